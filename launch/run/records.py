"""The records of a run: its folder, metrics, routing trace, progress bar and summary.

```
runs/NAME/config.toml       the resolved configuration
runs/NAME/metrics.jsonl     one JSON object per step; run.metrics=detailed adds one per MoE layer inside
runs/NAME/tensorboard/      the same for TensorBoard, with run.tensorboard
runs/NAME/trace.npz         routing loads of every step, or of each run.trace_every steps, for `moesaic place` and `moesaic trace`
runs/NAME/summary.json      the numbers of the printed summary
runs/NAME/plan.json         with migration: the owners since the last one, as a plan for placement.file and `moesaic place`
runs/NAME/checkpoints/      step-N folders
runs/NAME/profile-rank-N.json  a profile of the last steps, with run.profile_steps
```
"""

import json
import math
import os
import statistics
import sys
from array import array
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any, TextIO

import numpy as np
from tqdm import tqdm

from ...collectives import SCHEDULES
from ...placement import Problem, SavedPlan, TraceMeta, TraceWriter, get_solver, policy_solvers
from ...placement.files import replace_text
from ...runtime.wrap.migration_policy import Decision
from ..config import Config, RunConfig
from ..offline.report import add_decisions
from .process import Process
from .tensorboard import TensorBoard


@contextmanager
def _ignoring_closed_pipes() -> Iterator[None]:
    """Drop output to a closed pipe, as of `moesaic train | head`, instead of ending the run."""
    try:
        yield
    except BrokenPipeError:
        with open(os.devnull, "w", encoding="utf-8") as nowhere:
            for stream in (sys.stdout, sys.stderr):
                try:
                    stream.flush()
                except BrokenPipeError:
                    os.dup2(nowhere.fileno(), stream.fileno())


def show(text: str) -> None:
    """Print text about the run."""
    with _ignoring_closed_pipes():
        print(text, flush=True)


def create_run_folder(config: RunConfig) -> Path:
    """Make and return a new folder for this run: NAME, or the first free of NAME-2, NAME-3, ...; nothing is ever overwritten.

    Raises `ValueError` if the folder cannot be made.
    """
    parent = Path(config.folder).expanduser()
    number = 1
    try:
        parent.mkdir(parents=True, exist_ok=True)
        while True:
            folder = parent / (config.name if number == 1 else f"{config.name}-{number}")
            number += 1
            with suppress(FileExistsError):
                folder.mkdir()
                return folder
    except OSError as error:
        raise ValueError(f"cannot make a run folder in {str(parent)!r} ({error.strerror}): set run.folder to another") from None


@dataclass(frozen=True)
class StepRecord:
    """One line of metrics.jsonl, which also holds the handle's metrics of the step.

    `migrations` lists what was decided about owners after the step, if anything was: the fields of `Decision`. A later line has
    `saved_s_observed` and `migration_step`: what experts that migrated after that step saved.
    """

    step: int
    """Optimizer steps done."""
    loss: float
    """Mean training cross-entropy of the global batch, nats per byte."""
    aux_loss: float
    """The router's losses, coefficients applied, mean over ranks."""
    grad_norm: float
    """Global gradient norm before clipping."""
    lr: float
    """Learning rate of the step."""
    seconds: float
    """Wall time of the step on rank 0, without evaluation, checkpoints and `compile_s`."""
    compile_s: float
    """Seconds that rank 0 spent compiling and loading routines since the previous record, or since the start."""
    tokens_per_s: float
    """Over all ranks."""
    bytes_sent: float
    """Bytes that all ranks sent for experts and routed tokens."""


@dataclass(frozen=True)
class Summary:
    """A run in a few numbers, printed at its end and written to summary.json."""

    steps: int
    first_val_loss: float
    last_val_loss: float
    tokens_per_s: float
    max_over_mean_static: float
    max_over_mean: float
    copies_per_layer: float
    schedules: dict[str, float]
    bytes_sent_per_step: float
    expert_bytes: float
    slot_bytes_bound: float
    slot_bytes_peak: float
    seconds: float
    migrations: list[dict[str, Any]]
    """The decisions by which experts migrated, each with its step and, as far as known, `saved_s_observed`."""
    folder: str

    def __str__(self) -> str:
        return "\n".join(
            (
                f"steps                  {self.steps} in {self.seconds:.0f} s",
                f"validation loss        {self.first_val_loss:.3f} -> {self.last_val_loss:.3f} nats per byte",
                f"throughput             {self.tokens_per_s:,.0f} tokens/s (median step)",
                f"max/mean rank load     {self.max_over_mean_static:.3f} under static EP, {self.max_over_mean:.3f} under FSSDP"
                " (mean over steps, same routing)",
                f"copies per layer       {self.copies_per_layer:.2f}",
                f"copies travelled       {self._schedules()}",
                f"sent per step          {self.bytes_sent_per_step / 1e6:.2f} MB over all ranks",
                f"memory, rank 0         {self.expert_bytes / 1e6:.1f} MB of experts and gradients; slots took"
                f" {self.slot_bytes_peak / 1e6:.1f} MB of the {self.slot_bytes_bound / 1e6:.1f} MB predicted at most",
                *self._migrations(),
                f"files                  {self.folder}",
            )
        )

    def _migrations(self) -> list[str]:
        """The last migrations, a line each."""
        lines = []
        for move in self.migrations[-_MIGRATIONS_SHOWN:]:
            observed = f"{move['saved_s_observed']:.3g} s" if "saved_s_observed" in move else "nothing yet"
            lines.append(
                f"migration at {move['step']:<9} {move['moved']} experts, which save until the next proposal:"
                f" {move['saved_s_predicted']:.3g} s predicted, {observed} observed ({move['solver']}, gap {move['gap']:.1%})"
            )
        return lines

    def _schedules(self) -> str:
        """The schedules of the gathers, most frequent first."""
        total = sum(self.schedules.values())
        ordered = sorted(self.schedules.items(), key=lambda schedule: -schedule[1])
        shares = [f"{name} ({count / total:.0%} of gathers)" for name, count in ordered if count]
        return ", ".join(shares) if shares else "not at all"


# Of a summary, as printed; summary.json has all.
_MIGRATIONS_SHOWN = 5
_MEANS = ("max_over_mean_static", "max_over_mean", "copies_per_layer", "bytes_sent", *(f"gathers_{name}" for name in SCHEDULES))


class _Totals:
    """Sums over all steps for the summary, in 8 bytes per step: a run may have millions of steps."""

    def __init__(self) -> None:
        self._sums = dict.fromkeys((*_MEANS, "seconds"), 0.0)
        self._tokens_per_s = array("d")  # of every step, for the median
        self._last: Mapping[str, float] = {}
        self._first_val_loss: float | None = None
        self.decisions: list[dict[str, Any]] = []  # about owners
        self.last_val_loss = math.nan

    @property
    def num_steps(self) -> int:
        """Steps added."""
        return len(self._tokens_per_s)

    def add(self, values: Mapping[str, float]) -> None:
        """Add one step."""
        for key in self._sums:
            self._sums[key] += values[key]
        self._tokens_per_s.append(values["tokens_per_s"])
        self._last = values

    def add_validation(self, val_loss: float) -> None:
        """Add an evaluation."""
        self._first_val_loss = val_loss if self._first_val_loss is None else self._first_val_loss
        self.last_val_loss = val_loss

    def summary(self, folder: Path) -> Summary:
        """The summary so far; requires an evaluation and a step."""
        assert self.num_steps and self._first_val_loss is not None
        mean = {key: self._sums[key] / self.num_steps for key in _MEANS}
        return Summary(
            steps=self.num_steps,
            first_val_loss=self._first_val_loss,
            last_val_loss=self.last_val_loss,
            tokens_per_s=statistics.median(self._tokens_per_s),
            max_over_mean_static=mean["max_over_mean_static"],
            max_over_mean=mean["max_over_mean"],
            copies_per_layer=mean["copies_per_layer"],
            schedules={name: mean[f"gathers_{name}"] for name in SCHEDULES},
            bytes_sent_per_step=mean["bytes_sent"],
            expert_bytes=self._last["expert_bytes"],
            slot_bytes_bound=self._last["slot_bytes_bound"],
            slot_bytes_peak=self._last["slot_bytes_peak"],
            seconds=self._sums["seconds"],
            migrations=[decision for decision in self.decisions if decision["moved"]],
            folder=str(folder),
        )


class Records:
    """Rank 0's records of a run; a context manager that closes every file, also after an error.

    On other ranks every call does nothing, so that the training loop needs no `if rank == 0`.
    """

    def __init__(self, folder: Path, config: Config, process: Process, *, first_step: int) -> None:
        self.folder = folder
        self._totals = _Totals()
        self._closing = ExitStack()
        self._metrics: TextIO | None = None
        self._trace: TraceWriter | None = None
        self._tensorboard: TensorBoard | None = None
        self._config, self._meta = config, trace_meta(config, process.world_size)
        self._bar: tqdm | None = None
        if not process.is_first:
            return
        replace_text(folder / "config.toml", config.to_toml())
        self._metrics = open(folder / "metrics.jsonl", "w", encoding="utf-8", buffering=1)  # noqa: SIM115 (closed on exit)
        self._closing.enter_context(self._metrics)
        self._trace = self._closing.enter_context(TraceWriter(folder / "trace.npz", self._meta))
        if config.run.tensorboard:
            self._tensorboard = self._closing.enter_context(TensorBoard(folder / "tensorboard"))
        self._bar = self._closing.enter_context(
            tqdm(
                total=config.train.steps,
                initial=first_step,
                unit="step",
                disable=not config.launch.progress,
                # A terminal gets a smooth bar, a log file one line from time to time.
                mininterval=0.2 if sys.stderr.isatty() else 15.0,
                dynamic_ncols=True,
            )
        )

    def __enter__(self) -> "Records":
        return self

    def __exit__(self, *exc: object) -> None:
        with _ignoring_closed_pipes():
            self._closing.close()

    def add(
        self,
        record: StepRecord,
        metrics: Mapping[str, float],
        loads_LRE: np.ndarray,
        *,
        val_loss: float | None,
        layers: Mapping[str, Mapping[str, float]] = MappingProxyType({}),
        decisions: Sequence[Decision] = (),
    ) -> None:
        """Add one step: a metrics line, a trace entry, the bar, and a printed line per migration decision."""
        if self._metrics is None or self._trace is None or self._bar is None:
            return
        values = asdict(record) | dict(metrics)
        if val_loss is not None:
            values["val_loss"] = val_loss
            self._totals.add_validation(val_loss)
        line: dict[str, Any] = values | ({"migrations": [decision.to_dict() for decision in decisions]} if decisions else {})
        if self._config.run.metrics == "detailed":
            line["layers"] = [{"layer": name, **summary} for name, summary in layers.items()]
        print(json.dumps(line), file=self._metrics)
        if self._tensorboard is not None:
            self._tensorboard.add(record.step, line)
        for decision in decisions:
            self.print_line(f"step {record.step}: {decision.reason}")
        self._totals.add(values)
        add_decisions(self._totals.decisions, line)
        trace_every = self._config.run.trace_every
        if trace_every and record.step % trace_every == 0:
            self._trace.append(loads_LRE)
        self._bar.set_postfix(self._postfix(values), refresh=False)
        with _ignoring_closed_pipes():
            self._bar.update()

    def add_validation(self, step: int, val_loss: float) -> None:
        """Add the evaluation before the first step."""
        if self._metrics is not None:
            print(json.dumps({"step": step, "val_loss": val_loss}), file=self._metrics)
            self._totals.add_validation(val_loss)

    def add_plan(self, problems: Sequence[Problem], decision: Decision) -> None:
        """Write the owners after a migration, with the policy's copies for the problems' load; the figures are the decision's."""
        if self._metrics is None:
            return
        solve = get_solver(policy_solvers(self._config.runtime.policy)[0])
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

    def print_line(self, text: str) -> None:
        """Print a line without breaking the bar."""
        if self._bar is not None:
            with _ignoring_closed_pipes():
                self._bar.write(text, file=sys.stdout)
                sys.stdout.flush()

    def _postfix(self, values: Mapping[str, float]) -> dict[str, str]:
        return {
            "loss": f"{values['loss']:.3f}",
            "val": f"{self._totals.last_val_loss:.3f}",
            "tok/s": f"{values['tokens_per_s']:,.0f}",
            "load": f"{values['max_over_mean']:.2f} (static {values['max_over_mean_static']:.2f})",
            "copies": f"{values['copies_per_layer']:.1f}",
        }

    def summary(self) -> Summary | None:
        """Write summary.json and return its content; None on other ranks and before the first step."""
        if not self._totals.num_steps:
            return None
        summary = self._totals.summary(self.folder)
        replace_text(self.folder / "summary.json", json.dumps(asdict(summary), indent=2) + "\n")
        return summary


def trace_meta(config: Config, world_size: int) -> TraceMeta:
    """The metadata of the run's trace, which a plan for this run must match; its ranks are those of one replica."""
    model = config.model
    return TraceMeta(
        num_layers=model.num_layers,
        num_experts=model.num_experts,
        top_k=model.top_k,
        num_ranks=config.ranks_per_replica(world_size),
        dim=model.dim,
        ffn_dim=model.ffn_dim,
        source=f"moesaic train {config.run.name}",
    )
