"""The histogram against a loop, and what it refuses."""

from __future__ import annotations

import pytest
import torch

from moesaic.kernels import histogram


@pytest.mark.parametrize("shape,num_bins", [((1,), 1), ((7, 2), 3), ((129, 8), 63), ((1025,), 1), ((0, 2), 3)])
@pytest.mark.parametrize("dtype", [torch.int32, torch.int64], ids=str)
def test_counts_every_id(shape: tuple[int, ...], num_bins: int, dtype: torch.dtype) -> None:
    """Of any shape, and of a column of a wider matrix, which has gaps."""
    ids = torch.randint(0, num_bins, shape, dtype=dtype)
    for each in (ids, torch.stack([ids, ids + 1], dim=-1)[..., 0]):
        counts = histogram(each, num_bins)
        assert counts.dtype == torch.int64
        assert counts.tolist() == [ids.flatten().tolist().count(b) for b in range(num_bins)]


def test_what_it_cannot_count_is_named() -> None:
    with pytest.raises(ValueError, match=r"ids go from -1 to 4; they must be in \[0, 4\)"):
        histogram(torch.tensor([2, -1, 4]), 4)
    with pytest.raises(ValueError, match="ids must be int32 or int64, got torch"):
        histogram(torch.zeros(2), 4)
    with pytest.raises(ValueError, match="ids are counted in int32, got 2147483648, more than 2147483647; split the batch"):
        histogram(torch.zeros(1, dtype=torch.int64).expand(2**31), 4)
