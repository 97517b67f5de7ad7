"""The handle of a wrapped model: what the user's loop calls, and what it may ask."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

from ...collectives import LinkCounts
from ...placement import OwnerMap
from ..adapters.safetensors_files import SafetensorsFolder, write_folder
from ..adapters.weights import checkpoint_tensors, load_weights, state_on_rank_zero
from ..agreement import Doing
from ..config import RuntimeConfig
from ..experts.bank import Bank
from ..experts.migrate import expert_states, migrate, rounds_of
from ..group import RankGroup
from ..layer import moe_layers
from ..sharded_experts import ShardedExperts
from ..stages import StageClock
from ..state import expert_parameters, load_state, prepare_optimizer, state_of
from ..step.metrics import exposed_metrics, step_metrics
from .drift import DriftGuard
from .migration_policy import Decision, Rehomer
from .profile import profiled


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
        self.banks = list(banks)
        self.group = group
        self.config = config
        self.clock = clock
        self._agreement = next(iter(self.layers.values())).runtime.agreement
        self._step = 0
        self._guard = DriftGuard(
            group, every=config.check_replicas_every, ignored=config.check_replicas_except, agreement=self._agreement
        )
        self._metrics: dict[str, float] = {}
        self._layer_metrics: dict[str, dict[str, float]] = {}
        self._loads: list[np.ndarray] = []
        self._moe_layers = moe_layers(model)
        self._rehomers = [
            Rehomer(bank, self._layers_of(bank), group, config)
            for bank in self.banks
            if config.migration.every and group.world_size > 1
        ]

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
            return torch.zeros((), device=self._device)
        losses = [layer.aux_loss for layer in self._moe_layers.values() if layer.aux_loss is not None]
        if not losses:
            raise RuntimeError("aux_loss() before any forward of a MoE layer; call the model first")
        return torch.stack(losses).sum()

    def step(self, optimizer: torch.optim.Optimizer | None = None) -> None:
        """Close a training step, after `optimizer.step()`: metrics are taken, and what was sent ahead is dropped.

        The backward of every forward must have run: weights count as changed from here on.

        With `RuntimeConfig.migration` experts may change their owner here; `optimizer`, whose state goes along, must be given.

        Collective: after the first step, and every `RuntimeConfig.check_replicas_every`, ranks compare what they must hold alike.

        Raises:
            DriftError: a `RuntimeError`, on every rank, if they differ; see docs/composability.md, "Ranks that drift apart".
        """
        if self._rehomers and optimizer is None:
            raise ValueError(
                f"runtime.migration.every is {self.config.migration.every}, but handle.step() got no optimizer; give it"
            )
        for layer in self.layers.values():
            layer.runtime.drop_prefetched()
        counters = [layer.runtime.counters for layer in self.layers.values()]
        self._metrics = step_metrics(counters, self._sent_bytes())
        self._layer_metrics = {n: layer.runtime.counters.summary() for n, layer in self.layers.items() if _has_run(layer)}
        self._metrics |= exposed_metrics({name: layer.runtime.counters for name, layer in self.layers.items()})
        self._metrics |= {key: float(count) for key, count in self.memory().items()}
        self._loads = [
            np.zeros((self.group.world_size, layer.num_experts), np.int64) if c.load_RE is None else c.load_RE
            for layer, c in zip(self.layers.values(), counters, strict=True)
        ]
        kept = [load if c.kept_RE is None else c.kept_RE for load, c in zip(self._loads, counters, strict=True)]
        self._step += 1
        for moe_layer in self._moe_layers.values():
            moe_layer.aux_loss = None
        for layer in self.layers.values():
            layer.runtime.counters.reset()
            layer.runtime.step = self._step
        for bank in self.banks:
            bank.weights_changed()
        for rehomer in self._rehomers:
            here = [load for layer, load in zip(self.layers.values(), kept, strict=True) if layer.runtime.bank is rehomer.bank]
            rehomer.step(self._step, np.stack(here), optimizer)
        if self._rehomers:
            latest = [rehomer.decisions[-1] for rehomer in self._rehomers if rehomer.decisions]
            self._metrics["moved_experts"] = float(sum(d.num_moved for d in latest if d.step == self._step))
        for transport in (self.group.tokens, self.group.experts, self.group.replicas):
            transport.traffic.reset()
        self._guard.after_step(self._step, self._tensors(experts=False), self._tensors(experts=True), optimizer, self._device)

    def rehome(self, owners: Sequence[OwnerMap], optimizer: torch.optim.Optimizer | None = None) -> None:
        """Make these the owner maps, one per bank: weights, gradients and the optimizer's state move. Collective, between steps.

        Replicas, on a two-dimensional mesh, must get the same maps.

        Raises:
            ValueError: not one map for each bank, a rank would own another number of experts than now, or some optimizer state
                has no rows to move. Nothing has moved then.
        """
        if len(owners) != len(self.banks):
            raise ValueError(f"{len(owners)} owner maps for {len(self.banks)} banks; give one for each, as handle.placement does")
        for bank, wanted in zip(self.banks, owners, strict=True):
            rounds_of(bank.owners, wanted)
            expert_states(bank, optimizer)
        for bank, wanted in zip(self.banks, owners, strict=True):
            for layer in self._layers_of(bank):
                layer.runtime.drop_prefetched()
            migrate(bank, optimizer, wanted, self.group.experts, where=f"re-homing after step {self._step}")
            for layer in self._layers_of(bank):
                layer.follow_bank()

    def last_stage(self) -> str:
        """The stage of a layer that this rank completed last, with step, layer and plan: for errors outside the layers."""
        return "no stage" if self.clock.completed is None else " of ".join(self.clock.completed)

    def rehomings(self) -> list[Decision]:
        """What came of every proposal to re-home experts so far, with its reason."""
        return [decision for rehomer in self._rehomers for decision in rehomer.decisions]

    def _layers_of(self, bank: Bank) -> list[ShardedExperts]:
        layers = [layer for layer in self.layers.values() if layer.runtime.bank is bank]
        return sorted(layers, key=lambda layer: layer.runtime.layer)

    def memory(self, optimizer: torch.optim.Optimizer | None = None) -> dict[str, int]:
        """Bytes of expert state on this rank.

        expert_bytes: master weights and gradients of the experts owned here, and with `RuntimeConfig.compute_dtype` their
        weights in that dtype. slot_bytes_bound: the most that copies, their gradients and staging can take for one forward in
        flight, predicted. slot_bytes_peak: the most they did take so far. optimizer_bytes: state of the experts
        in `optimizer`, if it is given.
        """
        pools = {layer.runtime.pool for layer in self.layers.values()}
        memory = {
            "expert_bytes": sum(2 * p.nbytes for bank in self.banks for p in bank.parameters())
            + sum(bank.cast_bytes for bank in self.banks),
            "slot_bytes_bound": sum(pool.predicted_bytes for pool in pools),
            "slot_bytes_peak": sum(pool.peak_bytes for pool in pools),
        }
        if optimizer is not None:
            states = [optimizer.state.get(p, {}) for bank in self.banks for p in bank.parameters()]
            memory["optimizer_bytes"] = sum(v.nbytes for state in states for v in state.values() if isinstance(v, Tensor))
        return memory

    def metrics(self) -> dict[str, float]:
        """The last closed step in numbers; docs/training.md lists the keys.

        With `RuntimeConfig.migration` also moved_experts: experts that changed their owner after the step.
        """
        return dict(self._metrics)

    def layer_metrics(self) -> dict[str, dict[str, float]]:
        """The last closed step by the layer's name; the keys are those of `metrics`, but for bytes sent."""
        return {name: dict(summary) for name, summary in self._layer_metrics.items()}

    def profile(self, path: str | Path) -> AbstractContextManager[None]:
        """Profile the steps of a `with` block on this rank, and write them to `path` as a trace for ui.perfetto.dev.

        Compute, the stages of every MoE layer, and each collective from launch to arrival.
        """
        traffic = {"experts": self.group.experts.traffic, "token rows": self.group.tokens.traffic}
        return profiled(Path(path), traffic, self.group.rank)

    def loads(self) -> np.ndarray:
        """Assignments of the last closed step by layer, source rank and expert, int64 [L, R, E].

        Raises:
            ValueError: layers have different numbers of experts; see `layer_loads`.
        """
        numbers = {load_RE.shape[1] for load_RE in self._loads}
        if len(numbers) > 1:
            raise ValueError(
                f"layers have {' and '.join(map(str, sorted(numbers)))} experts, no one array; use handle.layer_loads()"
            )
        return np.stack(self._loads)

    def layer_loads(self) -> dict[str, np.ndarray]:
        """The same by the layer's name, int64 [R, E] each."""
        return dict(zip(self.layers, self._loads, strict=False))

    @property
    def placement(self) -> list[OwnerMap]:
        """The owner map of every bank."""
        return [bank.owners for bank in self.banks]

    def set_requires_all_reduce(self, required: bool) -> None:
        """Whether backward passes end with gradients averaged over the groups of a two-dimensional mesh; at first they do.

        For gradient accumulation: False before all micro-batches but the last saves their averaging, and changes nothing else.
        Applies to the dense part as well, as FSDP2's method of the same name, where `shard_experts` sharded it.
        """
        for bank in self.banks:
            bank.averages_gradients = required
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
        num_ranks = self.group.world_size * self.group.replicas.world_size
        square = torch.zeros((), dtype=torch.float64, device=self._device)
        for parameter in self.parameters():
            grad = parameter.grad
            if grad is None:
                continue
            num_shards = self.group.world_size if id(parameter) in experts else _num_shards(grad)
            local = grad.to_local() if isinstance(grad, DTensor) else grad.as_subclass(Tensor)
            grads.append(local)
            dtype = torch.promote_types(local.dtype, torch.float32)
            square += torch.linalg.vector_norm(local, dtype=dtype).double().square() * (num_shards / num_ranks)
        # Summed in rank order on every rank, and over replicas: bitwise the same everywhere.
        for ranks in (self.group.tokens, self.group.replicas):
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
        for layer in self.layers.values():
            layer.runtime.drop_prefetched()
        self._reshard()
        load_state(state, self.model, optimizer)
        for bank in self.banks:
            bank.weights_changed()

    def family_state_dict(self) -> dict[str, Tensor]:
        """The weights as the unwrapped model's `state_dict()` has them, whole, in CPU memory of rank 0; empty elsewhere.

        Collective. Models from transformers come out under transformers' own names.
        """
        self._reshard()
        self._claim()
        return state_on_rank_zero(self.model, self.layers, self.group.tokens) if self.group.replicas.rank == 0 else {}

    def load_family_state_dict(self, state: Mapping[str, Any]) -> tuple[str, ...]:
        """Copy this rank's part of the weights out of the unwrapped model's whole state dict.

        Returns names that the model has no place for; see `adapters.weights.load_weights`.
        """
        for layer in self.layers.values():
            layer.runtime.drop_prefetched()
        self._reshard()
        self._claim()
        for bank in self.banks:
            bank.weights_changed()
        return load_weights(state, self.model, self.layers)

    def save_safetensors(self, folder: str | Path, *, max_file_bytes: int = 4 << 30) -> None:
        """Write the weights as transformers' `save_pretrained` lays them out, with the model's config, if it has one.

        Collective; every rank, of the first replica, writes the experts it owns into the same folder, which must hold no
        safetensors yet.
        """
        self._reshard()
        self._claim()
        replica = self.group.replicas.rank
        tensors = () if replica else checkpoint_tensors(self.model, self.layers, self.group.tokens)
        rank = replica * self.group.world_size + self.group.rank
        write_folder(Path(folder), tensors, rank=rank, max_file_bytes=max_file_bytes)
        save_config = getattr(getattr(self.model, "config", None), "save_pretrained", None)
        if self.group.is_first and save_config is not None:
            save_config(folder)

    def load_safetensors(self, folder: str | Path) -> tuple[str, ...]:
        """Load weights from such a folder, transformers' own included; each rank reads its part only.

        Returns names that the model has no place for.
        """
        return self.load_family_state_dict(SafetensorsFolder(Path(folder)))

    def prepare_optimizer(self, optimizer: torch.optim.Optimizer, saved: Iterable[str] | None = None) -> None:
        """Create the state of an optimizer that has not stepped yet, so that it can be loaded in place.

        `saved` are the names in the state to be loaded; of a checkpoint in `folder`, which `torch.distributed.checkpoint` wrote:
        `FileSystemReader(folder).read_metadata().state_dict_metadata`. Parameters without state there get none here either.
        """
        self._reshard()
        prepare_optimizer(optimizer, self.model, saved)

    def _tensors(self, *, experts: bool) -> Iterator[tuple[str, Tensor]]:
        """Parameters and buffers by name: those of the experts that this rank owns, or all others."""
        self._reshard()
        owned = {id(p) for p in self.expert_parameters()}
        for name, tensor in (*self.model.named_parameters(), *self.model.named_buffers()):
            if (id(tensor) in owned) == experts:
                yield name, tensor

    def _reshard(self) -> None:
        """Give the root its shards back: FSDP2 leaves its parameters whole after a forward that had no backward."""
        if isinstance(self.model, FSDPModule):
            self.model.reshard()

    def _claim(self) -> None:
        """Have the banks' memory hold what the parameters do, which may have been given other memory; see `Bank.claim`."""
        for bank in self.banks:
            for layer in range(bank.owners.num_layers):
                bank.claim(layer)

    def _sent_bytes(self) -> dict[str, LinkCounts]:
        """What this rank has sent since the last step, by operation and link class."""
        group = self.group
        bytes_by_op: dict[str, np.ndarray] = {}
        for part in {group.tokens.traffic, group.experts.traffic}:
            for op in part.total_bytes():
                bytes_by_op[op] = bytes_by_op.get(op, 0) + part.bytes_R(op)
        sent = {op: LinkCounts.sent_by(group.rank, bytes_R, group.topology) for op, bytes_R in bytes_by_op.items()}
        between = group.replicas.traffic
        return sent | {
            op: LinkCounts.sent_by(group.replicas.rank, between.bytes_R(op), group.replica_topology)
            for op in between.total_bytes()
        }

    @property
    def _device(self) -> torch.device:
        return self.banks[0].device


def _has_run(layer: ShardedExperts) -> bool:
    return layer.runtime.counters.num_forwards > 0


def _num_shards(grad: Tensor) -> int:
    """How many parts a dense gradient is in; further ranks hold the same parts again."""
    if not isinstance(grad, DTensor):
        return 1
    sizes = zip(grad.device_mesh.shape, grad.placements, strict=True)
    return math.prod(size for size, placement in sizes if not placement.is_replicate())
