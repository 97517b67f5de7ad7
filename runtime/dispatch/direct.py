"""The direct route: every token goes straight to the ranks that compute it. by_node.py has the route for nodes of several ranks.

Shape letters: as in handle.py; R ranks.
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
from .layouts import bags_at, slices, starts, without


def direct_handle(
    topk_ids_TK: Tensor,
    weights_TK: Tensor,
    split: Split,
    local_experts: Sequence[int],
    transport: Transport,
    op: str,
    where: str,
) -> DispatchHandle:
    """Describe this rank's assignments to their destinations, and receive the description of those computed here.

    Both sides take from the split how many assignments travel between them; the number of *tokens* that those share is part of
    the metadata, so no sizes are exchanged beforehand. `local_experts` are ascending.
    """
    rank, num_tokens = transport.rank, topk_ids_TK.shape[0]
    recvs_RX = split.recvs(rank)[:, list(local_experts)]

    # 1. Destinations of assignments, and the tokens that must be sent for them.
    assigned = Assignments.of(topk_ids_TK, weights_TK, split, rank)
    sent = _SentTokens.of(assigned, num_tokens, rank, split.placement.num_ranks)

    # 2. The metadata of each destination: the number of tokens; each assignment's token, counted from 0 for this pair of ranks;
    #    the bits of each weight.
    to_R, headers_R = slices(assigned.counts_R), sent.num_R.to(torch.int32)
    messages = [_metadata(headers_R[r : r + 1], sent.local_ids_A[to], assigned.weights_A[to]) for r, to in enumerate(to_R)]
    own_tokens = assigned.tokens_A[to_R[rank]].to(torch.int32)
    own_message = _metadata(headers_R[rank : rank + 1], own_tokens, assigned.weights_A[to_R[rank]])
    sizes_R = [1 + 2 * n if n else 0 for n in recvs_RX.sum(axis=1).tolist()]
    received = exchange_metadata(transport, messages, own_message, sizes_R, op, where)

    # 3. The numbers of tokens that leave and arrive: here, and nowhere else, the host waits for the device.
    has_message_R = [message.numel() > 0 for message in received]
    counts = iter(torch.cat([headers_R, *(message[:1] for message in received)]).tolist())
    sent_R = tuple(next(counts) for _ in received)
    received_R = tuple(next(counts) if has_message else 0 for has_message in has_message_R)
    sent_ids_P = sent.token_ids(sum(sent_R))

    # 4. Every assignment computed here, rank-major: its token and its weight. The expert stage regroups them by expert.
    bodies = [message[1:].view(2, -1) for message in received]
    first_id_R = [0 if r == rank else num_tokens + start for r, start in enumerate(starts(received_R))]
    ids = torch.cat([body[0] + first for body, first in zip(bodies, first_id_R, strict=True)]).long()
    weights = torch.cat([body[1] for body in bodies]).view(torch.float32)
    computed = Computed.of(rank, local_experts, recvs_RX, topk_ids_TK.device)
    own = computed.own

    # 5. The way back.
    return_bags_Q = bags_at(without(ids, own) - num_tokens, without(computed.positions, own), sum(received_R))
    hop = Hop(sent_ids_P, RowLayout.consecutive(sent_R, received_R), return_bags_Q)
    return computed.handle(assigned, topk_ids_TK.shape, (hop,), ids, weights)


@dataclass(frozen=True, eq=False)
class _SentTokens:
    """One token for each (other destination, token) pair, numbered by (destination, token)."""

    is_sent_RT: Tensor
    number_RT: Tensor
    num_R: Tensor
    local_ids_A: Tensor  # int32: the sent token of every assignment, counted from 0 for its destination

    @classmethod
    def of(cls, assigned: Assignments, num_tokens: int, rank: int, num_ranks: int) -> _SentTokens:
        """The tokens that assignments of other ranks need."""
        device = assigned.tokens_A.device
        pairs_A = assigned.destinations_A * num_tokens + assigned.tokens_A
        is_sent_RT = torch.zeros(num_ranks, num_tokens, dtype=torch.bool, device=device)
        is_sent_RT.view(-1)[pairs_A] = True
        is_sent_RT[rank] = False
        number_RT = is_sent_RT.view(-1).cumsum(0).view_as(is_sent_RT) - 1
        num_R = is_sent_RT.sum(1)
        local_ids_RT = number_RT - (num_R.cumsum(0) - num_R)[:, None]
        return cls(is_sent_RT, number_RT, num_R, local_ids_RT.view(-1)[pairs_A].to(torch.int32))

    def token_ids(self, num_sent: int) -> Tensor:
        """The token ids in the order of their numbers: `nonzero` without the host synchronization, for a known count."""
        tokens_RT = torch.arange(self.is_sent_RT.shape[1], device=self.is_sent_RT.device).expand_as(self.is_sent_RT)
        # Tokens that are not sent go to a place behind the end.
        places_RT = torch.where(self.is_sent_RT, self.number_RT, num_sent)
        return tokens_RT.new_empty(num_sent + 1).scatter_(0, places_RT.view(-1), tokens_RT.reshape(-1))[:num_sent]


def _metadata(num_tokens: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
    """One int32 message: the number of tokens, each assignment's token, the bits of each weight. Empty without assignments."""
    if not weights.numel():
        return ids.new_empty(0)
    return torch.cat([num_tokens, ids, weights.view(torch.int32)])
