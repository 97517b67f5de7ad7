"""Compiled single-pass SwiGLU for the CPU. Import this module lazily: it imports numba, and a first call compiles.

Torch needs three passes forward and eight backward, which at small model widths cost a tenth of the matrix products. Here each
element is read and written once, and the exponential is a polynomial that the compiler vectorises. Arrays are float32, or
bfloat16 viewed as int16 (numpy has no bfloat16); arithmetic is float32, rounded once when written.

Shapes: N rows, F expert ffn dim.
"""

# Numba infers the types of these functions; Python annotations cannot express them.
# mypy: ignore-errors

from __future__ import annotations

from functools import cache

import numpy as np
import torch
from llvmlite import ir
from numba import carray, types
from numba.extending import intrinsic

from ..jit.decorators import cfunc, njit
from .cpu.threads import NUM_ROWS, OWN, pointer_to, run_rows, take_rows, task_at

_LOG2_E = np.float32(1.4426950408889634)
# Taylor coefficients of 2**f; the relative error on [-0.5, 0.5] is below 1.2e-7.
_C0, _C1, _C2, _C3, _C4, _C5, _C6 = (np.float32(np.log(2) ** k / float(np.prod(np.arange(1.0, k + 1)))) for k in range(7))
_ONE = np.float32(1.0)
_MAX_EXPONENT = np.float32(126.0)
# The words of both routines' tasks, two of them unused in the forward: addresses, and the width F.
NUM_WORDS = 6
GATE_UP, ROW_WEIGHTS, H, DGATE_UP, DROW_WEIGHTS, WIDTH = range(OWN, OWN + NUM_WORDS)
# Adding and subtracting 1.5 * 2**23 rounds a float32 to the nearest integer.
_ROUND = np.float32(12582912.0)


def swiglu_into(h_NF, gate_up_N2F, row_weights_N):
    """h = silu(gate) * up * row_weight, row weights in fp32; all arrays contiguous."""
    (N, F), dtype = h_NF.shape, _numpy_dtype(h_NF)
    run_rows(swiglu_routine(dtype), N, 3 * F * h_NF.element_size(), *_addresses(gate_up_N2F, row_weights_N, h_NF), 0, 0, F)


def swiglu_backward_into(dh_then_h_NF, gate_up_N2F, row_weights_N, dgate_up_N2F, drow_weights_N):
    """The gradients of gate, up and row weights; h overwrites dh; all arrays contiguous."""
    (N, F), dtype = dh_then_h_NF.shape, _numpy_dtype(dh_then_h_NF)
    addresses = _addresses(gate_up_N2F, row_weights_N, dh_then_h_NF, dgate_up_N2F, drow_weights_N)
    run_rows(swiglu_backward_routine(dtype), N, 6 * F * dh_then_h_NF.element_size(), *addresses, F)


def _addresses(*tensors):
    return [tensor.data_ptr() for tensor in tensors]


def _numpy_dtype(tensor):
    return np.int16 if tensor.dtype == torch.bfloat16 else np.float32


@intrinsic
def _float_of_bits(typingctx, bits):
    """Reinterpret an int32 as a float32."""

    def codegen(context, builder, signature, args):
        return builder.bitcast(args[0], ir.FloatType())

    return types.float32(types.int32), codegen


@intrinsic
def _load(typingctx, element):
    """An array element as float32: itself, or the bfloat16 whose bits an int16 holds."""

    def codegen(context, builder, signature, args):
        if signature.args[0] == types.float32:
            return args[0]
        bits = builder.shl(builder.zext(args[0], ir.IntType(32)), ir.IntType(32)(16))
        return builder.bitcast(bits, ir.FloatType())

    return types.float32(element), codegen


@intrinsic
def _store(typingctx, value, like):
    """A float32 in the element type of `like`: itself, or rounded to nearest even as the bits of a bfloat16."""

    def codegen(context, builder, signature, args):
        if signature.return_type == types.float32:
            return args[0]
        i32 = ir.IntType(32)
        bits = builder.bitcast(args[0], i32)
        is_odd = builder.and_(builder.lshr(bits, i32(16)), i32(1))
        rounded = builder.lshr(builder.add(bits, builder.add(i32(0x7FFF), is_odd)), i32(16))
        is_nan = builder.fcmp_unordered("uno", args[0], args[0])
        return builder.trunc(builder.select(is_nan, i32(0x7FC0), rounded), ir.IntType(16))

    return like(types.float32, like), codegen


@njit(cache=True, inline="always")
def _sigmoid(x):
    """1 / (1 + exp(-x)), with the exponent clamped to the range of float32; NaN propagates through the caller's product."""
    z = min(max(-_LOG2_E * x, -_MAX_EXPONENT), _MAX_EXPONENT)
    n = (z + _ROUND) - _ROUND
    f = z - n
    fraction = (((((_C6 * f + _C5) * f + _C4) * f + _C3) * f + _C2) * f + _C1) * f + _C0
    power = _float_of_bits((np.int32(n) + np.int32(127)) << np.int32(23))
    return _ONE / (_ONE + fraction * power)


@njit(cache=True, error_model="numpy", fastmath={"contract"})
def _forward_rows(gate_up_N2F, row_weights_N, h_NF):
    """h = silu(gate) * up * row_weight."""
    N, F = h_NF.shape
    for n in range(N):
        weight = row_weights_N[n]
        gate, up, h = gate_up_N2F[n, :F], gate_up_N2F[n, F:], h_NF[n]
        for f in range(F):
            g = _load(gate[f])
            h[f] = _store(g * _sigmoid(g) * _load(up[f]) * weight, h[f])


@njit(cache=True, error_model="numpy", fastmath={"contract", "reassoc"})
def _backward_rows(dh_then_h_NF, gate_up_N2F, row_weights_N, dgate_up_N2F, drow_weights_N):
    """Both gradients, with h overwriting dh; a row weight's gradient, a sum over f, is vectorised in one fixed order.

    dh and h share an array not only to save memory: the compiler vectorises a loop over two arrays only if they do not overlap.
    """
    N, F = dh_then_h_NF.shape
    for n in range(N):
        weight = row_weights_N[n]
        gate, up, dh_then_h = gate_up_N2F[n, :F], gate_up_N2F[n, F:], dh_then_h_NF[n]
        dgate, dup = dgate_up_N2F[n, :F], dgate_up_N2F[n, F:]
        dweight = np.float32(0.0)
        for f in range(F):
            g, u, d = _load(gate[f]), _load(up[f]), _load(dh_then_h[f])
            s = _sigmoid(g)
            activated = g * s
            d_up = d * activated
            dweight += d_up * u
            dh_then_h[f] = _store(activated * u * weight, dh_then_h[f])
            dup[f] = _store(d_up * weight, dup[f])
            dgate[f] = _store(d * u * weight * (s + activated * (_ONE - s)), dgate[f])
        drow_weights_N[n] = dweight


@njit(cache=True, inline="always")
def _rows_at(task, word, width, dtype):
    """The contiguous rows whose address is a word of the task."""
    return carray(pointer_to(task[word]), (task[NUM_ROWS], width), dtype)


@cache
def swiglu_routine(dtype):
    """The forward routine for rows of a numpy dtype, compiled on first use."""

    @cfunc("void(voidptr)", cache=True)
    def routine(pointer):
        task = task_at(pointer, NUM_WORDS)
        F = task[WIDTH]
        gate_up_N2F, h_NF = _rows_at(task, GATE_UP, 2 * F, dtype), _rows_at(task, H, F, dtype)
        row_weights_N = carray(pointer_to(task[ROW_WEIGHTS]), task[NUM_ROWS], np.float32)
        first, stop = take_rows(task)
        while first < stop:
            _forward_rows(gate_up_N2F[first:stop], row_weights_N[first:stop], h_NF[first:stop])
            first, stop = take_rows(task)

    return routine


@cache
def swiglu_backward_routine(dtype):
    """The backward routine for rows of a numpy dtype, compiled on first use."""

    @cfunc("void(voidptr)", cache=True)
    def routine(pointer):
        task = task_at(pointer, NUM_WORDS)
        F = task[WIDTH]
        gate_up_N2F, dgate_up_N2F = _rows_at(task, GATE_UP, 2 * F, dtype), _rows_at(task, DGATE_UP, 2 * F, dtype)
        dh_then_h_NF = _rows_at(task, H, F, dtype)
        row_weights_N = carray(pointer_to(task[ROW_WEIGHTS]), task[NUM_ROWS], np.float32)
        drow_weights_N = carray(pointer_to(task[DROW_WEIGHTS]), task[NUM_ROWS], np.float32)
        first, stop = take_rows(task)
        while first < stop:
            rows = slice(first, stop)
            _backward_rows(dh_then_h_NF[rows], gate_up_N2F[rows], row_weights_N[rows], dgate_up_N2F[rows], drow_weights_N[rows])
            first, stop = take_rows(task)

    return routine
