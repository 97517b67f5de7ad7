"""The products of all groups in one compiled call, fp32 on the CPU. Import this module lazily: it imports numba.

Rows may be column ranges of wider rows; matrices are contiguous.

Shapes: N rows, I input width, O output width, matrices [O, I].
"""

# Numba infers the types of these functions; Python annotations cannot express them.
# mypy: ignore-errors

from __future__ import annotations

import numpy as np
from numba import carray

from ..jit.decorators import njit
from .cpu.blas import PLAIN, SCRATCH_WORDS, TRANSPOSED, are_groups_of, multiply
from .cpu.threads import pointer_to
from .types import BACKWARD, DGRAD, FORWARD, WGRAD


@njit(
    "boolean(int64, int64, int64, int64, int64, float64, int64, int64, int64, int64, int64, int64, int64, int64, int64)",
    cache=True,
    nogil=True,
)
def multiply_groups(sgemm, kind, num_rows, num_groups, words, alpha, y, out_dim, y_stride, x, in_dim, x_stride, dx, _, dx_stride):
    """Compute a product of every group that has rows, or both of the backward; return whether the group sizes sum to the rows.

    If they do not, nothing is written. Rows are given by address, width and stride; y is dy in a gradient. At the address `words`
    lie the group sizes, the addresses of the weights, those of their gradients, and flags for the gradients to overwrite with
    `alpha` times the product instead of adding it: these are set to zero where the group has no rows.
    """
    G = num_groups
    groups, scratch = carray(pointer_to(words), 4 * G, np.int64), np.empty(SCRATCH_WORDS, np.int64)
    if not are_groups_of(num_rows, groups[:G]):
        return False
    for g in range(G):
        n, weight, grad, is_fresh = groups[g], groups[G + g], groups[2 * G + g], groups[3 * G + g]
        if n == 0:
            if is_fresh and kind in (WGRAD, BACKWARD):
                carray(pointer_to(grad), out_dim * in_dim, np.float32)[:] = 0.0
            continue
        y_nO, x_nI, weight_OI = (y, y_stride, PLAIN), (x, x_stride, PLAIN), (weight, in_dim, PLAIN)
        if kind == FORWARD:
            multiply(sgemm, scratch, n, out_dim, in_dim, x_nI, (weight, in_dim, TRANSPOSED), y, y_stride, 1.0, 0.0)
        # The weight gradient first: it leaves only rows of dy in the caches, while the other product also leaves rows of dx.
        if kind in (WGRAD, BACKWARD):
            beta = 0.0 if is_fresh else 1.0
            multiply(sgemm, scratch, out_dim, in_dim, n, (y, y_stride, TRANSPOSED), x_nI, grad, in_dim, alpha, beta)
        if kind in (DGRAD, BACKWARD):
            multiply(sgemm, scratch, n, in_dim, out_dim, y_nO, weight_OI, dx, dx_stride, 1.0, 0.0)
        y += 4 * n * y_stride
        x += 4 * n * x_stride
        dx += 4 * n * dx_stride
    return True
