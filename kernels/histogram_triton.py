"""Triton kernel of `histogram`, which counts block by block, without atomics. Import this module lazily: it imports triton.

Shapes: N ids, B bins, C blocks of ids.
"""

# Triton infers the types of kernels; Python annotations cannot express them.
# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

COUNT_BLOCK = 128  # ids per program


@triton.jit
def _count_kernel(ids_ptr, counts_ptr, num_ids, num_bins, BLOCK_N: tl.constexpr, BLOCK_B: tl.constexpr):
    """Count each bin's ids in one block. With ids = [1, 0, 1]: counts = [1, 2]."""
    block = tl.program_id(0).to(tl.int64)
    n = block * BLOCK_N + tl.arange(0, BLOCK_N)
    ids = tl.load(ids_ptr + n, mask=n < num_ids, other=-1).to(tl.int32)
    for start in range(0, num_bins, BLOCK_B):
        b = start + tl.arange(0, BLOCK_B)
        counts = tl.sum((ids[:, None] == b[None, :]).to(tl.int32), axis=0)
        tl.store(counts_ptr + block * num_bins + b, counts, mask=b < num_bins)


def count_blocks(ids_N: Tensor, num_bins: int) -> Tensor:
    """Launch `_count_kernel`: `counts_CB` (int32) of every `COUNT_BLOCK` ids."""
    num_blocks = triton.cdiv(ids_N.numel(), COUNT_BLOCK)
    counts_CB = torch.empty(num_blocks, num_bins, dtype=torch.int32, device=ids_N.device)
    if counts_CB.numel():
        block_b = min(triton.next_power_of_2(num_bins), 64)
        _count_kernel[(num_blocks,)](ids_N, counts_CB, ids_N.numel(), num_bins, BLOCK_N=COUNT_BLOCK, BLOCK_B=block_b, num_warps=4)
    return counts_CB


def histogram_triton(ids: Tensor, num_bins: int) -> Tensor:
    """One launch, then a sum over blocks; integer sums do not depend on the order."""
    return count_blocks(ids.reshape(-1).contiguous(), num_bins).sum(dim=0, dtype=torch.int64)
