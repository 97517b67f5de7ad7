"""The expert FFN over ragged groups: `y = (silu(x Wg) * (x Wu) * row_weight) Wd`, forward and backward.

The row weights (the router's gates) multiply h before the down product, so y comes out weighted and the gate
gradients fall out of the activation's backward. The forward keeps the pre-activation only; the backward recomputes h.

On the CPU rows are processed in chunks: a chunk is large enough for the matrix products to run at full rate, and small enough for
its intermediates to stay in one workspace, allocated once per call. In fp32 one compiled call processes all chunks
(grouped_ffn_cpu.py); the torch twin makes one call per product. On other devices the ops run one after the other over all rows,
one launch each.

Shapes: N rows, D model dim, F expert ffn dim.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor

from .cpu.operands import address_of, addresses_of, words_of_rows
from .grouped_gemm import grouped_gemm, grouped_gemm_backward, grouped_gemm_dgrad, grouped_gemm_wgrad
from .groups import add_wgrad, check_groups, group_slices, zero_empty
from .swiglu import serves_threads, swiglu, swiglu_backward
from .types import FFNWeights, GroupedFFNGrads, GroupedFFNOutput, SwigluGrads

# Upper bound on the rows of one chunk.
_CHUNK_ROWS = 2048


def grouped_ffn(
    x_ND: Tensor,
    row_weights_N: Tensor,
    weights: FFNWeights,
    group_sizes: Sequence[int],
    *,
    out: GroupedFFNOutput | None = None,
) -> GroupedFFNOutput:
    """Run each group's rows through its expert; rows are sorted by group. No autograd. `out` names buffers to fill."""
    out = GroupedFFNOutput.empty(x_ND, weights) if out is None else out
    operands = _compiled_operands(out.gate_up_N2F, (x_ND, out.y_ND), (row_weights_N,), (weights,), len(group_sizes))
    if operands is not None and _run_compiled(out.gate_up_N2F, operands, group_sizes):
        return out
    check_groups(x_ND.shape[0], weights.gate_up, group_sizes)
    if not len(group_sizes):
        return out
    if x_ND.device.type == "cpu":
        grouped_ffn_torch(x_ND, row_weights_N, weights, group_sizes, out=out)
    else:
        grouped_gemm(x_ND, weights.gate_up, group_sizes, out=out.gate_up_N2F)
        grouped_gemm(swiglu(out.gate_up_N2F, row_weights_N), weights.down, group_sizes, out=out.y_ND)
    return out


def grouped_ffn_backward(
    dy_ND: Tensor,
    x_ND: Tensor,
    gate_up_N2F: Tensor,
    row_weights_N: Tensor,
    weights: FFNWeights,
    grads: FFNWeights | None,
    group_sizes: Sequence[int],
    *,
    alpha: float = 1.0,
    overwrite: Sequence[bool] | None = None,
    out: GroupedFFNGrads | None = None,
) -> GroupedFFNGrads:
    """Backward of `grouped_ffn`: returns the row gradients and adds `alpha` times the weight gradients to `grads`.

    `grads` holds fp32 views, one pair per group, added to in place; None when the experts are frozen. The gradients of groups
    without rows are left unchanged. `alpha` scales the weight gradients only. The gradients of groups marked in `overwrite` are
    uninitialised: they are set, not added to, and set to zero where the group has no rows.
    """
    out = GroupedFFNGrads.empty(x_ND, row_weights_N) if out is None else out
    is_fresh = [False] * len(group_sizes) if overwrite is None else list(overwrite)
    rows = dy_ND, x_ND, gate_up_N2F, row_weights_N
    operands = _compiled_operands(
        gate_up_N2F,
        (x_ND, dy_ND, out.dx_ND),
        (row_weights_N, out.drow_weights_N),
        (weights,) if grads is None else (weights, grads),
        len(group_sizes),
    )
    if operands is None or not _run_compiled(gate_up_N2F, operands, group_sizes, alpha, is_fresh):
        check_groups(x_ND.shape[0], weights.gate_up, group_sizes, is_fresh)
        if not len(group_sizes):
            return out
        if x_ND.device.type != "cpu":
            _backward_by_ops(*rows, weights, grads, group_sizes, alpha=alpha, overwrite=is_fresh, out=out)
            return out
        grouped_ffn_backward_torch(*rows, weights, grads, group_sizes, alpha=alpha, overwrite=is_fresh, out=out)
    if grads is not None:
        zero_empty(grads.gate_up, group_sizes, is_fresh)
        zero_empty(grads.down, group_sizes, is_fresh)
    return out


def _backward_by_ops(
    dy_ND: Tensor,
    x_ND: Tensor,
    gate_up_N2F: Tensor,
    row_weights_N: Tensor,
    weights: FFNWeights,
    grads: FFNWeights | None,
    group_sizes: Sequence[int],
    *,
    alpha: float,
    overwrite: Sequence[bool],
    out: GroupedFFNGrads,
) -> None:
    """The ops one after the other over all rows; the weight-gradient ops handle groups without rows."""
    dh_NF = grouped_gemm_dgrad(dy_ND, weights.down, group_sizes)
    buffers = SwigluGrads(torch.empty_like(gate_up_N2F), out.drow_weights_N, dh_NF)
    inner = swiglu_backward(dh_NF, gate_up_N2F, row_weights_N, out=buffers)
    dgate_up_N2F = inner.dgate_up_N2F
    if grads is None:
        grouped_gemm_dgrad(dgate_up_N2F, weights.gate_up, group_sizes, out=out.dx_ND)
        return
    how: dict[str, Any] = {"alpha": alpha, "overwrite": overwrite}
    grouped_gemm_backward(dgate_up_N2F, x_ND, weights.gate_up, group_sizes, grads.gate_up, **how, out=out.dx_ND)
    grouped_gemm_wgrad(dy_ND, inner.h_NF, group_sizes, grads.down, **how)


def grouped_ffn_torch(
    x_ND: Tensor, row_weights_N: Tensor, weights: FFNWeights, group_sizes: Sequence[int], *, out: GroupedFFNOutput
) -> None:
    """Torch twin of `grouped_ffn`."""
    chunks = list(_row_chunks(group_sizes))
    workspace = x_ND.new_empty(_max_rows(chunks), out.gate_up_N2F.shape[1] // 2)
    for group, rows in chunks:
        gate_up = out.gate_up_N2F[rows]
        torch.mm(x_ND[rows], weights.gate_up[group].t(), out=gate_up)
        h = swiglu(gate_up, row_weights_N[rows], out=workspace[: len(gate_up)])
        torch.mm(h, weights.down[group].t(), out=out.y_ND[rows])


def grouped_ffn_backward_torch(
    dy_ND: Tensor,
    x_ND: Tensor,
    gate_up_N2F: Tensor,
    row_weights_N: Tensor,
    weights: FFNWeights,
    grads: FFNWeights | None,
    group_sizes: Sequence[int],
    *,
    alpha: float,
    overwrite: Sequence[bool],
    out: GroupedFFNGrads,
) -> None:
    """Torch twin of `grouped_ffn_backward`, including its handling of groups without rows."""
    is_fresh, F = list(overwrite), gate_up_N2F.shape[1] // 2
    chunks = list(_row_chunks(group_sizes))
    # One allocation for dh (later h) and dgate_up: the allocator then caches and reuses a single block.
    max_rows = _max_rows(chunks)
    dh_buffer, dgate_up_buffer = x_ND.new_empty(3 * max_rows * F).split([max_rows * F, 2 * max_rows * F])
    for group, rows in chunks:
        num_rows = rows.stop - rows.start
        dh = torch.mm(dy_ND[rows], weights.down[group], out=dh_buffer[: num_rows * F].view(num_rows, F))
        dgate_up = dgate_up_buffer[: num_rows * 2 * F].view(num_rows, 2 * F)
        buffers = SwigluGrads(dgate_up_N2F=dgate_up, drow_weights_N=out.drow_weights_N[rows], h_NF=dh)
        inner = swiglu_backward(dh, gate_up_N2F[rows], row_weights_N[rows], out=buffers)
        torch.mm(inner.dgate_up_N2F, weights.gate_up[group], out=out.dx_ND[rows])
        if grads is not None:
            add_wgrad(grads.down[group], dy_ND[rows], inner.h_NF, alpha=alpha, overwrite=is_fresh[group])
            add_wgrad(grads.gate_up[group], inner.dgate_up_N2F, x_ND[rows], alpha=alpha, overwrite=is_fresh[group])
            is_fresh[group] = False


@dataclass(frozen=True)
class CompiledOperands:
    """The addresses, widths and strides of a pass's operands, as the compiled routines take them."""

    rows: list[int]  # address, width and row stride of gate_up_N2F, x_ND, then y_ND, or dy_ND and dx_ND
    row_weights: list[int]  # address of row_weights_N, and in the backward of drow_weights_N
    matrices: list[int]  # addresses of every group's gate_up, then of down; in the backward of trained experts, their gradients'


def _compiled_operands(
    gate_up_N2F: Tensor,
    rows_ND: Sequence[Tensor],
    weights_N: Sequence[Tensor],
    parts: Sequence[FFNWeights],
    num_groups: int,
) -> CompiledOperands | None:
    """The operands as words, if the compiled routines support them (fp32 on the CPU, plain layouts); else None."""
    N, wide = gate_up_N2F.shape
    rows = words_of_rows(N, gate_up_N2F, *rows_ND)
    # The activation pass takes contiguous rows whose gate and up halves are equally wide.
    if rows is None or wide % 2 or (rows[2] != wide and N > 1):
        return None
    D = rows[4]
    if any(width != D for width in rows[4::3]):
        return None
    row_weights, matrices = [], []
    for weights in weights_N:
        if (address := address_of(weights, (N,))) is None:
            return None
        row_weights.append(address)
    for part in parts:
        gate_up = addresses_of(part.gate_up, num_groups, wide, D)
        down = addresses_of(part.down, num_groups, D, wide // 2)
        if gate_up is None or down is None:
            return None
        matrices += [*gate_up, *down]
    return CompiledOperands(rows, row_weights, matrices)


def _run_compiled(
    gate_up_N2F: Tensor,
    operands: CompiledOperands,
    group_sizes: Sequence[int],
    alpha: float = 1.0,
    overwrite: Sequence[bool] = (),
) -> bool:
    """Run a pass as one compiled call; return False, having done nothing, if there is none or the groups do not fit the rows."""
    run = compiled_ffn() if serves_threads() else None
    return run is not None and run(gate_up_N2F, operands, group_sizes, _CHUNK_ROWS, alpha, overwrite)


@cache
def compiled_ffn() -> Callable[..., bool] | None:
    """The function that runs the compiled routines; None where torch's library has no usable BLAS.

    Imports numba on first use.
    """
    from .cpu.blas import sgemm_address
    from .grouped_ffn_cpu import run

    return run if sgemm_address() else None


def _row_chunks(group_sizes: Sequence[int]) -> Iterator[tuple[int, slice]]:
    """Yield (group, slice of rows); a group longer than `_CHUNK_ROWS` is split into equal chunks."""
    for group, rows in group_slices(group_sizes):
        size = rows.stop - rows.start
        num_parts = -(-size // _CHUNK_ROWS)
        for part in range(num_parts):
            yield group, slice(rows.start + size * part // num_parts, rows.start + size * (part + 1) // num_parts)


def _max_rows(chunks: Sequence[tuple[int, slice]]) -> int:
    """Rows of the largest chunk, 0 without chunks."""
    return max((rows.stop - rows.start for _, rows in chunks), default=0)
