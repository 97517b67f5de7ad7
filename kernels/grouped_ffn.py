"""The expert FFN over ragged groups: `y = (silu(x Wg) * (x Wu) * row_weight) Wd`, forward and backward.

The row weights (the router's gates) multiply h before the down product, so y comes out weighted and the gate
gradients fall out of the activation's backward. The forward keeps the pre-activation only; the backward recomputes h.

On the CPU rows go through in chunks: a chunk is large enough for the matrix products to run at full rate and small
enough for its intermediates to be reused from one workspace, allocated once per call. In fp32 all chunks are one compiled
call (grouped_ffn_cpu.py); the torch twin makes one for every product. Elsewhere the ops run one after the other over all
rows, each one launch.

Shapes: N rows, D model dim, F expert ffn dim.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .grouped_gemm import (
    add_wgrad,
    are_plain_matrices,
    are_plain_rows,
    check_groups,
    group_slices,
    grouped_gemm,
    grouped_gemm_dgrad,
    grouped_gemm_wgrad,
    has_blas,
    zero_empty,
)
from .swiglu import SwigluGrads, swiglu, swiglu_backward, takes_compiled_pass

# Upper bound on the rows of one chunk.
_CHUNK_ROWS = 2048


@dataclass(frozen=True)
class FFNWeights:
    """One gate_up [2F, D] and one down [D, F] matrix per group: weights, or the views their gradients are added to.

    Only `clamped_ffn` knows biases, gate_up_bias [2F] and down_bias [D] per group.
    """

    gate_up: Sequence[Tensor]
    down: Sequence[Tensor]
    gate_up_bias: Sequence[Tensor] = ()
    down_bias: Sequence[Tensor] = ()

    def __post_init__(self) -> None:
        if len(self.gate_up) != len(self.down):
            raise ValueError(f"{len(self.gate_up)} gate_up and {len(self.down)} down matrices; give one pair per group")
        biases = len(self.gate_up_bias), len(self.down_bias)
        if biases not in ((0, 0), (len(self.down), len(self.down))):
            raise ValueError(f"{biases[0]} gate_up and {biases[1]} down biases for {len(self.down)} groups; give all or none")

    def of_groups(self, groups: slice) -> FFNWeights:
        """Those of some of the groups."""
        return FFNWeights(self.gate_up[groups], self.down[groups], self.gate_up_bias[groups], self.down_bias[groups])


@dataclass(frozen=True)
class GroupedFFNOutput:
    """Forward result: the weighted output, and the pre-activation that the backward needs."""

    y_ND: Tensor
    gate_up_N2F: Tensor

    def of_rows(self, rows: slice) -> GroupedFFNOutput:
        """Those of some of the rows."""
        return GroupedFFNOutput(self.y_ND[rows], self.gate_up_N2F[rows])


@dataclass(frozen=True)
class GroupedFFNGrads:
    """Gradients of rows and row weights; weight gradients were added in place."""

    dx_ND: Tensor
    drow_weights_N: Tensor

    def of_rows(self, rows: slice) -> GroupedFFNGrads:
        """Those of some of the rows."""
        return GroupedFFNGrads(self.dx_ND[rows], self.drow_weights_N[rows])


def grouped_ffn(
    x_ND: Tensor,
    row_weights_N: Tensor,
    weights: FFNWeights,
    group_sizes: Sequence[int],
    *,
    out: GroupedFFNOutput | None = None,
) -> GroupedFFNOutput:
    """Run each group's rows through its expert; rows are sorted by group. No autograd. `out` names buffers to fill."""
    N, D = x_ND.shape
    # A rank may have no expert of a layer, and then no rows either.
    F = weights.down[0].shape[1] if len(weights.down) else 0
    if out is None:
        out = GroupedFFNOutput(y_ND=x_ND.new_empty(N, D), gate_up_N2F=x_ND.new_empty(N, 2 * F))
    if _takes_compiled(weights, out.gate_up_N2F, row_weights_N, x_ND, out.y_ND):
        from .grouped_ffn_cpu import forward_into

        if forward_into(out, x_ND, row_weights_N, weights, group_sizes, _CHUNK_ROWS):
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

    `grads` holds fp32 views, one pair per group, added to in place; None when the experts are frozen. Groups without
    rows leave theirs untouched. `alpha` scales the weight gradients only. Groups marked in `overwrite` have buffers that
    hold nothing yet: theirs are set, not added to, and set to zero where the group has no rows.
    """
    if out is None:
        out = GroupedFFNGrads(
            dx_ND=torch.empty_like(x_ND, memory_format=torch.contiguous_format), drow_weights_N=torch.empty_like(row_weights_N)
        )
    is_fresh = [False] * len(group_sizes) if overwrite is None else list(overwrite)
    rows = dy_ND, x_ND, gate_up_N2F, row_weights_N
    is_done = False
    if _takes_compiled(
        weights, gate_up_N2F, row_weights_N, x_ND, dy_ND, out.dx_ND, grads=grads, drow_weights_N=out.drow_weights_N
    ):
        from .grouped_ffn_cpu import backward_into

        is_done = backward_into(out, *rows, weights, grads, group_sizes, alpha, is_fresh, _CHUNK_ROWS)
    if not is_done:
        check_groups(x_ND.shape[0], weights.gate_up, group_sizes)
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
    """One op after the other over all rows; those of the weight gradients deal with groups that have no rows."""
    dh_NF = grouped_gemm_dgrad(dy_ND, weights.down, group_sizes)
    buffers = SwigluGrads(torch.empty_like(gate_up_N2F), out.drow_weights_N, dh_NF)
    inner = swiglu_backward(dh_NF, gate_up_N2F, row_weights_N, out=buffers)
    grouped_gemm_dgrad(inner.dgate_up_N2F, weights.gate_up, group_sizes, out=out.dx_ND)
    if grads is not None:
        grouped_gemm_wgrad(dy_ND, inner.h_NF, group_sizes, grads.down, alpha=alpha, overwrite=overwrite)
        grouped_gemm_wgrad(inner.dgate_up_N2F, x_ND, group_sizes, grads.gate_up, alpha=alpha, overwrite=overwrite)


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
    """Torch twin of `grouped_ffn_backward`, which itself deals with groups that have no rows."""
    is_fresh, F = list(overwrite), gate_up_N2F.shape[1] // 2
    chunks = list(_row_chunks(group_sizes))
    # One allocation for dh (later h) and dgate_up: the allocator keeps and recycles a single block.
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


def _takes_compiled(
    weights: FFNWeights,
    gate_up_N2F: Tensor,
    row_weights_N: Tensor,
    *rows_ND: Tensor,
    grads: FFNWeights | None = None,
    drow_weights_N: Tensor | None = None,
) -> bool:
    """Whether the compiled routines serve these: fp32 on the CPU, in plain layouts, between which the compiled swiglu runs."""
    (N, wide), D = gate_up_N2F.shape, rows_ND[0].shape[1]
    weights_N = [row_weights_N] if drow_weights_N is None else [row_weights_N, drow_weights_N]
    return (
        wide % 2 == 0
        and are_plain_rows(N, gate_up_N2F, *rows_ND)
        and all(rows.shape[1] == D for rows in rows_ND)
        and all(numbers.shape == (N,) for numbers in weights_N)
        and takes_compiled_pass(weights_N, gate_up_N2F)
        and all(
            len(part.gate_up) == len(weights.gate_up)
            and are_plain_matrices(part.gate_up, wide, D)
            and are_plain_matrices(part.down, D, wide // 2)
            for part in (weights, grads)
            if part is not None
        )
        and has_blas()
    )


def _row_chunks(group_sizes: Sequence[int]) -> Iterator[tuple[int, slice]]:
    """Yield (group, slice of rows); a group longer than `_CHUNK_ROWS` comes in equal parts."""
    for group, rows in group_slices(group_sizes):
        size = rows.stop - rows.start
        num_parts = -(-size // _CHUNK_ROWS)
        for part in range(num_parts):
            yield group, slice(rows.start + size * part // num_parts, rows.start + size * (part + 1) // num_parts)


def _max_rows(chunks: Sequence[tuple[int, slice]]) -> int:
    """Rows of the largest chunk, 0 without chunks."""
    return max((rows.stop - rows.start for _, rows in chunks), default=0)
