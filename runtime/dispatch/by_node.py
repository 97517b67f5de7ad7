"""Dispatch over nodes of several ranks: a token row crosses to each node once, and comes back once, summed on that node.

Two hops in place of one. A row goes to one rank of each other node that has work for its token, its *gateway* there: one of
the ranks that compute it, so no rank gets a row that it has no use for. Tokens take turns among them, which spreads the work.
The gateway passes the row on to the other ranks of its node that need it. On the way back they return their sums to the
gateway, which adds its own part, in rank order, and sends one row home. Rows between ranks of one node travel as in dispatch.py.

Descriptions and gate gradients, numbers that differ from assignment to assignment, have nothing to share: each crosses once,
straight between the source and the rank that computes it. A rank finds the rows that a gateway passes on to it by order:
(gateway, source, row). What a gateway has to pass on is a bit mask that comes with its own description.

Shape letters: as in dispatch.py, and M ranks of a node, W int32 words of a mask, U rows passed on by this gateway, S rows
passed on to this rank.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from ...collectives import RowLayout, Transport, all_to_all_rows
from ...kernels import Bags, gather_rows, sum_rows
from ...placement import Split
from .direct import Assignments, bags_at, exchange_messages, home_bags, inverse, segment_transpose
from .expert_order import Run
from .handle import DispatchHandle, RowsHome, RowsInFlight, slices, starts

# Bits of a mask in one int32, which stays positive.
_WORD_BITS = 31


@dataclass(frozen=True, eq=False)
class NodeHandle(DispatchHandle):
    """A handle whose received rows may be passed on. Row ids (`row_ids_N`) from T + Q on name rows that gateways passed on."""

    passed_row_ids_U: Tensor  # received row of every row that this rank passes on
    passed_rows_R: tuple[int, ...]  # rows passed on to each rank
    relayed_rows_R: tuple[int, ...]  # rows that each gateway passes on to this rank
    relayed_bags: Bags  # slot-major rows of every row that was passed on to this rank

    @cached_property
    def pass_layout(self) -> RowLayout:
        """Rows passed on to ranks of this node, and those that they pass on to this one."""
        return RowLayout.consecutive(self.passed_rows_R, self.relayed_rows_R)

    def send_rows(self, x_TD: Tensor, transport: Transport, op: str, where: str) -> list[RowsInFlight[Tensor]]:
        """See `DispatchHandle.send_rows`. One part; what is in flight is the first hop, which is the one between nodes."""
        dim, num_received = x_TD.shape[1], self.num_received
        outgoing = transport.empty((self.num_sent, dim), x_TD)
        gather_rows(x_TD, self.sent_token_ids_P, out=outgoing)
        arrived = x_TD.new_empty(num_received + sum(self.relayed_rows_R), dim)
        received_QD, relayed_SD = arrived[:num_received], arrived[num_received:]
        pending = all_to_all_rows(transport, self.out_layouts_H[0], outgoing, received_QD, op=op, where=where)

        def pass_on() -> Tensor:
            passed = transport.empty((sum(self.passed_rows_R), dim), x_TD)
            gather_rows(received_QD, self.passed_row_ids_U, out=passed)
            all_to_all_rows(transport, self.pass_layout, passed, relayed_SD, op=op, where=where).wait(until_sent=False)
            return gather_rows(x_TD, self.row_ids_N, beside=arrived)

        return [RowsInFlight(pending, outgoing, pass_on)]

    def return_rows(self, part: int, home: RowsHome, transport: Transport, op: str, where: str) -> RowsInFlight[None]:
        """See `DispatchHandle.return_rows`. What is in flight is the last hop, which is the one between nodes."""
        rows_ND = home.rows_ND
        relayed = transport.empty((sum(self.relayed_rows_R), rows_ND.shape[1]), rows_ND)
        sum_rows(rows_ND, self.relayed_bags, out=relayed)
        passed_UD = rows_ND.new_empty(sum(self.passed_rows_R), rows_ND.shape[1])
        layout = self.pass_layout.transpose
        all_to_all_rows(transport, layout, relayed, passed_UD, op=op, where=where).wait(until_sent=False)
        sum_rows(rows_ND, self.return_bags_H[part], beside=passed_UD, out=home.outgoing_QD)
        return self.take_home(part, home, transport, op, where)


def build_node_handle(
    topk_ids_TK: Tensor,
    weights_TK: Tensor,
    split: Split,
    local_experts: Sequence[int],
    transport: Transport,
    op: str,
    where: str,
    *,
    ranks_per_node: int,
) -> NodeHandle:
    """Describe this rank's assignments to their destinations, and learn what comes here and what must be passed on.

    As `dispatch.build_handle`, for ranks in node-major order; one exchange, and no sizes before it.
    """
    rank, num_tokens = transport.rank, topk_ids_TK.shape[0]

    # Phase 1: which assignment goes where, which rows that makes, and what is said about them.
    assigned = Assignments.of(topk_ids_TK, split, rank)
    sent = _SentRows.of(assigned, num_tokens, rank, split.placement.num_ranks, ranks_per_node)
    weights_A = weights_TK.detach().float().flatten()[assigned.ids_A]
    recvs_RE = split.recvs(rank)
    received_assignments_R = tuple(int(n) for n in recvs_RE.sum(axis=1))
    messages = _exchange_descriptions(assigned, sent, weights_A, received_assignments_R, ranks_per_node, transport, op, where)

    # Phase 2: which row every assignment that came is about; slot-major order regroups them by local expert.
    came = _ArrivedRows.of(messages, received_assignments_R, num_tokens, rank, ranks_per_node)
    slot_major_N = segment_transpose(recvs_RE, topk_ids_TK.device)
    num_slot_major, positions_by_source = slot_major_N.numel(), inverse(slot_major_N)

    # Phase 3: the way back. A gateway adds up, in rank order, what the ranks of its node return and what is computed here.
    own = slices(received_assignments_R)[rank]
    num_before = sum(came.passed_rows_R[:rank])
    returned_U = torch.arange(num_slot_major, num_slot_major + sum(came.passed_rows_R), device=slot_major_N.device)
    first_relayed = num_tokens + sum(came.received_rows_R)
    is_relayed = came.ids_by_source >= first_relayed
    is_received = (came.ids_by_source >= num_tokens) & ~is_relayed
    passed = came.passed_row_ids_U
    return NodeHandle(
        rank=rank,
        num_tokens=num_tokens,
        top_k=topk_ids_TK.shape[1],
        sent_token_ids_P=sent.token_ids_P,
        sent_rows_HR=(sent.rows_R,),
        home_rows_HR=(sent.rows_R,),
        sent_assignments_A=assigned.ids_A,
        sent_assignments_HR=(assigned.counts_R,),
        received_rows_HR=(came.received_rows_R,),
        returned_rows_HR=(came.received_rows_R,),
        received_assignments_HR=(received_assignments_R,),
        slot_major_N=slot_major_N,
        row_ids_N=came.ids_by_source[slot_major_N],
        return_bags_H=(
            bags_at(
                torch.cat([passed[:num_before], came.ids_by_source[is_received] - num_tokens, passed[num_before:]]),
                torch.cat([returned_U[:num_before], positions_by_source[is_received], returned_U[num_before:]]),
                sum(came.received_rows_R),
            ),
        ),
        home_bags=home_bags(rank, sent.rows_R, sent.token_ids_P, came.ids_by_source[own], positions_by_source, own, num_tokens),
        row_weights_N=came.weights_by_source[slot_major_N],
        experts=tuple(int(e) for e in local_experts),
        group_sizes=tuple(int(n) for n in recvs_RE.sum(axis=0)[list(local_experts)]),
        runs=(Run(slice(0, len(local_experts)), slice(0, num_slot_major), 0),),
        passed_row_ids_U=passed,
        passed_rows_R=came.passed_rows_R,
        relayed_rows_R=came.relayed_rows_R,
        relayed_bags=bags_at(
            came.ids_by_source[is_relayed] - first_relayed, positions_by_source[is_relayed], sum(came.relayed_rows_R)
        ),
    )


@dataclass(frozen=True, eq=False)
class _SentRows:
    """The rows that leave this rank, and for each assignment the row that it is about."""

    token_ids_P: Tensor
    rows_R: tuple[int, ...]
    codes_A: Tensor  # int32: row * M + the rank, in its node, that the row goes to first; rows count from 0 for each rank
    masks_PW: Tensor  # int32: ranks of the node that the row is passed on to

    @classmethod
    def of(cls, assigned: Assignments, num_tokens: int, rank: int, num_ranks: int, ranks_per_node: int) -> _SentRows:
        """One row for each (other rank of this node, token), and for each (other node, token) one to its gateway.

        Example: two nodes of ranks 0, 1 and 2, 3; a token of rank 0 that ranks 1, 2 and 3 compute makes two rows, one to rank
        1 and one to rank 2 or 3, whose turn it is; the mask of the latter names the other of them.
        """
        device, home = assigned.tokens_A.device, rank // ranks_per_node
        members, tokens = torch.arange(ranks_per_node, device=device), torch.arange(num_tokens, device=device)

        # Phase 1: who computes what, and the first of them whose turn it is as the gateway.
        needs_RT = torch.zeros(num_ranks, num_tokens, dtype=torch.bool, device=device)
        needs_RT.view(-1)[assigned.destinations_A * num_tokens + assigned.tokens_A] = True
        needs_NMT = needs_RT.view(num_ranks // ranks_per_node, ranks_per_node, num_tokens)
        turns_MT = (members[:, None] - tokens) % ranks_per_node
        gateways_NT = torch.where(needs_NMT, turns_MT, ranks_per_node).argmin(dim=1)
        is_sent_NMT = needs_NMT & (gateways_NT[:, None] == members[:, None])
        is_sent_NMT[home] = needs_NMT[home]
        is_sent_RT = is_sent_NMT.view(num_ranks, num_tokens)
        is_sent_RT[rank] = False

        # Phase 2: rows in the order (rank, token), and the row of every assignment.
        ranks_P, token_ids_P = is_sent_RT.nonzero(as_tuple=True)
        rows_R = tuple(is_sent_RT.sum(1).tolist())
        nodes_A = assigned.destinations_A // ranks_per_node
        gateways_A = nodes_A * ranks_per_node + gateways_NT[nodes_A, assigned.tokens_A]
        first_A = torch.where(nodes_A == home, assigned.destinations_A, gateways_A)
        row_number = is_sent_RT.view(-1).cumsum(0) - 1
        first_row_R = torch.tensor(starts(rows_R), device=device)
        rows_A = row_number[first_A * num_tokens + assigned.tokens_A] - first_row_R[first_A]

        # Phase 3: the other ranks of a gateway's node.
        others_PM = needs_NMT[ranks_P // ranks_per_node, :, token_ids_P]
        others_PM &= (ranks_P % ranks_per_node)[:, None] != members
        codes_A = rows_A * ranks_per_node + first_A % ranks_per_node
        return cls(token_ids_P, rows_R, codes_A.to(torch.int32), pack_masks(others_PM))


@dataclass(frozen=True, eq=False)
class _ArrivedRows:
    """What this rank learnt from the descriptions."""

    ids_by_source: Tensor  # of every assignment: token t (t < T), received row q (T + q), row s that is passed on (T + Q + s)
    weights_by_source: Tensor  # fp32
    received_rows_R: tuple[int, ...]
    relayed_rows_R: tuple[int, ...]
    passed_row_ids_U: Tensor
    passed_rows_R: tuple[int, ...]

    @classmethod
    def of(
        cls, messages: Sequence[Tensor], assignments_R: Sequence[int], num_tokens: int, rank: int, ranks_per_node: int
    ) -> _ArrivedRows:
        """Read the messages, in rank order; this rank's own among them, with tokens for rows."""
        num_ranks, device = len(messages), messages[rank].device
        num_words, local = num_mask_words(ranks_per_node), rank % ranks_per_node
        first_of_node = rank - local

        # Phase 1: rows that came straight from their source.
        headers = [message[:1] for message in messages if message.numel()]
        counts = iter(torch.cat(headers).tolist() if headers else [])
        received_rows_R = tuple(next(counts) if message.numel() else 0 for message in messages)
        first_ids = [0 if r == rank else num_tokens + start for r, start in enumerate(starts(received_rows_R))]
        codes, weights = (
            torch.cat([message[1 + part * n : 1 + (part + 1) * n] for message, n in zip(messages, assignments_R, strict=True)])
            for part in (0, 1)
        )
        rows, members = codes.long() // ranks_per_node, codes.long() % ranks_per_node
        sources = torch.repeat_interleave(torch.tensor(assignments_R, device=device), output_size=codes.numel())
        ids = torch.tensor(first_ids, device=device)[sources] + rows

        # Phase 2: rows that another rank of this node passes on, in the order (gateway, source, row).
        is_relayed = members != local
        keys = ((members * num_ranks + sources) << 32) + rows
        relayed_keys, numbers = keys[is_relayed].unique(return_inverse=True)
        ids[is_relayed] = num_tokens + sum(received_rows_R) + numbers
        relayed_M = (relayed_keys // (num_ranks << 32)).bincount(minlength=ranks_per_node).tolist()

        # Phase 3: rows that this rank passes on, in the order (destination, source, row).
        masks = [
            message[1 + 2 * n : 1 + 2 * n + rows_here * num_words].view(-1, num_words)
            if r // ranks_per_node != rank // ranks_per_node
            else message.new_zeros(rows_here, num_words)
            for r, (message, n, rows_here) in enumerate(zip(messages, assignments_R, received_rows_R, strict=True))
        ]
        is_passed_MQ = unpack_masks(torch.cat(masks), ranks_per_node).T
        passed_M = is_passed_MQ.sum(1).tolist()

        def over_ranks(counts_M: list[int]) -> tuple[int, ...]:
            """Counts for the ranks of this node as counts for all ranks."""
            return (0,) * first_of_node + tuple(counts_M) + (0,) * (num_ranks - first_of_node - ranks_per_node)

        return cls(
            ids_by_source=ids,
            weights_by_source=weights.view(torch.float32),
            received_rows_R=received_rows_R,
            relayed_rows_R=over_ranks(relayed_M),
            passed_row_ids_U=is_passed_MQ.nonzero()[:, 1],
            passed_rows_R=over_ranks(passed_M),
        )


def _exchange_descriptions(
    assigned: Assignments,
    sent: _SentRows,
    weights_A: Tensor,
    received_assignments_R: Sequence[int],
    ranks_per_node: int,
    transport: Transport,
    op: str,
    where: str,
) -> list[Tensor]:
    """One int32 message from each rank, empty if it has no assignment for this one.

    Layout: the number of rows; each assignment's code; each weight's bits; from another node also the masks of the rows, in as
    much room as if every assignment had a row of its own, since the receiver knows the number of assignments only.
    """
    rank, num_words, device = transport.rank, num_mask_words(ranks_per_node), weights_A.device

    def size(other: int, num_assignments: int) -> int:
        is_far = other // ranks_per_node != rank // ranks_per_node
        return 1 + num_assignments * (2 + num_words * is_far) if num_assignments else 0

    outgoing = []
    parts = zip(slices(assigned.counts_R), slices(sent.rows_R), strict=True)
    for r, (part, rows) in enumerate(parts):
        message = torch.zeros(size(r, assigned.counts_R[r]), dtype=torch.int32, device=device)
        if message.numel():
            n = assigned.counts_R[r]
            message[0] = sent.rows_R[r]
            message[1 : 1 + n] = sent.codes_A[part]
            message[1 + n : 1 + 2 * n] = weights_A[part].view(torch.int32)
            masks = sent.masks_PW[rows].flatten()
            if message.numel() > 1 + 2 * n:
                message[1 + 2 * n : 1 + 2 * n + masks.numel()] = masks
        outgoing.append(message)
    own, n = outgoing[rank], assigned.counts_R[rank]
    if n:
        own[1 : 1 + n] = assigned.tokens_A[slices(assigned.counts_R)[rank]] * ranks_per_node + rank % ranks_per_node
    sizes_R = [size(r, n) for r, n in enumerate(received_assignments_R)]
    return exchange_messages(transport, outgoing, own, sizes_R, op, where)


def num_mask_words(ranks_per_node: int) -> int:
    """W for nodes of M ranks."""
    return -(-ranks_per_node // _WORD_BITS)


def pack_masks(flags_PM: Tensor) -> Tensor:
    """Bools [P, M] as int32 words [P, W], the lowest bit first. Example: [True, False, True] is [5]."""
    num_rows, num_flags = flags_PM.shape
    num_words = num_mask_words(num_flags)
    bits = torch.zeros(num_rows, num_words * _WORD_BITS, dtype=torch.int64, device=flags_PM.device)
    bits[:, :num_flags] = flags_PM
    bits = bits.view(num_rows, num_words, _WORD_BITS) << torch.arange(_WORD_BITS, device=flags_PM.device)
    return bits.sum(dim=2).to(torch.int32)


def unpack_masks(words_PW: Tensor, num_flags: int) -> Tensor:
    """The inverse of `pack_masks`: bools [P, M]."""
    bits = words_PW[:, :, None] >> torch.arange(_WORD_BITS, dtype=torch.int32, device=words_PW.device)
    return (bits & 1).bool().flatten(1)[:, :num_flags]
