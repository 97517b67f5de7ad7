"""Models built on the meta device: shapes without memory, allocated once they are sharded."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn


def allocate_meta(model: nn.Module, device: torch.device) -> None:
    """Give every parameter and buffer on the meta device memory on `device`. What was allocated before stays as it is.

    Parameters hold nothing yet. Buffers that are no part of a state dict, such as rotary frequencies, no checkpoint brings
    back: for transformers' models they are computed here.

    Raises:
        ValueError: there are such buffers in a model that cannot compute them.
    """
    lost = [name for name, module in model.named_modules() if any(_is_lost(module))]
    initialize = getattr(model, "_init_weights", None)
    if lost and initialize is None:
        raise ValueError(
            f"{lost[0] or type(model).__name__!r} has a buffer on the meta device that no state dict holds, so it would stay "
            "undefined; build that module on a real device"
        )
    # Module._apply keeps FSDP2's and tied parameters in order, which assignments from outside would not.
    model._apply(lambda tensor: torch.empty_like(tensor, device=device) if tensor.is_meta else tensor)
    with torch.no_grad():
        for name in lost:
            initialize(model.get_submodule(name))  # type: ignore[misc]


def _is_lost(module: nn.Module) -> list[bool]:
    kept = module._non_persistent_buffers_set
    buffers: dict[str, Any] = module._buffers
    return [isinstance(buffers[name], Tensor) and buffers[name].is_meta for name in kept]
