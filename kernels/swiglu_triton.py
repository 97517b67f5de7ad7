"""Triton kernels of `swiglu` and `swiglu_backward`. Import this module lazily: it imports triton.

Shapes: N rows, F expert ffn dim.
"""

# Triton infers the types of kernels; Python annotations cannot express them.
# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .checks import unit_stride
from .types import SwigluGrads

_FORWARD_TILE = 4096
_BACKWARD_TILE = 2048


@triton.jit
def _swiglu_kernel(
    gate_up_ptr,
    weights_ptr,
    h_ptr,
    num_rows,
    width,
    stride_gate_up,
    stride_h,
    HAS_WEIGHTS: tl.constexpr,
    COMPUTE: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_F: tl.constexpr,
):
    """h = silu(gate) * up * weight. With gate_up = [[0, 2, 3, 4]], weight = [0.5]: h = [[0, 0.5 * 4 * 2 * sigmoid(2)]]."""
    n = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    f = tl.program_id(1) * BLOCK_F + tl.arange(0, BLOCK_F)
    mask = (n < num_rows)[:, None] & (f < width)[None, :]
    offsets = n[:, None] * stride_gate_up + f[None, :]
    gate = tl.load(gate_up_ptr + offsets, mask=mask, other=0.0).to(COMPUTE)
    up = tl.load(gate_up_ptr + offsets + width, mask=mask, other=0.0).to(COMPUTE)
    h = gate / (1.0 + tl.exp(-gate)) * up
    if HAS_WEIGHTS:
        h *= tl.load(weights_ptr + n, mask=n < num_rows, other=0.0).to(COMPUTE)[:, None]
    tl.store(h_ptr + n[:, None] * stride_h + f[None, :], h.to(h_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _swiglu_backward_kernel(
    dh_ptr,
    gate_up_ptr,
    weights_ptr,
    dgate_up_ptr,
    dweights_ptr,
    h_ptr,
    num_rows,
    width,
    stride_dh,
    stride_gate_up,
    stride_dgate_up,
    stride_h,
    HAS_WEIGHTS: tl.constexpr,
    COMPUTE: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_F: tl.constexpr,
):
    """Gradients of BLOCK_N whole rows, so that one program sums a row weight's gradient, in one fixed order.

    With dh = [[1]], gate_up = [[0, 4]], weight = [0.5]: dgate = 1 * 4 * 0.5 * 0.5, dup = 0, dweight = 0, h = 0.
    """
    n = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    is_row = n < num_rows
    if HAS_WEIGHTS:
        weight = tl.load(weights_ptr + n, mask=is_row, other=0.0).to(COMPUTE)[:, None]
    dweight = tl.zeros((BLOCK_N,), dtype=COMPUTE)
    for start in range(0, width, BLOCK_F):
        f = start + tl.arange(0, BLOCK_F)
        mask = is_row[:, None] & (f < width)[None, :]
        offsets = n[:, None] * stride_gate_up + f[None, :]
        gate = tl.load(gate_up_ptr + offsets, mask=mask, other=0.0).to(COMPUTE)
        up = tl.load(gate_up_ptr + offsets + width, mask=mask, other=0.0).to(COMPUTE)
        dh = tl.load(dh_ptr + n[:, None] * stride_dh + f[None, :], mask=mask, other=0.0).to(COMPUTE)
        sigmoid = 1.0 / (1.0 + tl.exp(-gate))
        activated = gate * sigmoid
        h, dup, dgate = activated * up, dh * activated, dh * up * (sigmoid + activated * (1.0 - sigmoid))
        if HAS_WEIGHTS:
            dweight += tl.sum(dh * h, axis=1)
            h, dup, dgate = h * weight, dup * weight, dgate * weight
        tl.store(h_ptr + n[:, None] * stride_h + f[None, :], h.to(h_ptr.dtype.element_ty), mask=mask)
        out = dgate_up_ptr + n[:, None] * stride_dgate_up + f[None, :]
        tl.store(out, dgate.to(dgate_up_ptr.dtype.element_ty), mask=mask)
        tl.store(out + width, dup.to(dgate_up_ptr.dtype.element_ty), mask=mask)
    if HAS_WEIGHTS:
        tl.store(dweights_ptr + n, dweight.to(dweights_ptr.dtype.element_ty), mask=is_row)


def swiglu_triton(gate_up_N2F: Tensor, row_weights_N: Tensor | None, h_NF: Tensor) -> Tensor:
    """Launch `_swiglu_kernel`; `h_NF` is written and returned."""
    gate_up_N2F = unit_stride(gate_up_N2F)
    N, F = h_NF.shape
    _check_unit_stride(h_NF=h_NF)
    if h_NF.numel() == 0:
        return h_NF
    block_f = min(triton.next_power_of_2(F), _FORWARD_TILE)
    block_n = max(1, min(_FORWARD_TILE // block_f, triton.next_power_of_2(N)))
    _swiglu_kernel[(triton.cdiv(N, block_n), triton.cdiv(F, block_f))](
        gate_up_N2F,
        None if row_weights_N is None else row_weights_N.contiguous(),
        h_NF,
        N,
        F,
        gate_up_N2F.stride(0),
        h_NF.stride(0),
        HAS_WEIGHTS=row_weights_N is not None,
        COMPUTE=_compute_type(gate_up_N2F),
        BLOCK_N=block_n,
        BLOCK_F=block_f,
        num_warps=8,
    )
    return h_NF


def swiglu_backward_triton(dh_NF: Tensor, gate_up_N2F: Tensor, row_weights_N: Tensor | None, grads: SwigluGrads) -> SwigluGrads:
    """Launch `_swiglu_backward_kernel`; `grads` is written and returned, its `h_NF` may be `dh_NF`."""
    dh_NF, gate_up_N2F = unit_stride(dh_NF), unit_stride(gate_up_N2F)
    N, F = dh_NF.shape
    _check_unit_stride(dgate_up_N2F=grads.dgate_up_N2F, h_NF=grads.h_NF)
    if grads.drow_weights_N is not None and not grads.drow_weights_N.is_contiguous():
        raise ValueError(
            f"drow_weights_N must be contiguous, got stride {grads.drow_weights_N.stride()}; pass a contiguous buffer"
        )
    if N == 0:
        return grads
    block_f = min(triton.next_power_of_2(F), _BACKWARD_TILE)
    block_n = max(1, min(_BACKWARD_TILE // block_f, triton.next_power_of_2(N)))
    _swiglu_backward_kernel[(triton.cdiv(N, block_n),)](
        dh_NF,
        gate_up_N2F,
        None if row_weights_N is None else row_weights_N.contiguous(),
        grads.dgate_up_N2F,
        grads.drow_weights_N,
        grads.h_NF,
        N,
        F,
        dh_NF.stride(0),
        gate_up_N2F.stride(0),
        grads.dgate_up_N2F.stride(0),
        grads.h_NF.stride(0),
        HAS_WEIGHTS=row_weights_N is not None,
        COMPUTE=_compute_type(gate_up_N2F),
        BLOCK_N=block_n,
        BLOCK_F=block_f,
        num_warps=8,
    )
    return grads


def _compute_type(x: Tensor) -> tl.dtype:
    """The dtype to compute in: fp64 for fp64, else fp32."""
    return tl.float64 if x.dtype == torch.float64 else tl.float32


def _check_unit_stride(**buffers: Tensor) -> None:
    """Raise ValueError for a buffer whose rows are not contiguous."""
    for name, buffer in buffers.items():
        if buffer.dim() != 2 or buffer.stride(1) != 1:
            raise ValueError(f"{name} must have contiguous rows, got shape {tuple(buffer.shape)} with stride {buffer.stride()}")
