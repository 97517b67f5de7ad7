"""Compiled row copies and row sums for the CPU. Import this module lazily: it imports numba, and a first call compiles.

Torch has no gather from two tensors and no sum of rows into memory that is already there; each would cost another pass.

Shapes: M rows, N and P rows of two sources that are read as one, D model dim.
"""

# The compiler gives these functions their types, which Python annotations cannot say.
# mypy: ignore-errors

from __future__ import annotations

from numba import njit, types
from numba.core import cgutils
from numba.extending import intrinsic


@intrinsic
def copy_bytes(typingctx, target, source, num_bytes):
    """memcpy between two addresses."""

    def codegen(context, builder, signature, args):
        destination, origin = (builder.inttoptr(address, cgutils.voidptr_t) for address in args[:2])
        cgutils.raw_memcpy(builder, destination, origin, args[2], 1)
        return context.get_dummy_value()

    return types.void(types.intp, types.intp, types.intp), codegen


@njit(cache=True, nogil=True)
def gather_bytes(out, out_stride, x, x_stride, num_x, beside, beside_stride, ids_N, row_bytes):
    """Row n of out is row ids_N[n] of x followed by beside. Tensors are addresses, strides are bytes."""
    for n in range(ids_N.size):
        i = ids_N[n]
        source = x + i * x_stride if i < num_x else beside + (i - num_x) * beside_stride
        copy_bytes(out + n * out_stride, source, row_bytes)


@njit(cache=True, nogil=True, error_model="numpy")
def sum_bags(out_MD, x_ND, beside_PD, indices, offsets):
    """Row m of out is the sum, in order, of the rows of bag m in x followed by beside; zeros for an empty bag."""
    num_bags, D = out_MD.shape
    N = x_ND.shape[0]
    for m in range(num_bags):
        first, last = offsets[m], offsets[m + 1]
        total = out_MD[m]
        if first == last:
            total[:] = 0
            continue
        i = indices[first]
        a = x_ND[i] if i < N else beside_PD[i - N]
        if last == first + 1:
            for d in range(D):
                total[d] = a[d]
            continue
        i = indices[first + 1]
        b = x_ND[i] if i < N else beside_PD[i - N]
        for d in range(D):
            total[d] = a[d] + b[d]
        for j in range(first + 2, last):
            i = indices[j]
            a = x_ND[i] if i < N else beside_PD[i - N]
            for d in range(D):
                total[d] += a[d]
