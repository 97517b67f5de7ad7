"""The assignments of one rank by destination, those that it computes, and the exchange of dispatch metadata that describes them.

Shape letters: as in handle.py; E experts, X local experts, R ranks.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from ...collectives import RowLayout, RowPart, Transport, all_to_all_rows
from ...kernels import on_device, split_tokens
from ...placement import Split
from .handle import DispatchHandle, GateRoute, Hop
from .layouts import bags_at, inverse, segment_transpose, slices, starts


@dataclass(frozen=True, eq=False)
class Assignments:
    """This rank's assignments in the order (destination, expert, token), and their gate weights.

    Ids are those of `Capacity.kept_ids`: E stands for an assignment that is dropped, which goes nowhere.
    """

    ids_A: Tensor  # assignment t * K + k
    tokens_A: Tensor  # its token t
    destinations_A: Tensor  # the rank that computes it
    weights_A: Tensor  # fp32
    counts_R: tuple[int, ...]  # for each destination

    @classmethod
    def of(cls, topk_ids_TK: Tensor, weights_TK: Tensor, split: Split, rank: int) -> Assignments:
        """Expert by expert, tokens fill the destinations in rank order.

        A token that goes to a rank anyway, for an expert held only there, takes that destination's turn, so that its
        assignments share one message. An expert with one holder gets its tokens in their own order, on whichever rank, so that
        its gradient has the same bits on any rank.
        """
        device, sends_ER = topk_ids_TK.device, split.sends(rank)
        is_shared_E = np.append(split.placement.num_replicas_E > 1, False)
        anchors_TK = None
        if is_shared_E.any():
            anchors_TK = anchor_ranks(topk_ids_TK, split, rank) * on_device(is_shared_E, device)[topk_ids_TK]
        ids_A = split_tokens(topk_ids_TK, on_device(sends_ER, device), anchors_TK, num_sent=int(sends_ER.sum()))
        counts_R = tuple(int(n) for n in sends_ER.sum(axis=0))
        destinations_A = torch.repeat_interleave(on_device(counts_R, device), output_size=ids_A.numel())
        weights_A = weights_TK.detach().float().flatten()[ids_A]
        return cls(ids_A, ids_A // topk_ids_TK.shape[1], destinations_A, weights_A, counts_R)


@dataclass(frozen=True, eq=False)
class Computed:
    """The assignments that one rank computes: rank-major, as their metadata arrives, and expert-major, for the expert stage."""

    rank: int
    experts: tuple[int, ...]  # of this rank, ascending
    recvs_RX: np.ndarray
    own: slice  # the place of this rank's own assignments in rank-major order
    rank_major_N: Tensor  # the rank-major position of every expert-major row
    positions: Tensor  # its inverse: the expert-major position of every assignment, rank-major

    @classmethod
    def of(cls, rank: int, experts: Sequence[int], recvs_RX: np.ndarray, device: torch.device) -> Computed:
        """Given the number from each source rank for each local expert."""
        rank_major_N = segment_transpose(recvs_RX, device)
        own = slices(recvs_RX.sum(axis=1).tolist())[rank]
        return cls(rank, tuple(map(int, experts)), recvs_RX, own, rank_major_N, inverse(rank_major_N))

    def handle(
        self, assigned: Assignments, size_TK: Sequence[int], hops: tuple[Hop, ...], ids: Tensor, weights: Tensor
    ) -> DispatchHandle:
        """The routes of this rank's `assigned`; `ids` and `weights` are those of the assignments computed here, rank-major."""
        num_tokens, top_k = size_TK
        sent_ids_P, num_rows = hops[0].send_ids_P, self.positions.numel()
        # The terms of a token's result are in rank order.
        before = sum(part.num_rows for part in hops[0].layout.sent if part.peer < self.rank)
        returned_P = torch.arange(num_rows, num_rows + sent_ids_P.numel(), device=sent_ids_P.device)
        sides = []
        for counts_R in (self.recvs_RX.sum(axis=1).tolist(), assigned.counts_R):
            pieces = zip(starts(counts_R), counts_R, strict=True)
            sides.append([RowPart(r, first, n) for r, (first, n) in enumerate(pieces) if r != self.rank])
        own_sent = slices(assigned.counts_R)[self.rank]
        return DispatchHandle(
            num_tokens=num_tokens,
            top_k=top_k,
            hops=hops,
            source_ids_N=ids[self.rank_major_N],
            combine_bags_T=bags_at(
                torch.cat([sent_ids_P[:before], ids[self.own], sent_ids_P[before:]]),
                torch.cat([returned_P[:before], self.positions[self.own], returned_P[before:]]),
                num_tokens,
            ),
            gates=GateRoute(self.rank_major_N, assigned.ids_A, RowLayout(*sides), self.own, own_sent),
            gate_weights_N=weights[self.rank_major_N],
            experts=self.experts,
            group_sizes=tuple(self.recvs_RX.sum(axis=0).tolist()),
        )


def anchor_ranks(topk_ids_TK: Tensor, split: Split, rank: int) -> Tensor:
    """A rank that each token goes to whatever the split says, int64 [T, 1]; `rank` itself where there is none.

    That is the highest remote rank that is the only holder of one of the token's experts.
    """
    placement = split.placement
    is_bound_E = (placement.num_replicas_E == 1) & (placement.expert_to_owner_E != rank)
    anchor_E = on_device(np.append(np.where(is_bound_E, placement.expert_to_owner_E, -1), -1), topk_ids_TK.device)
    if not topk_ids_TK.numel():
        return topk_ids_TK[:, :1]
    anchors_TK = anchor_E[topk_ids_TK].amax(dim=1, keepdim=True)
    return torch.where(anchors_TK < 0, rank, anchors_TK)


def exchange_metadata(
    transport: Transport, messages_R: list[Tensor], own: Tensor, sizes_R: Sequence[int], op: str, where: str
) -> list[Tensor]:
    """Send a 1-D message to each other rank and receive those of `sizes_R`; `own` stands for this rank's in the result."""
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
