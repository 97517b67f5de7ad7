"""Finding the MoE layers of a model: moesaic's own, those that registered adapters match, and experts modules of transformers."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from importlib import import_module
from typing import Protocol

from torch import nn

from ..layer import MoELayer
from ..sharded_experts import ExpertSource, ShardedExperts
from .conversions import Conversions
from .experts_modules import adopt, carry_hooks, is_experts_module, is_wrapped_by_peft, layer_name


class Adapter(Protocol):
    """Converts MoE blocks of one kind, which are replaced whole."""

    name: str

    def matches(self, module: nn.Module) -> bool:
        """Whether `module` is a block of this kind."""

    def convert(self, module: nn.Module) -> MoELayer:
        """A `MoELayer` with the block's weights, which takes its place in the model. The block itself must stay as it is.

        Set `layer.experts.naming` for the weights to be saved and loaded under the names that they have in the block.
        """


_ADAPTERS: list[Adapter] = []


def register_adapter(adapter: Adapter) -> None:
    """Add an adapter for a further kind of MoE blocks. Adapters that were registered later are tried first."""
    _ADAPTERS.insert(0, adapter)


@dataclass(frozen=True, eq=False)
class FoundLayer:
    """A MoE layer of a model that is not sharded yet; finding it has changed nothing."""

    name: str
    """Of the layer: of its block, where the experts are the block's child `experts`."""
    experts: ShardedExperts
    source: ExpertSource
    replaced: nn.Module | None = None
    replacement: nn.Module | None = None
    """What takes the place of `replaced` wherever the model holds it; None: nothing is replaced."""


def find_layers(model: nn.Module) -> list[FoundLayer]:
    """Every MoE layer of `model`, in module order.

    Raises:
        ValueError: there is none, with what the model consists of; experts that compute something else than transformers' own.
    """
    found = list(_found_in(model))
    if not found:
        seen = sorted({type(module).__name__ for module in model.modules()})
        known = ", ".join(["moesaic.MoELayer", *(adapter.name for adapter in _ADAPTERS), "experts modules of transformers"])
        raise ValueError(
            f"no MoE block in {type(model).__name__}, which consists of {', '.join(seen)}; known blocks: {known}; "
            "add an adapter for yours with register_adapter(adapter)"
        )
    return found


def _found_in(model: nn.Module) -> Iterator[FoundLayer]:
    taken: list[str] = []  # what is inside of these belongs to them
    seen: set[int] = set()  # experts that several layers share
    conversions: Conversions | None = None
    for name, module in model.named_modules():
        if any(name.startswith(outer + ".") or not outer for outer in taken):
            continue
        adapter = next((a for a in _ADAPTERS if a.matches(module)), None)
        if isinstance(module, MoELayer):
            taken.append(name)
            if id(module.experts) not in seen:
                seen.add(id(module.experts))
                yield FoundLayer(name, module.experts, module.experts.source())
        elif isinstance(module, ShardedExperts):
            taken.append(name)
            yield FoundLayer(layer_name(name), module, module.source())
        elif adapter is not None:
            taken.append(name)
            layer = adapter.convert(module)
            carry_hooks(module, layer)
            yield FoundLayer(name, layer.experts, layer.experts.source(), module, layer)
        elif is_wrapped_by_peft(module):
            taken.append(name)
            conversions = conversions or Conversions.of(model)
            experts, source = import_module(".lora_experts", __package__).adopt_adapted(name, module, conversions)
            yield FoundLayer(layer_name(name), experts, source, module, experts)
        elif is_experts_module(module):
            taken.append(name)
            _check_holders(model, name, module)
            conversions = conversions or Conversions.of(model)
            experts, source = adopt(name, module, conversions)
            yield FoundLayer(layer_name(name), experts, source, module, experts)


def _check_holders(model: nn.Module, name: str, module: nn.Module) -> None:
    """Refuse experts of which there is no holder, or of which peft trains a copy."""
    if not name:
        raise ValueError(f"the model is nothing but {type(module).__name__}; give the model that holds it")
    holder = model.get_submodule(name.rpartition(".")[0])
    if type(holder).__module__.startswith("peft."):
        raise ValueError(
            f"{name} is trained as a copy, by peft's {type(holder).__name__}, with the original beside it; use target_parameters "
            "for LoRA on experts, or train the experts without peft"
        )


def replace_modules(model: nn.Module, found: list[FoundLayer]) -> None:
    """Put every replacement where the model holds what it replaces, under whatever names."""
    replacements = {id(layer.replaced): layer.replacement for layer in found if layer.replaced is not None}
    for module in list(model.modules()):
        for name, child in module._modules.items():
            if id(child) in replacements:
                module._modules[name] = replacements[id(child)]
