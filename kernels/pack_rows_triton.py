"""Triton kernels of `pack_rows` and `accumulate_rows`. Import this module lazily: it imports triton.

Shapes: B bank rows, N packed rows, X elements of a row.
"""

# The compiler gives kernels their types, which Python annotations cannot say.
# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from .permute import Bags

_BLOCK = 4096
_MAX_ROWS = 65_535  # programs in the second dimension of a CUDA grid


@triton.jit
def _pack_rows_kernel(bank_ptr, ids_ptr, out_ptr, row_size, BLOCK: tl.constexpr):
    """Copy a block of one row, cast on the way. With ids = [2, 0]: out[0] = bank[2], out[1] = bank[0]."""
    n = tl.program_id(1).to(tl.int64)
    x = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    row = tl.load(ids_ptr + n).to(tl.int64)
    values = tl.load(bank_ptr + row * row_size + x, mask=x < row_size)
    tl.store(out_ptr + n * row_size + x, values.to(out_ptr.dtype.element_ty), mask=x < row_size)


@triton.jit
def _accumulate_rows_kernel(bank_ptr, indices_ptr, offsets_ptr, buffer_ptr, row_size, alpha, BLOCK: tl.constexpr):
    """Add a bag's rows to a block of one bank row, in order. With indices = [1, 0], offsets = [0, 0, 2]:

    bank[0] stays; bank[1] = (bank[1] + alpha * buffer[1]) + alpha * buffer[0].
    """
    row = tl.program_id(1).to(tl.int64)
    x = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    begin, end = tl.load(offsets_ptr + row), tl.load(offsets_ptr + row + 1)
    if end > begin:
        total = tl.load(bank_ptr + row * row_size + x, mask=x < row_size, other=0.0)
        for i in range(begin, end):
            n = tl.load(indices_ptr + i).to(tl.int64)
            total += alpha * tl.load(buffer_ptr + n * row_size + x, mask=x < row_size, other=0.0).to(total.dtype)
        tl.store(bank_ptr + row * row_size + x, total, mask=x < row_size)


def pack_rows_triton(bank: Tensor, row_ids_N: Tensor, *, out: Tensor) -> Tensor:
    """Launch `_pack_rows_kernel`; `out` is written and returned."""
    _check_contiguous(bank=bank, out=out)
    _check_grid(row_ids_N.numel())
    row_size = bank[0].numel() if len(bank) else 0
    if out.numel() > 0:
        grid = (triton.cdiv(row_size, _BLOCK), row_ids_N.numel())
        _pack_rows_kernel[grid](bank, row_ids_N.contiguous(), out, row_size, BLOCK=_BLOCK, num_warps=8)
    return out


def accumulate_rows_triton(bank: Tensor, bags: Bags, buffer: Tensor, *, alpha: float = 1.0) -> None:
    """Launch `_accumulate_rows_kernel`."""
    _check_contiguous(bank=bank, buffer=buffer)
    _check_grid(bank.shape[0])
    if bank.numel() == 0 or buffer.numel() == 0:
        return
    row_size = bank[0].numel()
    _accumulate_rows_kernel[(triton.cdiv(row_size, _BLOCK), bank.shape[0])](
        bank, bags.indices.contiguous(), bags.offsets.contiguous(), buffer, row_size, alpha, BLOCK=_BLOCK, num_warps=8
    )


def _check_contiguous(**tensors: Tensor) -> None:
    """Raise ValueError for a tensor whose rows can't be reached as one block."""
    for name, tensor in tensors.items():
        if not tensor.is_contiguous():
            raise ValueError(f"{name} must be contiguous, got shape {tuple(tensor.shape)} with stride {tensor.stride()}")


def _check_grid(num_rows: int) -> None:
    """Raise ValueError for more rows than one launch can have."""
    if num_rows > _MAX_ROWS:
        raise ValueError(f"one launch serves up to {_MAX_ROWS} rows, each a whole expert, got {num_rows}; split the call")
