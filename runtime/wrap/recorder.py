"""The records of a run in its folder, from the numbers that a handle has after each step.

metrics.jsonl      one JSON object a step; with `layers` also one for every MoE layer inside
tensorboard/       the same for TensorBoard, with `tensorboard`
trace.npz          routing loads of the steps, for `moesaic place` and `moesaic trace`
summary.json       the numbers of the summary
plan.json          with migration: the owners since the last one, as a plan for `moesaic place`
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path
from typing import Any, TextIO

import torch
import torch.distributed as dist
from torch import Tensor

from ...jit import compile_seconds, run_seconds
from ...placement import ExpertLoad, Problem, SavedPlan, TraceMeta, TraceWriter, get_solver, policy_solvers
from ...placement.files import replace_text
from ..config import RuntimeConfig
from .migration_policy import Decision
from .run_summary import Summary, Totals, add_decisions
from .sharded_model import ShardedModel
from .telemetry import Telemetry
from .tensorboard import TensorBoard


class Recorder:
    """Made by `Handle.record`; a context manager that closes every file, also after an error.

    Files are rank 0's. Call it on every rank all the same: a loop needs no `if rank == 0`.
    """

    def __init__(
        self,
        folder: Path,
        sharded: ShardedModel,
        telemetry: Telemetry,
        metrics: Callable[[], dict[str, float]],
        config: RuntimeConfig,
        *,
        first_step: int,
        layers: bool,
        trace_every: int,
        tensorboard: bool,
    ):
        self.folder = folder
        self.step = first_step
        """Steps recorded, with those before the first."""
        self.last_val_loss: float | None = None
        self._first_step = first_step
        self._sharded, self._telemetry, self._handle_metrics, self._config = sharded, telemetry, metrics, config
        self._has_layers, self._trace_every = layers, trace_every
        self._num_decisions = len(telemetry.migrations())
        self._since_s, self._compile_s = run_seconds(), compile_seconds()
        self._totals = Totals()
        self._closing = ExitStack()
        self._lines: TextIO | None = None
        self._trace: TraceWriter | None = None
        self._tensorboard: TensorBoard | None = None
        self._meta = _trace_meta(sharded, str(folder))
        if not sharded.group.is_first:
            return
        folder.mkdir(parents=True, exist_ok=True)
        if (folder / "metrics.jsonl").exists():
            raise ValueError(f"{str(folder)!r} holds the records of another run; give a new folder")
        with ExitStack() as closing:
            self._lines = closing.enter_context(open(folder / "metrics.jsonl", "w", encoding="utf-8", buffering=1))
            if trace_every and self._meta is not None:
                self._trace = closing.enter_context(TraceWriter(folder / "trace.npz", self._meta))
            if tensorboard:
                self._tensorboard = closing.enter_context(TensorBoard(folder / "tensorboard"))
            self._closing = closing.pop_all()

    def __enter__(self) -> Recorder:
        return self

    def __exit__(self, *exc: object) -> None:
        self._closing.close()

    def add(self, loss: float | Tensor, **numbers: float | Tensor) -> None:
        """Add a step, after `handle.step()`: the means over all ranks of the loss and of further numbers (`lr`, `val_loss`, ...).

        Collective: every rank gives the same names. Seconds are those since the step before.
        """
        metrics = self._handle_metrics()
        given = {"loss": loss, **dict(sorted(numbers.items()))}
        device = self._sharded.device
        values = [torch.as_tensor(value, dtype=torch.float64, device=device).detach().reshape(()) for value in given.values()]
        sent = torch.tensor(sum(value for key, value in metrics.items() if key.startswith("bytes_")), dtype=torch.float64)
        total = torch.stack([*values, sent.to(device)])
        dist.all_reduce(total)
        *sums, bytes_sent = total.tolist()
        means = {key: value / dist.get_world_size() for key, value in zip(given, sums, strict=True)}
        now_s, compile_s = run_seconds(), compile_seconds()
        seconds = now_s - self._since_s
        own = {
            "seconds": seconds,
            "compile_s": compile_s - self._compile_s,
            "tokens_per_s": self._num_tokens() / seconds,
            "bytes_sent": bytes_sent,
        }
        self.write(own | means)
        self._since_s, self._compile_s = run_seconds(), compile_seconds()

    def _num_tokens(self) -> float:
        """Tokens of the last step, over all ranks, by the layer that routed most."""
        layers = self._sharded.layers
        loads = self._telemetry.layer_loads()
        most = max(float(load_RE.sum()) / layers[name].top_k for name, load_RE in loads.items())
        return most * self._sharded.group.replicas.world_size

    def write(self, values: Mapping[str, float]) -> list[Decision]:
        """Add a step with numbers that are the same on all ranks already; return what was decided about owners after it.

        They hold at least `loss`, `seconds`, `tokens_per_s` and `bytes_sent`.
        """
        self.step += 1
        decisions = self._telemetry.migrations()[self._num_decisions :]
        self._num_decisions += len(decisions)
        if self._lines is None:
            return decisions
        metrics = self._handle_metrics()
        if "migration_step" in metrics:
            metrics["migration_step"] += self._first_step  # the handle counts its own steps
        line: dict[str, Any] = {"step": self.step, **values, **metrics}
        if "val_loss" in values:
            self._note_validation(values["val_loss"])
        self._totals.add(line)
        if decisions:
            line["migrations"] = [decision.to_dict() for decision in decisions]
        if self._has_layers:
            line["layers"] = [{"layer": name, **summary} for name, summary in self._telemetry.layer_metrics().items()]
        print(json.dumps(line), file=self._lines)
        if self._tensorboard is not None:
            self._tensorboard.add(self.step, line)
        add_decisions(self._totals.decisions, line)
        if self._trace is not None and self.step % self._trace_every == 0:
            self._trace.append(self._telemetry.loads())
        if self._meta is not None and decisions and decisions[-1].moved:
            layers = zip(self._sharded.layers.values(), self._telemetry.loads(), strict=True)
            self.write_plan([layer.runtime.planner.problem(ExpertLoad(load_RE)) for layer, load_RE in layers], decisions[-1])
        return decisions

    def add_validation(self, val_loss: float) -> None:
        """Add an evaluation without a step, as before the first one; one after a step is `add`'s `val_loss`."""
        if self._lines is not None:
            print(json.dumps({"step": self.step, "val_loss": val_loss}), file=self._lines)
            self._note_validation(val_loss)

    def _note_validation(self, val_loss: float) -> None:
        self.last_val_loss = val_loss
        self._totals.add_validation(val_loss)

    def write_plan(self, problems: Sequence[Problem], decision: Decision) -> None:
        """Write the owners after a migration, with the policy's copies for the problems' load; the figures are the decision's."""
        assert self._meta is not None
        solve = get_solver(policy_solvers(self._config.policy)[0])
        SavedPlan(
            meta=self._meta,
            topology=problems[0].topology,
            slots=problems[0].slots,
            solver=decision.solver,
            objective_s=decision.objective,
            bound_s=decision.bound,
            gap=decision.gap,
            seconds=decision.seconds,
            moves=decision.moved,
            trace_digest="",
            layers=tuple(solve(problem).placement for problem in problems),
        ).write(self.folder / "plan.json")

    def summary(self) -> Summary | None:
        """Write summary.json and return its content, which prints as a table; None on other ranks and before the first step."""
        if not self._totals.num_steps:
            return None
        summary = self._totals.summary(self.folder)
        replace_text(self.folder / "summary.json", json.dumps(asdict(summary), indent=2) + "\n")
        return summary


def _trace_meta(sharded: ShardedModel, source: str) -> TraceMeta | None:
    """What the run's trace is about, whose ranks are those of one replica; None where layers differ, which no trace holds."""
    kinds = {(layer.num_experts, layer.top_k, layer.shape) for layer in sharded.layers.values()}
    if len(kinds) > 1:
        return None
    ((num_experts, top_k, shape),) = kinds
    return TraceMeta(
        num_layers=len(sharded.layers),
        num_experts=num_experts,
        top_k=top_k,
        num_ranks=sharded.group.world_size,
        dim=shape.dim,
        ffn_dim=shape.ffn_dim,
        num_matrices=3 if shape.has_gate else 2,
        source=source,
    )
