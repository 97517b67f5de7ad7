"""Matrix products for compiled routines, by the BLAS that torch was built with. Import this module lazily: it imports numba.

Between two products of a narrow model Python takes 1 % of their time: every product evicts the interpreter from the caches. A
compiled routine that calls BLAS itself turns all products into one call from Python.
"""

# Numba infers the types of these functions; Python annotations cannot express them.
# mypy: ignore-errors

from __future__ import annotations

import ctypes
from functools import cache
from pathlib import Path

import numpy as np
import torch
from numba import carray

from ...jit.decorators import cfunc, njit
from .threads import call

PLAIN, TRANSPOSED = np.int64(ord("N")), np.int64(ord("T"))
# Words of `multiply`'s scratch: BLAS takes numbers by address. A 4-byte integer is read from the first half of its word.
SCRATCH_WORDS = 10
_TB, _TA, _N, _M, _K, _LDB, _LDA, _LDOUT, _ALPHA, _BETA = range(SCRATCH_WORDS)


@njit(cache=True, inline="always")
def multiply(sgemm, scratch, M, N, K, a, b, out, out_stride, alpha, beta):
    """out [M, N] = alpha * a [M, K] @ b [K, N] + beta * out, in fp32; nothing may be empty.

    Operands are (address, row stride in elements, form); TRANSPOSED: memory holds the transpose.
    """
    scratch[_TB], scratch[_TA], scratch[_N], scratch[_M], scratch[_K] = b[2], a[2], N, M, K
    scratch[_LDB], scratch[_LDA], scratch[_LDOUT] = b[1], a[1], out_stride
    numbers = scratch.view(np.float32)
    numbers[2 * _ALPHA], numbers[2 * _BETA] = alpha, beta
    at = scratch.ctypes.data
    # BLAS is column-major, torch row-major: out.T = b.T @ a.T.
    forms_and_sizes = at + 8 * _TB, at + 8 * _TA, at + 8 * _N, at + 8 * _M, at + 8 * _K
    operands = at + 8 * _ALPHA, b[0], at + 8 * _LDB, a[0], at + 8 * _LDA
    call(sgemm, forms_and_sizes + operands + (at + 8 * _BETA, out, at + 8 * _LDOUT))


@njit(cache=True, inline="always")
def are_groups_of(num_rows, sizes):
    """Whether the group sizes are nonnegative and sum to the number of rows."""
    total = 0
    for size in sizes:
        if size < 0 or size > num_rows - total:
            return False
        total += size
    return total == num_rows


@cache
def sgemm_address():
    """Address of the fp32 BLAS product in torch's library; 0 if it has none, or one with another calling convention."""
    try:
        function = ctypes.CDLL(str(Path(torch.__file__).parent / "lib" / "libtorch_cpu.so")).sgemm_
    except (OSError, AttributeError):
        return 0
    address = ctypes.cast(function, ctypes.c_void_p).value
    a, b, out = np.arange(6, dtype=np.float32), np.arange(12, dtype=np.float32), np.ones(8, dtype=np.float32)
    task = np.array([address, a.ctypes.data, b.ctypes.data, out.ctypes.data])
    _try.ctypes(task.ctypes.data_as(ctypes.c_void_p))
    return address if np.array_equal(out.reshape(2, 4), 2 * a.reshape(2, 3) @ b.reshape(4, 3).T + 3) else 0


@cfunc("void(voidptr)", cache=True)
def _try(pointer):
    """Compute one product of small integers, to test the calling convention."""
    task, scratch = carray(pointer, 4, np.int64), np.empty(SCRATCH_WORDS, np.int64)
    multiply(task[0], scratch, 2, 4, 3, (task[1], 3, PLAIN), (task[2], 3, TRANSPOSED), task[3], 4, 2.0, 3.0)
