"""Which ranks share a node: found from what the kernel says of each process, not from host names, which containers copy."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class NodeIdentity:
    """What the processes of one node share: a running kernel, process numbers, a network and a user.

    Containers of one machine are therefore nodes of their own, as are the network namespaces of an emulated cluster.
    """

    boot_id: str
    pid_namespace: int
    net_namespace: int
    user: int

    @classmethod
    def of_this_process(cls) -> NodeIdentity:
        """Read from /proc. Raises `OSError` on systems other than Linux."""
        boot_id = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
        return cls(boot_id, os.stat("/proc/self/ns/pid").st_ino, os.stat("/proc/self/ns/net").st_ino, os.geteuid())


def cache_bytes() -> int:
    """What the last-level caches of the cores that this process may use hold together; no end where Linux does not say."""
    caches: dict[str, int] = {}
    for core in os.sched_getaffinity(0):
        levels = Path(f"/sys/devices/system/cpu/cpu{core}/cache").glob("index*/level")
        try:
            last = max(levels, key=lambda level: int(level.read_text())).parent
            size = (last / "size").read_text().strip()
            caches[(last / "shared_cpu_list").read_text()] = int(size[:-1]) << {"K": 10, "M": 20}[size[-1]]
        except (OSError, ValueError, KeyError):  # some machines list caches without their sizes
            return 1 << 62
    return sum(caches.values())


def number_nodes(identities_R: Sequence[object]) -> list[int]:
    """The node of every rank, numbered in the order in which ranks first name them.

    Example: identities a, b, a give nodes 0, 1, 0.
    """
    numbers: dict[object, int] = {}
    return [numbers.setdefault(identity, len(numbers)) for identity in identities_R]
