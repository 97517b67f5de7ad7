"""The handle of a wrapped model: what a training loop calls."""

from __future__ import annotations

import math
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

from ...placement import OwnerMap
from ..agreement import Doing, first_problem
from ..config import RuntimeConfig
from ..experts.bank import Bank
from ..experts.migrate import expert_states, migrate, rounds_of
from ..group import RankGroup
from ..layer import moe_layers
from ..renamed_members import renamed_members
from ..sharded_experts import ShardedExperts
from ..stages import StageClock
from ..state import expert_parameters, load_state, prepare_optimizer, state_of
from .drift import DriftGuard
from .migration_policy import Migrator
from .model_weights import ModelWeights
from .recorder import Recorder
from .sharded_model import ShardedModel
from .telemetry import Telemetry


@renamed_members(
    placement="owner_maps",
    rehome="migrate",
    rehomings="telemetry.migrations",
    loads="telemetry.loads",
    layer_loads="telemetry.layer_loads",
    layer_metrics="telemetry.layer_metrics",
    memory="telemetry.memory",
    profile="telemetry.profile",
    last_stage="telemetry.last_stage",
    clock="telemetry.clock",
    family_state_dict="weights.state_dict",
    load_family_state_dict="weights.load_state_dict",
    save_safetensors="weights.save_safetensors",
    load_safetensors="weights.load_safetensors",
    banks="_banks",
    group="_group",
    config="_config",
)
class Handle:
    """Returned by `shard_experts`; one per model."""

    def __init__(
        self,
        model: nn.Module,
        layers: Mapping[str, ShardedExperts],
        banks: Sequence[Bank],
        group: RankGroup,
        config: RuntimeConfig,
        clock: StageClock,
    ):
        self.model = model
        self.layers = dict(layers)
        """The experts of every MoE layer by its name, in the order of the model."""
        self._sharded = ShardedModel(model, self.layers, list(banks), group)
        self._banks = self._sharded.banks
        self._group = group
        self._config = config
        self._agreement = next(iter(self.layers.values())).runtime.agreement
        self._step = 0
        self._guard = DriftGuard(
            group, every=config.check_replicas_every, ignored=config.check_replicas_except, agreement=self._agreement
        )
        self._moe_layers = moe_layers(model)
        self._migrators = [
            Migrator(bank, self._sharded.layers_of(bank), group, config)
            for bank in self._banks
            if config.migration.every and group.world_size > 1
        ]
        self._weights = ModelWeights(self._sharded)
        self._telemetry = Telemetry(self._sharded, clock, self._migrators)
        self._metrics: dict[str, float] = {}

    def parameters(self) -> list[nn.Parameter]:
        """Every parameter of the model, as an optimizer wants it: FSDP2's shards, and the experts that this rank owns.

        After a forward that had no backward FSDP2 leaves some parameters whole; what `model.parameters()` gives then are copies
        that never train.
        """
        self._reshard()
        return list(self.model.parameters())

    def parameter_groups(self) -> list[dict[str, list[nn.Parameter]]]:
        """The model's parameters for an optimizer, dense ones and experts apart.

        FSDP2's dense parameters are DTensors and the experts' are not; `foreach` and `fused` optimizers, the default on CUDA,
        cannot take both in one group.
        """
        ids = expert_parameters(self.layers)
        parameters = self.parameters()
        return [{"params": [p for p in parameters if id(p) not in ids]}, {"params": [p for p in parameters if id(p) in ids]}]

    def expert_parameters(self) -> list[nn.Parameter]:
        """The parameters of the experts that this rank owns.

        With `RuntimeConfig(shard_dense=False)` every `fully_shard` needs `ignored_params=set(handle.expert_parameters())`.
        """
        return [parameter for experts in self.layers.values() for parameter in experts.parameters()]

    def aux_loss(self) -> Tensor:
        """The router losses of the last forward, summed over the layers it ran and their calls: add it to your loss.

        Coefficients are applied. Blocks of transformers' models have their own losses, which the model's output holds.
        """
        if not self._moe_layers:
            return torch.zeros((), device=self._sharded.device)
        losses = [layer.aux_loss for layer in self._moe_layers.values() if layer.aux_loss is not None]
        if not losses:
            raise RuntimeError("aux_loss() before any forward of a MoE layer; call the model first")
        return torch.stack(losses).sum()

    def step(self, optimizer: torch.optim.Optimizer | None = None) -> None:
        """Close a training step, after `optimizer.step()`: metrics are taken, and what was sent ahead is dropped.

        The backward of every forward must have run: weights count as changed from here on.

        With `RuntimeConfig.migration` experts may change their owner here; `optimizer`, whose state goes along, must be given.

        Collective: after the first step, and every `RuntimeConfig.check_replicas_every`, ranks compare what must be equal.

        Raises:
            DriftError: a `RuntimeError`, on every rank, if they differ; see docs/composability.md, "Ranks that drift apart".
        """
        if self._migrators and optimizer is None:
            raise ValueError(
                f"runtime.migration.every is {self._config.migration.every}, but handle.step() got no optimizer; give it"
            )
        self._sharded.drop_prefetched()
        self._metrics = self._telemetry.close_step()
        loads = self._telemetry.layer_loads()  # as the routers chose; what was kept of them decides about owners
        loads |= {name: kept_RE for name, layer in self.layers.items() if (kept_RE := layer.runtime.counters.kept_RE) is not None}
        self._step += 1
        for moe_layer in self._moe_layers.values():
            moe_layer.aux_loss = None
        for layer in self.layers.values():
            layer.runtime.counters.reset()
            layer.runtime.step = self._step
        self._sharded.weights_changed()
        for migrator in self._migrators:
            migrator.step(self._step, loads, optimizer)
            self._metrics |= migrator.observed
        if self._migrators:
            latest = [migrator.decisions[-1] for migrator in self._migrators if migrator.decisions]
            self._metrics["moved_experts"] = float(sum(d.moved for d in latest if d.step == self._step))
        for transport in (self._group.tokens, self._group.experts, self._group.replicas):
            transport.traffic.reset()
        self._guard.after_step(
            self._step, self._tensors(experts=False), self._tensors(experts=True), optimizer, self._sharded.device
        )

    def migrate(self, owners: Sequence[OwnerMap], optimizer: torch.optim.Optimizer | None = None) -> None:
        """Make these the owner maps, one per bank; weights, gradients and optimizer state go along. Collective, between steps.

        Replicas, on a two-dimensional mesh, must get the same maps.

        Raises:
            ValueError: not one map for each bank, a rank would own another number of experts than now, or some optimizer state
                has no rows to migrate. Nothing has migrated then.
        """
        banks = self._banks
        if len(owners) != len(banks):
            raise ValueError(f"{len(owners)} owner maps for {len(banks)} banks; give one for each, as handle.owner_maps does")
        for bank, wanted in zip(banks, owners, strict=True):
            rounds_of(bank.owners, wanted)
            expert_states(bank, optimizer)
        for bank, wanted in zip(banks, owners, strict=True):
            layers = self._sharded.layers_of(bank)
            for layer in layers:
                layer.runtime.drop_prefetched()
            migrate(bank, optimizer, wanted, self._group.experts, where=f"the migration after step {self._step}")
            for layer in layers:
                layer.follow_bank()

    @property
    def owner_maps(self) -> list[OwnerMap]:
        """The owner map of every bank."""
        return [bank.owners for bank in self._banks]

    def metrics(self) -> dict[str, float]:
        """The last closed step in numbers; docs/training.md lists the keys.

        With `RuntimeConfig.migration` also moved_experts: experts that changed their owner after the step; and on rank 0, some
        steps after a migration, saved_s_observed and migration_step: what it saved until the next proposal, by the clock.
        """
        return dict(self._metrics)

    def set_requires_all_reduce(self, required: bool) -> None:
        """Whether backward passes end with gradients averaged over the groups of a two-dimensional mesh; at first they do.

        For gradient accumulation: False before all micro-batches but the last saves their averaging, and changes nothing else.
        Applies to the dense part as well, as FSDP2's method of the same name, where `shard_experts` sharded it.
        """
        for bank in self._banks:
            bank.owned_grads.averages = required
        if isinstance(self.model, FSDPModule):
            self.model.set_requires_all_reduce(required)

    @torch.no_grad()
    def clip_grad_norm_(self, max_norm: float, *, error_if_nonfinite: bool = False) -> Tensor:
        """Scale all gradients so that their global 2-norm is at most `max_norm`; return the norm before, the same everywhere.

        Like `torch.nn.utils.clip_grad_norm_` on the unsharded model, however the dense part is sharded: each rank counts what it
        holds divided by the number of ranks that hold the same.
        """
        experts = expert_parameters(self.layers)
        grads: list[Tensor] = []
        num_ranks = self._group.world_size * self._group.replicas.world_size
        square = torch.zeros((), dtype=torch.float64, device=self._sharded.device)
        for parameter in self.parameters():
            grad = parameter.grad
            if grad is None:
                continue
            num_shards = self._group.world_size if id(parameter) in experts else _num_shards(grad)
            local = grad.to_local() if isinstance(grad, DTensor) else grad.as_subclass(Tensor)
            grads.append(local)
            dtype = torch.promote_types(local.dtype, torch.float32)
            square += torch.linalg.vector_norm(local, dtype=dtype).double().square() * (num_shards / num_ranks)
        # Summed in rank order on every rank, and over replicas: bitwise the same everywhere.
        for ranks in (self._group.tokens, self._group.replicas):
            squares_R = self._agreement.gather(ranks, square.view(1).view(torch.int64), Doing.CLIP, self._step).values_Rn
            square = squares_R.contiguous().view(torch.float64).sum()
        norm = square.sqrt()
        if error_if_nonfinite and not torch.isfinite(norm):
            raise RuntimeError(f"the gradient norm is {norm.item()}; look for the overflow, or pass error_if_nonfinite=False")
        scale = (max_norm / (norm + 1e-6)).clamp(max=1.0).float()
        for grad in grads:
            grad.mul_(scale)
        return norm.float()

    def state_dict(self, optimizer: torch.optim.Optimizer | None = None) -> dict[str, Any]:
        """Weights (and optimizer state) under logical names, as live tensors; see `state.state_of`."""
        self._reshard()
        return state_of(self.model, optimizer)

    def load_state_dict(self, state: Mapping[str, Any], optimizer: torch.optim.Optimizer | None = None) -> None:
        """Copy weights (and optimizer state) from a state that holds at least this rank's part; see `state.load_state`."""
        self._sharded.drop_prefetched()
        self._reshard()
        load_state(state, self.model, optimizer)
        self._sharded.weights_changed()

    def prepare_optimizer(self, optimizer: torch.optim.Optimizer, saved: Iterable[str] | None = None) -> None:
        """Create the state of an optimizer that has not stepped yet, so that it can be loaded in place.

        `saved` are the names in the state to be loaded; of a checkpoint in `folder`, which `torch.distributed.checkpoint` wrote:
        `FileSystemReader(folder).read_metadata().state_dict_metadata`. Parameters without state there get none here either.
        """
        self._reshard()
        prepare_optimizer(optimizer, self.model, saved)

    @property
    def weights(self) -> ModelWeights:
        """The model's weights under the names that it has unwrapped: state dicts and folders of safetensors."""
        return self._weights

    @property
    def telemetry(self) -> Telemetry:
        """Loads, memory, decisions about owners, profiles."""
        return self._telemetry

    def record(
        self,
        folder: str | os.PathLike[str],
        *,
        first_step: int = 0,
        layers: bool = False,
        trace_every: int = 1,
        tensorboard: bool = False,
    ) -> Recorder:
        """Records of a run in a new folder: `with handle.record("runs/x") as records`, and `records.add(loss)` after each step.

        They are what `moesaic train` writes, and `moesaic report` draws. Collective.

        Args:
            first_step: steps that were done before.
            layers: metrics.jsonl has also the numbers of every MoE layer.
            trace_every: steps between routing loads in trace.npz; 0: none. Layers must be alike for it.
            tensorboard: also write the numbers for TensorBoard.

        Raises:
            ValueError: the folder has records already, or cannot be written; on every rank.
        """
        recorder, problem = None, ""
        try:
            recorder = Recorder(
                Path(folder),
                self._sharded,
                self._telemetry,
                self.metrics,
                self._config,
                first_step=first_step,
                layers=layers,
                trace_every=trace_every,
                tensorboard=tensorboard,
            )
        except (ValueError, OSError) as error:
            problem = str(error)
        problem = first_problem(problem)
        if recorder is None or problem:
            raise ValueError(problem)
        return recorder

    def _reshard(self) -> None:
        """Give FSDP2's root its shards back; see `ShardedModel.reshard`."""
        self._sharded.reshard()

    def _tensors(self, *, experts: bool) -> Iterator[tuple[str, Tensor]]:
        """Parameters and buffers by name: those of the experts that this rank owns, or all others."""
        self._reshard()
        owned = {id(p) for p in self.expert_parameters()}
        for name, tensor in (*self.model.named_parameters(), *self.model.named_buffers()):
            if (id(tensor) in owned) == experts:
                yield name, tensor


def _num_shards(grad: Tensor) -> int:
    """How many parts a dense gradient is in; further ranks hold the same parts again."""
    if not isinstance(grad, DTensor):
        return 1
    sizes = zip(grad.device_mesh.shape, grad.placements, strict=True)
    return math.prod(size for size, placement in sizes if not placement.is_replicate())
