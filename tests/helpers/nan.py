"""Uninitialised memory that shows: `torch.empty` and its kin return NaN (the smallest integer for integer types)."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import torch
from torch import Tensor


def poison_(tensor: Tensor) -> Tensor:
    """Fill with NaN, or with the smallest value of an integer type."""
    if tensor.dtype == torch.bool:
        return tensor.fill_(True)
    if tensor.dtype.is_floating_point or tensor.dtype.is_complex:
        return tensor.fill_(float("nan"))
    return tensor.fill_(torch.iinfo(tensor.dtype).min)


@contextmanager
def poisoned_empty() -> Iterator[None]:
    """Inside this block every tensor made by `empty`, `empty_like` or `new_empty` is poisoned."""

    def poisoned(make: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def wrapper(*args: Any, **kwargs: Any) -> Tensor:
            return poison_(make(*args, **kwargs))

        return wrapper

    with (
        mock.patch.object(torch, "empty", poisoned(torch.empty)),
        mock.patch.object(torch, "empty_like", poisoned(torch.empty_like)),
        mock.patch.object(torch.Tensor, "new_empty", poisoned(torch.Tensor.new_empty)),
    ):
        yield
