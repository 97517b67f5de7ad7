"""All groups' products in one compiled call, fp32 on the CPU. Import this module lazily: it imports numba.

Rows may be columns of wider ones; matrices are contiguous, or stacked. Each function returns whether the groups are what the
rows consist of, one for each matrix; it does nothing otherwise.

Shapes: N rows, I input width, O output width, matrices [O, I].
"""

# The compiler gives these functions their types, which Python annotations cannot say.
# mypy: ignore-errors

from __future__ import annotations

from array import array

import numpy as np
from numba import carray, cfunc

from .blas_cpu import (
    PLAIN,
    SCRATCH_WORDS,
    TRANSPOSED,
    addresses_of,
    are_groups_of,
    float_word,
    multiply,
    sgemm_address,
    word_float,
)

# The words of a task; for every group its rows, its matrix and whether that is overwritten come after them.
_NUM_WORDS = 12
_IS_DONE, _SGEMM, _KIND, _NUM_ROWS, _NUM_GROUPS, _O, _O_ROWS, _O_STRIDE, _I, _I_ROWS, _I_STRIDE, _ALPHA = range(_NUM_WORDS)
_FORWARD, _DGRAD, _WGRAD = range(3)


def forward_into(y_NO, x_NI, weights, group_sizes):
    """Every group's rows of y: its rows of x times its weight transposed."""
    return _run(_FORWARD, y_NO, x_NI, weights, group_sizes)


def dgrad_into(dx_NI, dy_NO, weights, group_sizes):
    """Every group's rows of dx: its rows of dy times its weight."""
    return _run(_DGRAD, dy_NO, dx_NI, weights, group_sizes)


def wgrad_into(grads, dy_NO, x_NI, group_sizes, alpha, overwrite):
    """To every group that has rows: add alpha times its rows of dy, transposed, times those of x, or set its gradient to it."""
    return _run(_WGRAD, dy_NO, x_NI, grads, group_sizes, alpha, overwrite)


def _run(kind, rows_NO, rows_NI, matrices, group_sizes, alpha=1.0, overwrite=None):
    overwrite = [False] * len(matrices) if overwrite is None else overwrite
    if not len(matrices) == len(group_sizes) == len(overwrite):
        return False
    words = [0, sgemm_address(), kind, len(rows_NO), len(matrices)]
    for rows in (rows_NO, rows_NI):
        words += rows.shape[1], rows.data_ptr(), rows.stride(0)
    words.append(float_word(alpha))
    words += group_sizes
    words += addresses_of(matrices)
    words += map(bool, overwrite)
    task = array("q", words)
    _multiply_groups.ctypes(task.buffer_info()[0])
    return bool(task[_IS_DONE])


@cfunc("void(voidptr)", cache=True)
def _multiply_groups(pointer):
    task, scratch = carray(pointer, _NUM_WORDS, np.int64), np.empty(SCRATCH_WORDS, np.int64)
    sgemm, kind, G, out_dim, in_dim = task[_SGEMM], task[_KIND], task[_NUM_GROUPS], task[_O], task[_I]
    groups = carray(pointer, _NUM_WORDS + 3 * G, np.int64)[_NUM_WORDS:]
    alpha = word_float(task[_ALPHA])
    rows_NO, rows_NI = task[_O_ROWS], task[_I_ROWS]
    stride_NO, stride_NI = task[_O_STRIDE], task[_I_STRIDE]
    if not are_groups_of(task[_NUM_ROWS], groups[:G]):
        return
    task[_IS_DONE] = 1
    for g in range(G):
        n, matrix = groups[g], groups[G + g]
        if n == 0:
            continue
        if kind == _FORWARD:
            a, b = (rows_NI, stride_NI, PLAIN), (matrix, in_dim, TRANSPOSED)
            multiply(sgemm, scratch, n, out_dim, in_dim, a, b, rows_NO, stride_NO, 1.0, 0.0)
        elif kind == _DGRAD:
            a, b = (rows_NO, stride_NO, PLAIN), (matrix, in_dim, PLAIN)
            multiply(sgemm, scratch, n, in_dim, out_dim, a, b, rows_NI, stride_NI, 1.0, 0.0)
        else:
            a, b = (rows_NO, stride_NO, TRANSPOSED), (rows_NI, stride_NI, PLAIN)
            multiply(sgemm, scratch, out_dim, in_dim, n, a, b, matrix, in_dim, alpha, 0.0 if groups[2 * G + g] else 1.0)
        rows_NO += n * stride_NO * 4
        rows_NI += n * stride_NI * 4
