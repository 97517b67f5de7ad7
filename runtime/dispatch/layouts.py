"""Index arithmetic of dispatch: consecutive pieces, their regrouping, and bags of rows to sum.

Shape letters: as in handle.py; S pieces.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate

import numpy as np
import torch
from torch import Tensor

from ...kernels import Bags, bags_of, on_device


def starts(sizes: Sequence[int]) -> list[int]:
    """The start of each of consecutive pieces of these sizes."""
    return list(accumulate(sizes, initial=0))[:-1]


def slices(sizes: Sequence[int]) -> list[slice]:
    """Consecutive pieces of these sizes."""
    return [slice(start, start + size) for start, size in zip(starts(sizes), sizes, strict=True)]


def segment_transpose(counts_AB: np.ndarray, device: torch.device) -> Tensor:
    """Regroup consecutive segments: the gather index from (a, b) order to (b, a) order, int64.

    Example: counts [[1, 2], [0, 1]] lay four elements out as segments (a0,b0) = 0, (a0,b1) = 1 2, (a1,b1) = 3; b-major that
    is b0: 0, then b1: 1 2 3, so the result is [0, 1, 2, 3]. With counts [[1, 1], [1, 0]] it is [0, 2, 1].
    """
    sizes_S, order_S = counts_AB.ravel(), np.arange(counts_AB.size).reshape(counts_AB.shape).T.ravel()
    starts_S, order_S = np.cumsum(sizes_S) - sizes_S, order_S[sizes_S[order_S] > 0]
    sizes_S = sizes_S[order_S]
    shifts_S = starts_S[order_S] - (np.cumsum(sizes_S) - sizes_S)
    total = int(sizes_S.sum())
    shifts_N = torch.repeat_interleave(on_device(shifts_S, device), on_device(sizes_S, device), output_size=total)
    return shifts_N + torch.arange(total, device=device)


def inverse(order: Tensor) -> Tensor:
    """The inverse of a permutation that is given as a gather index: the place of each element afterwards."""
    places = torch.empty_like(order)
    places[order] = torch.arange(order.numel(), device=order.device)
    return places


def without(values: Tensor, part: slice) -> Tensor:
    """All values except one piece."""
    return torch.cat([values[: part.start], values[part.stop :]])


def bags_at(row_ids: Tensor, positions: Tensor, num_rows: int) -> Bags:
    """`bags_of`, where entry i stands for `positions[i]`."""
    bags = bags_of(row_ids, num_rows)
    return Bags(positions[bags.indices].to(torch.int32), bags.offsets)
