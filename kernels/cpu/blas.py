"""Matrix products from compiled routines, by the BLAS that torch was built with. Import this module lazily: it imports numba.

Between two products of a narrow model Python takes a percent of their time, more than it does warm, since every product evicts
its code. A routine that calls BLAS itself makes one call of all of them.
"""

# The compiler gives these functions their types, which Python annotations cannot say.
# mypy: ignore-errors

from __future__ import annotations

import ctypes
from functools import cache
from pathlib import Path

import numpy as np
import torch
from numba import carray, cfunc, njit

from .threads import call

PLAIN, TRANSPOSED = np.int64(ord("N")), np.int64(ord("T"))
# Words of `multiply`'s scratch: BLAS takes numbers by address. Integers of 4 bytes are read from the first half of theirs.
SCRATCH_WORDS = 10
_TB, _TA, _N, _M, _K, _LDB, _LDA, _LDOUT, _ALPHA, _BETA = range(SCRATCH_WORDS)


@njit(cache=True, inline="always")
def multiply(sgemm, scratch, M, N, K, a, b, out, out_stride, alpha, beta):
    """out [M, N] = alpha * a [M, K] @ b [K, N] + beta * out, in fp32; nothing may be empty.

    Operands are (address, stride of rows in elements, form); TRANSPOSED is one that lies in memory as its transpose.
    """
    scratch[_TB], scratch[_TA], scratch[_N], scratch[_M], scratch[_K] = b[2], a[2], N, M, K
    scratch[_LDB], scratch[_LDA], scratch[_LDOUT] = b[1], a[1], out_stride
    numbers = scratch.view(np.float32)
    numbers[2 * _ALPHA], numbers[2 * _BETA] = alpha, beta
    at = scratch.ctypes.data
    # BLAS has columns where torch has rows: out.T = b.T @ a.T.
    forms_and_sizes = at + 8 * _TB, at + 8 * _TA, at + 8 * _N, at + 8 * _M, at + 8 * _K
    operands = at + 8 * _ALPHA, b[0], at + 8 * _LDB, a[0], at + 8 * _LDA
    call(sgemm, forms_and_sizes + operands + (at + 8 * _BETA, out, at + 8 * _LDOUT))


@njit(cache=True, inline="always")
def are_groups_of(num_rows, sizes):
    """Whether groups of these sizes are what the rows consist of."""
    total = 0
    for size in sizes:
        if size < 0 or size > num_rows - total:
            return False
        total += size
    return total == num_rows


@cache
def sgemm_address():
    """Where torch's library has BLAS's fp32 product; 0 where it has none, or none that can be called like this."""
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
    """A product of whole numbers."""
    task, scratch = carray(pointer, 4, np.int64), np.empty(SCRATCH_WORDS, np.int64)
    multiply(task[0], scratch, 2, 4, 3, (task[1], 3, PLAIN), (task[2], 3, TRANSPOSED), task[3], 4, 2.0, 3.0)
