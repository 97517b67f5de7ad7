"""A model's weights under the names that it has unwrapped: state dict and safetensors, out and in.

Nothing but a state dict that was asked for is ever whole on one rank. A tensor of the dense part is whole while it is
written, as is one layer's weight where the original keeps the experts of a layer in one tensor (see `WeightNaming`).

Shape letters: E experts.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Shard

from ...collectives import Buffer, Transport
from ..experts.expert import ExpertTensors
from ..naming import ExpertNames
from ..sharded_experts import ShardedExperts
from ..state import expert_parameters
from .conversions import Conversions, InterfaceNaming, without_wrappers


@dataclass(frozen=True)
class DenseTensor:
    """A parameter or buffer outside the experts. Tied weights have several names."""

    tensor: Tensor
    names: tuple[str, ...]  # in the unwrapped model's state dict
    checkpoint_names: tuple[str, ...]


def dense_tensors(
    model: nn.Module, layers: Mapping[str, ShardedExperts], conversions: Conversions | None = None
) -> list[DenseTensor]:
    """Everything that the unwrapped model's state dict holds besides experts, each tensor once, in module order."""
    experts, conversions = expert_parameters(layers), conversions or conversions_of(layers)
    names: dict[int, list[str]] = {}
    tensors: dict[int, Tensor] = {}
    for name, tensor in model.state_dict(keep_vars=True).items():
        if id(tensor) not in experts:
            tensors[id(tensor)] = tensor
            names.setdefault(id(tensor), []).append(_original_name(name, layers))
    plain = without_wrappers if hasattr(model, "peft_config") else str
    in_checkpoints = conversions.names(plain(name) for of_tensor in names.values() for name in of_tensor)
    return [DenseTensor(tensors[i], tuple(of), tuple(in_checkpoints[plain(name)] for name in of)) for i, of in names.items()]


def _original_name(name: str, layers: Mapping[str, ShardedExperts]) -> str:
    """The name in the unwrapped model of what the wrapped model calls `name`."""
    for block, layer in layers.items():
        prefix = f"{block}." if block else ""
        if name.startswith(prefix):
            return prefix + layer.naming.name_of(name.removeprefix(prefix))
    return name


def conversions_of(layers: Mapping[str, ShardedExperts]) -> Conversions:
    """How the model's checkpoints differ from it, to be used once: some conversions go by what they saw."""
    namings = (layer.naming for layer in layers.values())
    return deepcopy(next((each.conversions for each in namings if isinstance(each, InterfaceNaming)), Conversions(())))


def whole(tensor: Tensor) -> Tensor:
    """All of a tensor. Collective where it is sharded."""
    tensor = tensor.detach()
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def gather_experts(layer: ShardedExperts, weight: str, transport: Transport) -> Tensor | None:
    """One weight of all experts of a layer, [E, ...], on rank 0; None elsewhere. Collective."""
    runtime, rank = layer.runtime, transport.rank
    parameter = runtime.bank.storage[weight]
    owners_E = runtime.bank.owners.expert_to_owner_LE[runtime.layer]
    rows = {e: parameter[runtime.bank.row_of(runtime.layer, e)] for e in runtime.owned_experts}
    whole_E: Tensor | None = None
    sends: list[Buffer] = []
    recvs: list[Buffer] = []
    if rank == 0:
        whole_E = parameter.new_empty(runtime.num_experts, *parameter.shape[1:])
        recvs = [Buffer(whole_E[e], int(owner)) for e, owner in enumerate(owners_E) if owner != 0]
        for e, row in rows.items():
            whole_E[e] = row
    else:
        sends = [Buffer(row, 0) for row in rows.values()]
    transport.exchange(sends, recvs, op="export", where=f"{runtime.name}.{weight}").wait()
    return whole_E


def state_on_rank_zero(
    model: nn.Module, layers: Mapping[str, ShardedExperts], transport: Transport, *, of_adapters: bool = False
) -> dict[str, Tensor]:
    """The state dict that the unwrapped model would have, whole, in CPU memory of rank 0; empty elsewhere. Collective.

    With `of_adapters` those of LoRA, and whatever else is trained besides.
    """
    state: dict[str, Tensor] = {}
    for dense in dense_tensors(model, layers):
        if of_adapters and not dense.tensor.requires_grad and "lora_" not in dense.names[0]:
            continue
        full = whole(dense.tensor)
        if transport.rank == 0:
            state |= dict.fromkeys(dense.names, full.to("cpu", copy=True))
    for block, layer in layers.items():
        for weight, inner in layer.naming.fused:
            if of_adapters and weight not in layer.shape.lora_sizes():
                continue
            experts = gather_experts(layer, weight, transport)
            if experts is None:
                continue
            if layer.naming.state_experts is not None:
                names = _names_apart(block, layer, weight)
                state |= {name: experts[e].to("cpu", copy=True) for e, name in enumerate(names)}
            else:
                state[_in_block(block, inner)] = layer.naming.fuse(weight, experts).contiguous().cpu()
    return state


def _in_block(block: str, inner: str) -> str:
    return f"{block}.{inner}" if block else inner


def _names_apart(block: str, layer: ShardedExperts, weight: str) -> list[str]:
    """By expert: the name of a weight in models that keep experts apart."""
    assert layer.naming.state_experts is not None
    return [_in_block(block, layer.naming.state_experts.format(expert=e, weight=weight)) for e in range(layer.num_experts)]


def checkpoint_tensors(
    model: nn.Module, layers: Mapping[str, ShardedExperts], transport: Transport
) -> Iterator[tuple[str, Tensor]]:
    """What this rank writes of a checkpoint, one tensor at a time. Collective: every rank iterates to the end.

    Rank 0 writes the dense part, and the experts where checkpoints fuse those of a layer; else every rank writes its own.
    """
    conversions = conversions_of(layers)
    for dense in dense_tensors(model, layers, conversions):
        full = whole(dense.tensor)
        if transport.rank == 0:
            yield dense.checkpoint_names[0], full
    for block, layer in layers.items():
        names, runtime = layer.naming.checkpoint_experts, layer.runtime
        if layer.naming.state_experts is not None:
            for weight in runtime.bank.weight_names:
                apart = _names_apart(block, layer, weight)
                for e in runtime.owned_experts:
                    yield apart[e], runtime.bank.weights(runtime.layer, e)[weight]
        elif names is None:
            yield from _fused_tensors(block, layer, layer.naming.fused, transport, conversions)
        else:
            for e in runtime.owned_experts:
                for inner, tensor in _matrices(names, runtime.bank.weights(runtime.layer, e)):
                    yield conversions.name(_in_block(block, inner.format(expert=e))), tensor
            yield from _fused_tensors(block, layer, _adapters_of(layer), transport, conversions)


def _adapters_of(layer: ShardedExperts) -> list[tuple[str, str]]:
    """Of the fused tensors, as (ours, theirs), those of LoRA, which no checkpoint keeps apart."""
    return [(weight, inner) for weight, inner in layer.naming.fused if weight in layer.shape.lora_sizes()]


def _fused_tensors(
    block: str, layer: ShardedExperts, fused: Sequence[tuple[str, str]], transport: Transport, conversions: Conversions
) -> Iterator[tuple[str, Tensor]]:
    """These tensors of all experts of a layer, one at a time, on rank 0. Collective."""
    for weight, inner in fused:
        experts = gather_experts(layer, weight, transport)
        if experts is not None:
            yield conversions.name(_in_block(block, without_wrappers(inner))), layer.naming.fuse(weight, experts)


def _matrices(names: ExpertNames, expert: ExpertTensors) -> Iterator[tuple[str, Tensor]]:
    """The matrices of an expert that checkpoints keep apart, with their names."""
    if names.gate is None:
        yield names.up, expert.gate_up
    else:
        yield from zip((names.gate, names.up), expert.gate_up.chunk(2), strict=True)
    yield names.down, expert.down


@dataclass(frozen=True)
class _Read:
    """One copy to make: names that may hold it, the shape it must have there, and where its parts go."""

    names: tuple[str, ...]
    shape: tuple[int, ...]
    rows: Any  # an index into the stored tensor; None for all of it
    target: Tensor
    layer: ShardedExperts | None = None  # whose original's layout the stored tensor has
    weight: str = ""


@torch.no_grad()
def load_weights(
    state: Mapping[str, Any], model: nn.Module, layers: Mapping[str, ShardedExperts], *, of_adapters: bool = False
) -> tuple[str, ...]:
    """Copy this rank's part out of a whole state under the names of the unwrapped model's state dict, or of its checkpoints.

    Args:
        state: values are tensors, or anything that becomes one when sliced, so that files are read only where needed.
        of_adapters: copy those of LoRA alone, also under the names of peft's files.

    Returns:
        Names in `state` that this model has no place for.

    Raises:
        ValueError: something is missing, has another shape, or is quantized; nothing is changed then, but for the last.
    """
    conversions = conversions_of(layers)
    state = conversions.converted(conversions.prefixed(state) if hasattr(model, "peft_config") else state)
    has_adapters = of_adapters or any("lora_" in name for name in state)
    dense = dense_tensors(model, layers, conversions)
    reads = [*_dense_reads(dense), *_expert_reads(layers, state, conversions)]
    if of_adapters:
        reads = [replace(r, names=(*r.names, _name_in_adapter(r.names[0]))) for r in reads if "lora_" in r.names[0]]
    found: list[tuple[_Read, str]] = []
    for read in reads:
        name = next((n for n in read.names if n in state), None)
        if name is None and "lora_" in read.names[0] and not has_adapters:
            continue  # a checkpoint of the base model leaves adapters as they are
        if name is None:
            raise ValueError(f"the state lacks {read.names[0]!r}; load one that was saved from a model of the same configuration")
        shape = tuple(state[name].shape if isinstance(state[name], Tensor) else state[name].get_shape())
        if shape != read.shape:
            raise ValueError(
                f"{name!r} has shape {shape} in the state and {read.shape} in the model; "
                "load one that was saved from a model of the same configuration"
            )
        found.append((read, name))
    for read, name in found:
        value = state[name][... if read.rows is None else read.rows]
        if value.dtype not in (read.target.dtype, torch.float64, torch.float32, torch.bfloat16, torch.float16):
            raise ValueError(f"{name!r} is {value.dtype}, a quantized weight; dequantize the checkpoint first")
        read.target.copy_(value if read.layer is None else read.layer.naming.from_original(read.weight, value))
    places = {n for each in dense for n in (*each.names, *map(without_wrappers, each.names), *each.checkpoint_names)}
    places |= {n for read in reads for n in read.names}
    places |= {n for block, layer in layers.items() for n in _expert_names(block, layer, conversions)}
    return tuple(name for name in state if name not in places)


def _name_in_adapter(name: str) -> str:
    """What peft's files call a tensor of LoRA: without the name of the adapter."""
    return re.sub(r"(lora_\w+)\.[^.]+\.", r"\1.", name)


def _dense_reads(tensors: Sequence[DenseTensor]) -> Iterator[_Read]:
    for dense in tensors:
        names, tensor = (*dense.names, *map(without_wrappers, dense.names), *dense.checkpoint_names), dense.tensor.detach()
        if isinstance(tensor, DTensor):
            yield _Read(names, tuple(tensor.shape), _local_rows(tensor), tensor.to_local())
        else:
            yield _Read(names, tuple(tensor.shape), None, tensor)


def _local_rows(tensor: DTensor) -> slice:
    """The rows of a tensor that FSDP2 keeps on this rank: the chunks of `torch.chunk`, one a rank."""
    *replicated, placement = tensor.placements
    assert isinstance(placement, Shard) and placement.dim == 0 and all(p.is_replicate() for p in replicated), tensor.placements
    mesh, axis = tensor.device_mesh, tensor.device_mesh.ndim - 1
    chunk = -(-tensor.shape[0] // mesh.size(axis))
    start = min(mesh.get_local_rank(axis) * chunk, tensor.shape[0])
    return slice(start, start + tensor.to_local().shape[0])


def _expert_reads(layers: Mapping[str, ShardedExperts], state: Mapping[str, Any], conversions: Conversions) -> Iterator[_Read]:
    for block, layer in layers.items():
        runtime, names = layer.runtime, layer.naming.checkpoint_experts
        for e in runtime.owned_experts:
            expert = runtime.bank.weights(runtime.layer, e)
            apart = [] if names is None else list(_matrices(names, expert))
            apart = [(conversions.name(_in_block(block, name.format(expert=e))), target) for name, target in apart]
            fused: Sequence[tuple[str, str]] = layer.naming.fused
            if apart and apart[-1][0] in state:
                yield from (_Read((name,), tuple(target.shape), None, target) for name, target in apart)
                fused = _adapters_of(layer)
            for weight, inner in fused:
                target = expert[weight]
                fused_names = _fused_names(block, inner, conversions)
                if layer.naming.state_experts is not None and not any(name in state for name in fused_names):
                    yield _Read((_names_apart(block, layer, weight)[e],), tuple(target.shape), None, target)
                    continue
                all_experts = torch.empty(runtime.num_experts, *target.shape, device="meta")
                shape, place = layer.naming.fuse(weight, all_experts).shape, layer.naming.place(weight, e, runtime.num_experts)
                yield _Read(fused_names, tuple(shape), place, target, layer, weight)


def _fused_names(block: str, inner: str, conversions: Conversions) -> tuple[str, ...]:
    """Where a state may have a tensor of all experts: by its name in the model, in the model without adapters, in checkpoints."""
    plain = _in_block(block, without_wrappers(inner))
    return _in_block(block, inner), plain, conversions.name(plain)


def _expert_names(block: str, layer: ShardedExperts, conversions: Conversions) -> Sequence[str]:
    """All names that weights of a layer's experts may have."""
    names = layer.naming.checkpoint_experts
    apart = () if names is None else [name for name in (names.gate, names.up, names.down) if name is not None]
    weights = () if layer.naming.state_experts is None else layer.runtime.bank.weight_names
    return [
        *(name for weight in weights for name in _names_apart(block, layer, weight)),
        *(name for _, inner in layer.naming.fused for name in _fused_names(block, inner, conversions)),
        *(conversions.name(_in_block(block, name.format(expert=e))) for name in apart for e in range(layer.num_experts)),
    ]
