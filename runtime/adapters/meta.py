"""Models built on the meta device: shapes without memory, allocated once they are sharded."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

_PAIR = ("lora_A", "lora_B")


def initialize_adapters(model: nn.Module, device: torch.device) -> None:
    """Give peft's adapters on the meta device memory, and the values that peft starts with: no checkpoint of the base holds any.

    The same on every rank. Collective if there are some.

    Raises:
        ValueError: adapters that start with other values, such as some made of the base weights.
    """
    found = [(name, layer, adapter) for name, layer in model.named_modules() for adapter in _adapters_on_meta(layer)]
    if not found:
        return
    for name, layer, adapter in found:
        start = model.peft_config[adapter].init_lora_weights  # type: ignore[index, union-attr]
        if start is not True or not all(adapter in getattr(layer, part) for part in _PAIR):
            raise ValueError(
                f"the adapter {adapter!r} of {name} is on the meta device and starts with init_lora_weights={start!r}; only LoRA "
                "of linear layers and experts with init_lora_weights=True can start there: build the model on a real device"
            )
    seed = [torch.initial_seed()]
    dist.broadcast_object_list(seed)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed[0])
        for _, layer, adapter in found:
            pair: list[Any] = [getattr(layer, part)[adapter].to_empty(device="cpu") for part in _PAIR]
            layer.reset_lora_parameters(adapter, True)
            for linear in pair:
                linear.to(device)


def _adapters_on_meta(layer: Any) -> Iterator[str]:
    if type(layer).__module__.startswith("peft.") and hasattr(layer, "reset_lora_parameters"):
        kinds = [getattr(layer, kind) for kind in layer.adapter_layer_names]
        for adapter in dict.fromkeys(adapter for kind in kinds for adapter in kind):
            values = [kind[adapter] for kind in kinds if adapter in kind]
            tensors = [p for value in values for p in (value.parameters() if isinstance(value, nn.Module) else [value])]
            if any(tensor.is_meta for tensor in tensors):
                yield adapter


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
