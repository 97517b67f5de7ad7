"""Distribution of a compiled routine's rows over torch's own CPU threads.

A routine is a C function of one argument, the address of its task: int64 words, the first of which hold the rows still to be
done. Threads take rows chunk by chunk until none are left, so that a thread that starts late or is preempted does not delay the
others. The value of a row does not depend on the thread that computes it.

The threads are those of torch's own passes, started through the same entry point, GCC's OpenMP runtime. A second pool would
compete for the cores with torch's threads, which spin for milliseconds after each pass. If torch is built on another threading
runtime, the routine runs on the caller's thread alone.

Import this module lazily: it imports numba.
"""

# Numba infers the types of these functions; Python annotations cannot express them.
# mypy: ignore-errors

from __future__ import annotations

import ctypes
from array import array
from functools import cache

import numpy as np
import torch
from llvmlite import ir
from numba import carray, types
from numba.core import cgutils
from numba.extending import intrinsic

from ...jit.decorators import njit

# The first words of a task; the routine's own words follow, from OWN on.
_NEXT_ROW, _CHUNK_ROWS, NUM_ROWS, OWN = range(4)
# Size of the chunk that a thread takes at a time, and the minimum worth waking another thread for.
_CHUNK_BYTES = 1 << 16


def run_rows(routine, num_rows, row_bytes, *words):
    """Run `routine` (a numba cfunc) over `num_rows` rows of about `row_bytes` each; return the final last word of its task."""
    chunk_rows = max(1, _CHUNK_BYTES // max(1, row_bytes))
    # All of torch's threads or one: a smaller OpenMP team ends the other threads, and torch's next pass would restart them.
    start_threads = _gomp_parallel() if num_rows > chunk_rows and torch.get_num_threads() > 1 else None
    if start_threads is None:
        chunk_rows = num_rows
    task = array("q", (0, chunk_rows, num_rows, *words))
    if start_threads is None:
        routine.ctypes(task.buffer_info()[0])
    else:
        start_threads(routine.address, task.buffer_info()[0], torch.get_num_threads(), 0)
    return task[-1]


def team_words():
    """The last arguments of `share_rows`: address of the function that starts torch's threads, or 0 for none; their number."""
    num_threads = torch.get_num_threads()
    start_threads = _gomp_parallel() if num_threads > 1 else None
    return (0 if start_threads is None else start_threads.address), num_threads


def has_torch_threads():
    """Whether `run_rows` runs on torch's threads."""
    return _gomp_parallel() is not None


@cache
def _gomp_parallel():
    """`GOMP_parallel(function, argument, num_threads, flags)` of the OpenMP library that torch found in this process, or None.

    Looked up in the whole process, as the linker did for torch: a library that the user preloads serves both or neither.
    """
    function = getattr(ctypes.CDLL(None), "GOMP_parallel", None)
    if function is not None:
        function.argtypes = (ctypes.c_void_p, ctypes.c_void_p, ctypes.c_uint, ctypes.c_uint)
        function.restype = None
        function.address = ctypes.cast(function, ctypes.c_void_p).value
    return function


@intrinsic
def _add_to_word(typingctx, address, value):
    """Atomically add to a word; return its previous value."""

    def codegen(context, builder, signature, args):
        return builder.atomic_rmw("add", builder.inttoptr(args[0], ir.IntType(64).as_pointer()), args[1], "monotonic")

    return types.int64(types.int64, types.int64), codegen


@intrinsic
def pointer_to(typingctx, address):
    """An address as a pointer, for numba's `carray`."""

    def codegen(context, builder, signature, args):
        return builder.inttoptr(args[0], cgutils.voidptr_t)

    return types.voidptr(types.int64), codegen


@intrinsic
def call(typingctx, function, arguments):
    """Call the C function at an address; its arguments are a tuple of addresses, or integers cast to them."""

    def codegen(context, builder, signature, args):
        values = [builder.inttoptr(value, cgutils.voidptr_t) for value in cgutils.unpack_tuple(builder, args[1])]
        kind = ir.FunctionType(ir.VoidType(), [cgutils.voidptr_t] * len(values))
        builder.call(builder.inttoptr(args[0], kind.as_pointer()), values)
        return context.get_dummy_value()

    return types.void(function, arguments), codegen


@njit(cache=True, inline="always")
def share_rows(routine, task, num_rows, row_bytes, start_threads, num_threads):
    """`run_rows` for compiled callers: a routine's address, its task with its own words set, and `team_words`."""
    chunk_rows = max(1, _CHUNK_BYTES // max(1, row_bytes))
    is_shared = start_threads != 0 and num_rows > chunk_rows
    task[_NEXT_ROW], task[_CHUNK_ROWS], task[NUM_ROWS] = 0, chunk_rows if is_shared else num_rows, num_rows
    if is_shared:
        call(start_threads, (routine, task.ctypes.data, num_threads, 0))
    else:
        call(routine, (task.ctypes.data,))


@njit(cache=True, inline="always")
def take_rows(task):
    """The next rows not yet taken, as (first, end); an empty range when none are left."""
    first = _add_to_word(task.ctypes.data, task[_CHUNK_ROWS])
    return first, min(first + task[_CHUNK_ROWS], task[NUM_ROWS])


@njit(cache=True, inline="always")
def task_at(pointer, num_words):
    """The task at a routine's argument, with `num_words` words of its own."""
    return carray(pointer, OWN + num_words, np.int64)
