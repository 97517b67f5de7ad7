"""`moesaic trace`: inspect, convert, generate and back-test routing traces."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from typing import Any

import click
import numpy as np

from ...placement.files import clear_errors, digest_of
from ...placement.offline.backtest import backtest
from ...placement.owners import OwnerMap
from ...placement.traces.format import TraceMeta, write_trace
from ...placement.traces.sources import LoadSource, pair_counts_of
from ...placement.traces.synth import KINDS, SynthSpec, synthesize
from ..output import progress, publish
from .trace_options import Count, TraceOptions, inspect_options, trace_options

INFO_COLUMNS = ("layer", "assignments", "expert_max_over_mean", "expert_min_over_mean", "rank_max_over_mean", "shift")
BACKTEST_COLUMNS = ("predictor", "age", "mean", "worst", "num_cells")


@click.group("trace")
def command() -> None:
    """Inspect, convert, generate and back-test routing traces."""


@dataclass
class _LayerStats:
    """Sums over the steps of one layer."""

    owner_E: np.ndarray
    num_ranks: int
    steps: int = 0
    assignments: int = 0
    expert_max: float = 0.0
    expert_min: float = 0.0
    rank_max: float = 0.0
    shift: float = 0.0
    before_E: np.ndarray | None = None

    def add(self, load_RE: np.ndarray) -> tuple[float, np.ndarray]:
        """Add one step; return its busiest rank over the mean rank, and each expert over the mean expert [E]."""
        totals_E = load_RE.sum(axis=0)
        total = max(int(totals_E.sum()), 1)
        assignments_R = np.bincount(self.owner_E, weights=totals_E, minlength=self.num_ranks)
        share_E = totals_E / total
        self.steps += 1
        self.assignments += int(totals_E.sum())
        self.expert_max += float(share_E.max()) * share_E.size
        self.expert_min += float(share_E.min()) * share_E.size
        rank_max = float(assignments_R.max()) / total * self.num_ranks
        self.rank_max += rank_max
        if self.before_E is not None:
            self.shift += 0.5 * float(np.abs(share_E - self.before_E).sum())
        self.before_E = share_E
        return rank_max, share_E * share_E.size

    def record(self, layer: int | str) -> dict[str, Any]:
        """The means over steps."""
        return {
            "layer": layer,
            "assignments": self.assignments / self.steps,
            "expert_max_over_mean": self.expert_max / self.steps,
            "expert_min_over_mean": self.expert_min / self.steps,
            "rank_max_over_mean": self.rank_max / self.steps,
            "shift": self.shift / max(self.steps - 1, 1),
        }


def inspect_trace(
    source: LoadSource, on_step: Callable[[int, list[tuple[float, np.ndarray]]], None] = lambda step, layers: None
) -> list[dict[str, Any]]:
    """Read and check every step of a source; return a record of means over steps for each layer.

    expert_max_over_mean, expert_min_over_mean: of the experts' loads. rank_max_over_mean: of the ranks' loads, with contiguous
    blocks of experts. shift: total variation distance between the expert shares of neighbouring steps. recorded_layer: the
    layer's number in the recording. dropped: assignments missing for its tokens, over all steps. `on_step` is called with every
    step and what `_LayerStats.add` returned for each layer.
    """
    meta = source.meta
    owners_LE = OwnerMap.contiguous(meta.num_layers, meta.num_experts, meta.num_ranks).expert_to_owner_LE
    stats = [_LayerStats(owner_E, meta.num_ranks) for owner_E in owners_LE]
    with progress(source.num_steps, "step") as advance:
        for step, loads_LRE in enumerate(source.steps()):
            on_step(step, [layer_stats.add(load_RE) for layer_stats, load_RE in zip(stats, loads_LRE, strict=True)])
            advance()
    numbers = meta.layers or range(meta.num_layers)
    expected = None if source.tokens_SR is None else int(source.tokens_SR.sum()) * meta.top_k
    records = []
    for layer, (layer_stats, number) in enumerate(zip(stats, numbers, strict=True)):
        dropped = 0 if expected is None else expected - layer_stats.assignments
        records.append({**layer_stats.record(layer), "recorded_layer": number, "dropped": dropped})
    return records


@command.command("info")
@click.argument("path", metavar="TRACE")
@inspect_options
def info_command(path: str, ranks: int | None, json_path: str | None, **options: Any) -> None:
    """Check a whole trace and summarize it by layer."""
    source = TraceOptions.take(options).open(path, ranks, json_path)
    records = inspect_trace(source)
    meta = source.meta
    with clear_errors():
        digest = digest_of(path)
    if json_path != "-":
        dropped = sum(record["dropped"] for record in records)
        click.echo(
            f"{path}: {source.num_steps} steps, {meta.num_layers} layers, {meta.num_experts} experts, top-{meta.top_k}, "
            f"{meta.num_ranks} ranks; dim {meta.dim or 'unknown'}, ffn_dim {meta.ffn_dim or 'unknown'}; "
            f"source {meta.source or 'unknown'}; {digest}; every step is valid"
            + (f"; dropped assignments: {dropped:,}" if dropped else "")
        )
    about = {"trace": path, "steps": source.num_steps, "ranks": meta.num_ranks, "experts": meta.num_experts, "digest": digest}
    publish("trace.info", [{**about, **record} for record in records], INFO_COLUMNS, json_path)


@command.command("convert")
@click.argument("path", metavar="IN")
@click.argument("out", metavar="OUT")
@click.option("--ranks", type=Count, metavar="R", help="Distribute the tokens over R ranks; by default those of the trace.")
@trace_options
def convert_command(path: str, out: str, ranks: int | None, **options: Any) -> None:
    """Turn a recording into a trace over any number of ranks.

    IN is a trace, or a recording of another system, .npz, .npy or .pt: the experts of single tokens (topk_ids, routed_experts,
    routing_map), counts (logical_count, counts, weight) or shares. Counts are kept exactly. Tokens are distributed
    over the ranks in consecutive blocks of a step; their layer-to-layer routing is kept as pair_counts.
    """
    source = TraceOptions.take(options).open(path, ranks)
    arrays = {"pair_counts_LEE": pair_counts_of(source), "tokens_SR": source.tokens_SR}
    _write(out, source.meta, source.steps(), source.num_steps, **arrays)
    click.echo(f"{out}: {source.num_steps} steps on {source.meta.num_ranks} ranks")


@command.command("synth")
@click.argument("out", metavar="OUT")
@click.option("--kind", type=click.Choice(KINDS), default="zipf")
@click.option("--skew", type=float, default=1.2, help="Zipf exponent.")
@click.option("--drift", type=float, default=0.1, help="Step of the random walk of log-popularities.")
@click.option("--steps", "num_steps", type=Count, default=100)
@click.option("--layers", "num_layers", type=Count, default=4)
@click.option("--experts", "num_experts", type=Count, default=64)
@click.option("--top-k", type=Count, default=6)
@click.option("--ranks", "num_ranks", type=Count, default=8)
@click.option("--tokens", "tokens_per_rank", type=Count, default=4096, help="Tokens per rank and step.")
@click.option("--dim", type=Count, default=2048)
@click.option("--ffn-dim", type=Count, default=1408)
@click.option("--seed", type=click.IntRange(min=0), default=0)
def synth_command(out: str, **given: Any) -> None:
    """Generate a trace: uniform, zipf, drifting, bursty or one-hot, or a workload of bench step, w0 to w7."""
    sizes = {name: given.pop(name) for name in ("num_layers", "num_experts", "top_k", "num_ranks", "dim", "ffn_dim")}
    meta = TraceMeta(**sizes, source=f"moesaic trace synth --kind {given['kind']}")
    spec = SynthSpec(meta, **given)
    _write(out, meta, synthesize(spec), spec.num_steps)
    click.echo(f"{out}: {spec.num_steps} steps of {spec.kind} load on {meta.num_ranks} ranks")


def _write(out: str, meta: TraceMeta, steps: Iterator[np.ndarray], num_steps: int, **arrays: np.ndarray | None) -> None:
    with clear_errors(), progress(num_steps, "step") as advance:
        write_trace(out, meta, steps, **arrays, on_step=advance)


@command.command("backtest")
@click.argument("path", metavar="TRACE")
@inspect_options
def backtest_command(path: str, ranks: int | None, json_path: str | None, **options: Any) -> None:
    """Evaluate every load predictor by age on a trace: total variation distance between expert shares."""
    source = TraceOptions.take(options).open(path, ranks, json_path)
    with progress(source.num_steps, "step") as advance:
        found = backtest(source, on_step=advance)
    if not found:
        raise ValueError(f"{path} has one step; a back-test needs at least two")
    publish("trace.backtest", [{"trace": path, **asdict(record)} for record in found], BACKTEST_COLUMNS, json_path)
