"""What `moesaic bench collectives` measures, and one rank of it: builds every variant, checks each, and times them in turn."""

from __future__ import annotations

import ctypes
import time
from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from ..collectives import (
    SCHEDULES,
    TRANSPORTS,
    RowLayout,
    RowPart,
    Schedule,
    Transport,
    all_to_all_rows,
    make_schedule,
    make_transports,
    sparse_all_gather,
    sparse_reduce_scatter,
)
from ..collectives.transports.mpi import MpiJob, MpiTransport
from ..placement import Placement, Topology
from .ranks import Rank
from .routed_tokens import ROUTES, crossing_bytes, exchange

OPS = ("all_to_all", "sparse_gather", "sparse_reduce")
TOKEN_OP = "token_rows"
# The baselines, under the key `transport`.
COPY, COPY_IN_STEP, MPI_OWN = "memory copy", "memory copy in step", "mpi4py"
# The least duration of a timed repetition: ranks leave a barrier up to a millisecond apart, which must not matter.
_PIECE_S = 0.02
_MOST_REPEATS = 1024
_TIMEOUT_S = 300.0


@dataclass(frozen=True, kw_only=True)
class CollectivesCase:
    """The variants and sizes of one run."""

    ops: tuple[str, ...]
    ranks: int
    nodes: int
    link_bits_per_s: float
    """Rate of each node's link, each direction; unused with one node."""
    sizes: tuple[int, ...]
    transports: tuple[str, ...]
    schedules: tuple[str, ...]
    rounds: int

    def __post_init__(self) -> None:
        for name, known in (("ops", (*OPS, TOKEN_OP)), ("transports", TRANSPORTS), ("schedules", SCHEDULES)):
            wrong = [value for value in getattr(self, name) if value not in known]
            if wrong:
                raise ValueError(f"--{name} has {wrong[0]!r}; choose from {', '.join(known)}")
        if self.ranks % self.nodes:
            raise ValueError(f"--ranks {self.ranks} does not divide over --nodes {self.nodes}; give a multiple")
        if any(size < 4 or size % 4 for size in self.sizes):
            raise ValueError(f"--sizes has {min(self.sizes)} bytes; tensors are fp32, so give multiples of 4")

    def received_bytes(self, op: str, size: int) -> int:
        """The bytes that the busiest rank must receive under any schedule; sums may be formed on the way."""
        if op == TOKEN_OP:
            return 2 * size * (self.ranks - 1)
        return size * (self.ranks - 1) if op == "all_to_all" else size

    def link_bytes(self, op: str, size: int) -> int:
        """The bytes that must cross the busiest link between nodes, in its busier direction."""
        inside = self.ranks // self.nodes
        if op == TOKEN_OP:
            return crossing_bytes(self.topology(), size)
        return size * inside * (self.ranks - inside) if op == "all_to_all" else size

    def topology(self) -> Topology:
        """The machine as described to a planner."""
        topology = Topology.preset("cpu", num_nodes=self.nodes, ranks_per_node=self.ranks // self.nodes)
        return topology if self.nodes == 1 else replace(topology, node_bytes_per_s=self.link_bits_per_s / 8)


@dataclass(frozen=True, eq=False)
class Buffers:
    """The buffers of one rank for one size, one line per peer to send to or to receive from; fp32 [R, size / 4] each."""

    outgoing: Tensor
    incoming: Tensor

    @classmethod
    def allocate(cls, transport: Transport, size: int) -> Buffers:
        """Buffers in the memory from which the transport sends most cheaply; for other transports they are ordinary tensors."""
        shape, like = (transport.world_size, size // 4), torch.empty(0)
        return cls(transport.empty(shape, like).fill_(1.0), transport.empty(shape, like).fill_(1.0))


def measure(case: CollectivesCase, this: Rank) -> dict[str, dict[str, list[float]]]:
    """Seconds of every variant in each round on this rank, by op and size."""
    with this.process_group(case.ranks, timeout_s=_TIMEOUT_S) as group:
        return _measure_all(case, group)


def _measure_all(case: CollectivesCase, group: dist.ProcessGroup) -> dict[str, dict[str, list[float]]]:
    transports = {name: make_transports(name, group, num_transports=1, timeout_s=_TIMEOUT_S)[0] for name in case.transports}
    measured = {}
    for size in case.sizes:
        buffers = Buffers.allocate(transports.get("shm") or next(iter(transports.values())), size)
        for op in case.ops:
            variants = _variants(op, case, transports, buffers)
            measured[f"{op} {size}"] = _measure(variants, case.rounds)
    return measured


def _variants(
    op: str, case: CollectivesCase, transports: dict[str, Transport], buffers: Buffers
) -> dict[str, Callable[[], None]]:
    """Every variant of one collective by name: transport/schedule, the memory copies, MPI's own."""
    rank = dist.get_rank()
    variants = {COPY: _copy(case.received_bytes(op, buffers.incoming[0].nbytes))}
    mpi = transports.get("mpi")
    if isinstance(mpi, MpiTransport) and op != TOKEN_OP:
        variants[MPI_OWN] = _mpi_own(op, mpi.job, buffers)
    if op == "all_to_all" and "shm" in transports:
        variants[COPY_IN_STEP] = _in_step(variants[COPY], transports["shm"])
    for name, transport in transports.items():
        if op == "all_to_all":
            variants[f"{name}/direct"] = _all_to_all(transport, buffers)
            continue
        if op == TOKEN_OP:
            x, y = buffers.outgoing[0], buffers.incoming[0]
            variants |= {f"{name}/{route}": exchange(transport, route, x, y, case.topology()) for route in ROUTES}
            continue
        placement = Placement.everywhere(np.zeros(1, np.int64), case.ranks)
        for schedule_name in case.schedules:
            schedule = make_schedule(schedule_name, placement, case.topology(), buffers.incoming[0].nbytes)
            make = _gather if op == "sparse_gather" else _reduce
            variants[f"{name}/{schedule_name}"] = make(transport, schedule, buffers)
    for name, variant in variants.items():
        if name not in (COPY, COPY_IN_STEP):
            _check(f"{op} by {name} on rank {rank}", op, variant, buffers)
    return variants


def _check(what: str, op: str, variant: Callable[[], None], buffers: Buffers) -> None:
    """Run once between poisoned buffers, and assert the values that the collective must give."""
    rank, world_size = dist.get_rank(), dist.get_world_size()
    for peer, (outgoing, incoming) in enumerate(zip(buffers.outgoing, buffers.incoming, strict=True)):
        outgoing.fill_(10.0 * rank + peer)
        incoming.fill_(torch.nan)
    if op == "sparse_reduce":
        buffers.incoming[0].fill_(0.5)
    variant()
    if op == "all_to_all":
        expected = {peer: 10.0 * peer + rank for peer in range(world_size) if peer != rank}
    elif op == TOKEN_OP:
        expected = {0: 10.0 * rank * world_size}
    elif op == "sparse_gather":
        expected = {0: 0.0} if rank else {}
    else:
        expected = {} if rank else {0: 0.5 + sum(10.0 * peer for peer in range(1, world_size))}
    for peer, value in expected.items():
        assert bool((buffers.incoming[peer] == value).all()), f"{what} gave {buffers.incoming[peer][:4]}, expected {value}"


def _all_to_all(transport: Transport, buffers: Buffers) -> Callable[[], None]:
    parts = [RowPart(peer, peer, 1) for peer in range(transport.world_size) if peer != transport.rank]
    layout = RowLayout(parts, parts)
    return lambda: all_to_all_rows(transport, layout, buffers.outgoing, buffers.incoming, op="all_to_all").wait()


def _gather(transport: Transport, schedule: Schedule, buffers: Buffers) -> Callable[[], None]:
    owned = {0: (buffers.outgoing[0],)} if transport.rank == 0 else {}
    copies = {} if transport.rank == 0 else {0: (buffers.incoming[0],)}
    return lambda: sparse_all_gather(schedule, transport, owned, copies, op="gather").wait()


def _reduce(transport: Transport, gather: Schedule, buffers: Buffers) -> Callable[[], None]:
    rank = transport.rank
    schedule = gather.transpose().limit_receives(2)
    contributions = {} if rank == 0 else {0: (buffers.outgoing[0],)}
    totals = {0: (buffers.incoming[0],)} if rank == 0 else {}
    # Staging uses the buffers of two other messages, as a reduce of experts uses their own slots.
    staging = [(buffers.outgoing[1],), (buffers.incoming[1],)]
    return lambda: sparse_reduce_scatter(schedule, transport, contributions, totals, staging, op="reduce").wait()


def _copy(num_bytes: int) -> Callable[[], None]:
    """The C library's copy between two buffers of this process."""
    source, target = torch.zeros(num_bytes, dtype=torch.uint8), torch.zeros(num_bytes, dtype=torch.uint8)

    def copy() -> None:
        ctypes.memmove(target.data_ptr(), source.data_ptr(), num_bytes)

    return copy


def _in_step(copy: Callable[[], None], transport: Transport) -> Callable[[], None]:
    """The copy, then an exchange of one number with every rank."""
    exchange = _all_to_all(transport, Buffers.allocate(transport, 4))

    def copy_in_step() -> None:
        copy()
        exchange()

    return copy_in_step


def _mpi_own(op: str, job: MpiJob, buffers: Buffers) -> Callable[[], None]:
    """Alltoallv, Bcast or Reduce of mpi4py on the same memory."""
    communicator, rank = job.mpi.COMM_WORLD, job.mpi.COMM_WORLD.Get_rank()
    outgoing, incoming = buffers.outgoing.numpy(), buffers.incoming.numpy()
    if op == "sparse_gather":
        item = incoming[0] if rank else outgoing[0]
        return lambda: communicator.Bcast(item)
    if op == "sparse_reduce":
        # The owner contributes its total, which MPI replaces by the sum.
        parts = (outgoing[0], None) if rank else (job.mpi.IN_PLACE, incoming[0])
        return lambda: communicator.Reduce(*parts)
    world_size, count = buffers.incoming.shape
    layout = ([0 if peer == rank else count for peer in range(world_size)], [peer * count for peer in range(world_size)])
    message = ([outgoing, layout, job.mpi.FLOAT], [incoming, layout, job.mpi.FLOAT])
    return lambda: communicator.Alltoallv(*message)


def _measure(variants: dict[str, Callable[[], None]], num_rounds: int) -> dict[str, list[float]]:
    """Seconds of each variant in every round, between barriers; each round begins with another variant."""
    seconds: dict[str, list[float]] = {name: [] for name in variants}
    repeats = {name: _repeats(variant) for name, variant in variants.items()}
    names = list(variants)
    for round_index in range(num_rounds):
        first = round_index % len(names)
        for name in names[first:] + names[:first]:
            seconds[name].append(_piece_s(variants[name], repeats[name]) / repeats[name])
    return seconds


def _piece_s(variant: Callable[[], None], repeats: int) -> float:
    dist.barrier()
    start_s = time.perf_counter()
    for _ in range(repeats):
        variant()
    return time.perf_counter() - start_s


def _repeats(variant: Callable[[], None]) -> int:
    """Repeats of a variant in a timed piece, the same on all ranks; finding the number also warms up the variant."""
    repeats = 1
    while repeats < _MOST_REPEATS:
        shortest_s = torch.tensor(_piece_s(variant, repeats), dtype=torch.float64)
        dist.all_reduce(shortest_s, op=dist.ReduceOp.MIN)
        if shortest_s.item() >= _PIECE_S:
            break
        repeats *= min(8, max(2, round(_PIECE_S / shortest_s.item())))
    return repeats
