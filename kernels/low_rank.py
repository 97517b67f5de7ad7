"""Ragged products with matrices to which low-rank pairs are added: `y = x (W + scale * B A).T`, never forming the sum.

A pair costs 2 r (I + O) operations a row beside the 2 I O of its matrix. Its gradients are those of its two factors alone, so
that a frozen matrix needs none. Without a pair these are the products of grouped_gemm.py.

Shapes: N rows, I input width, O output width, r rank.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from .grouped_gemm import grouped_gemm, grouped_gemm_dgrad, grouped_gemm_wgrad
from .types import LowRank, Matrices


def adapted_gemm(
    x_NI: Tensor, weights: Matrices, pairs: LowRank | None, group_sizes: Sequence[int], *, out: Tensor | None = None
) -> Tensor:
    """Return `y_NO`: for each group its rows times the transpose of its matrix [O, I] and pair. No autograd."""
    y_NO = grouped_gemm(x_NI, weights, group_sizes, out=out)
    if pairs is not None:
        inner_Nr = grouped_gemm(x_NI, pairs.a, group_sizes)
        y_NO.add_(grouped_gemm(inner_Nr, pairs.b, group_sizes), alpha=pairs.scale)
    return y_NO


def adapted_gemm_dgrad(
    dy_NO: Tensor, weights: Matrices, pairs: LowRank | None, group_sizes: Sequence[int], *, out: Tensor | None = None
) -> Tensor:
    """Return `dx_NI`: for each group its rows of `dy_NO` times its matrix [O, I] and pair."""
    dx_NI = grouped_gemm_dgrad(dy_NO, weights, group_sizes, out=out)
    if pairs is not None:
        dinner_Nr = grouped_gemm_dgrad(dy_NO, pairs.b, group_sizes)
        dx_NI.add_(grouped_gemm_dgrad(dinner_Nr, pairs.a, group_sizes), alpha=pairs.scale)
    return dx_NI


def low_rank_wgrad(
    dy_NO: Tensor,
    x_NI: Tensor,
    pairs: LowRank | None,
    group_sizes: Sequence[int],
    grads: LowRank | None,
    *,
    alpha: float = 1.0,
    overwrite: Sequence[bool] | None = None,
) -> None:
    """Add `alpha` times the gradients of the pairs, where there are some, to `grads`; see `grouped_gemm_wgrad`."""
    if pairs is None or grads is None:
        return
    alpha *= pairs.scale
    inner_Nr = grouped_gemm(x_NI, pairs.a, group_sizes)
    grouped_gemm_wgrad(dy_NO, inner_Nr, group_sizes, grads.b, alpha=alpha, overwrite=overwrite)
    dinner_Nr = grouped_gemm_dgrad(dy_NO, pairs.b, group_sizes)
    grouped_gemm_wgrad(dinner_Nr, x_NI, group_sizes, grads.a, alpha=alpha, overwrite=overwrite)
