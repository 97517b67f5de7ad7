"""Checks of an op's arguments before it runs: one device, a supported dtype, integer ids, contiguous rows."""

from __future__ import annotations

import torch
from torch import Tensor

INT32_MAX = 2**31 - 1


def check_devices(device: torch.device, **tensors: Tensor | None) -> None:
    """Raise ValueError for a tensor on another device than the rows; a kernel would read an invalid address."""
    for name, tensor in tensors.items():
        if tensor is not None and tensor.device != device:
            raise ValueError(f"{name} is on {tensor.device}, but the rows are on {device}; move one of them")


def check_floating(**tensors: Tensor) -> None:
    """Raise ValueError for a tensor that is not floating point; sums of integers would be rounded to fp32."""
    for name, tensor in tensors.items():
        if not tensor.dtype.is_floating_point:
            raise ValueError(f"{name} must be floating point, got {tensor.dtype}; cast it first")


def check_ids(**tensors: Tensor) -> None:
    """Raise ValueError for a tensor of ids or counts that is neither int32 nor int64; a kernel would truncate it."""
    for name, tensor in tensors.items():
        if tensor.dtype not in (torch.int32, torch.int64):
            raise ValueError(f"{name} must be int32 or int64, got {tensor.dtype}; cast it first")


def check_int32(what: str, number: int, cure: str) -> None:
    """Raise ValueError for a number that does not fit a 32-bit counter."""
    if number > INT32_MAX:
        raise ValueError(f"{what} are counted in int32, got {number}, more than {INT32_MAX}; {cure}")


def check_out(out: Tensor, shape: tuple[int, int], like: Tensor) -> None:
    """Raise ValueError unless `out` has this shape, the dtype of `like`, and contiguous rows."""
    if out.shape != shape or out.dtype != like.dtype or out.stride(1) != 1:
        raise ValueError(
            f"out must be {like.dtype} {shape} with contiguous rows, got {out.dtype} {tuple(out.shape)} {out.stride()}"
        )


def unit_stride(x: Tensor) -> Tensor:
    """`x` itself if its last dimension is contiguous, else a contiguous copy."""
    return x if x.stride(-1) == 1 else x.contiguous()
