"""Token rows to expert-major order and back: `gather_rows` and its transpose `sum_rows`.

Dispatch copies token rows into expert-major order (a token may appear several times); combine sums the results of each token.
Both are described by one int vector, `row_ids_N`: routed row n belongs to token row `row_ids_N[n]`. A bag is summed in its own
order, in fp32, so that results are bitwise repeatable.

Shapes: M rows on the token side, N routed rows, D model dim.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from .checks import check_devices, check_floating, check_ids, check_int32, check_out, unit_stride
from .types import Bags


def bags_of(row_ids_N: Tensor, num_rows: int) -> Bags:
    """Group the positions n by `row_ids_N[n]` (values in [0, num_rows)); positions ascend inside a bag.

    On a GPU nothing is read back, so ids out of range are not detected there; on the CPU they raise ValueError.
    """
    N = row_ids_N.numel()
    check_ids(row_ids_N=row_ids_N)
    check_int32("row ids and rows", max(N, num_rows), "split the batch")
    # One plain sort of (id, position) packed into an int64: keys are unique, so no stable sort is needed, and numpy's
    # vectorised sort is several times faster than a stable argsort.
    keys = (row_ids_N.long() << 32) | torch.arange(N, device=row_ids_N.device)
    if row_ids_N.device.type == "cpu":
        keys = torch.from_numpy(np.sort(keys.numpy()))
        offsets = _offsets_by_counting(row_ids_N, num_rows)
    else:
        keys = torch.sort(keys).values
        offsets = _offsets_by_search(keys >> 32, num_rows)
    return Bags(indices=(keys & 0x7FFFFFFF).int(), offsets=offsets)


def _offsets_by_counting(row_ids_N: Tensor, num_rows: int) -> Tensor:
    """Offsets of the bags, with ids checked against `num_rows`."""
    counts = torch.bincount(row_ids_N, minlength=num_rows)
    if counts.numel() > num_rows:
        raise ValueError(f"row_ids_N reaches {counts.numel() - 1}, but num_rows is {num_rows}; ids must be in [0, num_rows)")
    offsets = torch.zeros(num_rows + 1, dtype=torch.int32)
    torch.cumsum(counts, 0, dtype=torch.int32, out=offsets[1:])
    return offsets


def _offsets_by_search(sorted_ids_N: Tensor, num_rows: int) -> Tensor:
    """Offsets of the bags without a host synchronisation, which torch.bincount would need."""
    return torch.searchsorted(sorted_ids_N, torch.arange(num_rows + 1, device=sorted_ids_N.device), out_int32=True)


def gather_rows(x_MD: Tensor, row_ids_N: Tensor, *, beside: Tensor | None = None, out: Tensor | None = None) -> Tensor:
    """Return `rows_ND` with `rows_ND[n] = x_MD[row_ids_N[n]]`; the transpose of `sum_rows`. No autograd.

    With `beside` [P, D], ids from M on refer to its rows, as if it were appended to `x_MD`; no concatenation is made.
    """
    check_devices(x_MD.device, row_ids_N=row_ids_N, out=out)
    check_ids(row_ids_N=row_ids_N)
    _check_beside(x_MD, beside)
    if x_MD.device.type == "cuda":
        from .permute_triton import gather_rows_triton

        return gather_rows_triton(x_MD, row_ids_N, beside=beside, out=out)
    if x_MD.device.type == "cpu" and beside is not None:
        return _gather_compiled(x_MD, row_ids_N, beside, out)
    return gather_rows_torch(x_MD, row_ids_N, beside=beside, out=out)


def sum_rows(rows_ND: Tensor, bags: Bags, *, beside: Tensor | None = None, out: Tensor | None = None) -> Tensor:
    """Return `x_MD` with `x_MD[m]` the sum of the rows in bag m, zeros where the bag is empty. No autograd.

    The sum runs in the bag's order, in fp32 (fp64 for fp64 rows), and is rounded once to the dtype of `rows_ND`. With `beside`
    [P, D], indices from N on refer to its rows, as if it were appended to `rows_ND`.
    """
    check_devices(rows_ND.device, indices=bags.indices, offsets=bags.offsets, out=out)
    check_floating(rows_ND=rows_ND)
    _check_beside(rows_ND, beside)
    if rows_ND.device.type == "cuda":
        from .permute_triton import sum_rows_triton

        return sum_rows_triton(rows_ND, bags, beside=beside, out=out)
    if rows_ND.device.type == "cpu" and rows_ND.dtype in (torch.float32, torch.float64):
        return _sum_compiled(rows_ND, bags, beside, out)
    return sum_rows_torch(rows_ND, bags, beside=beside, out=out)


def gather_rows_torch(x_MD: Tensor, row_ids_N: Tensor, *, beside: Tensor | None = None, out: Tensor | None = None) -> Tensor:
    """Torch twin of `gather_rows`."""
    x_MD = x_MD if beside is None else torch.cat([x_MD, beside])
    if out is None:
        return torch.index_select(x_MD, 0, row_ids_N)
    return torch.index_select(x_MD, 0, row_ids_N, out=out)


def sum_rows_torch(rows_ND: Tensor, bags: Bags, *, beside: Tensor | None = None, out: Tensor | None = None) -> Tensor:
    """Torch twin of `sum_rows`: `embedding_bag`, which sums in the bag's order in fp32."""
    rows_ND = rows_ND if beside is None else torch.cat([rows_ND, beside])
    x_MD = _sum_bags(rows_ND, bags.indices, bags.offsets)
    return x_MD if out is None else out.copy_(x_MD)


def _gather_compiled(x_MD: Tensor, row_ids_N: Tensor, beside: Tensor, out: Tensor | None) -> Tensor:
    from .permute_cpu import gather_into

    out = _new_or_checked(out, row_ids_N.shape[0], x_MD)
    if not gather_into(out, unit_stride(x_MD), unit_stride(beside), row_ids_N.long().contiguous()):
        num_rows = _num_rows(x_MD, beside)
        raise ValueError(f"row_ids_N goes from {int(row_ids_N.min())} to {int(row_ids_N.max())}; ids must be in [0, {num_rows})")
    return out


def _sum_compiled(rows_ND: Tensor, bags: Bags, beside: Tensor | None, out: Tensor | None) -> Tensor:
    from .permute_cpu import sum_into

    out = _new_or_checked(out, bags.num_bags, rows_ND)
    indices, offsets = bags.indices.contiguous(), bags.offsets.contiguous()
    if not sum_into(out, unit_stride(rows_ND), None if beside is None else unit_stride(beside), indices, offsets):
        num_rows = _num_rows(rows_ND, beside)
        lowest, highest = int(indices.min()), int(indices.max())
        if lowest < 0 or highest >= num_rows:
            raise ValueError(f"the bags name rows {lowest} to {highest}, but there are {num_rows} rows; use bags_of")
        raise ValueError(
            f"offsets go from {int(offsets.min())} to {int(offsets.max())}, but there are {len(indices)} indices; use bags_of"
        )
    return out


def _new_or_checked(out: Tensor | None, num_rows: int, like: Tensor) -> Tensor:
    """Memory for rows like those of `like`: the checked `out`, or new."""
    if out is None:
        return like.new_empty(num_rows, like.shape[1])
    check_out(out, (num_rows, like.shape[1]), like)
    return out


def _num_rows(rows: Tensor, beside: Tensor | None) -> int:
    return rows.shape[0] + (0 if beside is None else beside.shape[0])


def _check_beside(rows: Tensor, beside: Tensor | None) -> None:
    if beside is not None and (beside.dtype, beside.device, beside.shape[1:]) != (rows.dtype, rows.device, rows.shape[1:]):
        raise ValueError(
            f"beside must have rows like those it stands beside, {rows.dtype} {tuple(rows.shape[1:])} on {rows.device}, "
            f"got {beside.dtype} {tuple(beside.shape[1:])} on {beside.device}"
        )


def _sum_bags(rows_ND: Tensor, indices: Tensor, offsets: Tensor) -> Tensor:
    """`embedding_bag` in sum mode; `offsets` start at 0 and end at the number of indices."""
    if indices.numel() == 0:
        return rows_ND.new_zeros(offsets.numel() - 1, rows_ND.shape[1])
    return F.embedding_bag(indices, rows_ND, offsets, mode="sum", include_last_offset=True)
