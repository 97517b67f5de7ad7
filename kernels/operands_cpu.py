"""What compiled routines take of fp32 tensors in host memory: their addresses and strides, each tensor looked at once.

After a product that has filled the caches every attribute of a tensor takes microseconds to read the first time: what is
checked here is handed on, and no routine asks for it again. This module imports no numba, so that tensors that are not for
compiled routines don't wait for it.

Shapes: N rows, matrices [O, I].
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeAlias

import torch
from torch import Tensor

Matrices: TypeAlias = Sequence[Tensor] | Tensor
"""One for every group, or all of them stacked."""

_FP32 = torch.float32


def words_of_rows(num_rows: int, *many_rows: Tensor) -> list[int] | None:
    """Address, width and row stride of each [N, width], one after the other; None unless elements of a row are neighbours."""
    words: list[int] = []
    for rows in many_rows:
        if rows.dtype is not _FP32 or not rows.is_cpu:
            return None
        shape, strides = rows.shape, rows.stride()
        if len(shape) != 2 or shape[0] != num_rows or strides[1] != 1 or not 0 < shape[1] <= strides[0]:
            return None
        words += rows.data_ptr(), shape[1], strides[0]
    return words


def address_of(tensor: Tensor, shape: tuple[int, ...]) -> int | None:
    """Where a contiguous tensor of this shape lies; None for any other."""
    if tensor.dtype is _FP32 and tensor.is_cpu and tensor.shape == shape and tensor.is_contiguous():
        return tensor.data_ptr()
    return None


def addresses_of(matrices: Matrices, num_groups: int, out_dim: int, in_dim: int) -> Sequence[int] | None:
    """Where each of that many contiguous matrices [out_dim, in_dim], neither of them 0, lies; None for any others."""
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
