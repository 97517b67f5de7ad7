"""The expert FFN of all groups in one compiled call, fp32 on the CPU: per chunk its products and the activation between them.

Import this module lazily: it imports numba. Each function returns whether the group sizes sum to the number of rows; it does
nothing otherwise.

Shapes: N rows, D model dim, F expert ffn dim.
"""

# Numba infers the types of these functions; Python annotations cannot express them.
# mypy: ignore-errors

from __future__ import annotations

from array import array

import numpy as np
from numba import carray

from ..jit.decorators import njit
from .cpu.blas import PLAIN, SCRATCH_WORDS, TRANSPOSED, are_groups_of, multiply, sgemm_address
from .cpu.threads import OWN, pointer_to, share_rows, team_words
from .swiglu_cpu import (
    DGATE_UP,
    DROW_WEIGHTS,
    GATE_UP,
    NUM_WORDS,
    ROW_WEIGHTS,
    WIDTH,
    H,
    swiglu_backward_routine,
    swiglu_routine,
)

# The words of both routines' tasks, some unused in the forward: sizes, then operands by address, width and row stride. For every
# group follow its rows and two weights, and in the backward of trained experts two gradients and whether to overwrite them.
_NUM_WORDS = 23
(
    _SGEMM,
    _SWIGLU,
    _START_THREADS,
    _NUM_THREADS,
    _NUM_ROWS,
    _NUM_GROUPS,
    _CHUNK_ROWS,
    _WORKSPACE,
    _IS_TRAINED,
    _ROW_WEIGHTS,
    _DROW_WEIGHTS,
    _GATE_UP,
    _2F,
    _,
    _X,
    _D,
    _X_STRIDE,
    _Y,
    _,
    _Y_STRIDE,
    _DX,
    _,
    _DX_STRIDE,
) = range(_NUM_WORDS)


def run(gate_up_N2F, operands, group_sizes, chunk_rows, alpha, overwrite):
    """`grouped_ffn`, or its backward where operands name a gradient of the row weights, in chunks of at most `chunk_rows`."""
    G, rows, row_weights, is_backward = len(group_sizes), operands.rows, operands.row_weights, len(operands.row_weights) == 2
    wide, is_trained = rows[1], len(operands.matrices) > 2 * G
    if is_trained and len(overwrite) != G:
        return False
    # One allocation for all intermediates of a chunk: h, or dh (later h) and dgate_up.
    width = wide + wide // 2 if is_backward else wide // 2
    workspace = gate_up_N2F.new_empty(max(0, min(max(group_sizes, default=0), chunk_rows)) * width)
    routine, swiglu = (_backward, swiglu_backward_routine) if is_backward else (_forward, swiglu_routine)
    words = [sgemm_address(), swiglu(np.float32).address, *team_words(), gate_up_N2F.shape[0], G, chunk_rows]
    words += workspace.data_ptr(), is_trained
    words += (*row_weights, *rows) if is_backward else (*row_weights, 0, *rows, 0, 0, 0)
    words += *group_sizes, *operands.matrices
    if is_trained:
        words += map(bool, overwrite)
    task = array("q", words)
    return routine(task.buffer_info()[0], float(alpha))


@njit(cache=True, inline="always")
def _end_of_chunk(size, chunk_rows, chunk):
    """The end of a chunk, where a group of rows is split into the fewest equal chunks."""
    num_chunks = -(-size // chunk_rows)
    return size * (chunk + 1) // num_chunks


@njit("boolean(int64, float64)", cache=True, nogil=True)
def _forward(address, _):
    task = carray(pointer_to(address), _NUM_WORDS, np.int64)
    sgemm, G, D, F, chunk_rows = task[_SGEMM], task[_NUM_GROUPS], task[_D], task[_2F] // 2, task[_CHUNK_ROWS]
    groups = carray(pointer_to(address), _NUM_WORDS + 3 * G, np.int64)[_NUM_WORDS:]
    if not are_groups_of(task[_NUM_ROWS], groups[:G]):
        return False
    scratch, swiglu = np.empty(SCRATCH_WORDS, np.int64), np.empty(OWN + NUM_WORDS, np.int64)
    swiglu[GATE_UP], swiglu[ROW_WEIGHTS], swiglu[H], swiglu[WIDTH] = task[_GATE_UP], task[_ROW_WEIGHTS], task[_WORKSPACE], F
    x, x_stride, y, y_stride = task[_X], task[_X_STRIDE], task[_Y], task[_Y_STRIDE]
    for g in range(G):
        size, gate_up_weight, down_weight = groups[g], groups[G + g], groups[2 * G + g]
        start = chunk = 0
        while start < size:
            stop = _end_of_chunk(size, chunk_rows, chunk)
            n = stop - start
            a, b = (x, x_stride, PLAIN), (gate_up_weight, D, TRANSPOSED)
            multiply(sgemm, scratch, n, 2 * F, D, a, b, swiglu[GATE_UP], 2 * F, 1.0, 0.0)
            share_rows(task[_SWIGLU], swiglu, n, 12 * F, task[_START_THREADS], task[_NUM_THREADS])
            a, b = (swiglu[H], F, PLAIN), (down_weight, F, TRANSPOSED)
            multiply(sgemm, scratch, n, D, F, a, b, y, y_stride, 1.0, 0.0)
            x += 4 * n * x_stride
            y += 4 * n * y_stride
            swiglu[GATE_UP] += 8 * n * F
            swiglu[ROW_WEIGHTS] += 4 * n
            start, chunk = stop, chunk + 1
    return True


@njit("boolean(int64, float64)", cache=True, nogil=True)
def _backward(address, alpha):
    task = carray(pointer_to(address), _NUM_WORDS, np.int64)
    sgemm, G, D, F, chunk_rows = task[_SGEMM], task[_NUM_GROUPS], task[_D], task[_2F] // 2, task[_CHUNK_ROWS]
    is_trained = task[_IS_TRAINED]
    groups = carray(pointer_to(address), _NUM_WORDS + (6 if is_trained else 3) * G, np.int64)[_NUM_WORDS:]
    if not are_groups_of(task[_NUM_ROWS], groups[:G]):
        return False
    scratch, swiglu = np.empty(SCRATCH_WORDS, np.int64), np.empty(OWN + NUM_WORDS, np.int64)
    # h overwrites dh; the gradients of a chunk's gate and up follow it in the workspace.
    swiglu[GATE_UP], swiglu[ROW_WEIGHTS], swiglu[H], swiglu[WIDTH] = task[_GATE_UP], task[_ROW_WEIGHTS], task[_WORKSPACE], F
    swiglu[DROW_WEIGHTS] = task[_DROW_WEIGHTS]
    x, x_stride, dy, dy_stride = task[_X], task[_X_STRIDE], task[_Y], task[_Y_STRIDE]
    dx, dx_stride = task[_DX], task[_DX_STRIDE]
    for g in range(G):
        size, gate_up_weight, down_weight = groups[g], groups[G + g], groups[2 * G + g]
        start = chunk = 0
        while start < size:
            stop = _end_of_chunk(size, chunk_rows, chunk)
            n = stop - start
            swiglu[DGATE_UP] = swiglu[H] + 4 * n * F
            dy_nD, x_nD = (dy, dy_stride, PLAIN), (x, x_stride, PLAIN)
            multiply(sgemm, scratch, n, F, D, dy_nD, (down_weight, F, PLAIN), swiglu[H], F, 1.0, 0.0)
            share_rows(task[_SWIGLU], swiglu, n, 24 * F, task[_START_THREADS], task[_NUM_THREADS])
            dgate_up_n2F, h_nF = (swiglu[DGATE_UP], 2 * F, PLAIN), (swiglu[H], F, PLAIN)
            multiply(sgemm, scratch, n, D, 2 * F, dgate_up_n2F, (gate_up_weight, D, PLAIN), dx, dx_stride, 1.0, 0.0)
            if is_trained:
                gate_up_grad, down_grad = groups[3 * G + g], groups[4 * G + g]
                beta = 0.0 if groups[5 * G + g] and chunk == 0 else 1.0
                a = dy, dy_stride, TRANSPOSED
                multiply(sgemm, scratch, D, F, n, a, h_nF, down_grad, F, alpha, beta)
                a = swiglu[DGATE_UP], 2 * F, TRANSPOSED
                multiply(sgemm, scratch, 2 * F, D, n, a, x_nD, gate_up_grad, D, alpha, beta)
            x += 4 * n * x_stride
            dy += 4 * n * dy_stride
            dx += 4 * n * dx_stride
            swiglu[GATE_UP] += 8 * n * F
            swiglu[ROW_WEIGHTS] += 4 * n
            swiglu[DROW_WEIGHTS] += 4 * n
            start, chunk = stop, chunk + 1
    return True
