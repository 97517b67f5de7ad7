"""Bank rows to send buffers with a cast, and received gradients back into the bank: `pack_rows` and `accumulate_rows`.

A row is one expert's whole matrix, flattened by a view: few rows, each long. Sums run in the bag's order.

Shapes: B bank rows, N packed rows, X elements of a row (the bank's trailing dimensions, flattened).
"""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor

from .checks import check_devices, check_floating, check_ids
from .permute import Bags


def pack_rows(bank: Tensor, row_ids_N: Tensor, *, dtype: torch.dtype | None = None, out: Tensor | None = None) -> Tensor:
    """Return a buffer [N, ...] with `buffer[n] = bank[row_ids_N[n]]`, cast to `dtype` (the bank's own by default)."""
    check_devices(bank.device, row_ids_N=row_ids_N, out=out)
    check_ids(row_ids_N=row_ids_N)
    if out is None:
        out = torch.empty((row_ids_N.numel(), *bank.shape[1:]), dtype=dtype or bank.dtype, device=bank.device)
    if out.shape != (row_ids_N.numel(), *bank.shape[1:]) or (dtype is not None and out.dtype != dtype):
        raise ValueError(f"out is {out.dtype} {tuple(out.shape)}, must hold {row_ids_N.numel()} rows of {tuple(bank.shape[1:])}")
    if bank.device.type != "cuda":
        return pack_rows_torch(bank, row_ids_N, out=out)
    from .pack_rows_triton import pack_rows_triton

    return pack_rows_triton(bank, row_ids_N, out=out)


def accumulate_rows(bank: Tensor, bags: Bags, buffer: Tensor, *, alpha: float = 1.0) -> None:
    """Add to bank row m, in place, `alpha` times each buffer row of bag m, one after the other in the bag's order.

    Arithmetic is in the bank's dtype (fp32); a bank row with an empty bag is untouched.
    """
    if bags.num_bags != bank.shape[0] or buffer.shape[1:] != bank.shape[1:]:
        raise ValueError(
            f"{bags.num_bags} bags and a buffer {tuple(buffer.shape)} do not fit a bank {tuple(bank.shape)}; "
            "give one bag per bank row and rows of one shape"
        )
    check_devices(bank.device, indices=bags.indices, offsets=bags.offsets, buffer=buffer)
    check_floating(bank=bank, buffer=buffer)
    if bank.device.type != "cuda":
        accumulate_rows_torch(bank, bags, buffer, alpha=alpha)
        return
    from .pack_rows_triton import accumulate_rows_triton

    accumulate_rows_triton(bank, bags, buffer, alpha=alpha)


def pack_rows_torch(bank: Tensor, row_ids_N: Tensor, *, out: Tensor) -> Tensor:
    """Torch twin of `pack_rows`: one copy per row, which also casts."""
    row_ids = row_ids_N.tolist()
    if row_ids and not 0 <= min(row_ids) <= max(row_ids) < len(bank):
        raise ValueError(f"row_ids_N goes from {min(row_ids)} to {max(row_ids)}; ids must be in [0, {len(bank)})")
    for n, row in enumerate(row_ids):
        out[n].copy_(bank[row])
    return out


def accumulate_rows_torch(bank: Tensor, bags: Bags, buffer: Tensor, *, alpha: float = 1.0) -> None:
    """Torch twin of `accumulate_rows`: one add per buffer row."""
    indices, offsets = bags.indices.tolist(), bags.offsets.tolist()
    for row, (begin, end) in enumerate(pairwise(offsets)):
        for n in indices[begin:end]:
            bank[row].add_(buffer[n], alpha=alpha)
