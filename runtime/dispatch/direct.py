"""Where token rows go: to the ranks that compute them, and back.

A row crosses to a rank once, however many of its experts are computed there, and comes back once, already summed over
them with its gate weights. Combine is the transpose of dispatch, so each one's backward is the other's forward, and the
gate gradients travel with the rows of dispatch's backward.

What a rank computes of its own tokens never becomes a message: those rows are read from and added to the tokens' own tensors.
Here rows go straight to their destinations, in one part or in two; dispatch_by_node.py is the form for nodes of several ranks.
This file finds out what goes where; dispatch_handle.py has the rows travel.

Layouts, on the source rank:
    assignment a = t * K + k                      as the router made them
    "by destination": (destination, expert, token)  the order in which assignments are described to their destinations
    sent rows: (destination, token)               one for each other destination of each token; in two parts
                                                  (destination, kind, token), see dispatch_handle.py
and on the destination rank:
    received rows: (source, token)                from other ranks, in the order in which they were sent
    "by source": (source, expert, token)          the order in which descriptions arrive
    "slot-major": (expert, source, token)         the order of the expert stage: one contiguous group per local expert
In all but the first, experts are in the order in which the destination computes them, see expert_order.py.

Ids are those of `Capacity.kept_ids`: E stands for an assignment that is dropped, which nothing below describes or sends.

Shape letters: T tokens, K choices, D model dim, E experts, R ranks, A assignments of this rank (up to T * K), P sent rows,
Q received rows, N slot-major rows (assignments computed here), H parts, C kinds of rows.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from ...collectives import RowLayout, Transport, all_to_all_rows
from ...kernels import Bags, bags_of, on_device, split_tokens
from ...placement import Split
from .expert_order import ExpertOrder, regroup
from .handle import Counts_HR, DispatchHandle, per_rank, slices, starts


@dataclass(frozen=True, eq=False)
class Assignments:
    """This rank's assignments by destination."""

    ids_A: Tensor  # assignment t * K + k
    tokens_A: Tensor  # its token t
    destinations_A: Tensor  # the rank that computes it
    sends_ER: np.ndarray  # rows of each expert to each rank
    counts_R: tuple[int, ...]  # for each rank

    @classmethod
    def of(cls, topk_ids_TK: Tensor, split: Split, rank: int, order: ExpertOrder | None = None) -> Assignments:
        """Which assignment goes where; to each destination in the order of its experts, or of their ids.

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
        if order is not None:
            ids_A = order.by_destination(ids_A, sends_ER)
        counts_R = tuple(int(n) for n in sends_ER.sum(axis=0))
        destinations_A = torch.repeat_interleave(on_device(counts_R, device), output_size=ids_A.numel())
        return cls(ids_A, ids_A // topk_ids_TK.shape[1], destinations_A, sends_ER, counts_R)


def build_handle(
    topk_ids_TK: Tensor,
    weights_TK: Tensor,
    split: Split,
    local_experts: Sequence[int],
    transport: Transport,
    op: str,
    where: str,
    *,
    num_parts: int = 1,
) -> DispatchHandle:
    """Describe this rank's assignments to their destinations, and learn what comes here.

    Both sides know from the split how many assignments travel between them; how many *rows* those share is part of the
    description, so no sizes are exchanged beforehand. `local_experts` are ascending; `num_parts` is 1 or 2.
    """
    rank, device = transport.rank, topk_ids_TK.device
    num_tokens, top_k = topk_ids_TK.shape
    order = ExpertOrder.of(split, num_parts)
    here_X, part_RE = order.experts(rank, local_experts), order.part_RE
    recvs_RX = split.recvs(rank)[:, here_X]
    received_RH = _by_part(recvs_RX, part_RE[rank, here_X], num_parts)

    # Phase 1: which assignment goes where, and the rows that makes.
    assigned = Assignments.of(topk_ids_TK, split, rank, order)
    sent_RH = _by_part(assigned.sends_ER.T, part_RE, num_parts)
    rows = _SentRows.of(assigned, sent_RH, num_tokens, rank)

    # Phase 2: tell each destination, for its assignments in order, the row (from 0 for this pair of ranks) and the weight.
    weights_A = weights_TK.detach().float().flatten()[assigned.ids_A]
    to_R, headers_R = slices(assigned.counts_R), rows.num_RC.sum(1).to(torch.int32)
    sent = [_describe(headers_R[r : r + 1], rows.local_row_A[part], weights_A[part]) for r, part in enumerate(to_R)]
    received_assignments_R = tuple(int(n) for n in received_RH.sum(axis=1))
    own, own_rows = slices(received_assignments_R)[rank], assigned.tokens_A[to_R[rank]].to(torch.int32)
    own_message = _describe(headers_R[rank : rank + 1], own_rows, weights_A[to_R[rank]])
    sizes_R = [1 + 2 * n if n else 0 for n in received_assignments_R]
    received = exchange_messages(transport, sent, own_message, sizes_R, op, where)
    bodies = [message[1:].view(2, -1) for message in received]

    # Phase 3: rows get numbers through own tokens and all sources; slot-major order regroups them by local expert.
    counts = _RowCounts.learnt(rows.num_RC, received, [body[0] for body in bodies], received_RH, own)
    sent_rows_R, received_rows_R = per_rank(counts.sent_HR), per_rank(counts.received_HR)
    sent_token_ids_P = rows.token_ids(sum(sent_rows_R))
    first_id_R = [0 if r == rank else num_tokens + start for r, start in enumerate(starts(received_rows_R))]
    ids_by_source = torch.cat([body[0] + first for body, first in zip(bodies, first_id_R, strict=True)]).long()
    weights_by_source = torch.cat([body[1] for body in bodies]).view(torch.float32)
    slot_major_N, group_sizes = segment_transpose(recvs_RX, device), tuple(int(n) for n in recvs_RX.sum(axis=0))

    # Phase 4: the way back, where every row, and every token, sums up in the order of expert ids.
    ids, positions, by_id_N = ids_by_source, inverse(slot_major_N), order.by_id(recvs_RX, here_X, device)
    if by_id_N is not None:
        ids, positions = ids[by_id_N], positions[by_id_N]
    return DispatchHandle(
        rank=rank,
        num_tokens=num_tokens,
        top_k=top_k,
        sent_token_ids_P=sent_token_ids_P,
        sent_rows_HR=counts.sent_HR,
        home_rows_HR=counts.home_HR,
        sent_assignments_A=assigned.ids_A,
        sent_assignments_HR=_by_rank(sent_RH),
        received_rows_HR=counts.received_HR,
        returned_rows_HR=counts.returned_HR,
        received_assignments_HR=_by_rank(received_RH),
        slot_major_N=slot_major_N,
        row_ids_N=ids_by_source[slot_major_N],
        return_bags_H=counts.return_bags(without(ids, own) - num_tokens, without(positions, own)),
        home_bags=home_bags(rank, sent_rows_R, sent_token_ids_P, ids[own], positions, own, num_tokens),
        row_weights_N=weights_by_source[slot_major_N],
        experts=tuple(int(e) for e in here_X),
        group_sizes=group_sizes,
        runs=order.runs(rank, here_X, group_sizes),
    )


def _by_part(counts_RX: np.ndarray, parts: np.ndarray, num_parts: int) -> np.ndarray:
    """Counts for each expert as counts for each part, [R, H]; `parts`, [R, X] or [X] for all ranks, tells every expert's."""
    return np.stack([(counts_RX * (parts == part)).sum(axis=1) for part in range(num_parts)], axis=1)


@dataclass(frozen=True, eq=False)
class _SentRows:
    """One row for each (other destination, token), numbered by (destination, kind, token).

    Kinds, with two parts: rows that the first part alone needs, both need, the second alone needs. With one part: one.
    """

    is_sent_RCT: Tensor
    number_RCT: Tensor
    num_RC: Tensor
    local_row_A: Tensor  # int32: the row of every assignment, from 0 for its destination

    @classmethod
    def of(cls, assigned: Assignments, sent_RH: np.ndarray, num_tokens: int, rank: int) -> _SentRows:
        """`sent_RH`: assignments to each rank and part, which are in this order."""
        (num_ranks, num_parts), device = sent_RH.shape, assigned.tokens_A.device
        num_assignments = assigned.tokens_A.numel()
        pieces_A = torch.repeat_interleave(on_device(sent_RH.ravel(), device), output_size=num_assignments)
        needs_RHT = torch.zeros(num_ranks, num_parts, num_tokens, dtype=torch.bool, device=device)
        needs_RHT.view(-1)[pieces_A * num_tokens + assigned.tokens_A] = True
        needs_RHT[rank] = False
        is_sent_RCT = needs_RHT
        if num_parts == 2:
            first_RT, second_RT = needs_RHT.unbind(1)
            is_sent_RCT = torch.stack([first_RT & ~second_RT, first_RT & second_RT, second_RT & ~first_RT], dim=1)
        number_RCT = is_sent_RCT.view(-1).cumsum(0).view_as(is_sent_RCT) - 1
        num_RC = is_sent_RCT.sum(2)
        num_R = num_RC.sum(1)
        row_number_RT = number_RCT[:, 0] if num_parts == 1 else torch.where(is_sent_RCT, number_RCT, 0).sum(1)
        local_row_RT = row_number_RT - (num_R.cumsum(0) - num_R)[:, None]
        local_row_A = local_row_RT.view(-1)[assigned.destinations_A * num_tokens + assigned.tokens_A]
        return cls(is_sent_RCT, number_RCT, num_RC, local_row_A.to(torch.int32))

    def token_ids(self, num_rows: int) -> Tensor:
        """The token of every row, in the order of their numbers; `nonzero`, but for one whose size the host knows."""
        tokens_RCT = torch.arange(self.is_sent_RCT.shape[2], device=self.is_sent_RCT.device).expand_as(self.is_sent_RCT)
        # Rows that aren't sent go to a place behind the end.
        places_RCT = torch.where(self.is_sent_RCT, self.number_RCT, num_rows)
        return tokens_RCT.new_empty(num_rows + 1).scatter_(0, places_RCT.view(-1), tokens_RCT.reshape(-1))[:num_rows]


@dataclass(frozen=True, eq=False)
class _RowCounts:
    """How many rows travel between this rank and each other: by the part with which they go out, and by that of the way home."""

    sent_HR: Counts_HR
    home_HR: Counts_HR
    received_HR: Counts_HR
    returned_HR: Counts_HR
    num_early: int  # others' assignments computed here whose rows are returned with the first of two parts

    @classmethod
    def learnt(
        cls, num_RC: Tensor, messages_R: Sequence[Tensor], rows_R: Sequence[Tensor], received_RH: np.ndarray, own: slice
    ) -> _RowCounts:
        """Here, and nowhere else, the host waits for the device: it learns how many rows leave and how many came."""
        num_ranks, num_kinds = num_RC.shape
        learnt = [num_RC.flatten().to(torch.int32), *(message[:1] for message in messages_R)]
        if num_kinds > 1:
            learnt.append(_part_ends(torch.cat(list(rows_R)), received_RH, own))
        counts = iter(torch.cat(learnt).tolist())
        kinds_CR = tuple(zip(*([next(counts) for _ in range(num_kinds)] for _ in range(num_ranks)), strict=True))
        came_R = tuple(next(counts) if message.numel() else 0 for message in messages_R)
        if num_kinds == 1:
            return cls(kinds_CR, kinds_CR, (came_R,), (came_R,), num_early=0)
        first_R, both_R, second_R = (np.array(kind_R) for kind_R in kinds_CR)
        total_R = np.array(came_R)
        received_R, returned_R = (np.minimum([next(counts) for _ in total_R], total_R) for _ in range(2))
        return cls(
            sent_HR=_by_rank(np.stack([first_R + both_R, second_R], axis=1)),
            home_HR=_by_rank(np.stack([first_R, both_R + second_R], axis=1)),
            received_HR=_by_rank(np.stack([received_R, total_R - received_R], axis=1)),
            returned_HR=_by_rank(np.stack([returned_R, total_R - returned_R], axis=1)),
            num_early=next(counts),
        )

    def return_bags(self, received_ids: Tensor, positions: Tensor) -> tuple[Bags, ...]:
        """For the rows returned with each part, in the order (part, source, row), what each sums up.

        Others' assignments, by source, belong to these received rows and are computed at these slot-major positions.
        """
        num_rows_H = [sum(counts_R) for counts_R in self.returned_HR]
        if len(num_rows_H) == 1:
            return (bags_at(received_ids, positions, num_rows_H[0]),)
        place_of_Q = inverse(segment_transpose(np.array(self.returned_HR).T, received_ids.device))
        bags = bags_at(place_of_Q[received_ids], positions, sum(num_rows_H))
        cut, early = num_rows_H[0], self.num_early
        return Bags(bags.indices[:early], bags.offsets[: cut + 1]), Bags(bags.indices[early:], bags.offsets[cut:] - early)


def _part_ends(rows_by_source: Tensor, received_RH: np.ndarray, own: slice) -> Tensor:
    """What this rank must learn of rows in two parts, int32 [2 R + 1], from its assignments' rows, which count from 0 per source.

    For each source the rows that came with the first part, which are those before the end of what its assignments name; the
    rows that are returned with it, which are those before the first that an assignment of the second names (a large number if
    none does); and how many assignments of other ranks belong to the latter. Entries of this rank itself mean nothing.
    """
    device, num_ranks = rows_by_source.device, received_RH.shape[0]
    pieces = torch.repeat_interleave(on_device(received_RH.ravel(), device), output_size=rows_by_source.numel())
    ends = rows_by_source.new_zeros(2 * num_ranks).scatter_reduce_(0, pieces, rows_by_source + 1, "amax")[0::2]
    most = torch.iinfo(torch.int32).max
    begins = rows_by_source.new_full((2 * num_ranks,), most).scatter_reduce_(0, pieces, rows_by_source, "amin")[1::2]
    is_early = rows_by_source < begins[pieces // 2]
    is_early[own] = False
    return torch.cat([ends, begins, is_early.sum(0, keepdim=True, dtype=torch.int32)])


def _by_rank(counts_RH: np.ndarray) -> Counts_HR:
    return tuple(tuple(int(n) for n in counts_R) for counts_R in counts_RH.T)


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
    return regroup(counts_AB.ravel(), np.arange(counts_AB.size).reshape(counts_AB.shape).T.ravel(), device)


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


def inverse(order: Tensor) -> Tensor:
    """Where each element went: the inverse of a permutation given as a gather index."""
    places = torch.empty_like(order)
    places[order] = torch.arange(order.numel(), device=order.device)
    return places


def without(values: Tensor, part: slice) -> Tensor:
    """The values but for one part."""
    return torch.cat([values[: part.start], values[part.stop :]])


def bags_at(row_ids: Tensor, positions: Tensor, num_rows: int) -> Bags:
    """`bags_of`, where entry i stands for `positions[i]`."""
    bags = bags_of(row_ids, num_rows)
    return Bags(positions[bags.indices].to(torch.int32), bags.offsets)
