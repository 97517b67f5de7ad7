"""How token rows travel once it is known where they go: out to the ranks that compute them and home again, in one part or in two.

Two parts let the experts of one run while the other travels. A rank's part is a run of its experts in the order in which it
computes them (expert_order.py), so that every expert's matrix products stay whole, and with them the bits. A row goes out with
the first part that needs it, and comes home with the last that adds to it, so it crosses as often as in one part: once each way.
Between two ranks rows are ordered by both,

    those of the first part alone, those of both parts, those of the second part alone

which makes every part one piece there: two of the three kinds go out with the first part, two come home with the second.

Layouts: see dispatch.py. Where rows are returned, those of a part lie together, (part, source, token), as they are summed part by
part; everywhere else those of a rank.

Shape letters: as in dispatch.py, and H parts.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate
from typing import Generic, TypeVar, cast

import torch
from torch import Tensor

from ...collectives import Pending, RowLayout, RowPart, Transport, all_to_all_rows
from ...kernels import Bags, gather_rows, sum_rows
from .expert_order import Run

Arrived = TypeVar("Arrived")
Counts_HR = tuple[tuple[int, ...], ...]


class RowsInFlight(Generic[Arrived]):
    """Token rows on their way.

    Args:
        pending: waits for them; None if they are at home.
        sent: what was sent; it must live until then, and is only dropped afterwards. None if they are at home.
        take: makes of what arrived what it is wanted for; called once. Where rows are passed on, it communicates.
    """

    __slots__ = ("_arrived", "_pending", "_sent", "_take")

    def __init__(self, pending: Pending | None, sent: Tensor | None, take: Callable[[], Arrived]):
        self._pending = pending
        self._sent = sent
        self._take: Callable[[], Arrived] | None = take
        self._arrived: Arrived | None = None

    @property
    def has_arrived(self) -> bool:
        """Whether `wait` has returned."""
        return self._take is None

    def wait(self) -> Arrived:
        """Return what has arrived; a second time the same."""
        if self._take is not None:
            if self._pending is not None:
                self._pending.wait(until_sent=False)
            self._arrived = self._take()
            self._take = self._sent = None
        return cast(Arrived, self._arrived)


@dataclass(frozen=True, eq=False)
class RowsHome:
    """The buffers of rows that go home part by part; see `DispatchHandle.rows_home`."""

    rows_ND: Tensor
    outgoing_QD: Tensor  # one sum for every received row
    returned_PD: Tensor
    gates: GateGrads | None


@dataclass(frozen=True, eq=False)
class GateGrads:
    """One number per slot-major row [N] that goes home beside the rows, and the buffers for it."""

    grads_N: Tensor
    by_source: Tensor
    by_destination: Tensor


@dataclass(frozen=True, eq=False)
class ReturnedRows:
    """What came home: rows [T, D], and with a backward the gradients of the gate weights [T * K], in router order."""

    x_TD: Tensor
    gate_grads_A: Tensor | None


@dataclass(frozen=True, eq=False)
class DispatchHandle:
    """Where every row of one forward went. Combine and both backwards follow it; it carries no gradient."""

    rank: int
    num_tokens: int  # T
    top_k: int  # K
    sent_token_ids_P: Tensor  # token of every sent row
    sent_rows_HR: Counts_HR  # rows that go out to each rank with each part; none to this one
    home_rows_HR: Counts_HR  # the same rows by the part with which they come home
    sent_assignments_A: Tensor  # assignments by destination
    sent_assignments_HR: Counts_HR
    received_rows_HR: Counts_HR  # rows that come from each rank with each part; none from this one
    returned_rows_HR: Counts_HR  # the same rows by the part with which they are returned
    received_assignments_HR: Counts_HR  # also this rank's own, in both, though no part sends them
    slot_major_N: Tensor  # position "by source" of every slot-major row
    row_ids_N: Tensor  # what every slot-major row is a copy of: token t (t < T), or received row q (T + q)
    return_bags_H: tuple[Bags, ...]  # slot-major rows of every row that is returned with a part
    home_bags: Bags  # of every token: the slot-major rows computed here (n < N) and the sent rows that come back (N + p)
    row_weights_N: Tensor  # gate weight of every slot-major row, fp32
    experts: tuple[int, ...]  # that this rank computes, in the order of the groups
    group_sizes: tuple[int, ...]  # rows of each
    runs: tuple[Run, ...]  # of groups, in the order in which they are computed; one for every part, in order, and those at home

    @property
    def num_parts(self) -> int:
        """H."""
        return len(self.sent_rows_HR)

    @cached_property
    def rows_H(self) -> tuple[slice, ...]:
        """Slot-major rows of each part that travel, with those of the same experts that do not."""
        return tuple(run.rows for run in self.runs if run.part is not None)

    @property
    def num_sent(self) -> int:
        """P."""
        return sum(map(sum, self.sent_rows_HR))

    @property
    def num_received(self) -> int:
        """Q."""
        return sum(map(sum, self.received_rows_HR))

    @cached_property
    def out_layouts_H(self) -> tuple[RowLayout, ...]:
        """Sent rows to their destinations, received rows from their sources."""
        return layouts(rank_by_rank(self.sent_rows_HR), rank_by_rank(self.received_rows_HR))

    @cached_property
    def home_layouts_H(self) -> tuple[RowLayout, ...]:
        """Received rows, in the order in which they are returned, to their sources; sent rows from their destinations."""
        return layouts(part_by_part(self.returned_rows_HR), rank_by_rank(self.home_rows_HR))

    @cached_property
    def gate_layouts_H(self) -> tuple[RowLayout, ...]:
        """One number of each assignment "by source" to its source, where it belongs "by destination"."""
        received, sent = rank_by_rank(self.received_assignments_HR), rank_by_rank(self.sent_assignments_HR)
        return layouts(*([[p for p in parts if p.peer != self.rank] for parts in side] for side in (received, sent)))

    def send_rows(self, x_TD: Tensor, transport: Transport, op: str, where: str) -> list[RowsInFlight[Tensor]]:
        """Launch tokens [T, D] to the ranks that compute them, part after part.

        They arrive run by run, to be waited for in this order, as the slot-major rows [N, D] in which those of the runs waited
        for are set.
        """
        outgoing = transport.empty((self.num_sent, x_TD.shape[1]), x_TD)
        gather_rows(x_TD, self.sent_token_ids_P, out=outgoing)
        received_QD = x_TD.new_empty(self.num_received, x_TD.shape[1])
        rows_ND = x_TD.new_empty(self.row_ids_N.shape[0], x_TD.shape[1])

        def at_home(rows: slice) -> RowsInFlight[Tensor]:
            # Holds none of the buffers in which rows travel.
            def take() -> Tensor:
                gather_rows(x_TD, self.row_ids_N[rows], out=rows_ND[rows])
                return rows_ND

            return RowsInFlight(None, None, take)

        def launch(layout: RowLayout, rows: slice) -> RowsInFlight[Tensor]:
            def take() -> Tensor:
                gather_rows(x_TD, self.row_ids_N[rows], beside=received_QD, out=rows_ND[rows])
                return rows_ND

            return RowsInFlight(all_to_all_rows(transport, layout, outgoing, received_QD, op=op, where=where), outgoing, take)

        return [at_home(run.rows) if run.part is None else launch(self.out_layouts_H[run.part], run.rows) for run in self.runs]

    def rows_home(self, rows_ND: Tensor, transport: Transport, gate_grads_N: Tensor | None = None) -> RowsHome:
        """Buffers in which slot-major rows [N, D] go home, of which those of a part need to be set when it is returned.

        With `gate_grads_N`, one number per slot-major row travels along.
        """
        gates, dim = None, rows_ND.shape[1]
        if gate_grads_N is not None:
            by_destination = gate_grads_N.new_empty(self.sent_assignments_A.shape[0])
            gates = GateGrads(gate_grads_N, torch.empty_like(gate_grads_N), by_destination)
        outgoing_QD = transport.empty((self.num_received, dim), rows_ND)
        return RowsHome(rows_ND, outgoing_QD, rows_ND.new_empty(self.num_sent, dim), gates)

    def return_rows(self, part: int, home: RowsHome, transport: Transport, op: str, where: str) -> RowsInFlight[None]:
        """Launch the slot-major rows of a part back to their tokens' ranks, summed for each token here."""
        rows = slices([sum(counts_R) for counts_R in self.returned_rows_HR])[part]
        sum_rows(home.rows_ND, self.return_bags_H[part], out=home.outgoing_QD[rows])
        return self.take_home(part, home, transport, op, where)

    def take_home(self, part: int, home: RowsHome, transport: Transport, op: str, where: str) -> RowsInFlight[None]:
        """The last hop of `return_rows`: the sums of the received rows to their sources."""
        layout = self.home_layouts_H[part]
        pending = all_to_all_rows(transport, layout, home.outgoing_QD, home.returned_PD, op=op, where=where)
        gates = home.gates
        if gates is None:
            return RowsInFlight(pending, home.outgoing_QD, lambda: None)
        layout, rows = self.gate_layouts_H[part], self.rows_H[part]
        gates.by_source[self.slot_major_N[rows]] = gates.grads_N[rows]
        numbers = all_to_all_rows(transport, layout, gates.by_source, gates.by_destination, op=op, where=where)
        return RowsInFlight(pending, home.outgoing_QD, lambda: numbers.wait(until_sent=False))

    def add_up(self, home: RowsHome) -> ReturnedRows:
        """Each token's sum over the ranks [T, D], once every part is home."""
        x_TD = sum_rows(home.rows_ND, self.home_bags, beside=home.returned_PD)
        gates = home.gates
        if gates is None:
            return ReturnedRows(x_TD, None)
        assignments = self.received_assignments_HR, self.sent_assignments_HR
        own_from, own_to = (slices(per_rank(counts_HR))[self.rank] for counts_HR in assignments)
        for rows in (run.rows for run in self.runs if run.part is None):
            gates.by_source[self.slot_major_N[rows]] = gates.grads_N[rows]
        gates.by_destination[own_to] = gates.by_source[own_from]
        gate_grads_A = gates.grads_N.new_zeros(self.num_tokens * self.top_k)  # those of dropped assignments stay zero
        gate_grads_A[self.sent_assignments_A] = gates.by_destination
        return ReturnedRows(x_TD, gate_grads_A)


def starts(sizes: Sequence[int]) -> list[int]:
    """Where each of consecutive pieces of these sizes begins."""
    return list(accumulate(sizes, initial=0))[:-1]


def slices(sizes: Sequence[int]) -> list[slice]:
    """Consecutive pieces of these sizes."""
    return [slice(start, start + size) for start, size in zip(starts(sizes), sizes, strict=True)]


def per_rank(counts_HR: Counts_HR) -> list[int]:
    """Counts of all parts together, for each rank."""
    return [sum(counts_H) for counts_H in zip(*counts_HR, strict=True)]


def rank_by_rank(counts_HR: Counts_HR) -> list[list[RowPart]]:
    """Each part's rows for every rank, in a tensor where those of one rank lie together, part after part."""
    num_parts, sizes = len(counts_HR), [n for counts_H in zip(*counts_HR, strict=True) for n in counts_H]
    parts = [RowPart(i // num_parts, start, n) for i, (start, n) in enumerate(zip(starts(sizes), sizes, strict=True))]
    return [parts[h::num_parts] for h in range(num_parts)]


def part_by_part(counts_HR: Counts_HR) -> list[list[RowPart]]:
    """The same in a tensor where the rows of one part lie together, rank after rank."""
    first_HR = iter(starts([n for counts_R in counts_HR for n in counts_R]))
    return [[RowPart(r, next(first_HR), n) for r, n in enumerate(counts_R)] for counts_R in counts_HR]


def layouts(sent: Sequence[Sequence[RowPart]], received: Sequence[Sequence[RowPart]]) -> tuple[RowLayout, ...]:
    """One layout for each part."""
    return tuple(RowLayout(*sides) for sides in zip(sent, received, strict=True))
