"""Memory by address, for compiled routines: cached and non-temporal copies, and a fence. It imports numba."""

# Numba infers the types of these functions; Python annotations cannot express them.
# mypy: ignore-errors

from __future__ import annotations

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from ...jit.decorators import njit

_LINE_BYTES = 64


@intrinsic
def copy_bytes(typingctx, target, source, num_bytes):
    """memcpy between two addresses."""

    def codegen(context, builder, signature, args):
        destination, origin = (builder.inttoptr(address, cgutils.voidptr_t) for address in args[:2])
        cgutils.raw_memcpy(builder, destination, origin, args[2], 1)
        return context.get_dummy_value()

    return types.void(types.intp, types.intp, types.intp), codegen


@intrinsic
def _stream_line(typingctx, target, source):
    """Copy one cache line to an aligned target, bypassing the caches."""

    def codegen(context, builder, signature, args):
        line = ir.VectorType(ir.IntType(64), _LINE_BYTES // 8).as_pointer()
        loaded = builder.load(builder.inttoptr(args[1], line), align=1)
        stored = builder.store(loaded, builder.inttoptr(args[0], line), align=_LINE_BYTES)
        stored.set_metadata("nontemporal", builder.module.add_metadata([ir.IntType(32)(1)]))
        return context.get_dummy_value()

    return types.void(types.intp, types.intp), codegen


@intrinsic
def fence(typingctx):
    """Full fence: earlier writes, non-temporal ones included, become visible before any later read or write."""

    def codegen(context, builder, signature, args):
        builder.fence("seq_cst")
        return context.get_dummy_value()

    return types.void(), codegen


@njit(cache=True, nogil=True)
def stream_bytes(target, source, num_bytes):
    """memcpy that bypasses the caches: for targets larger than the caches, which would otherwise read the old content first."""
    head = min(num_bytes, -target % _LINE_BYTES)
    body = (num_bytes - head) // _LINE_BYTES * _LINE_BYTES
    copy_bytes(target, source, head)
    for start in range(head, head + body, _LINE_BYTES):
        _stream_line(target + start, source + start)
    copy_bytes(target + head + body, source + head + body, num_bytes - head - body)
    fence()
