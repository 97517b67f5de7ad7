"""Where token rows go: to the ranks that compute them, and back.

A row crosses to a rank once, however many of its experts are computed there, and comes back once, already summed over
them with its gate weights. Combine is the transpose of dispatch, so each one's backward is the other's forward, and the
gate gradients travel with the rows of dispatch's backward.

What a rank computes of its own tokens never becomes a message: those rows are read from and added to the tokens' own tensors.
Here rows go straight to their destinations; dispatch_by_node.py is the form for nodes of several ranks.

Layouts, on the source rank:
    assignment a = t * K + k                      as the router made them
    "by destination": (destination, expert, token)  the order in which assignments are described to their destinations
    sent rows: (destination, token)               one for each other destination of each token
and on the destination rank:
    received rows: (source, token)                from other ranks
    "by source": (source, expert, token)          the order in which descriptions arrive
    "slot-major": (expert, source, token)         the order of the expert stage: one contiguous group per local expert

Ids are those of `Capacity.kept_ids`: E stands for an assignment that is dropped, which nothing below describes or sends.

Shape letters: T tokens, K choices, D model dim, E experts, R ranks, A assignments of this rank (up to T * K), P sent rows,
Q received rows, N slot-major rows (assignments computed here).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate
from typing import Generic, TypeVar, cast

import numpy as np
import torch
from torch import Tensor

from ..collectives import Pending, RowLayout, RowPart, Transport, all_to_all_rows
from ..kernels import Bags, bags_of, gather_rows, on_device, split_tokens, sum_rows
from ..placement import Split

Arrived = TypeVar("Arrived")


class RowsInFlight(Generic[Arrived]):
    """Token rows on their way.

    Args:
        pending: waits for them.
        sent: what was sent; it must live until then, and is only dropped afterwards.
        take: makes of what arrived what it is wanted for; called once. Where rows are passed on, it communicates.
    """

    __slots__ = ("_arrived", "_pending", "_sent", "_take")

    def __init__(self, pending: Pending, sent: Tensor, take: Callable[[], Arrived]):
        self._pending = pending
        self._sent: Tensor | None = sent
        self._take: Callable[[], Arrived] | None = take
        self._arrived: Arrived | None = None

    def wait(self) -> Arrived:
        """Return what has arrived; a second time the same."""
        if self._take is not None:
            self._pending.wait(until_sent=False)
            self._arrived = self._take()
            self._take = self._sent = None
        return cast(Arrived, self._arrived)


@dataclass(frozen=True, eq=False)
class DispatchHandle:
    """Where every row of one forward went. Combine and both backwards follow it; it carries no gradient."""

    num_tokens: int  # T
    top_k: int  # K
    sent_token_ids_P: Tensor  # token of every sent row
    sent_rows_R: tuple[int, ...]  # rows sent to each rank; none to this one
    sent_assignments_A: Tensor  # assignments by destination
    sent_assignments_R: tuple[int, ...]
    received_rows_R: tuple[int, ...]  # rows received from each rank; none from this one
    received_assignments_R: tuple[int, ...]
    slot_major_N: Tensor  # position "by source" of every slot-major row
    row_ids_N: Tensor  # what every slot-major row is a copy of: token t (t < T), or received row q (T + q)
    return_bags: Bags  # slot-major rows of every received row
    home_bags: Bags  # of every token: the slot-major rows computed here (n < N) and the sent rows that come back (N + p)
    row_weights_N: Tensor  # gate weight of every slot-major row, fp32
    group_sizes: tuple[int, ...]  # rows of each local expert

    @cached_property
    def row_layout(self) -> RowLayout:
        """Sent rows to their destinations, received rows from their sources."""
        return RowLayout.consecutive(self.sent_rows_R, self.received_rows_R)

    def send_rows(self, x_TD: Tensor, transport: Transport, op: str, where: str) -> RowsInFlight[Tensor]:
        """Launch tokens to the ranks that compute them: [T, D] on the source to slot-major rows [N, D] on the destination."""
        outgoing = transport.empty((sum(self.sent_rows_R), x_TD.shape[1]), x_TD)
        gather_rows(x_TD, self.sent_token_ids_P, out=outgoing)
        received_QD = x_TD.new_empty(sum(self.received_rows_R), x_TD.shape[1])
        pending = all_to_all_rows(transport, self.row_layout, outgoing, received_QD, op=op, where=where)
        return RowsInFlight(pending, outgoing, lambda: gather_rows(x_TD, self.row_ids_N, beside=received_QD))

    def return_rows(
        self, rows_ND: Tensor, transport: Transport, op: str, where: str, gate_grads_N: Tensor | None = None
    ) -> RowsInFlight[ReturnedRows]:
        """Launch slot-major rows back to their tokens: summed for each token here, then over the ranks there, [N, D] to [T, D].

        With `gate_grads_N`, one number per slot-major row travels along.
        """
        outgoing = transport.empty((sum(self.received_rows_R), rows_ND.shape[1]), rows_ND)
        sum_rows(rows_ND, self.return_bags, out=outgoing)
        return self.take_home(rows_ND, outgoing, transport, op, where, gate_grads_N)

    def take_home(
        self, rows_ND: Tensor, outgoing: Tensor, transport: Transport, op: str, where: str, gate_grads_N: Tensor | None
    ) -> RowsInFlight[ReturnedRows]:
        """The last hop of `return_rows`: `outgoing` [Q, D], one sum for every received row, to the sources, added up there."""
        returned_PD = rows_ND.new_empty(sum(self.sent_rows_R), rows_ND.shape[1])
        pending = all_to_all_rows(transport, self.row_layout.transpose, outgoing, returned_PD, op=op, where=where)
        gate_grads = None if gate_grads_N is None else self._take_gate_grads_home(gate_grads_N, transport, op, where)

        def take() -> ReturnedRows:
            gate_grads_A = None if gate_grads is None else gate_grads.wait()
            return ReturnedRows(sum_rows(rows_ND, self.home_bags, beside=returned_PD), gate_grads_A)

        return RowsInFlight(pending, outgoing, take)

    def _take_gate_grads_home(self, gate_grads_N: Tensor, transport: Transport, op: str, where: str) -> RowsInFlight[Tensor]:
        """One number for every slot-major row [N] to the assignments [A] of its source, in router order."""
        rank = transport.rank
        by_source = torch.empty_like(gate_grads_N)
        by_source[self.slot_major_N] = gate_grads_N
        by_destination = gate_grads_N.new_empty(sum(self.sent_assignments_R))
        out_R, in_R = slices(self.received_assignments_R), slices(self.sent_assignments_R)
        layout = RowLayout(parts_for_others(rank, out_R), parts_for_others(rank, in_R))
        pending = all_to_all_rows(transport, layout, by_source, by_destination, op=op, where=where)
        by_destination[in_R[rank]] = by_source[out_R[rank]]

        def take() -> Tensor:
            gate_grads_A = gate_grads_N.new_zeros(self.num_tokens * self.top_k)  # those of dropped assignments stay zero
            gate_grads_A[self.sent_assignments_A] = by_destination
            return gate_grads_A

        return RowsInFlight(pending, by_source, take)


@dataclass(frozen=True, eq=False)
class ReturnedRows:
    """What came home: rows [T, D], and with a backward the gradients of the gate weights [T * K], in router order."""

    x_TD: Tensor
    gate_grads_A: Tensor | None


@dataclass(frozen=True, eq=False)
class Assignments:
    """This rank's assignments by destination."""

    ids_A: Tensor  # assignment t * K + k
    tokens_A: Tensor  # its token t
    destinations_A: Tensor  # the rank that computes it
    counts_R: tuple[int, ...]  # for each rank

    @classmethod
    def of(cls, topk_ids_TK: Tensor, split: Split, rank: int) -> Assignments:
        """Which assignment goes where.

        Expert by expert, tokens fill the destinations in rank order; those that must go to a destination anyway, for an
        expert held only there, come where that destination's turn is, to share one row. An expert with one holder gets its
        tokens in their own order, whoever holds it, so that its gradient has the same bits wherever it lives.
        """
        device, sends_ER = topk_ids_TK.device, split.sends(rank)
        is_shared_E = np.append(split.placement.num_replicas_E > 1, False)
        anchors_TK = None
        if is_shared_E.any():
            anchors_TK = anchor_ranks(topk_ids_TK, split, rank) * on_device(is_shared_E, device)[topk_ids_TK]
        ids_A = split_tokens(topk_ids_TK, on_device(sends_ER, device), anchors_TK, num_sent=int(sends_ER.sum()))
        counts_R = tuple(int(n) for n in sends_ER.sum(axis=0))
        destinations_A = torch.repeat_interleave(on_device(counts_R, device), output_size=ids_A.numel())
        return cls(ids_A, ids_A // topk_ids_TK.shape[1], destinations_A, counts_R)


def build_handle(
    topk_ids_TK: Tensor, weights_TK: Tensor, split: Split, local_experts: Sequence[int], transport: Transport, op: str, where: str
) -> DispatchHandle:
    """Describe this rank's assignments to their destinations, and learn what comes here.

    Both sides know from the split how many assignments travel between them; how many *rows* those share is part of the
    description, so no sizes are exchanged beforehand.
    """
    rank, device = transport.rank, topk_ids_TK.device
    num_tokens, top_k = topk_ids_TK.shape
    recvs_RE = split.recvs(rank)

    # Phase 1: which assignment goes where.
    assigned = Assignments.of(topk_ids_TK, split, rank)
    tokens_A, destinations_A, assignments_R = assigned.tokens_A, assigned.destinations_A, assigned.counts_R

    # Phase 2: one row for each (other destination, token), numbered in that order.
    keys_A = destinations_A * num_tokens + tokens_A
    is_sent_RT = torch.zeros(transport.world_size, num_tokens, dtype=torch.bool, device=device)
    is_sent_RT.view(-1)[keys_A] = True
    is_sent_RT[rank] = False
    row_number_RT = is_sent_RT.view(-1).cumsum(0).view_as(is_sent_RT) - 1
    num_sent_R = is_sent_RT.sum(1)

    # Phase 3: tell each destination, for its assignments in order, the row (from 0 for this pair of ranks) and the weight.
    first_row_R = num_sent_R.cumsum(0) - num_sent_R
    local_row_A = (row_number_RT.view(-1)[keys_A] - first_row_R[destinations_A]).to(torch.int32)
    weights_A = weights_TK.detach().float().flatten()[assigned.ids_A]
    to_R, headers_R = slices(assignments_R), num_sent_R.to(torch.int32)
    sent = [_describe(headers_R[r : r + 1], local_row_A[part], weights_A[part]) for r, part in enumerate(to_R)]
    received_assignments_R = tuple(int(n) for n in recvs_RE.sum(axis=1))
    own_tokens = tokens_A[to_R[rank]]
    own_message = _describe(headers_R[rank : rank + 1], own_tokens.to(torch.int32), weights_A[to_R[rank]])
    sizes_R = [1 + 2 * n if n else 0 for n in received_assignments_R]
    received = exchange_messages(transport, sent, own_message, sizes_R, op, where)

    # Phase 4: rows get numbers through own tokens and all sources; slot-major order regroups them by local expert.
    # Here, and nowhere else, the host waits for the device: it learns how many rows leave and how many came.
    counts = iter(torch.cat([headers_R, *(message[:1] for message in received)]).tolist())
    sent_rows_R = tuple(next(counts) for _ in assignments_R)
    received_rows_R = tuple(next(counts) if message.numel() else 0 for message in received)
    sent_token_ids_P = _numbered(is_sent_RT, row_number_RT, sum(sent_rows_R))
    first_id_R = [0 if r == rank else num_tokens + start for r, start in enumerate(starts(received_rows_R))]
    bodies = [message[1:].view(2, -1) for message in received]
    ids_by_source = torch.cat([body[0] + first for body, first in zip(bodies, first_id_R, strict=True)]).long()
    weights_by_source = torch.cat([body[1] for body in bodies]).view(torch.float32)
    slot_major_N = segment_transpose(recvs_RE, device)
    positions_by_source = torch.empty_like(slot_major_N)
    positions_by_source[slot_major_N] = torch.arange(slot_major_N.numel(), device=device)

    # Phase 5: the way back.
    own = slices(received_assignments_R)[rank]
    return DispatchHandle(
        num_tokens=num_tokens,
        top_k=top_k,
        sent_token_ids_P=sent_token_ids_P,
        sent_rows_R=sent_rows_R,
        sent_assignments_A=assigned.ids_A,
        sent_assignments_R=assignments_R,
        received_rows_R=received_rows_R,
        received_assignments_R=received_assignments_R,
        slot_major_N=slot_major_N,
        row_ids_N=ids_by_source[slot_major_N],
        return_bags=bags_at(without(ids_by_source, own) - num_tokens, without(positions_by_source, own), sum(received_rows_R)),
        home_bags=home_bags(rank, sent_rows_R, sent_token_ids_P, own_tokens, positions_by_source, own, num_tokens),
        row_weights_N=weights_by_source[slot_major_N],
        group_sizes=tuple(int(n) for n in recvs_RE.sum(axis=0)[list(local_experts)]),
    )


def anchor_ranks(topk_ids_TK: Tensor, split: Split, rank: int) -> Tensor:
    """A rank that each token's row goes to whatever the split says, int64 [T, 1]; `rank` itself where there is none.

    That is the highest remote rank that is the only holder of one of the token's experts.
    """
    placement = split.placement
    is_bound_E = (placement.num_replicas_E == 1) & (placement.expert_to_owner_E != rank)
    anchor_E = on_device(np.append(np.where(is_bound_E, placement.expert_to_owner_E, -1), -1), topk_ids_TK.device)
    if not topk_ids_TK.numel():
        return topk_ids_TK[:, :1]
    anchors_TK = anchor_E[topk_ids_TK].amax(dim=1, keepdim=True)
    return torch.where(anchors_TK < 0, rank, anchors_TK)


def segment_transpose(counts_AB: np.ndarray, device: torch.device) -> Tensor:
    """Regroup consecutive segments: the gather index from (a, b) order to (b, a) order, int64.

    Example: counts [[1, 2], [0, 1]] lay four elements out as segments (a0,b0) = 0, (a0,b1) = 1 2, (a1,b1) = 3; b-major that
    is b0: 0, then b1: 1 2 3, so the result is [0, 1, 2, 3]. With counts [[1, 1], [1, 0]] it is [0, 2, 1].
    """
    sizes = counts_AB.ravel()
    starts_BA = (np.cumsum(sizes) - sizes).reshape(counts_AB.shape).T.ravel()
    sizes_BA = counts_AB.T.ravel()
    shifts_BA = starts_BA - (np.cumsum(sizes_BA) - sizes_BA)
    total = int(sizes.sum())
    shifts = torch.repeat_interleave(on_device(shifts_BA, device), on_device(sizes_BA, device), output_size=total)
    return shifts + torch.arange(total, device=device)


def home_bags(
    rank: int,
    sent_rows_R: Sequence[int],
    sent_token_ids_P: Tensor,
    own_tokens: Tensor,
    positions_by_source: Tensor,
    own: slice,
    num_tokens: int,
) -> Bags:
    """What every token adds up, in the order of the ranks: rows computed here (n < N) and sent rows that come back (N + p)."""
    num_slot_major, num_before = positions_by_source.numel(), sum(sent_rows_R[:rank])
    returned_P = torch.arange(num_slot_major, num_slot_major + sum(sent_rows_R), device=positions_by_source.device)
    return bags_at(
        torch.cat([sent_token_ids_P[:num_before], own_tokens, sent_token_ids_P[num_before:]]),
        torch.cat([returned_P[:num_before], positions_by_source[own], returned_P[num_before:]]),
        num_tokens,
    )


def _describe(num_rows: Tensor, row_of_assignment: Tensor, weights: Tensor) -> Tensor:
    """One int32 message: the number of rows, then each assignment's row, then each weight's bits. Empty if there is none."""
    if not weights.numel():
        return row_of_assignment.new_empty(0)
    return torch.cat([num_rows, row_of_assignment, weights.view(torch.int32)])


def _numbered(is_sent_RT: Tensor, row_number_RT: Tensor, num_rows: int) -> Tensor:
    """The token of every sent row, in the order of their numbers; `nonzero`, but for one whose size the host knows."""
    tokens_RT = torch.arange(is_sent_RT.shape[1], device=is_sent_RT.device).expand_as(is_sent_RT)
    # Rows that aren't sent go to a place behind the end.
    places_RT = torch.where(is_sent_RT, row_number_RT, num_rows)
    return tokens_RT.new_empty(num_rows + 1).scatter_(0, places_RT.view(-1), tokens_RT.reshape(-1))[:num_rows]


def starts(sizes: Sequence[int]) -> list[int]:
    """Where each of consecutive pieces of these sizes begins."""
    return list(accumulate(sizes, initial=0))[:-1]


def slices(sizes: Sequence[int]) -> list[slice]:
    """Consecutive pieces of these sizes."""
    return [slice(start, start + size) for start, size in zip(starts(sizes), sizes, strict=True)]


def parts_for_others(rank: int, slices_R: Sequence[slice]) -> list[RowPart]:
    """Slices of a tensor for each rank, without that of `rank` itself."""
    return [RowPart(r, part.start, part.stop - part.start) for r, part in enumerate(slices_R) if r != rank]


def exchange_messages(
    transport: Transport, messages_R: list[Tensor], own: Tensor, sizes_R: Sequence[int], op: str, where: str
) -> list[Tensor]:
    """A 1-D message to each other rank, and the messages of `sizes_R` that come from them; `own` stands for this rank's."""
    rank = transport.rank
    sent_R = [0 if r == rank else message.numel() for r, message in enumerate(messages_R)]
    received_R = [0 if r == rank else size for r, size in enumerate(sizes_R)]
    outgoing = transport.empty((sum(sent_R),), own)
    torch.cat([message for r, message in enumerate(messages_R) if r != rank] or [own[:0]], out=outgoing)
    incoming = own.new_empty(sum(received_R))
    layout = RowLayout.consecutive(sent_R, received_R)
    all_to_all_rows(transport, layout, outgoing, incoming, op=op, where=where).wait(until_sent=False)
    received = list(incoming.split(received_R))
    received[rank] = own
    return received


def without(values: Tensor, part: slice) -> Tensor:
    """The values but for one part."""
    return torch.cat([values[: part.start], values[part.stop :]])


def bags_at(row_ids: Tensor, positions: Tensor, num_rows: int) -> Bags:
    """`bags_of`, where entry i stands for `positions[i]`."""
    bags = bags_of(row_ids, num_rows)
    return Bags(positions[bags.indices].to(torch.int32), bags.offsets)
