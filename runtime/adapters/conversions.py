"""The names of a model's weights in checkpoints, by transformers' own conversion mapping.

The mapping says how `from_pretrained` makes a model's tensors of those in a checkpoint: by other names, and by fusing matrices
that the checkpoint keeps apart, or in any other way. Saved weights get the checkpoint's names, as `save_pretrained` gives them; a
tensor that the mapping makes in another way is saved as the model has it, which `from_pretrained` reads as well.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass, field
from functools import lru_cache, partial
from importlib import import_module
from typing import Any, Self

import torch
from torch import Tensor, nn

from ..naming import ExpertNames, WeightNaming

# The operations, and the dimensions that they work on, that make one tensor of all experts from matrices apart.
_FUSING = ((("MergeModulelist", 0),), (("MergeModulelist", 0), ("Concatenate", 1)))


class _Unwrapped:
    """What conversions ask of a model, which may be wrapped by then: its configuration, and the shapes of its parameters."""

    def __init__(self, model: Any):
        self.config = model.config
        named = model.named_parameters(remove_duplicate=False)
        self._parameters = {name: torch.empty(parameter.shape, device="meta") for name, parameter in named}

    def get_parameter(self, name: str) -> Tensor:
        """A tensor without values, of the parameter's shape."""
        return self._parameters[name]


@dataclass(frozen=True)
class _Scope:
    """A model of transformers, which may be inside of another module."""

    prefix: str  # of its names
    model: _Unwrapped
    conversions: tuple[Any, ...]  # from checkpoints to the model
    renamings: tuple[Any, ...]  # reversed: from names in the model to names in checkpoints
    fusings: tuple[Any, ...]  # reversed


def without_wrappers(name: str) -> str:
    """The name in the base model of what peft's layers are around; names of adapters stay."""
    return name if "lora_" in name else name.replace("base_layer.", "")


class Conversions:
    """The mappings of the models of transformers in a model. They are asked for before FSDP2 gives modules other classes."""

    def __init__(self, scopes: Sequence[_Scope]):
        self._scopes = tuple(scopes)

    @classmethod
    def of(cls, model: nn.Module) -> Self:
        """Those of a model, which may be one of transformers, hold some, or none."""
        return cls([_scope_of(name, module) for name, module in _outermost(model)])

    def name(self, name: str) -> str:
        """What checkpoints call the tensor that the model's state dict calls `name`."""
        for scope in self._scopes:
            if name.startswith(scope.prefix):
                renamed = name.removeprefix(scope.prefix)
                for renaming in scope.renamings:
                    renamed, _ = renaming.rename_source_key(renamed)
                return scope.prefix + renamed
        return name

    def prefixed(self, state: Mapping[str, Any]) -> Mapping[str, Any]:
        """A state of the one model of transformers that another one, such as peft's, holds, by its names in that."""
        prefix = self._scopes[0].prefix if len(self._scopes) == 1 else ""
        if not prefix or any(name.startswith(prefix) for name in state):
            return state
        return _Prefixed(state, prefix)

    def names(self, names: Iterable[str]) -> dict[str, str]:
        """`name` of several, in transformers' order: some renamings go by the names that they saw before."""
        natural = import_module("transformers.core_model_loading").dot_natural_key if self._scopes else None
        return {name: self.name(name) for name in sorted(names, key=natural)}

    def experts(self, block: str, first: str, down: str) -> ExpertNames | None:
        """Names inside the block, before `name`, of one expert's matrices; None where checkpoints hold the fused tensors.

        `first` and `down` are the fused tensors' names inside the block.
        """
        parts = [self._parts(block, inner) for inner in (first, down)]
        names = [part.removeprefix(f"{block}.") for of in parts for part in of]
        if not all(parts) or any("*" not in name for name in names):
            return None
        *gate, up, down = (name.replace("*", "{expert}") for name in names)
        return ExpertNames(gate[0] if gate else None, up, down)

    def converted(self, state: Mapping[str, Any]) -> Mapping[str, Any]:
        """A checkpoint with the tensors that the mapping makes in another way than by names and fusing, as the model has them."""
        made: dict[str, _Made] = {}
        for scope in self._scopes:
            loading = import_module("transformers.core_model_loading")
            renamings = [each for each in scope.conversions if isinstance(each, loading.WeightRenaming)]
            converters = [each for each in scope.conversions if not isinstance(each, loading.WeightRenaming)]
            of_pattern = {pattern: each for each in converters for pattern in each.source_patterns}
            for name in sorted(state, key=loading.dot_natural_key):
                inner = name.removeprefix(scope.prefix)
                target, pattern = loading.rename_source_key(inner, renamings, converters)
                if not name.startswith(scope.prefix) or pattern is None or _is_fusing(of_pattern[pattern]):
                    continue
                first, *others = of_pattern[pattern].target_patterns
                full = scope.prefix + target
                group = made.setdefault(full, _Made(scope, of_pattern[pattern], target, []))
                group.sources.append((name, pattern))
                made |= {scope.prefix + target.replace(first, other, 1): group for other in others}
        return _Converted(state, made) if made else state

    def _parts(self, block: str, inner: str) -> list[str]:
        full = f"{block}.{inner}"
        for scope in self._scopes:
            for fusing in scope.fusings if full.startswith(scope.prefix) else ():
                renamed, pattern = fusing.rename_source_key(full.removeprefix(scope.prefix))
                if pattern is not None:
                    targets = fusing.target_patterns
                    parts = [scope.prefix + renamed.replace(targets[0], target, 1) for target in targets]
                    return parts if all(part.startswith(f"{block}.") for part in parts) else []
        return []


@dataclass(frozen=True)
class InterfaceNaming(WeightNaming):
    """Names and layouts of the interface's experts: matrices [out, in] or [in, out]; gate above up, or their features in turn.

    And those of peft's LoRA on them.
    """

    conversions: Conversions = field(default_factory=lambda: Conversions(()), compare=False)
    is_transposed: bool = False
    is_interleaved: bool = False
    ranks: Mapping[str, int] = field(default_factory=dict, compare=False)  # of LoRA, by the name of A

    def to_original(self, weight: str, tensor: Tensor) -> Tensor:
        """See `WeightNaming.to_original`."""
        if self.is_interleaved and weight in ("gate_up", "gate_up_bias", "gate_up_lora_B"):
            tensor = interleaved(tensor, -1 if weight.endswith("bias") else -2)
        return tensor.mT if self.is_transposed and weight in ("gate_up", "down") else tensor

    def from_original(self, weight: str, tensor: Tensor) -> Tensor:
        """See `WeightNaming.from_original`."""
        if self.is_transposed and weight in ("gate_up", "down"):
            tensor = tensor.mT
        if self.is_interleaved and weight in ("gate_up", "gate_up_bias", "gate_up_lora_B"):
            dim = -1 if weight.endswith("bias") else -2
            tensor = torch.cat(tensor.unflatten(dim, (-1, 2)).unbind(dim), dim=dim)
        return tensor

    def fuse(self, weight: str, tensor_E: Tensor) -> Tensor:
        """See `WeightNaming.fuse`. In peft all A lie one above the other, [E r, in], and B is [out, r, E] in two dimensions."""
        tensor_E = self.to_original(weight, tensor_E)
        if weight.endswith("_lora_A"):
            return tensor_E.flatten(0, 1)
        return tensor_E.permute(1, 2, 0).flatten(1) if weight.endswith("_lora_B") else tensor_E

    def place(self, weight: str, expert: int, num_experts: int) -> Any:
        """See `WeightNaming.place`."""
        if weight.endswith("_lora_A"):
            rank = self.ranks[weight]
            return slice(expert * rank, (expert + 1) * rank)
        return (slice(None), slice(expert, None, num_experts)) if weight.endswith("_lora_B") else expert


def interleaved(gate_up: Tensor, dim: int) -> Tensor:
    """gate0, up0, gate1, up1, ... of gate, then up."""
    return torch.stack(gate_up.chunk(2, dim), dim=dim).flatten(dim - 1, dim)


class _Prefixed(Mapping[str, Any]):
    """A state whose names begin with something more."""

    def __init__(self, state: Mapping[str, Any], prefix: str):
        self._state, self._prefix = state, prefix

    def __getitem__(self, name: str) -> Any:
        if not name.startswith(self._prefix):
            raise KeyError(name)
        return self._state[name.removeprefix(self._prefix)]

    def __contains__(self, name: object) -> bool:
        return isinstance(name, str) and name.startswith(self._prefix) and name.removeprefix(self._prefix) in self._state

    def __iter__(self) -> Iterator[str]:
        return (self._prefix + name for name in self._state)

    def __len__(self) -> int:
        return len(self._state)


@dataclass(frozen=True, eq=False)
class _Made:
    """Tensors that a conversion makes of others."""

    scope: _Scope
    converter: Any
    target: str  # the first of them
    sources: list[tuple[str, str]]  # names in the checkpoint, each with the pattern that it fits


class _Converted(Mapping[str, Any]):
    """A checkpoint with converted tensors, each made when it is read."""

    def __init__(self, state: Mapping[str, Any], made: Mapping[str, _Made]):
        sources = {name for group in made.values() for name, _ in group.sources}
        self._state, self._made = state, made
        self._names = dict.fromkeys([*(name for name in state if name not in sources), *made])
        self._tensors = lru_cache(maxsize=4)(partial(_make, state))  # a layer's experts are read one by one

    def __getitem__(self, name: str) -> Any:
        return self._tensors(self._made[name])[name] if name in self._made else self._state[name]

    def __contains__(self, name: object) -> bool:
        return name in self._names

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)


def _make(state: Mapping[str, Any], group: _Made) -> dict[str, Tensor]:
    converter = deepcopy(group.converter)
    for name, pattern in group.sources:
        converter.add_tensor(group.target, name, pattern, state[name][...])
    tensors = converter.convert(group.target, model=group.scope.model, config=group.scope.model.config)
    return {group.scope.prefix + name: each[0] if isinstance(each, list) else each for name, each in tensors.items()}


def _outermost(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    found: list[str] = []
    for name, module in model.named_modules():
        is_theirs = any(kind.__name__ == "PreTrainedModel" for kind in type(module).__mro__)
        if is_theirs and not any(name.startswith(outer) for outer in found):
            found.append(f"{name}." if name else "")
            yield found[-1], module


def _scope_of(prefix: str, model: Any) -> _Scope:
    """The mapping as transformers' `revert_weight_conversion` takes it: of `from_pretrained`, or else the default one.

    Also the default one where `from_pretrained` has fused nothing: other checkpoints may keep experts apart.
    """
    mapping, loading = (import_module(f"transformers.{name}") for name in ("conversion_mapping", "core_model_loading"))
    conversions = getattr(model, "_weight_conversions", None)
    if conversions is None or all(isinstance(each, loading.WeightRenaming) for each in conversions):
        conversions = mapping.get_model_conversion_mapping(model, add_legacy=False)
        conversions = [each for each in conversions if not isinstance(each, loading.PrefixChange)]
    is_renaming = [isinstance(each, loading.WeightRenaming) for each in conversions]
    renamings = [each for each, renames in zip(conversions, is_renaming, strict=True) if renames]
    fusings = [each for each, renames in zip(conversions, is_renaming, strict=True) if not renames and _is_fusing(each)]
    return _Scope(
        prefix,
        _Unwrapped(model),
        tuple(conversions),
        tuple(each.reverse_transform() for each in reversed(renamings)),
        tuple(each.reverse_transform() for each in reversed(fusings)),
    )


def _is_fusing(converter: Any) -> bool:
    operations = tuple((type(each).__name__, getattr(each, "dim", None)) for each in converter.operations)
    return operations in _FUSING and len(converter.source_patterns) == len(operations) and len(converter.target_patterns) == 1
