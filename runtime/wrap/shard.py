"""Wrapping a model: its experts move into banks, the dense rest is sharded by FSDP2, a handle comes back."""

from __future__ import annotations

import os
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import NoReturn

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh

from ...placement import OwnerMap, Placement, Solver, Topology, get_solver, policy_solvers
from ...placement.machine import Machine
from ..adapters import FoundLayer, find_layers, replace_modules
from ..adapters.meta import allocate_meta, initialize_adapters
from ..adapters.save_pretrained import forbid_adapter_changes, guard_save_pretrained
from ..agreement import Agreement, agree_on_machine, check_same_layers
from ..config import RuntimeConfig
from ..experts.bank import Bank
from ..experts.expert import num_elements
from ..experts.expert_grad import ExpertRanks
from ..experts.grads import PendingReduces
from ..experts.memory import BankSize, plan_slots
from ..experts.slots import SlotPool
from ..group import RankGroup, group_of_process_group, mesh_with_limit
from ..layer import moe_layers
from ..sharded_experts import ExpertSource, ShardedExperts
from ..stages import StageClock
from ..step.contexts import ModelContext
from ..step.layer_runtime import LayerRuntime
from .dense import dense_units, gradient_divisor, holders_of, leave_dense, shard_dense
from .forwards import compare_in_forwards
from .handle import Handle
from .prefetch import prefetch_in_order


def shard_experts(
    model: nn.Module,
    *,
    mesh: DeviceMesh,
    config: RuntimeConfig | None = None,
    topology: Topology | None = None,
    machine: Machine | str | os.PathLike[str] | None = None,
    solver: Solver | None = None,
    placements: Sequence[Placement] | None = None,
) -> Handle:
    """Share the experts of `model` among the ranks of `mesh`, materialized where they help; FSDP2 shards the rest.

    Collective: every rank calls it with the same weights. Build the optimizer afterwards, from `handle.parameter_groups()`; keep
    your own loop, and call `handle.step()` after `optimizer.step()`. Each rank's loss is over its own tokens; gradients
    become those of the mean of the ranks' losses, for experts as for everything else.

    A model built under `torch.device("meta")` is sharded without ever being whole: each rank then allocates its own part, which
    holds nothing until `handle.weights.load_safetensors` fills it. Buffers of transformers' models that no checkpoint holds are
    computed, and adapters of peft start as peft has them.

    Args:
        model: changed in place. Any module with MoE blocks for which there is an adapter: `MoELayer`, models of transformers.
        mesh: over all ranks. One dimension; or two, (replicate, shard), as for FSDP2: experts are shared inside each group of
            the second dimension, and gradients are averaged over the groups besides.
        config: placement policy, slots, time limit.
        topology: nodes, and rates that turn bytes and routed tokens into seconds; by default as found, with those of `machine`.
        machine: the file that `moesaic calibrate` wrote, or what `read_machine` made of it; the preset of the device by default.
        solver: places copies in place of `config.policy`.
        placements: of every MoE layer, in order: `read_plan(path).layers` of a saved plan, whose owners and copies are kept.

    Raises:
        ValueError: no MoE block; a mesh of more than two dimensions, of two without names, or that leaves out ranks; a model that
            is already sharded; a configuration or placements that cannot be. No expert has moved then.
    """
    config = config or RuntimeConfig()
    _check_mesh(mesh)
    solvers = _solvers_of(config, solver)
    # Phase 1: whatever may be refused, while the model is as it was
    initialize_adapters(model, _device_of(mesh))
    found = find_layers(model)
    if any(layer.experts.is_sharded for layer in found):
        raise ValueError(f"the experts of {type(model).__name__} are sharded already; call shard_experts once")
    check_same_layers({layer.name: f"{layer.source.shape} x {layer.source.num_experts}" for layer in found})
    if topology is not None and machine is not None:
        raise ValueError("both topology and machine are given; leave out one")
    machine = agree_on_machine(machine)
    units = dense_units(model, [layer.name for layer in found]) if config.shard_dense else []
    group = group_of_process_group(
        mesh.get_group(mesh.ndim - 1),
        timeout_s=config.timeout_s,
        topology=topology,
        machine=machine,
        transport=config.transport,
        replicas=mesh.get_group(0) if mesh.ndim == 2 else None,
    )
    clock = StageClock()
    owners = None if placements is None else _owners_of(placements, found, group)
    runtimes = build_runtimes(
        found,
        group,
        config=config,
        solvers=solvers,
        clock=clock,
        owners=owners,
        placements=placements or (),
        device=_device_of(mesh),
        gather_hides=1.0 if machine is None else machine.gather_hides,
    )
    # Phase 2: experts move
    replace_modules(model, found)
    layers = share_layers(found, runtimes)
    banks = list(dict.fromkeys(runtime.bank for runtime in runtimes.values()))
    moe = list(moe_layers(model).values())
    for layer in moe:
        layer.sums_aux_loss = True
    prefetch_in_order(model, list(layers.values()), moe)
    for name, runtime in runtimes.items():
        runtime.context.gradient_divisor = partial(
            gradient_divisor, holders_of(model, name), group.world_size, group.replicas.world_size
        )
    if config.shard_dense:
        shard_dense(model, units, mesh_with_limit(mesh, config.timeout_s), layers, config)
        if any(tensor.is_meta for tensor in (*model.parameters(), *model.buffers())):
            allocate_meta(model, _device_of(mesh))
    else:
        leave_dense(model, layers)
    check_conversions(model, banks)
    compare_in_forwards(model, list(runtimes.values()), clock)
    guard_save_pretrained(model, layers)
    refuse_copies(model)
    forbid_adapter_changes(model, layers)
    return Handle(model, layers, banks, group, config, clock)


def _check_mesh(mesh: DeviceMesh) -> None:
    if mesh.ndim > 2:
        names = mesh.mesh_dim_names
        raise ValueError(f"the mesh has {mesh.ndim} dimensions {names}; give one of one dimension, or of two: replicate, shard")
    if mesh.ndim == 2 and mesh.mesh_dim_names is None:
        raise ValueError("the mesh has 2 dimensions without names; give it mesh_dim_names=('replicate', 'shard')")
    if mesh.size() != dist.get_world_size():
        # Groups side by side would train apart: nothing averages expert gradients between them.
        raise ValueError(f"the mesh has {mesh.size()} of {dist.get_world_size()} ranks; give a mesh over all ranks")


def check_conversions(model: nn.Module, banks: Sequence[Bank]) -> None:
    """Refuse `model.half()` and its like before they have converted what comes before the first experts."""

    def check_and_convert(fn: Callable[[Tensor], Tensor], recurse: bool = True) -> nn.Module:
        for bank in banks:
            bank.check_conversion(fn)
        # As the class has it now: fully_shard, called since, has another one, which FSDP2 needs to find its shards again.
        return type(model)._apply(model, fn, recurse)

    model._apply = check_and_convert  # type: ignore[method-assign]


def refuse_copies(model: nn.Module) -> None:
    """Refuse `copy.deepcopy` and `pickle` of the whole model with the cure, before they meet what cannot be copied in it."""

    def refuse(_: object) -> NoReturn:
        raise RuntimeError(
            f"{type(model).__name__} is shared with other ranks and can be neither copied nor pickled: copy the model before "
            "shard_experts, or keep a copy of handle.state_dict()"
        )

    model.__deepcopy__ = model.__reduce_ex__ = refuse  # type: ignore[assignment, method-assign]


def _owners_of(placements: Sequence[Placement], found: Sequence[FoundLayer], group: RankGroup) -> OwnerMap:
    """The owner map of given placements; ValueError unless there is one of the right shape for every layer."""
    if len(placements) != len(found):
        raise ValueError(f"{len(placements)} placements for {len(found)} MoE layers; give one for each")
    for placement, layer in zip(placements, found, strict=True):
        wanted = (group.world_size, layer.source.num_experts)
        if placement.replicas_RE.shape != wanted:
            shape = placement.replicas_RE.shape
            raise ValueError(f"the placement of {layer.name} is [R, E] = {shape}, the layer {wanted}; solve anew")
    return OwnerMap(np.stack([placement.expert_to_owner_E for placement in placements]), group.world_size)


def build_runtimes(
    found: Sequence[FoundLayer],
    group: RankGroup,
    *,
    config: RuntimeConfig,
    solvers: Mapping[str, Solver],
    clock: StageClock,
    owners: OwnerMap | None = None,
    placements: Sequence[Placement] = (),
    device: torch.device | None = None,
    gather_hides: float = 1.0,
) -> dict[str, LayerRuntime]:
    """What layers will run on, by name: banks, one for each shape of expert, which hold nothing yet. Layers are left alone.

    `owners` replaces the contiguous owner map; it needs layers of one shape. `placements`, of every layer with these owners, are
    held for good. Experts on the meta device get memory on `device`. `gather_hides`: of the machine.

    Raises:
        ValueError: what was asked for cannot be.
    """
    alike: dict[tuple[object, ...], list[FoundLayer]] = defaultdict(list)
    for layer in found:
        source = layer.source
        alike[(source.shape, source.num_experts, source.dtype, source.adapter_dtype, source.device)].append(layer)
    if owners is not None and len(alike) != 1:
        raise ValueError(f"one owner map for {len(alike)} shapes of experts; give layers of one shape")
    places = {layer.name: place for place, layer in enumerate(found)}
    sizes = [_size_of(of[0].source, group, config, tuple(places[layer.name] for layer in of)) for of in alike.values()]
    slots = plan_slots(config, sizes)
    owner_maps = [owners or OwnerMap.contiguous(len(of), of[0].source.num_experts, group.world_size) for of in alike.values()]
    ranks = ExpertRanks(group.experts, tuple(np.sum([each.num_rows_R for each in owner_maps], axis=0).tolist()))
    agreement = Agreement(group, {layer.name: layer.source.num_experts for layer in found})
    model = ModelContext(group, clock, agreement, PendingReduces(overlap=config.debug.overlap), config.debug, gather_hides)
    runtimes: dict[str, LayerRuntime] = {}
    for of, size, owner_map in zip(alike.values(), sizes, owner_maps, strict=True):
        source = of[0].source
        bank = Bank(
            source.shape,
            owner_map,
            group.rank,
            device=device if source.device.type == "meta" else source.device,
            dtype=source.dtype,
            adapter_dtype=source.adapter_dtype,
            compute_dtype=torch.bfloat16 if config.compute_dtype == "bf16" else source.dtype,
            transport=group.experts,
            replicas=group.replicas,
            ranks=ranks,
        )
        pool = SlotPool(bank.shape, group.experts, slots.peak_bytes([size]))
        for index, layer in enumerate(of):
            runtimes[layer.name] = LayerRuntime(
                layer.name,
                index,
                layer.experts.top_k,
                model,
                bank,
                pool,
                solvers=solvers,
                config=replace(config, slots=slots.slots),
                activation=layer.experts.activation,
                keeps_copies=slots.keeps(size.layers[index]),
                capacity=layer.experts.capacity,
            )
    for layer, placement in zip(found, placements, strict=False):
        runtimes[layer.name].planner.hold(placement)
    return {layer.name: runtimes[layer.name] for layer in found}


def share_layers(found: Sequence[FoundLayer], runtimes: Mapping[str, LayerRuntime]) -> dict[str, ShardedExperts]:
    """Copy the experts owned here into the banks and let go of the others; the layers run on the banks after."""
    for layer in found:
        runtime, source = runtimes[layer.name], layer.source
        bank, index = runtime.bank, runtime.layer
        bank.load_rows({(index, e): source.weights(e) for e in bank.owned(index)})
        for e in bank.owned(index):
            for weight in bank.weight_names:
                bank.module_of(index, e).parameter(weight).requires_grad_(source.is_trainable(e, weight))
        bank.retire(source.parameters)
        layer.experts.share(runtime)
    return {layer.name: layer.experts for layer in found}


def _solvers_of(config: RuntimeConfig, solver: Solver | None) -> dict[str, Solver]:
    """What places the copies: the solver given, or those of the policy."""
    if solver is not None:
        return {"given": solver}
    return {name: get_solver(name, keeps_owners=True) for name in policy_solvers(config.policy)}


def _size_of(source: ExpertSource, group: RankGroup, config: RuntimeConfig, places: tuple[int, ...]) -> BankSize:
    itemsize = 2 if config.compute_dtype == "bf16" else source.dtype.itemsize
    copy_bytes = num_elements(source.shape.tensor_sizes()) * itemsize
    return BankSize(copy_bytes, source.gradient_bytes, group.world_size, places)


def _device_of(mesh: DeviceMesh) -> torch.device:
    """The device that this rank computes on."""
    if mesh.device_type == "cpu":
        return torch.device("cpu")
    return torch.device(mesh.device_type, torch.get_device_module(mesh.device_type).current_device())
