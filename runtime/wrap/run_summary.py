"""A run in a few numbers, added up step by step in constant memory but for one number a step."""

from __future__ import annotations

import math
import statistics
from array import array
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ...collectives import SCHEDULES


@dataclass(frozen=True)
class Summary:
    """A run in a few numbers, printed at its end and written to summary.json."""

    steps: int
    first_loss: float
    last_loss: float
    """Of the training, by step."""
    first_val_loss: float | None
    last_val_loss: float | None
    """None: nothing was evaluated."""
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
                self._loss(),
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

    def _loss(self) -> str:
        """Of the validation where there was any."""
        if self.first_val_loss is None or self.last_val_loss is None:
            return f"training loss          {self.first_loss:.3f} -> {self.last_loss:.3f}"
        return f"validation loss        {self.first_val_loss:.3f} -> {self.last_val_loss:.3f}"

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


class Totals:
    """Sums over all steps for the summary, in 8 bytes per step: a run may have millions of steps."""

    def __init__(self) -> None:
        self._sums = dict.fromkeys((*_MEANS, "seconds"), 0.0)
        self._tokens_per_s = array("d")  # of every step, for the median
        self._last: Mapping[str, float] = {}
        self._first_loss = math.nan
        self._first_val_loss: float | None = None
        self.last_val_loss: float | None = None
        self.decisions: list[dict[str, Any]] = []  # about owners

    @property
    def num_steps(self) -> int:
        """Steps added."""
        return len(self._tokens_per_s)

    def add(self, values: Mapping[str, float]) -> None:
        """Add one step."""
        for key in self._sums:
            self._sums[key] += values[key]
        self._first_loss = self._first_loss if self._tokens_per_s else values["loss"]
        self._tokens_per_s.append(values["tokens_per_s"])
        self._last = values

    def add_validation(self, val_loss: float) -> None:
        """Add an evaluation."""
        self._first_val_loss = val_loss if self._first_val_loss is None else self._first_val_loss
        self.last_val_loss = val_loss

    def summary(self, folder: Path) -> Summary:
        """The summary so far; requires a step."""
        assert self.num_steps
        mean = {key: self._sums[key] / self.num_steps for key in _MEANS}
        return Summary(
            steps=self.num_steps,
            first_loss=self._first_loss,
            last_loss=self._last["loss"],
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


def add_decisions(decisions: list[dict[str, Any]], record: Mapping[str, Any]) -> None:
    """Add the decisions about owners of a record of metrics.jsonl, with its step; and to one of before what it did save."""
    if "migration_step" in record:
        for decision in decisions:
            if decision["step"] == record["migration_step"] and decision["moved"]:
                decision["saved_s_observed"] = record["saved_s_observed"]
    decisions += [{"step": record["step"], **decision} for decision in record.get("migrations", ())]
    for old in record.get("rehomings", ()):  # of runs recorded before 0.1
        decisions.append({**old, "moved": old.get("num_moved", 0), "saved_s_predicted": old.get("saved_s", 0.0)})
