"""Addresses and strides of fp32 tensors in host memory, for compiled routines; each tensor is inspected once.

After a product that has filled the caches, the first read of a tensor attribute takes microseconds: values read here are passed
on, and no routine reads them again. This module does not import numba, so that tensors for which no compiled routine exists do
not wait for that import.

Shapes: N rows, matrices [O, I].
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..types import Matrices

_FP32 = torch.float32
# Subclasses may wrap tensors in other memory, or without any.
_PLAIN = {Tensor, torch.nn.Parameter}
# BLAS takes sizes and strides as 4-byte integers.
_MOST = 2**31 - 1


def words_of_rows(num_rows: int, *many_rows: Tensor) -> list[int] | None:
    """Address, width and row stride of each [N, width], one after the other.

    None unless all are plain fp32 CPU tensors with contiguous rows, and sizes and strides below 2**31.
    """
    words: list[int] = []
    for rows in many_rows:
        if type(rows) not in _PLAIN or rows.dtype is not _FP32 or not rows.is_cpu:
            return None
        shape, strides = rows.shape, rows.stride()
        if len(shape) != 2 or shape[0] != num_rows or strides[1] != 1 or not 0 < shape[1] <= strides[0] <= _MOST:
            return None
        words += rows.data_ptr(), shape[1], strides[0]
    return words if num_rows <= _MOST else None


def address_of(tensor: Tensor, shape: tuple[int, ...]) -> int | None:
    """Address of a plain contiguous tensor of this shape; None for any other."""
    is_plain = type(tensor) in _PLAIN and tensor.dtype is _FP32 and tensor.is_cpu
    return tensor.data_ptr() if is_plain and tensor.shape == shape and tensor.is_contiguous() else None


def addresses_of(matrices: Matrices, num_groups: int, out_dim: int, in_dim: int) -> Sequence[int] | None:
    """Addresses of `num_groups` contiguous matrices [out_dim, in_dim], neither of them 0; None for any others."""
    if isinstance(matrices, Tensor):
        first, num_bytes = address_of(matrices, (num_groups, out_dim, in_dim)), 4 * out_dim * in_dim
        return None if first is None else range(first, first + num_groups * num_bytes, num_bytes)
    addresses = []
    for matrix in matrices:
        address = address_of(matrix, (out_dim, in_dim))
        if address is None:
            return None
        addresses.append(address)
    return addresses if len(addresses) == num_groups else None
