"""A small cluster on one machine: nodes are network namespaces, joined by links of a given rate.

    node 0 [eth0] -- tbf --> bridge <-- tbf -- [eth0] node 1 ...

Each node is a network namespace with one veth pair to a bridge in a namespace of its own. Token bucket filters (tc-tbf)
limit the rate out of and into each node. Processes of one node communicate over its own stack, unlimited. Linux only;
requires iproute2, util-linux, and root or unprivileged user namespaces. Namespaces end with the process that made them.
"""

from __future__ import annotations

import ctypes
import json
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass

from ..collectives.lifetime import first_failure, start

INTERFACE = "eth0"
# One thread per rank; freed activations stay with the process, since page faults would cost more than the differences measured.
RANK_ENVIRONMENT = {"OMP_NUM_THREADS": "1", "MALLOC_MMAP_THRESHOLD_": str(1 << 30), "MALLOC_TRIM_THRESHOLD_": str(1 << 34)}
# Frames of 9000 bytes: headers take under 1 % of the rate, and the filters handle few packets.
_MTU = 9000
# Bytes that a link may send at once after a pause: more than a frame, and few beside any timed message.
_BURST_BYTES = 32 * 1024
# Room for all bytes that TCP keeps in flight: like fabrics with flow control, the links lose nothing.
_QUEUE_BYTES = 16 * 1024 * 1024


@dataclass(frozen=True)
class Node:
    """One node, as a value that can be passed to a new process."""

    index: int
    holder_pid: int
    is_rootless: bool
    """Whether its namespaces belong to a user namespace that must be entered first."""

    @property
    def address(self) -> str:
        """IPv4 address on the shared network."""
        return f"10.77.0.{self.index + 1}"

    @property
    def prefix(self) -> list[str]:
        """The start of a command line that runs the rest on this node."""
        user = ["--user", "--preserve-credentials"] if self.is_rootless else []
        return ["nsenter", "--target", str(self.holder_pid), *user, "--net"]

    @property
    def environment(self) -> dict[str, str]:
        """Variables that make Gloo, NCCL and Open MPI use the node's link."""
        return {
            "GLOO_SOCKET_IFNAME": INTERFACE,
            "NCCL_SOCKET_IFNAME": INTERFACE,
            "OMPI_MCA_btl_tcp_if_include": INTERFACE,
        }

    def enter(self) -> None:
        """Move the calling process, which must have one thread only, to this node, and set `environment`."""
        libc = ctypes.CDLL(None, use_errno=True)
        for kind in ("user", "net") if self.is_rootless else ("net",):
            with open(f"/proc/{self.holder_pid}/ns/{kind}", "rb") as namespace:
                if libc.setns(namespace.fileno(), 0):
                    raise OSError(ctypes.get_errno(), f"cannot enter the {kind} namespace of node {self.index}")
        os.environ |= self.environment


class Network:
    """Namespaces and links; a context manager.

    Args:
        num_nodes: nodes, up to 250.
        bits_per_s: rate of every node's link, each direction.

    Raises:
        OSError: this machine does not support it; the message holds the failed command and its error.
    """

    def __init__(self, num_nodes: int, *, bits_per_s: float):
        self.bits_per_s = bits_per_s
        self._is_rootless = os.geteuid() != 0
        self._holders: list[subprocess.Popen[str]] = []
        try:
            # Phase 1: a namespace for the bridge, one for every node
            self.bridge = Node(
                -1,
                self._hold(["unshare", *(["--user", "--map-root-user"] if self._is_rootless else []), "--net"]),
                self._is_rootless,
            )
            inside = (
                ["nsenter", "--target", str(self.bridge.holder_pid), "--user", "--preserve-credentials"]
                if self._is_rootless
                else []
            )
            self.nodes = [Node(i, self._hold([*inside, "unshare", "--net"]), self._is_rootless) for i in range(num_nodes)]
            # Phase 2: links
            links = ["link add br0 type bridge", "link set br0 up"]
            for node in self.nodes:
                links += [
                    f"link add port{node.index} mtu {_MTU} type veth peer name {INTERFACE} mtu {_MTU} netns {node.holder_pid}",
                    f"link set port{node.index} master br0 up",
                ]
            self._in_bridge(["ip", "-batch", "-"], "\n".join(links))
            for node in self.nodes:
                lines = ["link set lo up", f"addr add {node.address}/24 dev {INTERFACE}", f"link set {INTERFACE} up"]
                _run([*node.prefix, "ip", "-batch", "-"], "\n".join(lines))
                # reno, which reacts to loss, fills a link without loss; bbr, which paces, takes seconds to find the rate.
                _run([*node.prefix, "sh", "-c", "echo reno > /proc/sys/net/ipv4/tcp_congestion_control"])
            # Phase 3: rates
            limits = f"tbf rate {round(bits_per_s)}bit burst {_BURST_BYTES}b limit {_QUEUE_BYTES}b"
            for node in self.nodes:
                self._in_bridge(["tc", "qdisc", "add", "dev", f"port{node.index}", "root", *limits.split()])
                _run([*node.prefix, "tc", "qdisc", "add", "dev", INTERFACE, "root", *limits.split()])
        except BaseException:
            self.close()
            raise

    def cut(self, node: int) -> None:
        """Take a node's link down: packets in flight are lost, and no process is notified."""
        self._in_bridge(["ip", "link", "set", f"port{node}", "down"])

    def restore(self, node: int) -> None:
        """Bring a link that was cut up again."""
        self._in_bridge(["ip", "link", "set", f"port{node}", "up"])

    def sent_bytes(self, node: int) -> int:
        """Bytes, headers included, that a node has sent over its link so far."""
        links = json.loads(_run([*self.nodes[node].prefix, "ip", "-json", "-stats", "link", "show", INTERFACE]))
        return int(links[0]["stats64"]["tx"]["bytes"])

    def close(self) -> None:
        """Remove everything. Processes on the nodes keep their namespace until they end."""
        for holder in reversed(self._holders):
            assert holder.stdin is not None and holder.stdout is not None
            holder.stdin.close()
            holder.wait()
            holder.stdout.close()
        self._holders = []

    def __enter__(self) -> Network:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def _hold(self, command: Sequence[str]) -> int:
        """Start a process that holds a new namespace while its standard input, a pipe from here, is open; return its id.

        However this process ends, the kernel closes the pipe, `cat` ends, and the namespace and its links go with it.
        """
        try:
            holder = subprocess.Popen(
                [*command, "cat"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
            )
        except FileNotFoundError as error:
            raise OSError(f"{command[0]} is not installed") from error
        assert holder.stdin is not None and holder.stdout is not None and holder.stderr is not None
        self._holders.append(holder)
        # `cat` repeats the line once the namespace exists.
        try:
            holder.stdin.write("ready\n")
            holder.stdin.flush()
            is_ready = holder.stdout.readline() == "ready\n"
        except BrokenPipeError:
            is_ready = False
        if not is_ready:
            raise OSError(f"{' '.join(command)}: {holder.stderr.read().strip()}")
        holder.stderr.close()
        return holder.pid

    def _in_bridge(self, command: Sequence[str], text: str = "") -> None:
        _run([*self.bridge.prefix, *command], text)


def linked_nodes(stack: ExitStack, num_nodes: int, bits_per_s: float) -> list[Node]:
    """Nodes that exist until the stack is closed; none for a single node, which has no network.

    Raises:
        ValueError: this machine does not support such nodes.
    """
    if num_nodes == 1:
        return []
    try:
        return stack.enter_context(Network(num_nodes, bits_per_s=bits_per_s)).nodes
    except OSError as error:
        raise ValueError(f"--nodes {num_nodes} needs network namespaces: {' '.join(str(error).split())}") from None


def run_on_nodes(
    command: Sequence[str], num_ranks: int, num_nodes: int, bits_per_s: float, environment: Mapping[str, str]
) -> None:
    """Run a command once per rank, with RANK and WORLD_SIZE set; ranks fill the nodes in order. A single node has no network.

    The first failed rank ends the others; so does the end of this process.

    Raises:
        ValueError: this machine does not support such nodes.
        RuntimeError: a rank failed.
    """
    with ExitStack() as stack:
        nodes = linked_nodes(stack, num_nodes, bits_per_s)
        processes = []
        for rank in range(num_ranks):
            env = {**os.environ, **environment, "RANK": str(rank), "WORLD_SIZE": str(num_ranks)}
            node = nodes[rank * num_nodes // num_ranks] if nodes else None
            prefix = node.prefix if node else []
            processes.append(start([*prefix, *command], env=env | (node.environment if node else {})))
        wait_for(processes)


def wait_for(processes: Sequence[subprocess.Popen[bytes]]) -> None:
    """Wait for all processes; the first that fails ends the others."""
    try:
        if status := first_failure([process.poll for process in processes]):
            raise RuntimeError(f"a rank of the benchmark ended with {status}")
    finally:
        for process in processes:
            process.kill()
            process.wait()


def why_not() -> str:
    """The reason why this machine cannot make a `Network`, in one line; empty if it can."""
    if sys.platform != "linux":
        return "network namespaces need Linux"
    try:
        with Network(1, bits_per_s=1e9):
            return ""
    except OSError as error:
        return " ".join(str(error).split())


def _run(command: Sequence[str], text: str = "") -> str:
    try:
        done = subprocess.run(command, input=text, capture_output=True, text=True, check=False)
    except FileNotFoundError as error:
        raise OSError(f"{command[0]} is not installed") from error
    if done.returncode:
        raise OSError(f"{' '.join(command)}: {(done.stderr or done.stdout).strip()}")
    return done.stdout
