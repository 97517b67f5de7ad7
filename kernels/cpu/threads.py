"""Rows of a compiled routine shared out among torch's own CPU threads.

A routine is a C function of one argument, the address of its task: int64 words, the first of which say which rows are still to
be done. Threads take rows chunk by chunk until none are left, so that a thread that starts late or is held up delays nobody
who has work to do. Which thread computes a row decides nothing about its value.

The threads are those that torch's own passes run on: GCC's entry point to OpenMP, through which torch starts them, is called
here too. A second pool would have to take the cores from them, as they spin for milliseconds after each pass of torch. Where
torch is built on another pool, the routine runs on the caller's thread alone.

Import this module lazily: it imports numba.
"""

# The compiler gives these functions their types, which Python annotations cannot say.
# mypy: ignore-errors

from __future__ import annotations

import ctypes
from array import array
from functools import cache

import numpy as np
import torch
from llvmlite import ir
from numba import carray, njit, types
from numba.core import cgutils
from numba.extending import intrinsic

# What a task begins with; the words of the routine follow, from OWN on.
_NEXT_ROW, _CHUNK_ROWS, NUM_ROWS, OWN = range(4)
# What one thread takes at a time, and the least that is worth waking another for.
_CHUNK_BYTES = 1 << 16


def run_rows(routine, num_rows, row_bytes, *words):
    """Run `routine` (a numba cfunc) over `num_rows` rows of about `row_bytes` each; return its last word as it left it."""
    chunk_rows = max(1, _CHUNK_BYTES // max(1, row_bytes))
    # All of torch's threads or one: OpenMP ends those that a smaller team leaves out, and torch's next pass starts them anew.
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
    """How `share_rows` starts torch's threads: the address of what does, 0 where the caller is to work alone, and how many."""
    num_threads = torch.get_num_threads()
    start_threads = _gomp_parallel() if num_threads > 1 else None
    return (0 if start_threads is None else start_threads.address), num_threads


def has_torch_threads():
    """Whether `run_rows` runs on torch's threads."""
    return _gomp_parallel() is not None


@cache
def _gomp_parallel():
    """`GOMP_parallel(function, argument, num_threads, flags)` of the OpenMP library that torch found in this process, or None.

    It is asked of the whole process, as the linker did for torch: a library preloaded by the user serves both or none.
    """
    function = getattr(ctypes.CDLL(None), "GOMP_parallel", None)
    if function is not None:
        function.argtypes = (ctypes.c_void_p, ctypes.c_void_p, ctypes.c_uint, ctypes.c_uint)
        function.restype = None
        function.address = ctypes.cast(function, ctypes.c_void_p).value
    return function


@intrinsic
def _add_to_word(typingctx, address, value):
    """Add to a word that others add to, and return what it held before."""

    def codegen(context, builder, signature, args):
        return builder.atomic_rmw("add", builder.inttoptr(args[0], ir.IntType(64).as_pointer()), args[1], "monotonic")

    return types.int64(types.int64, types.int64), codegen


@intrinsic
def pointer_to(typingctx, address):
    """An address as a pointer, which numba's `carray` makes an array of."""

    def codegen(context, builder, signature, args):
        return builder.inttoptr(args[0], cgutils.voidptr_t)

    return types.voidptr(types.int64), codegen


@intrinsic
def call(typingctx, function, arguments):
    """Call the C function at an address with a tuple of addresses; integers pass for them."""

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
    """The next rows that nobody has taken yet, (first, after the last); an empty range when there are none."""
    first = _add_to_word(task.ctypes.data, task[_CHUNK_ROWS])
    return first, min(first + task[_CHUNK_ROWS], task[NUM_ROWS])


@njit(cache=True, inline="always")
def task_at(pointer, num_words):
    """The task that a routine was given, with as many words of its own."""
    return carray(pointer, OWN + num_words, np.int64)
