"""`save_pretrained` of a sharded model: files of the whole model, or a refusal; never of one rank's experts.

Of models of transformers, and of peft, which cannot change its adapters any more.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ..sharded_experts import ShardedExperts


def guard_save_pretrained(model: nn.Module, layers: Mapping[str, ShardedExperts]) -> None:
    """Have `model.save_pretrained` write whole experts under transformers' names, where it is given all of them, or refuse."""
    original: Callable[..., Any] | None = getattr(model, "save_pretrained", None)
    if original is None:
        return

    def save_pretrained(save_directory: Any, *args: Any, state_dict: Mapping[str, Any] | None = None, **options: Any) -> Any:
        """See transformers, or peft. The state dict must hold every expert; without one, all of them must be on this rank.

        Ranks with `is_main_process=False` write nothing.

        Raises:
            RuntimeError: experts are on other ranks.
        """
        if not options.get("is_main_process", True):
            return None
        if state_dict is None:
            state_dict = model.state_dict()
        state_dict = original_names(state_dict, layers, of_adapters=hasattr(model, "peft_config"))
        with _stand_ins(model, layers):
            return original(save_directory, *args, state_dict=state_dict, **options)

    model.save_pretrained = save_pretrained  # type: ignore[assignment]


_CHANGES = {
    "merge_adapter": "merge adapters",
    "_unload_and_optionally_merge": "merge or unload adapters",
    "inject_adapter": "add an adapter",
    "delete_adapter": "delete an adapter",
}


def forbid_adapter_changes(model: nn.Module, layers: Mapping[str, ShardedExperts]) -> None:
    """Have peft refuse, before it has changed any layer, what experts with adapters cannot follow once they are shared."""
    for tuner in model.modules() if any(experts.stand_ins for experts in layers.values()) else ():
        if hasattr(type(tuner), "merge_adapter"):
            for method, what in _CHANGES.items():
                setattr(tuner, method, partial(_refuse_change, what))


def _refuse_change(what: str, *args: Any, **kwargs: Any) -> None:
    raise RuntimeError(
        f"peft cannot {what} once experts are shared; save the adapter (handle.weights.save_adapter), and do so with the "
        "unwrapped model"
    )


@contextmanager
def _stand_ins(model: nn.Module, layers: Mapping[str, ShardedExperts]) -> Iterator[None]:
    """Have the stand-ins of experts in their place: peft saves what it finds under modules of its own."""
    swaps = [(experts, stand_in) for experts in layers.values() for stand_in in experts.stand_ins]
    try:
        _replace(model, swaps)
        yield
    finally:
        _replace(model, [(stand_in, experts) for experts, stand_in in swaps])


def _replace(model: nn.Module, swaps: Sequence[tuple[nn.Module, nn.Module]]) -> None:
    new = {id(here): there for here, there in swaps}
    for module in list(model.modules()) if new else ():
        module._modules.update({name: new[id(child)] for name, child in module._modules.items() if id(child) in new})


def original_names(
    state: Mapping[str, Any], layers: Mapping[str, ShardedExperts], *, of_adapters: bool = False
) -> dict[str, Any]:
    """A whole state dict of the sharded model as that of the unwrapped one: all experts of a layer in one tensor.

    Only adapters need to be whole, and are changed, if these are all that will be saved.

    Raises:
        RuntimeError: the state lacks experts, or parts of other tensors.
    """
    state = dict(state)
    sharded = next(
        (name for name, value in state.items() if not isinstance(value, Tensor) or hasattr(value, "full_tensor")), None
    )
    for block, experts in layers.items():
        prefix = f"{block}.experts." if block else "experts."
        for weight, fused in experts.naming.fused:
            if of_adapters and weight not in experts.shape.lora_sizes():
                continue
            names = [f"{prefix}{expert}.{weight}" for expert in range(experts.num_experts)]
            found = [name for name in names if name in state]
            name = f"{block}.{fused}" if block else fused
            if name in state and not found and sharded is None:
                continue
            if sharded is not None or len(found) < len(names):
                lacks = (
                    f"parts of {sharded!r}"
                    if sharded is not None
                    else f"{len(names) - len(found)} of {len(names)} experts of {block}"
                )
                raise RuntimeError(
                    f"save_pretrained on this rank lacks {lacks}, which other ranks hold; call "
                    f"handle.weights.{'save_adapter' if of_adapters else 'save_safetensors'}(folder) on every rank, or "
                    "give the state_dict that get_model_state_dict returns with full_state_dict=True"
                )
            whole = torch.stack([state.pop(apart).detach() for apart in names])
            state[name] = experts.naming.fuse(weight, whole).contiguous()
    return state
