"""The cluster on one machine: what links carry and how fast, what a cut does, and that nothing is left behind."""

import os
import subprocess
from datetime import timedelta

import pytest
import torch
import torch.distributed as dist

from moesaic.benchmarks.network import INTERFACE, Network, why_not
from tests.helpers.cluster import Cluster, skip_without_network

BITS_PER_S = 200e6
NUM_BYTES = 5_000_000


def carry(rank: int, src: int, dst: int) -> None:
    """NUM_BYTES from one rank to another."""
    payload = torch.zeros(NUM_BYTES, dtype=torch.uint8)
    if rank == src:
        dist.send(payload, dst)
    elif rank == dst:
        dist.recv(payload, src)


def network_of(rank: int) -> tuple[int, str]:
    return os.stat("/proc/self/ns/net").st_ino, os.environ["LOCAL_RANK"]


def wait_for_a_cut_peer(rank: int) -> str:
    """Rank 1 waits for rank 0, whose link is down, with a limit."""
    if rank != 1:
        return ""
    work = dist.irecv(torch.zeros(1), 0)
    assert work is not None
    with pytest.raises(RuntimeError) as failed:
        work.wait(timedelta(seconds=0.5))
    return str(failed.value)


def test_links_between_nodes_none_inside() -> None:
    """Two nodes of two ranks: what goes to the other node crosses one limited link, what stays inside crosses none."""
    with Cluster(2, 2, bits_per_s=BITS_PER_S) as cluster:
        homes = cluster.run(network_of)
        assert homes[0][0] == homes[1][0] != homes[2][0] == homes[3][0]
        assert [local_rank for _, local_rank in homes] == ["0", "1", "0", "1"]
        network = cluster.network
        for node in network.nodes:
            for prefix, device in ((node.prefix, INTERFACE), (network.bridge.prefix, f"port{node.index}")):
                command = [*prefix, "tc", "qdisc", "show", "dev", device]
                assert "tbf" in (limit := subprocess.run(command, capture_output=True, text=True, check=True).stdout)
                assert "rate 200Mbit" in limit
        before = network.sent_bytes(0)
        cluster.run(carry, 0, 1)
        inside = network.sent_bytes(0) - before
        cluster.run(carry, 0, 2)
        across = network.sent_bytes(0) - before - inside
        assert inside < 0.01 * NUM_BYTES
        assert NUM_BYTES < across < 1.02 * NUM_BYTES
        network.cut(0)
        assert "imed out" in cluster.run(wait_for_a_cut_peer)[1]


def test_nothing_is_left_behind() -> None:
    """Closing the network, or the end of the process that made it, ends every namespace."""
    skip_without_network()
    with Network(2, bits_per_s=1e9) as network:
        holders = [node.holder_pid for node in network.nodes]
        assert all(os.path.exists(f"/proc/{pid}") for pid in holders)
        done = subprocess.run([*network.nodes[1].prefix, "ip", "-brief", "address"], capture_output=True, text=True, check=True)
        assert network.nodes[1].address in done.stdout
    assert not any(os.path.exists(f"/proc/{pid}") for pid in holders)


def test_what_is_missing_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without the tools the reason names the first one that is not there."""
    monkeypatch.setenv("PATH", "/nowhere")
    assert why_not() == "unshare is not installed"
