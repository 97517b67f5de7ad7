"""Triton kernels of `gather_rows` and `sum_rows`. Import this module lazily: it imports triton.

Shapes: M rows on the token side, N routed rows, D model dim.
"""

# Triton infers the types of kernels; Python annotations cannot express them.
# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .checks import check_out, unit_stride
from .types import Bags

# Elements of one program's tile: enough bytes in flight to saturate memory, few enough registers for 8 warps.
_TILE_ELEMENTS = 4096


@triton.jit
def _gather_rows_kernel(
    x_ptr,
    beside_ptr,
    ids_ptr,
    out_ptr,
    num_rows,
    num_x,
    width,
    stride_x,
    stride_beside,
    stride_out,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Copy rows of x followed by beside. With ids = [2, 0] and three rows of x: out[0] = x[2], out[1] = x[0]."""
    n = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    d = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    mask = (n < num_rows)[:, None] & (d < width)[None, :]
    ids = tl.load(ids_ptr + n, mask=n < num_rows, other=0).to(tl.int64)
    # Two loads, one of them masked off: selecting a pointer per row would lose the alignment that wide loads need.
    is_x = (ids < num_x)[:, None]
    rows = tl.load(x_ptr + ids[:, None] * stride_x + d[None, :], mask=mask & is_x)
    others = tl.load(beside_ptr + (ids - num_x)[:, None] * stride_beside + d[None, :], mask=mask & ~is_x)
    rows = tl.where(is_x, rows, others)
    tl.store(out_ptr + n[:, None] * stride_out + d[None, :], rows, mask=mask)


@triton.jit
def _sum_rows_kernel(
    rows_ptr,
    beside_ptr,
    indices_ptr,
    offsets_ptr,
    out_ptr,
    num_x,
    width,
    stride_rows,
    stride_beside,
    stride_out,
    ACCUMULATE: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Sum one bag, in its order. With indices = [1, 0, 2], offsets = [0, 1, 1, 3]:

    out[0] = rows[1]; out[1] = 0; out[2] = rows[0] + rows[2].
    """
    m = tl.program_id(0).to(tl.int64)
    d = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    total = tl.zeros((BLOCK_D,), dtype=ACCUMULATE)
    for i in range(tl.load(offsets_ptr + m), tl.load(offsets_ptr + m + 1)):
        n = tl.load(indices_ptr + i).to(tl.int64)
        source = tl.where(n < num_x, rows_ptr + n * stride_rows, beside_ptr + (n - num_x) * stride_beside)
        total += tl.load(source + d, mask=d < width, other=0.0).to(ACCUMULATE)
    tl.store(out_ptr + m * stride_out + d, total.to(out_ptr.dtype.element_ty), mask=d < width)


def gather_rows_triton(x_MD: Tensor, row_ids_N: Tensor, *, beside: Tensor | None = None, out: Tensor | None = None) -> Tensor:
    """Launch `_gather_rows_kernel`."""
    x_MD = unit_stride(x_MD)
    beside = x_MD[:0] if beside is None else unit_stride(beside)
    N, D = row_ids_N.numel(), x_MD.shape[1]
    out = x_MD.new_empty(N, D) if out is None else out
    check_out(out, (N, D), x_MD)
    if N == 0 or D == 0:
        return out
    block_d = min(triton.next_power_of_2(D), _TILE_ELEMENTS)
    block_n = max(1, min(_TILE_ELEMENTS // block_d, triton.next_power_of_2(N)))
    grid = (triton.cdiv(N, block_n), triton.cdiv(D, block_d))
    _gather_rows_kernel[grid](
        x_MD,
        beside,
        row_ids_N.contiguous(),
        out,
        N,
        x_MD.shape[0],
        D,
        x_MD.stride(0),
        beside.stride(0),
        out.stride(0),
        BLOCK_N=block_n,
        BLOCK_D=block_d,
        num_warps=8,
    )
    return out


def sum_rows_triton(rows_ND: Tensor, bags: Bags, *, beside: Tensor | None = None, out: Tensor | None = None) -> Tensor:
    """Launch `_sum_rows_kernel`."""
    rows_ND = unit_stride(rows_ND)
    beside = rows_ND[:0] if beside is None else unit_stride(beside)
    D = rows_ND.shape[1]
    out = rows_ND.new_empty(bags.num_bags, D) if out is None else out
    check_out(out, (bags.num_bags, D), rows_ND)
    if out.numel() == 0:
        return out
    block_d = min(triton.next_power_of_2(D), _TILE_ELEMENTS)
    _sum_rows_kernel[(bags.num_bags, triton.cdiv(D, block_d))](
        rows_ND,
        beside,
        bags.indices.contiguous(),
        bags.offsets.contiguous(),
        out,
        rows_ND.shape[0],
        D,
        rows_ND.stride(0),
        beside.stride(0),
        out.stride(0),
        ACCUMULATE=tl.float64 if rows_ND.dtype == torch.float64 else tl.float32,
        BLOCK_D=block_d,
        num_warps=min(8, max(1, block_d // 128)),
    )
    return out
