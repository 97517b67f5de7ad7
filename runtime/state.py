"""State under logical names: an expert is named by its layer and number, not by rank and row.

    model.<parameter or buffer name>                          the dense part, DTensors where FSDP2 sharded it
    model.<layer>.experts.<expert>.<weight>                   one expert's weights (gate_up, down, biases), on its owner only
    optimizer.<parameter name>.<key>                          optimizer state of either

Any world size and owner map can load what any other saved, through torch.distributed.checkpoint. Values are live: the parameters
themselves and the optimizer's tensors, so that a checkpoint is loaded in place; what the optimizer keeps as plain
Python values is put back by `load_state`. Parameters of which it keeps nothing yet, as they never got a gradient, have no
optimizer state. Hyper-parameters (learning rates, betas) are the optimizer's construction, not its state.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor, nn

from .sharded_experts import ShardedExperts


def state_of(model: nn.Module, optimizer: torch.optim.Optimizer | None = None) -> dict[str, Any]:
    """This rank's part of the state: the dense part, and the experts it owns."""
    state = {f"model.{name}": tensor.detach() for name, tensor in named_tensors(model)}
    if optimizer is None:
        return state
    return state | {entry.key: entry.value for entry in _optimizer_entries(model, optimizer)}


@torch.no_grad()
def load_state(state: Mapping[str, Any], model: nn.Module, optimizer: torch.optim.Optimizer | None = None) -> None:
    """Copy `state` into the model and the optimizer. Entries of experts of other ranks are left alone.

    Raises ValueError if something this rank needs is missing or has another shape; nothing is changed then.
    """
    with _state_undone_after_error(optimizer):
        if optimizer is not None:
            prepare_optimizer(optimizer, model, state)
        wanted = state_of(model, optimizer)
        _check_fits(state, wanted)
    for key, target in wanted.items():
        if isinstance(target, Tensor) and target is not state[key]:
            target.copy_(state[key])
    for entry in () if optimizer is None else _optimizer_entries(model, optimizer):
        if not isinstance(entry.value, Tensor):
            entry.fields[entry.field] = state[entry.key]


def named_tensors(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """What the state holds of a model: parameters and buffers, those that modules share under every name.

    Experts of a layer that is shared are there once, under its first name.
    """
    names = set()
    experts = {id(p) for layer in model.modules() if isinstance(layer, ShardedExperts) for p in layer.parameters()}
    for name, parameter in model.named_parameters():
        names.add(name)
        yield name, parameter
    # The tensors themselves, not detached, so that a parameter is found under every name.
    for name, value in model.state_dict(keep_vars=True).items():
        if name not in names and isinstance(value, Tensor) and id(value) not in experts:
            yield name, value


def _check_fits(state: Mapping[str, Any], wanted: Mapping[str, Any]) -> None:
    missing = sorted(key for key in wanted if key not in state)
    if missing:
        fresh = ", into an optimizer that has not stepped" if missing[0].startswith("optimizer.") else ""
        raise ValueError(
            f"the state lacks {len(missing)} of {len(wanted)} entries, the first is {missing[0]!r}; "
            f"load a state that was saved from this model{fresh}"
        )
    for key, target in wanted.items():
        here, there = _kind_of(target), _kind_of(state[key])
        if here != there:
            raise ValueError(f"{key!r} is {there} in the state and {here} in the model; load into the model it was saved from")


def _kind_of(value: Any) -> str:
    return f"a tensor of shape {tuple(value.shape)}" if isinstance(value, Tensor) else "a plain value"


def prepare_optimizer(
    optimizer: torch.optim.Optimizer,
    model: nn.Module,
    saved: Iterable[str] | None = None,
) -> None:
    """Make an optimizer create the state that it lacks: one step with zero gradients and a learning rate of zero.

    `saved`: the names in a state that is to be loaded; parameters without an optimizer state there get none here either.
    """
    parameters = [p for group in optimizer.param_groups for p in group["params"] if p.requires_grad]
    names = [name for name in saved or () if name.startswith("optimizer.")]
    # Without a name either the optimizer keeps no state, or what it makes here is missed when the state is loaded.
    wanted = _parameters_of(names, model) if names else set(parameters)
    new = {p for p in parameters if p in wanted and not optimizer.state.get(p)}
    if not new:
        return
    grads = [p.grad for p in parameters]
    settings = [{key: value for key, value in group.items() if key != "params"} for group in optimizer.param_groups]
    try:
        for p in parameters:
            p.grad = torch.zeros_like(p) if p in new else None
        for group in optimizer.param_groups:
            group["lr"] = torch.zeros_like(group["lr"]) if isinstance(group["lr"], Tensor) else 0.0
        with _state_undone_after_error(optimizer):
            optimizer.step()
    finally:
        for group, setting in zip(optimizer.param_groups, settings, strict=True):
            group.update(setting)
        for p, grad in zip(parameters, grads, strict=True):
            p.grad = grad


def _parameters_of(names: Iterable[str], model: nn.Module) -> set[nn.Parameter]:
    """The parameters that these entries belong to."""
    prefixes = {prefix for name in names for prefix in accumulate(name.split("."), "{}.{}".format)}
    return {parameter for name, parameter in model.named_parameters() if f"optimizer.{name}" in prefixes}


@contextmanager
def _state_undone_after_error(optimizer: torch.optim.Optimizer | None) -> Iterator[None]:
    """Parameters that get state in the block lose it again if the block raises."""
    state: dict[Any, Any] = {} if optimizer is None else optimizer.state
    before = {parameter for parameter, fields in state.items() if fields}
    try:
        yield
    except BaseException:
        for parameter in state.keys() - before:
            del state[parameter]
        raise


def expert_parameters(layers: Mapping[str, ShardedExperts]) -> set[int]:
    """The ids of the parameters of the experts that this rank owns."""
    return {id(parameter) for experts in layers.values() for parameter in experts.parameters()}


@dataclass(frozen=True)
class _Entry:
    """A piece of optimizer state under its logical name, and where the optimizer keeps it."""

    key: str
    value: Any
    fields: dict[str, Any]  # the parameter's state
    field: str


def _optimizer_entries(model: nn.Module, optimizer: torch.optim.Optimizer) -> Iterator[_Entry]:
    for name, parameter in model.named_parameters():
        fields = optimizer.state.get(parameter, {})
        for field, value in fields.items():
            yield _Entry(f"optimizer.{name}.{field}", value, fields, field)
