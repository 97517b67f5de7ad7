"""Ragged matrix products, one per group of rows: forward, input gradient, weight gradient.

Rows are sorted by group; `group_sizes` (host integers) says how many rows each group has. Weights and their gradients are 2-D
tensors, one per group (bank rows, slots, or any views, so that nothing is packed), or one stack of them. On the CPU one compiled
call computes the fp32 products of all groups (grouped_gemm_cpu.py); the torch twin makes one call per group that has rows.

Shapes: N rows, I input width, O output width, weights and gradients [O, I] each, or stacked [G, O, I].
"""

from __future__ import annotations

from array import array
from collections.abc import Callable, Sequence
from functools import cache, partial

import torch
from torch import Tensor

from .checks import check_devices, check_floating
from .cpu.operands import addresses_of, words_of_rows
from .groups import add_wgrad, check_groups, zero_empty
from .types import BACKWARD, DGRAD, FORWARD, WGRAD, Matrices


def grouped_gemm(x_NI: Tensor, weights: Matrices, group_sizes: Sequence[int], *, out: Tensor | None = None) -> Tensor:
    """Return `y_NO`: for each group g, its rows times `weights[g].T` ([O, I]). No autograd."""
    y_NO = _new_rows(x_NI, weights, group_sizes, 0) if out is None else out
    if _multiply_compiled(FORWARD, (y_NO, x_NI), (weights,), group_sizes):
        return y_NO
    check_groups(x_NI.shape[0], weights, group_sizes)
    _check_operands(x_NI, weights, y_NO)
    if x_NI.device.type != "cuda" or not len(weights):
        return grouped_gemm_torch(x_NI, weights, group_sizes, out=y_NO)
    from .grouped_gemm_triton import grouped_gemm_triton

    return grouped_gemm_triton(x_NI, weights, group_sizes, out=y_NO)


def grouped_gemm_dgrad(dy_NO: Tensor, weights: Matrices, group_sizes: Sequence[int], *, out: Tensor | None = None) -> Tensor:
    """Return `dx_NI`: for each group g, its rows of `dy_NO` times `weights[g]` ([O, I])."""
    dx_NI = _new_rows(dy_NO, weights, group_sizes, 1) if out is None else out
    if _multiply_compiled(DGRAD, (dy_NO, dx_NI), (weights,), group_sizes):
        return dx_NI
    check_groups(dy_NO.shape[0], weights, group_sizes)
    _check_operands(dy_NO, weights, dx_NI)
    if dy_NO.device.type != "cuda" or not len(weights):
        return grouped_gemm_dgrad_torch(dy_NO, weights, group_sizes, out=dx_NI)
    from .grouped_gemm_triton import grouped_gemm_dgrad_triton

    return grouped_gemm_dgrad_triton(dy_NO, weights, group_sizes, out=dx_NI)


def grouped_gemm_wgrad(
    dy_NO: Tensor,
    x_NI: Tensor,
    group_sizes: Sequence[int],
    grads: Matrices,
    *,
    alpha: float = 1.0,
    overwrite: Sequence[bool] | None = None,
) -> None:
    """Add `alpha * dy.T @ x` of each group to `grads[g]` ([O, I]) in place; those of empty groups are left unchanged.

    Products are accumulated in the dtype of the gradients (fp32), also for half-precision rows. The gradients of groups marked in
    `overwrite` are uninitialised: they are set, not added to, and set to zero where the group has no rows.
    """
    if _multiply_compiled(WGRAD, (dy_NO, x_NI), (grads,), group_sizes, alpha, overwrite):
        return
    check_groups(dy_NO.shape[0], grads, group_sizes, overwrite)
    _check_operands(dy_NO, [x_NI], None)
    _check_matrices("gradient", grads, dy_NO.device, None)
    if dy_NO.device.type != "cuda" or not len(grads):
        grouped_gemm_wgrad_torch(dy_NO, x_NI, group_sizes, grads, alpha=alpha, overwrite=overwrite)
        return
    from .grouped_gemm_triton import grouped_gemm_wgrad_triton

    grouped_gemm_wgrad_triton(dy_NO, x_NI, group_sizes, grads, alpha=alpha, overwrite=overwrite)


def grouped_gemm_backward(
    dy_NO: Tensor,
    x_NI: Tensor,
    weights: Matrices,
    group_sizes: Sequence[int],
    grads: Matrices,
    *,
    alpha: float = 1.0,
    overwrite: Sequence[bool] | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """Add to `grads` like `grouped_gemm_wgrad`, then return `dx_NI` like `grouped_gemm_dgrad`.

    In fp32 on the CPU one compiled call computes both products of a group before those of the next, while the group's rows are in
    the caches.
    """
    dx_NI = _new_rows(dy_NO, weights, group_sizes, 1) if out is None else out
    if _multiply_compiled(BACKWARD, (dy_NO, x_NI, dx_NI), (weights, grads), group_sizes, alpha, overwrite):
        return dx_NI
    # Checked before anything is written.
    check_groups(dy_NO.shape[0], weights, group_sizes)
    _check_operands(dy_NO, weights, dx_NI)
    grouped_gemm_wgrad(dy_NO, x_NI, group_sizes, grads, alpha=alpha, overwrite=overwrite)
    return grouped_gemm_dgrad(dy_NO, weights, group_sizes, out=dx_NI)


def _multiply_compiled(
    kind: int,
    rows: tuple[Tensor, ...],
    matrices: tuple[Matrices, ...],
    group_sizes: Sequence[int],
    alpha: float = 1.0,
    overwrite: Sequence[bool] | None = None,
) -> bool:
    """Compute a product in one compiled call; return False, having done nothing, if it does not support these operands.

    `rows` are y or dy, then x, or dx, or both; `matrices` weights, or gradients, or both.
    """
    num_rows, num_groups = rows[0].shape[0], len(group_sizes)
    row_words = words_of_rows(num_rows, *rows)
    if row_words is None:
        return False
    out_dim, in_dim = row_words[1], row_words[4]
    words = list(group_sizes)
    for part in matrices:
        addresses = addresses_of(part, num_groups, out_dim, in_dim)
        if addresses is None:
            return False
        words += addresses
    # Without a second operand of a kind the first is passed twice.
    if kind != BACKWARD:
        row_words += row_words[3:]
        words += words[num_groups:]
    words += [False] * num_groups if overwrite is None else map(bool, overwrite)
    multiply = compiled_products()
    if multiply is None or row_words[7] != in_dim or len(words) != 4 * num_groups:
        return False
    task = array("q", words)
    return multiply(kind, num_rows, num_groups, task.buffer_info()[0], float(alpha), *row_words)


@cache
def compiled_products() -> Callable[..., bool] | None:
    """The compiled routine with its BLAS; None where torch's library has no usable BLAS. Imports numba on first use."""
    from .cpu.blas import sgemm_address
    from .grouped_gemm_cpu import multiply_groups

    return partial(multiply_groups, sgemm_address()) if sgemm_address() else None


def _new_rows(rows: Tensor, weights: Matrices, group_sizes: Sequence[int], dim: int) -> Tensor:
    """Uninitialised rows, as many as `rows`, whose width is dimension `dim` of the weights; width 0 without groups."""
    if not len(weights):
        check_groups(rows.shape[0], weights, group_sizes)
    return rows.new_empty(rows.shape[0], weights[0].shape[dim] if len(weights) else 0)


def grouped_gemm_torch(x_NI: Tensor, weights: Matrices, group_sizes: Sequence[int], *, out: Tensor | None = None) -> Tensor:
    """Torch twin of `grouped_gemm`."""
    y_NO = _new_rows(x_NI, weights, group_sizes, 0) if out is None else out
    for x_nI, weight, y_nO in zip(_split(x_NI, group_sizes), weights, _split(y_NO, group_sizes), strict=True):
        torch.mm(x_nI, weight.t(), out=y_nO)
    return y_NO


def grouped_gemm_dgrad_torch(
    dy_NO: Tensor, weights: Matrices, group_sizes: Sequence[int], *, out: Tensor | None = None
) -> Tensor:
    """Torch twin of `grouped_gemm_dgrad`."""
    dx_NI = _new_rows(dy_NO, weights, group_sizes, 1) if out is None else out
    for dy_nO, weight, dx_nI in zip(_split(dy_NO, group_sizes), weights, _split(dx_NI, group_sizes), strict=True):
        torch.mm(dy_nO, weight, out=dx_nI)
    return dx_NI


def grouped_gemm_wgrad_torch(
    dy_NO: Tensor,
    x_NI: Tensor,
    group_sizes: Sequence[int],
    grads: Matrices,
    *,
    alpha: float = 1.0,
    overwrite: Sequence[bool] | None = None,
) -> None:
    """Torch twin of `grouped_gemm_wgrad`."""
    zero_empty(grads, group_sizes, overwrite)
    parts = zip(grads, _split(dy_NO, group_sizes), _split(x_NI, group_sizes), strict=True)
    for group, (grad, dy_nO, x_nI) in enumerate(parts):
        if group_sizes[group] > 0:
            add_wgrad(grad, dy_nO, x_nI, alpha=alpha, overwrite=overwrite is not None and overwrite[group])


def _split(rows: Tensor, group_sizes: Sequence[int]) -> Sequence[Tensor]:
    """Views of every group's rows, from one call: slicing costs more than 1 % of the small products of a narrow model."""
    return rows.split_with_sizes(list(group_sizes))


def _check_operands(rows: Tensor, matrices: Matrices, out: Tensor | None) -> None:
    """Raise ValueError unless all operands have one device and one floating dtype."""
    check_floating(rows=rows)
    check_devices(rows.device, out=out)
    _check_matrices("matrix", matrices, rows.device, rows.dtype)


def _check_matrices(what: str, matrices: Matrices, device: torch.device, dtype: torch.dtype | None) -> None:
    """Raise ValueError for a matrix on another device or of another dtype; dtype None accepts any."""
    for group, matrix in enumerate(matrices):
        if matrix.device != device:
            check_devices(device, **{f"{what} {group}": matrix})
        if dtype is not None and matrix.dtype != dtype:
            raise ValueError(f"{what} {group} is {matrix.dtype}, but the rows are {dtype}; cast one of them")
