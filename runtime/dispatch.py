"""Dispatch and combine: token rows go to the ranks that compute them, results come back.

A row crosses to a rank once, however many of its experts are computed there, and comes back once, already summed over
them with its gate weights. Combine is the transpose of dispatch, so each one's backward is the other's forward, and the
gate gradients travel with the rows of dispatch's backward.

Layouts, on the source rank:
    assignment a = t * K + k                      as the router made them
    "by destination": (destination, expert, token)  the order in which assignments are described to their destinations
    sent rows: (destination, token)               one for each destination of each token
and on the destination rank:
    received rows: (source, token)
    "by source": (source, expert, token)          the order in which descriptions arrive
    "slot-major": (expert, source, token)         the order of the expert stage: one contiguous group per local expert

Shape letters: T tokens, K choices, D model dim, E experts, R ranks, A assignments of this rank (T * K), P sent rows,
M received rows, N slot-major rows (assignments computed here).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from ..collectives import Transport, all_to_all_rows
from ..kernels import Bags, bags_of, gather_rows, sum_rows
from ..placement import Split
from .layer_pass import LayerPass

if TYPE_CHECKING:
    from .layer_runtime import LayerRuntime


@dataclass(frozen=True, eq=False)
class DispatchHandle:
    """Where every row of one forward went. Combine and both backwards follow it; it carries no gradient."""

    num_tokens: int  # T
    top_k: int  # K
    sent_token_ids_P: Tensor  # token of every sent row
    sent_bags: Bags  # sent rows of every token
    sent_rows_R: tuple[int, ...]  # rows sent to each rank, this one included
    sent_assignments_A: Tensor  # assignments by destination
    sent_assignments_R: tuple[int, ...]
    received_rows_R: tuple[int, ...]  # rows received from each rank
    received_assignments_R: tuple[int, ...]
    slot_major_N: Tensor  # position "by source" of every slot-major row
    row_ids_N: Tensor  # received row behind every slot-major row
    received_bags: Bags  # slot-major rows of every received row
    row_weights_N: Tensor  # gate weight of every slot-major row, fp32
    group_sizes: tuple[int, ...]  # rows of each local expert

    def sent_slices(self) -> list[slice]:
        """The sent rows to each rank."""
        return _slices(self.sent_rows_R)

    def received_slices(self) -> list[slice]:
        """The received rows from each rank."""
        return _slices(self.received_rows_R)


def build_handle(
    topk_ids_TK: Tensor, weights_TK: Tensor, split: Split, local_experts: Sequence[int], transport: Transport, op: str, where: str
) -> DispatchHandle:
    """Describe this rank's assignments to their destinations, and learn what comes here.

    Both sides know from the split how many assignments travel between them; how many *rows* those share is part of the
    description, so no sizes are exchanged beforehand.
    """
    rank, device = transport.rank, topk_ids_TK.device
    num_tokens, top_k = topk_ids_TK.shape
    sends_ER, recvs_RE = split.sends(rank), split.recvs(rank)

    # Phase 1: which assignment goes where. Expert by expert, tokens fill the destinations in rank order; those that must go
    # to a destination anyway, for an expert held only there, come where that destination's turn is, to share one row.
    anchors_TK = anchor_ranks(topk_ids_TK, split, rank)
    by_expert_A = (topk_ids_TK * transport.world_size + anchors_TK).flatten().argsort(stable=True)
    assignments_A = by_expert_A[segment_transpose(sends_ER, device)]
    assignments_R = tuple(int(n) for n in sends_ER.sum(axis=0))
    destinations_A = torch.repeat_interleave(torch.tensor(assignments_R, device=device), output_size=assignments_A.numel())

    # Phase 2: one row for each (destination, token), numbered in that order.
    keys_A = destinations_A * num_tokens + assignments_A // top_k
    is_sent = torch.zeros(transport.world_size * num_tokens, dtype=torch.bool, device=device)
    is_sent[keys_A] = True
    row_number = is_sent.cumsum(0)
    sent_row_A = row_number[keys_A] - 1
    sent_rows_R = tuple(is_sent.view(transport.world_size, num_tokens).sum(1).tolist())
    sent_token_ids_P = is_sent.nonzero().squeeze(1) % max(num_tokens, 1)

    # Phase 3: tell each destination, for its assignments in order, the row (from 0 for this pair of ranks) and the weight.
    first_row_R = torch.tensor(_starts(sent_rows_R), device=device)
    local_row_A = (sent_row_A - first_row_R[destinations_A]).to(torch.int32)
    weights_A = weights_TK.detach().float().flatten()[assignments_A]
    sent = [_describe(sent_rows_R[r], local_row_A[part], weights_A[part]) for r, part in enumerate(_slices(assignments_R))]
    received_assignments_R = tuple(int(n) for n in recvs_RE.sum(axis=1))
    received = [torch.empty(1 + 2 * n if n else 0, dtype=torch.int32, device=device) for n in received_assignments_R]
    pending = all_to_all_rows(transport, _but(rank, sent), _but(rank, received), op=op, where=where)
    received[rank] = sent[rank]
    pending.wait()

    # Phase 4: received rows are numbered through all sources; slot-major order regroups them by local expert.
    headers = [message[:1] for message in received if message.numel()]
    counts = iter(torch.cat(headers).tolist() if headers else [])
    received_rows_R = tuple(next(counts) if message.numel() else 0 for message in received)
    bodies = [message[1:].view(2, -1) for message in received]
    rows_by_source = torch.cat([body[0] + start for body, start in zip(bodies, _starts(received_rows_R), strict=True)])
    weights_by_source = torch.cat([body[1] for body in bodies]).view(torch.float32)
    slot_major_N = segment_transpose(recvs_RE, device)
    row_ids_N = rows_by_source[slot_major_N].long()
    return DispatchHandle(
        num_tokens=num_tokens,
        top_k=top_k,
        sent_token_ids_P=sent_token_ids_P,
        sent_bags=bags_of(sent_token_ids_P, num_tokens),
        sent_rows_R=sent_rows_R,
        sent_assignments_A=assignments_A,
        sent_assignments_R=assignments_R,
        received_rows_R=received_rows_R,
        received_assignments_R=received_assignments_R,
        slot_major_N=slot_major_N,
        row_ids_N=row_ids_N,
        received_bags=bags_of(row_ids_N, sum(received_rows_R)),
        row_weights_N=weights_by_source[slot_major_N],
        group_sizes=tuple(int(n) for n in recvs_RE.sum(axis=0)[list(local_experts)]),
    )


def anchor_ranks(topk_ids_TK: Tensor, split: Split, rank: int) -> Tensor:
    """A rank that each token's row goes to whatever the split says, int64 [T, 1]; `rank` itself where there is none.

    That is the highest remote rank that is the only holder of one of the token's experts.
    """
    placement = split.placement
    is_bound_E = (placement.num_replicas_E == 1) & (placement.expert_to_owner_E != rank)
    anchor_E = torch.from_numpy(np.where(is_bound_E, placement.expert_to_owner_E, -1)).to(topk_ids_TK.device)
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
    shifts = torch.repeat_interleave(
        torch.from_numpy(shifts_BA).to(device), torch.from_numpy(np.ascontiguousarray(sizes_BA)).to(device), output_size=total
    )
    return shifts + torch.arange(total, device=device)


def send_rows(x_TD: Tensor, handle: DispatchHandle, transport: Transport, op: str, where: str) -> Tensor:
    """Tokens to the ranks that compute them: [T, D] on the source to [M, D] on the destination."""
    rank = transport.rank
    sent, received = handle.sent_slices(), handle.received_slices()
    outgoing = [
        x_TD.new_empty(0) if r == rank else gather_rows(x_TD, handle.sent_token_ids_P[part]) for r, part in enumerate(sent)
    ]
    rows_MD = x_TD.new_empty(sum(handle.received_rows_R), x_TD.shape[1])
    incoming = [rows_MD[part] for part in received]
    pending = all_to_all_rows(transport, _but(rank, outgoing), _but(rank, incoming), op=op, where=where)
    gather_rows(x_TD, handle.sent_token_ids_P[sent[rank]], out=incoming[rank])
    pending.wait()
    return rows_MD


def return_rows(
    rows_MD: Tensor,
    handle: DispatchHandle,
    transport: Transport,
    op: str,
    where: str,
    gate_grads_N: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    """Rows back to their source, summed there over the ranks that worked on a token: [M, D] to [T, D].

    With `gate_grads_N`, one number per slot-major row travels along and comes out as [A], in router order.
    """
    rank = transport.rank
    sent, received = handle.sent_slices(), handle.received_slices()
    back_PD = rows_MD.new_empty(sum(handle.sent_rows_R), rows_MD.shape[1])
    outgoing = [[rows_MD[part]] for part in received]
    incoming = [[back_PD[part]] for part in sent]
    if gate_grads_N is not None:
        by_source = torch.empty_like(gate_grads_N)
        by_source[handle.slot_major_N] = gate_grads_N
        by_destination = gate_grads_N.new_empty(sum(handle.sent_assignments_R))
        own_out = _slices(handle.received_assignments_R)
        own_in = _slices(handle.sent_assignments_R)
        for r, (part_out, part_in) in enumerate(zip(own_out, own_in, strict=True)):
            outgoing[r].append(by_source[part_out])
            incoming[r].append(by_destination[part_in])
    pending = all_to_all_rows(transport, _but_lists(rank, outgoing), _but_lists(rank, incoming), op=op, where=where)
    for target, source in zip(incoming[rank], outgoing[rank], strict=True):
        target.copy_(source)
    pending.wait()
    x_TD = sum_rows(back_PD, handle.sent_bags)
    if gate_grads_N is None:
        return x_TD, None
    gate_grads_A = torch.empty_like(by_destination)
    gate_grads_A[handle.sent_assignments_A] = by_destination
    return x_TD, gate_grads_A


class _Dispatch(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x_TD: Tensor, weights_TK: Tensor, runtime: LayerRuntime, layer_pass: LayerPass
    ) -> tuple[Tensor, Tensor]:
        ctx.runtime, ctx.layer_pass = runtime, layer_pass
        transport, plan = runtime.group.tokens, layer_pass.plan
        with runtime.stage("dispatch"):
            if layer_pass.handle is None:
                assert plan.split is not None and layer_pass.topk_ids_TK is not None
                layer_pass.handle = build_handle(
                    layer_pass.topk_ids_TK,
                    weights_TK,
                    plan.split,
                    plan.experts_of(transport.rank),
                    transport,
                    layer_pass.op("describe"),
                    layer_pass.where,
                )
            handle = layer_pass.handle
            rows_MD = send_rows(x_TD, handle, transport, layer_pass.op("dispatch"), layer_pass.where)
            return gather_rows(rows_MD, handle.row_ids_N), handle.row_weights_N.clone()

    @staticmethod
    def backward(ctx: Any, dx_ND: Tensor, d_row_weights_N: Tensor) -> tuple[Tensor, Tensor, None, None]:
        layer_pass, transport = ctx.layer_pass, ctx.runtime.group.tokens
        handle, op = layer_pass.handle, layer_pass.op("dispatch_backward")
        with ctx.runtime.stage("dispatch"):
            rows_MD = sum_rows(dx_ND, handle.received_bags)
            dx_TD, gate_grads_A = return_rows(rows_MD, handle, transport, op, layer_pass.where, d_row_weights_N)
        assert gate_grads_A is not None
        return dx_TD, gate_grads_A.view(handle.num_tokens, handle.top_k), None, None


class _Combine(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, y_ND: Tensor, runtime: LayerRuntime, layer_pass: LayerPass) -> Tensor:
        ctx.runtime, ctx.layer_pass = runtime, layer_pass
        handle = layer_pass.handle
        assert handle is not None
        with runtime.stage("combine"):
            rows_MD = sum_rows(y_ND, handle.received_bags)
            return return_rows(rows_MD, handle, runtime.group.tokens, layer_pass.op("combine"), layer_pass.where)[0]

    @staticmethod
    def backward(ctx: Any, dy_TD: Tensor) -> tuple[Tensor, None, None]:
        layer_pass, transport = ctx.layer_pass, ctx.runtime.group.tokens
        handle, op = layer_pass.handle, layer_pass.op("combine_backward")
        with ctx.runtime.stage("combine"):
            rows_MD = send_rows(dy_TD.contiguous(), handle, transport, op, layer_pass.where)
            return gather_rows(rows_MD, handle.row_ids_N), None, None


def dispatch(x_TD: Tensor, weights_TK: Tensor, runtime: LayerRuntime, layer_pass: LayerPass) -> tuple[Tensor, Tensor]:
    """Send every token where its experts are computed: slot-major rows [N, D], and the gate weight of each [N]."""
    return _Dispatch.apply(x_TD, weights_TK, runtime, layer_pass)


def combine(y_ND: Tensor, runtime: LayerRuntime, layer_pass: LayerPass) -> Tensor:
    """Bring the weighted results home and add them up: slot-major [N, D] to [T, D], in the tokens' order."""
    return _Combine.apply(y_ND, runtime, layer_pass)


def _describe(num_rows: int, row_of_assignment: Tensor, weights: Tensor) -> Tensor:
    """One int32 message: the number of rows, then each assignment's row, then each weight's bits. Empty if there is none."""
    if not weights.numel():
        return row_of_assignment.new_empty(0)
    header = torch.tensor([num_rows], dtype=torch.int32, device=weights.device)
    return torch.cat([header, row_of_assignment, weights.view(torch.int32)])


def _starts(sizes: Sequence[int]) -> list[int]:
    return list(accumulate(sizes, initial=0))[:-1]


def _slices(sizes: Sequence[int]) -> list[slice]:
    return [slice(start, start + size) for start, size in zip(_starts(sizes), sizes, strict=True)]


def _but(rank: int, tensors: Sequence[Tensor]) -> list[list[Tensor]]:
    """One tensor per peer, none for `rank` itself."""
    return [[] if r == rank else [tensor] for r, tensor in enumerate(tensors)]


def _but_lists(rank: int, tensors: Sequence[Sequence[Tensor]]) -> list[Sequence[Tensor]]:
    return [[] if r == rank else part for r, part in enumerate(tensors)]
