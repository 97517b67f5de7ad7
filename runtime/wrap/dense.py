"""The dense rest of a model: FSDP2 on its repeated blocks and on the whole, or kept apart from what the user wraps it in."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.nn.parallel import DistributedDataParallel

from .._compat import gradient_divide_factor, leave_out_of_ddp, outside_graphs, sharded_modules, when_a_module_is_added
from ..config import RuntimeConfig
from ..experts.expert import Expert
from ..sharded_experts import ShardedExperts

_CONTAINERS = (nn.ModuleList, nn.ModuleDict, nn.Sequential)


def dense_units(model: nn.Module, layers: Sequence[str]) -> list[list[nn.Module]]:
    """The modules that FSDP2 gathers together, inside of the whole: the model's repeated blocks that hold MoE layers, given by
    name.

    A block may be held in a ModuleList, a ModuleDict, a Sequential or by attributes, at any depth. A block that is itself a list,
    whose elements the model calls one by one, is one unit of several modules.

    Raises:
        ValueError: the model cannot be a unit itself, or is one already.
    """
    if isinstance(model, (nn.ModuleList, nn.ModuleDict)):
        raise ValueError(
            f"the model is a {type(model).__name__}, whose forward FSDP2 cannot follow; give the module that calls its elements, "
            "or set runtime.shard_dense=False"
        )
    sharded = next((name for name, module in model.named_modules() if isinstance(module, FSDPModule)), None)
    if sharded is not None:
        raise ValueError(
            f"fully_shard was called on {sharded or 'the model'!r} before shard_experts; leave it out, or call it "
            "afterwards with ignored_params=set(handle.expert_parameters()) and set runtime.shard_dense=False"
        )
    holding = Counter(name[: end or None] for name in layers for end in _ends(name))
    blocks = dict.fromkeys(block for name in layers if (block := _block_of(model, name, set(layers), holding)) is not None)
    return [list(_callable_modules(model.get_submodule(block))) for block in blocks]


def _ends(name: str) -> list[int]:
    """Where the names of a module's ancestors and its own end in `name`."""
    return [i for i, letter in enumerate(name) if letter == "."] + [len(name)] if name else []


def holders_of(model: nn.Module, name: str) -> list[nn.Module]:
    """The modules around the layer of that name, its own block included, innermost first."""
    return [model.get_submodule(name[:end]) for end in [*reversed(_ends(name)), 0]]


def _block_of(model: nn.Module, name: str, layers: set[str], holding: Mapping[str, int]) -> str | None:
    """The block that a layer belongs to: of the modules around it, the innermost that has siblings with MoE layers too."""
    path = [name[:end] for end in _ends(name)]
    holders = [(child.rpartition(".")[0], child) for child in path]
    repeated = [
        child
        for holder, child in holders
        if sum(f"{holder}.{sibling}".strip(".") in holding for sibling, _ in model.get_submodule(holder).named_children()) > 1
    ]
    inner = [child for child in repeated if child not in layers]
    listed = [child for holder, child in holders if isinstance(model.get_submodule(holder), _CONTAINERS)]
    return inner[-1] if inner else next(iter([c for c in repeated if c in listed] or listed), None)


def _callable_modules(block: nn.Module) -> Iterator[nn.Module]:
    """The block, or what it lists."""
    if isinstance(block, (nn.ModuleList, nn.ModuleDict)):
        for child in block.children():
            yield from _callable_modules(child)
    else:
        yield block


def shard_dense(
    model: nn.Module,
    units: Sequence[Sequence[nn.Module]],
    mesh: DeviceMesh,
    layers: Mapping[str, ShardedExperts],
    config: RuntimeConfig,
) -> None:
    """FSDP2 on every unit, then on the whole; experts stay as they are."""
    precision = MixedPrecisionPolicy()
    if config.compute_dtype == "bf16":
        precision = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    ignored = {parameter for experts in layers.values() for parameter in experts.parameters()}

    def shard(modules: Sequence[nn.Module]) -> None:
        for odd in _odd_modules(modules, ignored):
            fully_shard(odd, mesh=mesh, ignored_params=ignored, mp_policy=precision)
        rest = [module for module in modules if not isinstance(module, FSDPModule)]
        if rest:
            fully_shard(rest[0] if len(rest) == 1 else rest, mesh=mesh, ignored_params=ignored, mp_policy=precision)

    for modules in units:
        shard(modules)
    shard([model])
    model.register_forward_hook(_reshard_after_evaluation)
    when_a_module_is_added(_refuse_ddp_of_shards, lives_with=model)
    _have_memory_for_training(model)


def _have_memory_for_training(model: nn.Module) -> None:
    """Where the first forward is under `inference_mode`, have FSDP2 make before it, and outside, the tensors that it makes once
    and that training goes on with."""

    @outside_graphs
    def make(module: nn.Module, inputs: Any) -> None:
        hook.remove()
        if torch.is_inference_mode_enabled():
            with torch.inference_mode(False):
                for unit in module.modules():
                    if isinstance(unit, FSDPModule):
                        unit.unshard()
                        unit.reshard()

    hook = model.register_forward_pre_hook(make, prepend=True)


@outside_graphs
def _reshard_after_evaluation(module: nn.Module, inputs: Any, output: Any) -> None:
    """Have parameters be shards again after a forward without gradients, after which FSDP2 leaves those of the root whole.

    An optimizer or an average that is made of `model.parameters()` then would be one of copies, which never train.
    """
    if not torch.is_grad_enabled():
        module.reshard()  # type: ignore[operator]


def _odd_modules(modules: Sequence[nn.Module], ignored: set[nn.Parameter]) -> list[nn.Module]:
    """Modules of a unit whose parameters have another dtype than most: FSDP2 gathers one dtype in a unit.

    Raises:
        ValueError: parameters of two dtypes in one module.
    """
    dtypes: dict[nn.Module, set[torch.dtype]] = {}
    sizes: Counter[torch.dtype] = Counter()
    for module in modules:
        for inner in _modules_of_unit(module):
            for parameter in inner.parameters(recurse=False):
                if parameter not in ignored:
                    dtypes.setdefault(inner, set()).add(parameter.dtype)
                    sizes[parameter.dtype] += parameter.numel()
    if len(sizes) < 2:
        return []
    usual = sizes.most_common(1)[0][0]
    mixed = next((inner for inner, kinds in dtypes.items() if len(kinds) > 1), None)
    if mixed is not None:
        kinds = " and ".join(sorted(map(str, dtypes[mixed])))
        raise ValueError(
            f"{type(mixed).__name__} has parameters of {kinds}, which FSDP2 cannot shard together; give them one dtype, or set "
            "runtime.shard_dense=False"
        )
    return [inner for inner, kinds in dtypes.items() if kinds != {usual}]


def _modules_of_unit(module: nn.Module) -> Iterator[nn.Module]:
    """The module and what is in it, but for other units."""
    yield module
    for child in module.children():
        if not isinstance(child, FSDPModule):
            yield from _modules_of_unit(child)


def leave_dense(model: nn.Module, layers: Mapping[str, ShardedExperts]) -> None:
    """Keep the experts out of what the user wraps the dense part in: DDP, and `fully_shard`, which replaces parameters."""
    names = [
        f"{name}.{expert}.{weight}"
        for name, module in model.named_modules(remove_duplicate=False)
        if isinstance(module, ShardedExperts)
        for expert in range(module.num_experts)
        for weight in module.shape.tensor_sizes()
    ]
    leave_out_of_ddp(model, names)

    when_a_module_is_added(_refuse_ddp_around, lives_with=model)

    first = {name: next(experts.parameters(), None) for name, experts in layers.items()}

    @outside_graphs
    def check_experts(module: nn.Module, inputs: tuple[Any, ...]) -> None:
        now = {name: next(experts.parameters(), None) for name, experts in layers.items()}
        if all(now[name] is parameter for name, parameter in first.items()):
            return
        # Experts may have changed their owner, or got other parameters from load_state_dict(assign=True); or been sharded.
        first.update(now)
        units = [unit for unit in model.modules() if isinstance(unit, FSDPModule)]
        if any(isinstance(taken, Expert) for unit in units for taken in sharded_modules(unit)):
            raise ValueError(
                f"the experts of {type(model).__name__} were sharded once more, after shard_experts; "
                "give every fully_shard ignored_params=set(handle.expert_parameters())"
            )

    model.register_forward_pre_hook(check_experts)


def _refuse_ddp_of_shards(model: nn.Module, holder: nn.Module, child: nn.Module) -> None:
    """Refuse DDP around the model, or around what holds it: it takes each rank's shards for copies of the same."""
    if isinstance(holder, DistributedDataParallel) and any(inner is model for inner in child.modules()):
        raise ValueError(
            "DistributedDataParallel around a model whose dense part FSDP2 shards already; leave it out, or call shard_experts "
            "with RuntimeConfig(shard_dense=False)"
        )


def _refuse_ddp_around(model: nn.Module, holder: nn.Module, child: nn.Module) -> None:
    """Refuse DDP around a module that holds the sharded model: it leaves out what its own module names, and copies all the
    rest."""
    if isinstance(holder, DistributedDataParallel) and child is not model and any(inner is model for inner in child.modules()):
        raise ValueError(
            f"DistributedDataParallel around {type(child).__name__}, which holds the {type(model).__name__} that shard_experts "
            "was given, would overwrite experts; call shard_experts with the module that DistributedDataParallel gets"
        )


def gradient_divisor(holders: Sequence[nn.Module], world_size: int, num_replicas: int) -> float:
    """What a rank's gradients of experts are divided by, before they are added up in its group and averaged over replicas.

    As FSDP2 divides those of the dense part around them: by the number of ranks, or the factor of `set_gradient_divide_factor`.
    `holders`: the modules around a layer, innermost first.
    """
    for module in holders:
        if isinstance(module, FSDPModule):
            factor = gradient_divide_factor(module)
            return world_size if factor is None else factor / num_replicas
    return world_size
