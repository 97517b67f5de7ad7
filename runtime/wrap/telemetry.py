"""What the steps of a sharded model were made of: loads, bytes, memory, decisions about owners, profiles."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from contextlib import AbstractContextManager
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from ...collectives import LinkCounts
from ..stages import StageClock
from ..step.metrics import exposed_metrics, step_metrics
from .migration_policy import Decision, Migrator
from .profile import profiled
from .sharded_model import ShardedModel

logger = logging.getLogger("moesaic.overlap")


class Telemetry:
    """Loads, bytes, memory and decisions about owners, beside the numbers of `Handle.metrics`."""

    def __init__(self, sharded: ShardedModel, clock: StageClock, migrators: Sequence[Migrator]):
        self.clock = clock
        """Seconds that this rank spent in each stage of a step, where `clock.enabled` is set."""
        self._sharded = sharded
        self._migrators = migrators
        self._layer_metrics: dict[str, dict[str, float]] = {}
        self._loads: dict[str, np.ndarray] = {}
        self._is_overlap_observed = self._observes_overlap()

    def layer_metrics(self) -> dict[str, dict[str, float]]:
        """The last closed step by the layer's name; the keys are those of `Handle.metrics`, but for bytes sent."""
        return {name: dict(summary) for name, summary in self._layer_metrics.items()}

    def loads(self) -> np.ndarray:
        """Assignments of the last closed step by layer, source rank and expert, int64 [L, R, E].

        Raises:
            ValueError: layers have different numbers of experts; see `layer_loads`.
        """
        numbers = {load_RE.shape[1] for load_RE in self._loads.values()}
        if len(numbers) > 1:
            raise ValueError(
                f"layers have {' and '.join(map(str, sorted(numbers)))} experts, no one array; use handle.telemetry.layer_loads()"
            )
        return np.stack(list(self._loads.values()))

    def layer_loads(self) -> dict[str, np.ndarray]:
        """The same by the layer's name, int64 [R, E] each."""
        return dict(self._loads)

    def memory(self, optimizer: torch.optim.Optimizer | None = None) -> dict[str, int]:
        """Bytes of expert state on this rank.

        expert_bytes: master weights of the experts owned here, gradients of those that are trained, and with
        `RuntimeConfig.compute_dtype` their weights in that dtype. slot_bytes_bound: the most that copies, their gradients and
        staging can take for one forward in flight, predicted. slot_bytes_peak: the most they did take so far. optimizer_bytes:
        state of the experts in `optimizer`, if it is given.
        """
        banks = self._sharded.banks
        pools = {layer.runtime.pool for layer in self._sharded.layers.values()}
        memory = {
            "expert_bytes": sum(
                bank.cast_bytes + sum(p.nbytes * (2 if p.requires_grad else 1) for p in bank.parameters()) for bank in banks
            ),
            "slot_bytes_bound": sum(pool.predicted_bytes for pool in pools),
            "slot_bytes_peak": sum(pool.peak_bytes for pool in pools),
        }
        if optimizer is not None:
            states = [optimizer.state.get(p, {}) for bank in banks for p in bank.parameters()]
            memory["optimizer_bytes"] = sum(v.nbytes for state in states for v in state.values() if isinstance(v, Tensor))
        return memory

    def profile(self, path: str | Path) -> AbstractContextManager[None]:
        """Profile the steps of a `with` block on this rank, and write them to `path` as a trace for ui.perfetto.dev.

        Compute, the stages of every MoE layer, and each collective from launch to arrival.
        """
        group = self._sharded.group
        return profiled(Path(path), {"experts": group.experts.traffic, "token rows": group.tokens.traffic}, group.rank)

    def migrations(self) -> list[Decision]:
        """What came of every proposal to migrate experts so far, with its reason."""
        return [decision for migrator in self._migrators for decision in migrator.decisions]

    def last_stage(self) -> str:
        """The stage of a layer that this rank completed last, with step, layer and plan: for errors outside the layers."""
        return "no stage" if self.clock.completed is None else " of ".join(self.clock.completed)

    def close_step(self) -> dict[str, float]:
        """Keep the numbers of the step that ends, by layer; return those of `Handle.metrics`."""
        layers = self._sharded.layers
        counters = {name: layer.runtime.counters for name, layer in layers.items()}
        overlap_s = {name: layer.runtime.planner.overlap_s for name, layer in layers.items()}
        self._layer_metrics = {
            name: c.summary() | {"overlap_s": overlap_s[name]} for name, c in counters.items() if c.num_forwards
        }
        num_ranks = self._sharded.group.world_size
        self._loads = {
            name: np.zeros((num_ranks, layers[name].num_experts), np.int64) if c.load_RE is None else c.load_RE
            for name, c in counters.items()
        }
        metrics = step_metrics(list(counters.values()), self._sent_bytes()) | exposed_metrics(counters)
        if self._is_overlap_observed and not self._observes_overlap():
            self._is_overlap_observed = False
            if self._sharded.group.is_first:
                least, most = min(overlap_s.values()), max(overlap_s.values())
                logger.info(
                    "gathers of copies hide under %.2g s of work ahead of a MoE layer, up to %.2g s: measured", least, most
                )
        return metrics | {"overlap_s": sum(overlap_s.values())} | {key: float(count) for key, count in self.memory().items()}

    def _observes_overlap(self) -> bool:
        """Whether ranks have still to agree on the work ahead of some layer."""
        return any(layer.runtime.context.work_ahead.is_observed for layer in self._sharded.layers.values())

    def _sent_bytes(self) -> dict[str, LinkCounts]:
        """What this rank has sent since the last step, by operation and link class."""
        group = self._sharded.group
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
