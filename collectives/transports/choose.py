"""Which transport a group uses, by one rule, and making it by name.

CUDA tensors                               c10d (NCCL)
CPU, one rank or every rank on one node    shm where there are two or more ranks, else c10d
CPU, several nodes, some with two or more  hierarchical: shm inside the nodes, c10d between them
CPU, several nodes with one rank each      c10d (Gloo)
mpi                                        only when asked for
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import TypeVar, cast

import torch.distributed as dist

from ..transport import Transport
from .c10d import C10dTransport
from .hierarchical import HierarchicalTransport
from .mpi import MpiJob
from .node import NodeIdentity, number_nodes
from .shm import ShmTransport

T = TypeVar("T")

TRANSPORTS = ("c10d", "shm", "mpi", "hierarchical")


@dataclass(frozen=True)
class TransportChoice:
    """A transport by name, and why this one."""

    name: str
    reason: str


def choose_transport(node_of_R: Sequence[int], *, on_cuda: bool) -> TransportChoice:
    """The rule of this file for ranks on the given nodes; see `nodes_of_group`."""
    num_ranks, num_nodes = len(node_of_R), len(set(node_of_R))
    if on_cuda:
        return TransportChoice("c10d", "the tensors are on CUDA devices, which NCCL connects")
    if num_ranks == 1:
        return TransportChoice("c10d", "one rank sends nothing")
    if num_nodes == 1:
        return TransportChoice("shm", f"all {num_ranks} ranks are on one node and can map each other's memory")
    if num_nodes < num_ranks:
        return TransportChoice("hierarchical", f"{num_ranks} ranks on {num_nodes} nodes: shm inside a node, c10d between nodes")
    return TransportChoice("c10d", f"{num_ranks} ranks, each on a node of its own")


def nodes_of_group(group: dist.ProcessGroup) -> list[int]:
    """The node of every rank, the same list on all. Where the kernel does not say, every rank is a node. Collective."""
    try:
        identity: object = NodeIdentity.of_this_process()
    except OSError:
        identity = dist.get_rank(group)
    return number_nodes(_gather(group, identity))


def make_transports(name: str, group: dist.ProcessGroup, *, num_transports: int, timeout_s: float) -> list[Transport]:
    """Transports over the ranks of `group`, matched apart from each other and from the group's own messages. Collective.

    Raises:
        ValueError: the transport does not work between these ranks; the same on all of them.
    """
    if name not in TRANSPORTS:
        raise ValueError(f"there is no transport {name!r}; choose one of {', '.join(TRANSPORTS)}")
    if name != "c10d" and dist.get_backend(group) == "nccl":
        raise ValueError(f"the transport {name} moves CPU tensors, the process group is NCCL's: choose c10d")
    rank, world_size = dist.get_rank(group), dist.get_world_size(group)
    times = range(num_transports)
    if name == "shm":
        return [_shm(group, range(world_size), timeout_s) for _ in times]
    if name == "mpi":
        job = _agreed(group, lambda: _mpi_job(world_size))
        return [job.transport(rank, world_size, timeout_s=timeout_s) for _ in times]
    ranks = dist.get_process_group_ranks(group)
    if name == "c10d":
        return [C10dTransport(new_group(ranks, timeout_s), timeout_s=timeout_s) for _ in times]
    node_of_R = nodes_of_group(group)
    return [_hierarchical(group, node_of_R, timeout_s) for _ in times]


def make_host_transport(group: dist.ProcessGroup, node_of_R: Sequence[int], *, timeout_s: float) -> Transport:
    """A transport of CPU tensors over the ranks of any group, NCCL's too, as the rule of this file chooses it. Collective."""
    name = choose_transport(node_of_R, on_cuda=False).name
    if name == "shm":
        return _shm(group, range(len(node_of_R)), timeout_s)
    if name == "hierarchical":
        return _hierarchical(group, node_of_R, timeout_s)
    return C10dTransport(new_group(dist.get_process_group_ranks(group), timeout_s, backend="gloo"), timeout_s=timeout_s)


def _hierarchical(group: dist.ProcessGroup, node_of_R: Sequence[int], timeout_s: float) -> HierarchicalTransport:
    rank = dist.get_rank(group)
    inside = _shm(group, [r for r, node in enumerate(node_of_R) if node == node_of_R[rank]], timeout_s)
    between = new_group(dist.get_process_group_ranks(group), timeout_s, backend="gloo")
    return HierarchicalTransport(inside, C10dTransport(between, timeout_s=timeout_s), node_of_R)


def new_group(ranks: list[int], timeout_s: float, *, backend: str | None = None) -> dist.ProcessGroup:
    """A process group of these ranks. The others take no part: they may be making theirs.

    Its own limit ends a collective that is no longer waited for, without which a process cannot end.
    """
    is_part = len(ranks) < dist.get_world_size()
    limit = timedelta(seconds=timeout_s)
    group = dist.new_group(ranks, timeout=limit, backend=backend, use_local_synchronization=is_part)
    assert group is not None
    return group


def _shm(group: dist.ProcessGroup, members: Sequence[int], timeout_s: float) -> ShmTransport:
    """Shared memory between some ranks of the group; all ranks of the group must make theirs together."""

    def gather(value: object) -> list[object]:
        values = _gather(group, value)
        return [values[member] for member in members]

    return ShmTransport(members.index(dist.get_rank(group)), len(members), gather, timeout_s=timeout_s, names_R=members)


def _mpi_job(world_size: int) -> MpiJob:
    job = MpiJob()
    job.check_world_size(world_size)
    return job


def _agreed(group: dist.ProcessGroup, action: Callable[[], T]) -> T:
    """The result of an action that worked on every rank; else the first rank's `ValueError` on all. Collective."""
    result, problem = None, ""
    try:
        result = action()
    except ValueError as error:
        problem = str(error)
    for text in _gather(group, problem):
        if text:
            raise ValueError(text)
    return cast(T, result)


def _gather(group: dist.ProcessGroup, value: T) -> list[T]:
    values: list[T] = [value] * dist.get_world_size(group)
    dist.all_gather_object(values, value, group=group)
    return values
