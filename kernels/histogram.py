"""Counts of ids: `histogram`, the load of every expert from the ids that the router chose.

Shapes: N ids, B bins.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .checks import check_ids, check_int32


def histogram(ids: Tensor, num_bins: int) -> Tensor:
    """Return `counts_B` (int64): the number of occurrences of each id of [0, num_bins) in `ids`, of any shape.

    On the GPU nothing is read back to the host (torch.bincount waits for the largest id), so ids out of range are ignored there;
    on the CPU they raise ValueError.
    """
    check_ids(ids=ids)
    check_int32("ids", ids.numel(), "split the batch")
    if ids.device.type != "cuda":
        return histogram_torch(ids, num_bins)
    from .histogram_triton import histogram_triton

    return histogram_triton(ids, num_bins)


def histogram_torch(ids: Tensor, num_bins: int) -> Tensor:
    """Torch twin of `histogram`."""
    if ids.numel() and not 0 <= int(ids.min()) <= int(ids.max()) < num_bins:
        raise ValueError(f"ids go from {int(ids.min())} to {int(ids.max())}; they must be in [0, {num_bins})")
    return torch.bincount(ids.flatten(), minlength=num_bins)
