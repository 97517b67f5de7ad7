"""Compiled row copies and row sums for the CPU. Import this module lazily: it imports numba, and a first call compiles.

Torch has no gather from two tensors and no row sum into existing memory; each would cost another pass.

Shapes: M rows, N and P rows of two sources that are read as if concatenated, D model dim.
"""

# Numba infers the types of these functions; Python annotations cannot express them.
# mypy: ignore-errors

from __future__ import annotations

from functools import cache

import numpy as np
from numba import carray

from ..jit.decorators import cfunc, njit
from .cpu.memory import copy_bytes
from .cpu.threads import NUM_ROWS, OWN, pointer_to, run_rows, take_rows, task_at

# The words of both routines' tasks: addresses, strides in bytes, numbers of rows; and whether an id was out of range.
_NUM_WORDS = 13
(
    _OUT,
    _OUT_STRIDE,
    _X,
    _X_STRIDE,
    _NUM_X,
    _BESIDE,
    _BESIDE_STRIDE,
    _NUM_BESIDE,
    _IDS,
    _NUM_IDS,
    _OFFSETS,
    _WIDTH,
    _IS_WRONG,
) = range(OWN, OWN + _NUM_WORDS)


def gather_into(out_ND, x_MD, beside_PD, ids_N):
    """Row n of out is row ids_N[n] (int64) of x followed by beside, of any dtype.

    Returns whether every id is in range.
    """
    N, row_bytes = ids_N.shape[0], x_MD.shape[1] * x_MD.element_size()
    words = *_rows(out_ND)[:2], *_rows(x_MD), *_rows(beside_PD), ids_N.data_ptr(), N, 0, row_bytes, 0
    return not run_rows(_gather, N, row_bytes, *words)


def sum_into(out_MD, x_ND, beside_PD, indices, offsets):
    """Row m of out is the sum, in order, of the rows of bag m in x followed by beside (or None); zeros for an empty bag.

    Rows are fp32 or fp64. Returns whether every offset and every index is in range.
    """
    M, D, item = out_MD.shape[0], x_ND.shape[1], x_ND.element_size()
    bags = indices.data_ptr(), indices.shape[0], offsets.data_ptr()
    words = *_rows(out_MD)[:2], *_rows(x_ND), *_rows(beside_PD), *bags, D, 0
    return not run_rows(_sum_routine(np.float32 if item == 4 else np.float64), M, D * item, *words)


def _rows(tensor):
    """Address, row stride in bytes and number of rows of a tensor; zeros for None."""
    if tensor is None:
        return 0, 0, 0
    return tensor.data_ptr(), tensor.stride(0) * tensor.element_size(), tensor.shape[0]


@njit(cache=True, inline="always")
def _address_of(task, i, otherwise):
    """The address of row i of both sources; for an i out of range some valid address, with the task's flag set."""
    if i < 0 or i >= task[_NUM_X] + task[_NUM_BESIDE]:
        task[_IS_WRONG] = 1
        return otherwise
    if i < task[_NUM_X]:
        return task[_X] + i * task[_X_STRIDE]
    return task[_BESIDE] + (i - task[_NUM_X]) * task[_BESIDE_STRIDE]


@cfunc("void(voidptr)", cache=True)
def _gather(pointer):
    task = task_at(pointer, _NUM_WORDS)
    ids_N = carray(pointer_to(task[_IDS]), task[_NUM_IDS], np.int64)
    first, stop = take_rows(task)
    while first < stop:
        for n in range(first, stop):
            target = task[_OUT] + n * task[_OUT_STRIDE]
            copy_bytes(target, _address_of(task, ids_N[n], target), task[_WIDTH])
        first, stop = take_rows(task)


@njit(cache=True, inline="always")
def _sum(pointer, dtype):
    task = task_at(pointer, _NUM_WORDS)
    D = task[_WIDTH]
    indices = carray(pointer_to(task[_IDS]), task[_NUM_IDS], np.int32)
    offsets = carray(pointer_to(task[_OFFSETS]), task[NUM_ROWS] + 1, np.int32)
    first_bag, stop_bag = take_rows(task)
    while first_bag < stop_bag:
        for m in range(first_bag, stop_bag):
            first, last = offsets[m], offsets[m + 1]
            if first < 0 or last > task[_NUM_IDS]:
                task[_IS_WRONG] = 1
                continue
            target = task[_OUT] + m * task[_OUT_STRIDE]
            total = carray(pointer_to(target), D, dtype)
            if first >= last:
                total[:] = 0
                continue
            a = carray(pointer_to(_address_of(task, indices[first], target)), D, dtype)
            if last == first + 1:
                for d in range(D):
                    total[d] = a[d]
                continue
            b = carray(pointer_to(_address_of(task, indices[first + 1], target)), D, dtype)
            for d in range(D):
                total[d] = a[d] + b[d]
            for j in range(first + 2, last):
                a = carray(pointer_to(_address_of(task, indices[j], target)), D, dtype)
                for d in range(D):
                    total[d] += a[d]
        first_bag, stop_bag = take_rows(task)


@cache
def _sum_routine(dtype):
    """The routine for rows of a numpy dtype, compiled on first use."""

    @cfunc("void(voidptr)", cache=True)
    def routine(pointer):
        _sum(pointer, dtype)

    return routine
