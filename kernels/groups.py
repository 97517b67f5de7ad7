"""Ragged groups of rows: their checks, their slices, and the weight gradient of one group.

Shapes: n rows of one group, I input width, O output width.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from torch import Tensor

from .types import Matrices


def check_groups(num_rows: int, weights: Matrices, group_sizes: Sequence[int], overwrite: Sequence[bool] | None = None) -> None:
    """Raise ValueError unless group sizes, weights, rows and overwrite flags match."""
    if len(weights) != len(group_sizes):
        raise ValueError(f"{len(group_sizes)} group sizes but {len(weights)} weights; give one weight per group")
    if min(group_sizes, default=0) < 0 or sum(group_sizes) != num_rows:
        raise ValueError(f"group sizes sum to {sum(group_sizes)}, but there are {num_rows} rows; sizes must be >= 0 and add up")
    if overwrite is not None and len(overwrite) != len(group_sizes):
        raise ValueError(f"{len(group_sizes)} group sizes but {len(overwrite)} marks of what to overwrite; give one per group")


def group_slices(group_sizes: Sequence[int]) -> Iterator[tuple[int, slice]]:
    """Yield (group, slice of its rows) for every group that has rows."""
    start = 0
    for group, size in enumerate(group_sizes):
        if size > 0:
            yield group, slice(start, start + size)
        start += size


def add_wgrad(grad_OI: Tensor, dy_nO: Tensor, x_nI: Tensor, *, alpha: float = 1.0, overwrite: bool = False) -> None:
    """`grad_OI += alpha * dy_nO.T @ x_nI`, or `=` to overwrite, in the dtype of `grad_OI`, for the rows of one group."""
    if dy_nO.dtype != grad_OI.dtype:
        # No CPU product has half-precision operands and an fp32 result; rounding the product would lose bits of the sum.
        dy_nO, x_nI = dy_nO.to(grad_OI.dtype), x_nI.to(grad_OI.dtype)
    grad_OI.addmm_(dy_nO.t(), x_nI, beta=0 if overwrite else 1, alpha=alpha)


def zero_empty(grads: Matrices, group_sizes: Sequence[int], overwrite: Sequence[bool] | None) -> None:
    """Set to zero the gradients that are to be overwritten and whose groups have no rows."""
    if overwrite is None or 0 not in group_sizes:
        return
    for grad, size, is_fresh in zip(grads, group_sizes, overwrite, strict=True):
        if is_fresh and size == 0:
            grad.zero_()
