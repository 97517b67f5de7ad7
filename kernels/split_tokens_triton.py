"""Triton kernels of `split_tokens`: a counting sort without atomics and without a host synchronisation.

Import this module lazily: it imports triton. Shapes: N assignments, E experts, R ranks, C blocks of assignments.
"""

# Triton infers the types of kernels; Python annotations cannot express them.
# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .histogram_triton import COUNT_BLOCK, count_blocks


@triton.jit
def _place_kernel(
    ids_ptr,
    before_ptr,
    piece_end_ptr,
    shift_ptr,
    order_ptr,
    num_rows,
    num_experts,
    num_ranks,
    BLOCK_N: tl.constexpr,
    LOG_RANKS: tl.constexpr,
):
    """Write each assignment of one block to its place in sending order.

    With ids = [1, 0, 1], flow = [[0, 1], [1, 1]]: the positions within the expert are [0, 0, 1], the destinations
    [0, 1, 1], the places [0, 1, 2].
    """
    block = tl.program_id(0).to(tl.int64)
    lane = tl.arange(0, BLOCK_N)
    n = block * BLOCK_N + lane
    ids = tl.load(ids_ptr + n, mask=n < num_rows, other=num_experts).to(tl.int32)
    is_row = ids < num_experts
    is_earlier = (ids[:, None] == ids[None, :]) & (lane[None, :] < lane[:, None])
    position = tl.sum(is_earlier.to(tl.int32), axis=1)
    position += tl.load(before_ptr + block * num_experts + ids, mask=is_row, other=0)

    # Bisection: the first rank whose piece of this expert ends beyond the position.
    low = tl.zeros((BLOCK_N,), dtype=tl.int32)
    high = tl.zeros((BLOCK_N,), dtype=tl.int32) + num_ranks - 1
    for _ in tl.static_range(LOG_RANKS):
        middle = (low + high) // 2
        end = tl.load(piece_end_ptr + ids * num_ranks + middle, mask=is_row, other=0)
        is_beyond = end > position
        high = tl.where(is_beyond, middle, high)
        low = tl.where(is_beyond, low, tl.minimum(middle + 1, high))
    place = position + tl.load(shift_ptr + ids * num_ranks + low, mask=is_row, other=0)
    tl.store(order_ptr + place, n, mask=is_row)


def split_tokens_triton(
    topk_ids_TK: Tensor, flow_ER: Tensor, anchors_TK: Tensor | None = None, *, num_sent: int | None = None
) -> Tensor:
    """Two launches and four small scans, all on the device; with anchors twice as many, for a second stable sort."""
    # A single column of a wider matrix flattens to a view with gaps.
    ids_N = topk_ids_TK.reshape(-1).contiguous()
    num_sent = ids_N.numel() if num_sent is None else num_sent
    if anchors_TK is None:
        return _split(ids_N, flow_ER, num_sent)
    anchors_N = anchors_TK.reshape(-1).contiguous()
    load_R = count_blocks(anchors_N, flow_ER.shape[1]).sum(dim=0, dtype=torch.int32)
    by_anchor_N = _split(anchors_N, load_R[:, None], ids_N.numel())
    return by_anchor_N[_split(ids_N[by_anchor_N], flow_ER, num_sent)]


def _split(ids_N: Tensor, flow_ER: Tensor, num_sent: int) -> Tensor:
    """Positions in ids_N in the order (rank, id, position)."""
    E, R = flow_ER.shape
    order_A = torch.empty(num_sent, dtype=torch.int64, device=ids_N.device)
    if num_sent == 0:
        return order_A
    counts_CE = count_blocks(ids_N, E)
    before_CE = counts_CE.cumsum(dim=0, dtype=torch.int32) - counts_CE

    flow_ER = flow_ER.to(torch.int32).contiguous()
    piece_end_ER = flow_ER.cumsum(dim=1, dtype=torch.int32)
    flow_RE = flow_ER.t().contiguous()
    run_start_RE = (flow_RE.view(-1).cumsum(dim=0, dtype=torch.int32) - flow_RE.view(-1)).view(R, E)
    shift_ER = (run_start_RE.t() - (piece_end_ER - flow_ER)).contiguous()
    _place_kernel[(counts_CE.shape[0],)](
        ids_N,
        before_CE,
        piece_end_ER,
        shift_ER,
        order_A,
        ids_N.numel(),
        E,
        R,
        BLOCK_N=COUNT_BLOCK,
        LOG_RANKS=max(1, R.bit_length()),
        num_warps=4,
    )
    return order_A
