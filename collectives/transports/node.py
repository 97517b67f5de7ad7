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


def number_nodes(identities_R: Sequence[object]) -> list[int]:
    """The node of every rank, numbered in the order in which ranks first name them.

    Example: identities a, b, a give nodes 0, 1, 0.
    """
    numbers: dict[object, int] = {}
    return [numbers.setdefault(identity, len(numbers)) for identity in identities_R]
