"""Ragged matrix products, one per group of rows: forward, input gradient, weight gradient.

Rows are sorted by group; `group_sizes` (host integers) says how many rows each group has. Weights are a sequence of
2-D tensors, one per group: rows of a bank, slots, or any views of them, so that nothing is packed. The CPU twin is
one BLAS call per group that has rows.

Shapes: N rows, I input width, O output width, weights [O, I].
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from .checks import check_devices, check_floating


def grouped_gemm(x_NI: Tensor, weights: Sequence[Tensor], group_sizes: Sequence[int], *, out: Tensor | None = None) -> Tensor:
    """Return `y_NO`: for each group g, its rows times `weights[g].T` ([O, I]). No autograd."""
    check_groups(x_NI.shape[0], weights, group_sizes)
    _check_operands(x_NI, weights, out)
    if x_NI.device.type != "cuda":
        return grouped_gemm_torch(x_NI, weights, group_sizes, out=out)
    from .grouped_gemm_triton import grouped_gemm_triton

    return grouped_gemm_triton(x_NI, weights, group_sizes, out=out)


def grouped_gemm_dgrad(
    dy_NO: Tensor, weights: Sequence[Tensor], group_sizes: Sequence[int], *, out: Tensor | None = None
) -> Tensor:
    """Return `dx_NI`: for each group g, its rows of `dy_NO` times `weights[g]` ([O, I])."""
    check_groups(dy_NO.shape[0], weights, group_sizes)
    _check_operands(dy_NO, weights, out)
    if dy_NO.device.type != "cuda":
        return grouped_gemm_dgrad_torch(dy_NO, weights, group_sizes, out=out)
    from .grouped_gemm_triton import grouped_gemm_dgrad_triton

    return grouped_gemm_dgrad_triton(dy_NO, weights, group_sizes, out=out)


def grouped_gemm_wgrad(
    dy_NO: Tensor,
    x_NI: Tensor,
    group_sizes: Sequence[int],
    grads: Sequence[Tensor],
    *,
    alpha: float = 1.0,
    overwrite: Sequence[bool] | None = None,
) -> None:
    """Add `alpha * dy.T @ x` of each group to `grads[g]` ([O, I]) in place; empty groups leave theirs untouched.

    Products are accumulated in the dtype of the gradients (fp32), also for half-precision rows. Groups marked in `overwrite`
    have buffers that hold nothing yet: theirs are set, not added to, and set to zero where the group has no rows.
    """
    check_groups(dy_NO.shape[0], grads, group_sizes)
    _check_operands(dy_NO, [x_NI], None)
    check_devices(dy_NO.device, **{f"gradient {group}": grad for group, grad in enumerate(grads)})
    if dy_NO.device.type != "cuda":
        grouped_gemm_wgrad_torch(dy_NO, x_NI, group_sizes, grads, alpha=alpha, overwrite=overwrite)
        return
    from .grouped_gemm_triton import grouped_gemm_wgrad_triton

    grouped_gemm_wgrad_triton(dy_NO, x_NI, group_sizes, grads, alpha=alpha, overwrite=overwrite)


def grouped_gemm_torch(
    x_NI: Tensor, weights: Sequence[Tensor], group_sizes: Sequence[int], *, out: Tensor | None = None
) -> Tensor:
    """Torch twin of `grouped_gemm`."""
    y_NO = x_NI.new_empty(x_NI.shape[0], weights[0].shape[0]) if out is None else out
    for group, rows in group_slices(group_sizes):
        torch.mm(x_NI[rows], weights[group].t(), out=y_NO[rows])
    return y_NO


def grouped_gemm_dgrad_torch(
    dy_NO: Tensor, weights: Sequence[Tensor], group_sizes: Sequence[int], *, out: Tensor | None = None
) -> Tensor:
    """Torch twin of `grouped_gemm_dgrad`."""
    dx_NI = dy_NO.new_empty(dy_NO.shape[0], weights[0].shape[1]) if out is None else out
    for group, rows in group_slices(group_sizes):
        torch.mm(dy_NO[rows], weights[group], out=dx_NI[rows])
    return dx_NI


def grouped_gemm_wgrad_torch(
    dy_NO: Tensor,
    x_NI: Tensor,
    group_sizes: Sequence[int],
    grads: Sequence[Tensor],
    *,
    alpha: float = 1.0,
    overwrite: Sequence[bool] | None = None,
) -> None:
    """Torch twin of `grouped_gemm_wgrad`."""
    zero_empty(grads, group_sizes, overwrite)
    for group, rows in group_slices(group_sizes):
        is_fresh = overwrite is not None and overwrite[group]
        add_wgrad(grads[group], dy_NO[rows], x_NI[rows], alpha=alpha, overwrite=is_fresh)


def add_wgrad(grad_OI: Tensor, dy_nO: Tensor, x_nI: Tensor, *, alpha: float = 1.0, overwrite: bool = False) -> None:
    """`grad_OI += alpha * dy_nO.T @ x_nI`, or `=` to overwrite, in the dtype of `grad_OI`, for the rows of one group."""
    # No CPU product takes half-precision operands and an fp32 result, and rounding the product would lose the sum's bits.
    grad_OI.addmm_(dy_nO.to(grad_OI.dtype).t(), x_nI.to(grad_OI.dtype), beta=0 if overwrite else 1, alpha=alpha)


def zero_empty(grads: Sequence[Tensor], group_sizes: Sequence[int], overwrite: Sequence[bool] | None) -> None:
    """Set to zero the gradients that are to be overwritten and whose groups have no rows to do it with."""
    for grad, size, is_fresh in zip(grads, group_sizes, overwrite or (), strict=overwrite is not None):
        if is_fresh and size == 0:
            grad.zero_()


def group_slices(group_sizes: Sequence[int]) -> Iterator[tuple[int, slice]]:
    """Yield (group, slice of its rows) for every group that has rows."""
    start = 0
    for group, size in enumerate(group_sizes):
        if size > 0:
            yield group, slice(start, start + size)
        start += size


def check_groups(num_rows: int, weights: Sequence[Tensor], group_sizes: Sequence[int]) -> None:
    """Raise ValueError unless sizes, weights and rows belong together."""
    if len(weights) != len(group_sizes):
        raise ValueError(f"{len(group_sizes)} group sizes but {len(weights)} weights; give one weight per group")
    if min(group_sizes, default=0) < 0 or sum(group_sizes) != num_rows:
        raise ValueError(f"group sizes sum to {sum(group_sizes)}, but there are {num_rows} rows; sizes must be >= 0 and add up")


def _check_operands(rows: Tensor, matrices: Sequence[Tensor], out: Tensor | None) -> None:
    """Raise ValueError unless everything that is multiplied has one device and one floating dtype."""
    check_floating(rows=rows)
    check_devices(rows.device, out=out, **{f"matrix {group}": matrix for group, matrix in enumerate(matrices)})
    for group, matrix in enumerate(matrices):
        if matrix.dtype != rows.dtype:
            raise ValueError(f"matrix {group} is {matrix.dtype}, but the rows are {rows.dtype}; cast one of them")
