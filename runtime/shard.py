"""Wrapping a model: its experts move into banks, the dense rest is sharded by FSDP2, a handle comes back."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

from ..placement import OwnerMap, Placement, Solver, Topology, get_solver
from ._compat import leave_out_of_ddp, outside_graphs
from .adapters import adopt_moe_layers
from .adapters.meta import allocate_meta
from .agreement import Agreement, check_same_layers
from .bank import Bank, SlotPool
from .config import RuntimeConfig
from .forwards import meet_in_forwards
from .group import RankGroup, group_of_process_group, mesh_with_limit
from .handle import Handle
from .layer import MoELayer
from .layer_runtime import LayerRuntime
from .memory import BankSize, SlotPlan, plan_slots
from .overlap import prefetch_in_order
from .reduces import PendingReduces
from .rematerialize import Rematerializer
from .stages import StageClock


def shard_experts(
    model: nn.Module,
    *,
    mesh: DeviceMesh,
    config: RuntimeConfig | None = None,
    topology: Topology | None = None,
    solver: Solver | None = None,
    placements: Sequence[Placement] | None = None,
) -> Handle:
    """Share the experts of `model` among the ranks of `mesh`, materialized where they help; FSDP2 shards the rest.

    Collective: every rank calls it with the same weights. Build the optimizer afterwards, from `handle.parameter_groups()`; keep
    your own loop, and call `handle.step()` after `optimizer.step()`. Each rank's loss is over its own tokens; gradients
    become those of the mean of the ranks' losses, for experts as for everything else.

    A model built under `torch.device("meta")` is sharded without ever being whole: each rank then allocates its own part, which
    holds nothing until `handle.load_safetensors` fills it. Buffers of transformers' models that no checkpoint holds are computed.

    Args:
        model: changed in place. Any module with MoE blocks that an adapter knows: `MoELayer`, families of transformers.
        mesh: over all ranks. One dimension; or two, (replicate, shard), as for FSDP2: experts are shared inside each group of
            the second dimension, and gradients are averaged over the groups besides.
        config: placement policy, slots, time limit.
        topology: rates that turn bytes and rows into seconds; the preset of the device by default.
        solver: places copies in place of `config.policy`.
        placements: of every MoE layer, in order: owners and copies of a saved plan, kept for good in place of any solver.

    Raises:
        ValueError: no MoE block; a mesh of more than two dimensions, of two without names, or that leaves out ranks; a model that
            is already sharded; a configuration or placements that cannot be. No expert has moved then.
    """
    config = config or RuntimeConfig()
    if mesh.ndim > 2:
        names = mesh.mesh_dim_names
        raise ValueError(f"the mesh has {mesh.ndim} dimensions {names}; give one of one dimension, or of two: replicate, shard")
    if mesh.ndim == 2 and mesh.mesh_dim_names is None:
        raise ValueError("the mesh has 2 dimensions without names; give it mesh_dim_names=('replicate', 'shard')")
    if mesh.size() != dist.get_world_size():
        # Groups side by side would train apart: nothing averages expert gradients between them.
        raise ValueError(f"the mesh has {mesh.size()} of {dist.get_world_size()} ranks; give a mesh over all ranks")
    solver = solver or get_solver(config.policy, keeps_owners=True)
    layers = adopt_moe_layers(model)
    if any(layer.experts is None for layer in layers.values()):
        raise ValueError(f"the experts of {type(model).__name__} are sharded already; call shard_experts once")
    check_same_layers({name: f"{layer.experts.shape} x {layer.num_experts}" for name, layer in layers.items() if layer.experts})
    group = group_of_process_group(
        mesh.get_group(mesh.ndim - 1),
        timeout_s=config.timeout_s,
        topology=topology,
        transport=config.transport,
        replicas=mesh.get_group(0) if mesh.ndim == 2 else None,
    )
    clock = StageClock()
    owners = None if placements is None else _owners_of(placements, layers, group)
    banks = share_experts(
        layers,
        group,
        config=config,
        solver=solver,
        clock=clock,
        owners=owners,
        placements=placements or (),
        device=_device_of(mesh),
    )
    prefetch_in_order(model, list(layers.values()))
    if config.shard_dense:
        _shard_dense(model, mesh_with_limit(mesh, config.timeout_s), layers, banks, config)
        if any(tensor.is_meta for tensor in (*model.parameters(), *model.buffers())):
            allocate_meta(model, _device_of(mesh))
    else:
        _leave_dense(model, banks)
    meet_in_forwards(model, [layer.runtime for layer in layers.values()], clock)
    return Handle(model, layers, banks, group, config, clock)


def _owners_of(placements: Sequence[Placement], layers: Mapping[str, MoELayer], group: RankGroup) -> OwnerMap:
    """The owner map of given placements; ValueError unless there is one of the right shape for every layer."""
    if len(placements) != len(layers):
        raise ValueError(f"{len(placements)} placements for {len(layers)} MoE layers; give one for each")
    for placement, (name, layer) in zip(placements, layers.items(), strict=True):
        wanted = (group.world_size, layer.num_experts)
        if placement.replicas_RE.shape != wanted:
            raise ValueError(f"the placement of {name} is [R, E] = {placement.replicas_RE.shape}, the layer {wanted}; solve anew")
    return OwnerMap(np.stack([placement.expert_to_owner_E for placement in placements]), group.world_size)


def share_experts(
    layers: Mapping[str, MoELayer],
    group: RankGroup,
    *,
    config: RuntimeConfig,
    solver: Solver,
    clock: StageClock,
    owners: OwnerMap | None = None,
    placements: Sequence[Placement] = (),
    device: torch.device | None = None,
) -> list[Bank]:
    """Move the experts of unsharded layers into banks, one bank for each shape of expert; the layers run on them after.

    A bank becomes a submodule, `bank`, of the first of its layers, where `model.parameters()` finds it.
    `owners` replaces the contiguous owner map; it needs layers of one shape. `placements`, of every layer with these owners, are
    held for good. Experts on the meta device get memory on `device`.

    Raises:
        ValueError: what was asked for cannot be; the layers are as they were then.
    """
    alike: dict[tuple[object, ...], list[str]] = defaultdict(list)
    for name, layer in layers.items():
        assert layer.experts is not None
        weights = layer.experts.gate_up
        alike[(layer.experts.shape, layer.num_experts, weights.dtype, weights.device, weights.requires_grad)].append(name)
    if owners is not None and len(alike) != 1:
        raise ValueError(f"one owner map for {len(alike)} shapes of experts; give layers of one shape")
    places = {name: place for place, name in enumerate(layers)}
    sizes = [_size_of(layers[names[0]], group, config, tuple(places[name] for name in names)) for names in alike.values()]
    slots, reduces = plan_slots(config, sizes), PendingReduces(overlap=config.overlap)
    agreement = Agreement(group, {name: layer.num_experts for name, layer in layers.items()})
    # Phase 1: whatever may be refused, while the layers still have their experts
    shared = [
        _runtimes_of_alike(
            {name: layers[name] for name in names},
            group,
            config=replace(config, slots=slots.slots),
            solver=solver,
            clock=clock,
            reduces=reduces,
            agreement=agreement,
            owners=owners,
            device=device,
            slots=slots,
            size=size,
        )
        for names, size in zip(alike.values(), sizes, strict=True)
    ]
    runtimes = {name: runtime for alike_runtimes in shared for name, runtime in alike_runtimes.items()}
    for name, placement in zip(layers, placements, strict=False):
        runtimes[name].planner.hold(placement)

    # Phase 2: experts move
    for name, runtime in runtimes.items():
        _move_experts(layers[name], runtime)
    return [next(iter(alike_runtimes.values())).bank for alike_runtimes in shared]


def _move_experts(layer: MoELayer, runtime: LayerRuntime) -> None:
    """Copy the experts owned here into the bank and let go of the others; the layer runs on the bank after."""
    whole, bank, index = layer.experts, runtime.bank, runtime.layer
    assert whole is not None
    if index == 0:
        layer.add_module("bank", bank)
    if not whole.gate_up.is_meta:
        bank.load_rows({(index, e): whole.weights(0, e) for e in runtime.owned_experts})
    layer.experts, layer.runtime = None, runtime


def _size_of(layer: MoELayer, group: RankGroup, config: RuntimeConfig, places: tuple[int, ...]) -> BankSize:
    assert layer.experts is not None
    expert_bytes = layer.experts.expert_bytes
    copy_bytes = layer.experts.shape.num_elements * 2 if config.compute_dtype == "bf16" else expert_bytes
    return BankSize(copy_bytes, expert_bytes, group.world_size, places)


def _runtimes_of_alike(
    layers: Mapping[str, MoELayer],
    group: RankGroup,
    *,
    config: RuntimeConfig,
    solver: Solver,
    clock: StageClock,
    reduces: PendingReduces,
    agreement: Agreement,
    owners: OwnerMap | None,
    device: torch.device | None,
    slots: SlotPlan,
    size: BankSize,
) -> dict[str, LayerRuntime]:
    """What layers with experts of one shape will run on, by their names: a bank that they share, which holds nothing yet."""
    first = next(iter(layers.values())).experts
    assert first is not None
    num_experts = first.owners.num_experts
    owners = owners or OwnerMap.contiguous(len(layers), num_experts, group.world_size)
    weights = first.gate_up
    device = device if weights.is_meta else weights.device
    compute_dtype = torch.bfloat16 if config.compute_dtype == "bf16" else weights.dtype
    bank = Bank(
        first.shape,
        owners,
        group.rank,
        device=device,
        dtype=weights.dtype,
        compute_dtype=compute_dtype,
        transport=group.experts,
        replicas=group.replicas,
    )
    bank.requires_grad_(first.is_trainable)
    pool, rematerializer = SlotPool(first.shape, group.experts, slots.peak_bytes([size])), Rematerializer()
    return {
        name: LayerRuntime(
            name,
            bank,
            index,
            layer.top_k,
            group=group,
            solver=solver,
            config=config,
            pool=pool,
            clock=clock,
            reduces=reduces,
            rematerializer=rematerializer,
            keeps_copies=slots.keeps(size.layers[index]),
            capacity=layer.capacity,
            agreement=agreement,
        )
        for index, (name, layer) in enumerate(layers.items())
    }


def _device_of(mesh: DeviceMesh) -> torch.device:
    """The device that this rank computes on."""
    if mesh.device_type == "cpu":
        return torch.device("cpu")
    return torch.device(mesh.device_type, torch.get_device_module(mesh.device_type).current_device())


def _shard_dense(
    model: nn.Module, mesh: DeviceMesh, layers: Mapping[str, MoELayer], banks: Sequence[Bank], config: RuntimeConfig
) -> None:
    """FSDP2 on every element of a ModuleList that holds a MoE layer, then on the whole; banks stay as they are."""
    precision = MixedPrecisionPolicy()
    if config.compute_dtype == "bf16":
        precision = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    ignored: set[nn.Parameter] = {parameter for bank in banks for parameter in bank.parameters()}
    blocks: dict[str, nn.Module] = {}
    for name in layers:
        parts = name.split(".")
        for end in range(1, len(parts) + 1):
            if isinstance(model.get_submodule(".".join(parts[: end - 1])), nn.ModuleList):
                blocks[".".join(parts[:end])] = model.get_submodule(".".join(parts[:end]))
                break
    for block in blocks.values():
        fully_shard(block, mesh=mesh, ignored_params=ignored, mp_policy=precision)
    fully_shard(model, mesh=mesh, ignored_params=ignored, mp_policy=precision)


def _leave_dense(model: nn.Module, banks: Sequence[Bank]) -> None:
    """Keep the experts out of what the user wraps the dense part in: DDP, and `fully_shard`, which replaces parameters."""
    owned = [(bank, name, parameter) for bank in banks for name, parameter in bank.named_parameters()]
    leave_out_of_ddp(model, [parameter for _, _, parameter in owned])

    @outside_graphs
    def check_banks(module: nn.Module, inputs: tuple[Any, ...]) -> None:
        if any(getattr(bank, name, None) is not parameter for bank, name, parameter in owned):
            raise ValueError(
                f"the experts of {type(model).__name__} were sharded once more, after shard_experts; "
                "give every fully_shard ignored_params=set(handle.expert_parameters())"
            )

    model.register_forward_pre_hook(check_banks)
