"""The route by node: a token crosses to each other node once, and its result comes back once, summed on that node.

Two hops in place of one. A token goes to one rank of each other node that has work for it, its *leader* there: one of the ranks
that compute it, so no rank gets a token that it has no use for. Tokens take turns among those, which spreads the work. The
leader forwards the token to the other ranks of its node that need it. On the way back they return their sums to the leader,
which adds its own part, in rank order, and sends one result to the source rank. Tokens between ranks of one node go straight,
in the first hop.

Dispatch metadata and gate gradients, numbers that differ from assignment to assignment, have nothing to share: each crosses once,
straight between the source and the rank that computes it. A rank finds the tokens that a leader forwards to it by order: (leader,
source, token). The ranks that a leader forwards to come as a bit mask with the leader's own metadata.

Shape letters: as in handle.py, and M ranks of a node, W int32 words of a mask, U tokens that this leader forwards.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ...collectives import RowLayout, Transport
from ...placement import Split
from .assignments import Assignments, Computed, exchange_metadata
from .handle import DispatchHandle, Hop
from .layouts import bags_at, slices, starts

# Bits of a mask in one int32, which stays positive.
_WORD_BITS = 31


def by_node_handle(
    topk_ids_TK: Tensor,
    weights_TK: Tensor,
    split: Split,
    local_experts: Sequence[int],
    transport: Transport,
    op: str,
    where: str,
    *,
    ranks_per_node: int,
) -> DispatchHandle:
    """Describe this rank's assignments to their destinations, and receive what is computed and what is forwarded here.

    As `direct.direct_handle`, for ranks in node-major order; one exchange, and no sizes before it.
    """
    rank, num_tokens, device = transport.rank, topk_ids_TK.shape[0], topk_ids_TK.device
    recvs_RX = split.recvs(rank)[:, list(local_experts)]
    computed_R = tuple(recvs_RX.sum(axis=1).tolist())

    # 1. Destinations of assignments, the tokens that must be sent for them, and the metadata.
    assigned = Assignments.of(topk_ids_TK, weights_TK, split, rank)
    sent = _SentTokens.of(assigned, num_tokens, rank, split.placement.num_ranks, ranks_per_node)
    messages = _exchange_metadata(assigned, sent, computed_R, ranks_per_node, transport, op, where)

    # 2. The token of every assignment computed here. The expert stage regroups them by expert.
    arrived = _ArrivedTokens.of(messages, computed_R, num_tokens, rank, ranks_per_node)
    ids, received_R, forwards_R = arrived.ids, arrived.received_R, arrived.forwards_R
    computed = Computed.of(rank, local_experts, recvs_RX, device)
    positions, num_rows = computed.positions, computed.positions.numel()

    # 3. The way back. A leader adds up, in rank order, what the ranks of its node return and what is computed here.
    first_forwarded = num_tokens + sum(received_R)
    is_forwarded = ids >= first_forwarded
    is_received = (ids >= num_tokens) & ~is_forwarded
    forwarded_ids_U, num_before = arrived.forwarded_ids_U, sum(forwards_R[:rank])
    returned_U = torch.arange(num_rows, num_rows + sum(forwards_R), device=device)
    between_nodes = Hop(
        sent.ids_P,
        RowLayout.consecutive(sent.num_R, received_R),
        bags_at(
            torch.cat([forwarded_ids_U[:num_before], ids[is_received] - num_tokens, forwarded_ids_U[num_before:]]),
            torch.cat([returned_U[:num_before], positions[is_received], returned_U[num_before:]]),
            sum(received_R),
        ),
    )
    inside_the_node = Hop(
        num_tokens + forwarded_ids_U,
        RowLayout.consecutive(forwards_R, arrived.forwarded_R),
        bags_at(ids[is_forwarded] - first_forwarded, positions[is_forwarded], sum(arrived.forwarded_R)),
    )
    hops = between_nodes, inside_the_node
    return computed.handle(assigned, topk_ids_TK.shape, hops, ids, arrived.weights)


@dataclass(frozen=True, eq=False)
class _SentTokens:
    """The tokens that leave this rank, and for each assignment the one that it belongs to."""

    ids_P: Tensor  # own token t
    num_R: tuple[int, ...]  # for each rank
    codes_A: Tensor  # int32: token * M + the rank, in its node, that it goes to first; tokens count from 0 for each rank
    masks_PW: Tensor  # int32: ranks of the node that the token is forwarded to

    @classmethod
    def of(cls, assigned: Assignments, num_tokens: int, rank: int, num_ranks: int, ranks_per_node: int) -> _SentTokens:
        """One for each (other rank of this node, token), and for each (other node, token) one to its leader.

        Example: two nodes of ranks 0, 1 and 2, 3; a token of rank 0 that ranks 1, 2 and 3 compute is sent twice, to rank 1 and
        to rank 2 or 3, whose turn it is; the mask of the latter names the other of them.
        """
        device, own_node = assigned.tokens_A.device, rank // ranks_per_node
        members, tokens = torch.arange(ranks_per_node, device=device), torch.arange(num_tokens, device=device)

        # 1. The ranks that compute each token, and the first of them whose turn it is as the leader.
        needs_RT = torch.zeros(num_ranks, num_tokens, dtype=torch.bool, device=device)
        needs_RT.view(-1)[assigned.destinations_A * num_tokens + assigned.tokens_A] = True
        needs_NMT = needs_RT.view(num_ranks // ranks_per_node, ranks_per_node, num_tokens)
        turns_MT = (members[:, None] - tokens) % ranks_per_node
        leaders_NT = torch.where(needs_NMT, turns_MT, ranks_per_node).argmin(dim=1)
        is_sent_NMT = needs_NMT & (leaders_NT[:, None] == members[:, None])
        is_sent_NMT[own_node] = needs_NMT[own_node]
        is_sent_RT = is_sent_NMT.view(num_ranks, num_tokens)
        is_sent_RT[rank] = False

        # 2. Tokens in the order (rank, token), and the one of every assignment.
        ranks_P, ids_P = is_sent_RT.nonzero(as_tuple=True)
        num_R = tuple(is_sent_RT.sum(1).tolist())
        nodes_A = assigned.destinations_A // ranks_per_node
        leaders_A = nodes_A * ranks_per_node + leaders_NT[nodes_A, assigned.tokens_A]
        first_A = torch.where(nodes_A == own_node, assigned.destinations_A, leaders_A)
        number = is_sent_RT.view(-1).cumsum(0) - 1
        first_R = torch.tensor(starts(num_R), device=device)
        local_ids_A = number[first_A * num_tokens + assigned.tokens_A] - first_R[first_A]

        # 3. The other ranks of a leader's node.
        others_PM = needs_NMT[ranks_P // ranks_per_node, :, ids_P]
        others_PM &= (ranks_P % ranks_per_node)[:, None] != members
        codes_A = local_ids_A * ranks_per_node + first_A % ranks_per_node
        return cls(ids_P, num_R, codes_A.to(torch.int32), pack_masks(others_PM))


@dataclass(frozen=True, eq=False)
class _ArrivedTokens:
    """The content of the metadata that arrived."""

    ids: Tensor  # the token of every assignment, rank-major: own t (t < T), then in the order of arrival, those forwarded last
    weights: Tensor  # fp32
    received_R: tuple[int, ...]  # tokens straight from each source
    forwarded_R: tuple[int, ...]  # tokens that each leader forwards to this rank
    forwarded_ids_U: Tensor  # the received token, from 0, of each that this rank forwards
    forwards_R: tuple[int, ...]  # tokens that this rank forwards to each

    @classmethod
    def of(
        cls, messages: Sequence[Tensor], assignments_R: Sequence[int], num_tokens: int, rank: int, ranks_per_node: int
    ) -> _ArrivedTokens:
        """Read the messages, in rank order, this rank's own among them."""
        num_ranks, device = len(messages), messages[rank].device
        num_words, local = num_mask_words(ranks_per_node), rank % ranks_per_node
        first_of_node = rank - local

        # 1. Tokens straight from their source.
        headers = [message[:1] for message in messages if message.numel()]
        counts = iter(torch.cat(headers).tolist() if headers else [])
        received_R = tuple(next(counts) if message.numel() else 0 for message in messages)
        first_ids = [0 if r == rank else num_tokens + start for r, start in enumerate(starts(received_R))]
        codes, weights = (
            torch.cat([message[1 + part * n : 1 + (part + 1) * n] for message, n in zip(messages, assignments_R, strict=True)])
            for part in (0, 1)
        )
        local_ids, members = codes.long() // ranks_per_node, codes.long() % ranks_per_node
        sources = torch.repeat_interleave(torch.tensor(assignments_R, device=device), output_size=codes.numel())
        ids = torch.tensor(first_ids, device=device)[sources] + local_ids

        # 2. Tokens that another rank of this node forwards, in the order (leader, source, token).
        is_forwarded = members != local
        keys = ((members * num_ranks + sources) << 32) + local_ids
        forwarded_keys, numbers = keys[is_forwarded].unique(return_inverse=True)
        ids[is_forwarded] = num_tokens + sum(received_R) + numbers
        forwarded_M = (forwarded_keys // (num_ranks << 32)).bincount(minlength=ranks_per_node).tolist()

        # 3. Tokens that this rank forwards, in the order (destination, source, token).
        masks = [
            message[1 + 2 * n : 1 + 2 * n + num_here * num_words].view(-1, num_words)
            if r // ranks_per_node != rank // ranks_per_node
            else message.new_zeros(num_here, num_words)
            for r, (message, n, num_here) in enumerate(zip(messages, assignments_R, received_R, strict=True))
        ]
        forwards_MQ = unpack_masks(torch.cat(masks), ranks_per_node).T
        forwards_M = forwards_MQ.sum(1).tolist()

        def over_ranks(counts_M: list[int]) -> tuple[int, ...]:
            """Counts for the ranks of this node as counts for all ranks."""
            return (0,) * first_of_node + tuple(counts_M) + (0,) * (num_ranks - first_of_node - ranks_per_node)

        return cls(
            ids=ids,
            weights=weights.view(torch.float32),
            received_R=received_R,
            forwarded_R=over_ranks(forwarded_M),
            forwarded_ids_U=forwards_MQ.nonzero()[:, 1],
            forwards_R=over_ranks(forwards_M),
        )


def _exchange_metadata(
    assigned: Assignments,
    sent: _SentTokens,
    computed_R: Sequence[int],
    ranks_per_node: int,
    transport: Transport,
    op: str,
    where: str,
) -> list[Tensor]:
    """One int32 message from each rank, empty if it has no assignment for this one.

    Layout: the number of tokens; each assignment's code; each weight's bits; from another node also the masks of the tokens, in
    as much room as if every assignment had a token of its own, since only the number of assignments is known beforehand.
    """
    rank, num_words, device = transport.rank, num_mask_words(ranks_per_node), assigned.weights_A.device

    def size(other: int, num_assignments: int) -> int:
        is_far = other // ranks_per_node != rank // ranks_per_node
        return 1 + num_assignments * (2 + num_words * is_far) if num_assignments else 0

    outgoing = []
    pieces = zip(slices(assigned.counts_R), slices(sent.num_R), strict=True)
    for r, (part, tokens) in enumerate(pieces):
        message = torch.zeros(size(r, assigned.counts_R[r]), dtype=torch.int32, device=device)
        if message.numel():
            n = assigned.counts_R[r]
            message[0] = sent.num_R[r]
            message[1 : 1 + n] = sent.codes_A[part]
            message[1 + n : 1 + 2 * n] = assigned.weights_A[part].view(torch.int32)
            masks = sent.masks_PW[tokens].flatten()
            if message.numel() > 1 + 2 * n:
                message[1 + 2 * n : 1 + 2 * n + masks.numel()] = masks
        outgoing.append(message)
    own, n = outgoing[rank], assigned.counts_R[rank]
    if n:
        own[1 : 1 + n] = assigned.tokens_A[slices(assigned.counts_R)[rank]] * ranks_per_node + rank % ranks_per_node
    sizes_R = [size(r, n) for r, n in enumerate(computed_R)]
    return exchange_metadata(transport, outgoing, own, sizes_R, op, where)


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
