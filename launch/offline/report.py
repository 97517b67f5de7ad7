"""`moesaic report`: a run or a routing trace as one self-contained HTML page. No script, no network."""

from __future__ import annotations

import html
import io
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import click
import numpy as np

from ...placement.files import clear_errors, replace_text
from ...placement.offline.records import table
from ...placement.traces.sources import LoadSource, open_source
from ...runtime.wrap.run_summary import add_decisions
from .page import page, section
from .trace import INFO_COLUMNS, inspect_trace
from .trace_options import RANKS_OPTION, TraceOptions, trace_options

# The most columns of a heat map; longer traces are averaged over neighbouring steps.
_MAX_COLUMNS = 240
_DECISION_COLUMNS = (
    *("step", "solver", "moved", "saved_s_predicted", "saved_s_observed", "move_s", "objective", "bound", "gap", "seconds"),
    "reason",
)


@dataclass(frozen=True)
class Chart:
    """Curves over steps: keys of metrics.jsonl by their name in the legend. Keys that a run lacks are left out."""

    title: str
    unit: str
    keys: Mapping[str, str]
    is_log: bool = False


_CHARTS = (
    Chart("Loss", "", {"training": "loss", "validation": "val_loss"}),
    Chart("Gradient norm before clipping", "", {"norm": "grad_norm"}, is_log=True),
    Chart("Throughput", "tokens/s", {"all ranks": "tokens_per_s"}),
    Chart(
        "Busiest rank over the mean rank",
        "",
        {"static expert parallelism": "max_over_mean_static", "as computed": "max_over_mean"},
    ),
    Chart("Busiest expert over the mean expert", "", {"expert": "expert_max_over_mean"}),
    Chart("Congestion coefficient gamma_eff, our reconstruction", "", {"mean over layers": "gamma_eff"}),
    Chart("Copies per layer", "", {"all": "copies_per_layer", "added by calibration": "copies_calibrated"}),
    Chart("Error of the load forecast", "share of assignments", {"error": "prediction_error"}),
    Chart(
        "Waiting, rank 0",
        "s per step",
        {"for copies": "exposed_gather_s", "for gradients": "exposed_reduce_s", "for routed tokens": "exposed_tokens_s"},
    ),
    Chart("Planning, rank 0", "s per step", {"all": "plan_s", "solver": "solve_s"}),
    Chart(
        "Sent by rank 0",
        "bytes per step",
        {
            "copies": "bytes_gather",
            "copies again for backward": "bytes_regather",
            "gradients of copies": "bytes_reduce",
            "tokens dispatched": "bytes_dispatch",
            "tokens combined": "bytes_combine",
        },
    ),
)


@click.command("report")
@click.argument("path", metavar="RUN_OR_TRACE")
@click.option("-o", "--out", required=True, metavar="FILE.html", help="The page, written atomically.")
@RANKS_OPTION
@trace_options
def command(path: str, out: str, ranks: int | None, **options: Any) -> None:
    """Write a run's folder, or a routing trace, as one HTML page of curves, heat maps and tables."""
    if find_spec("matplotlib") is None:
        raise ValueError("moesaic report draws with matplotlib: pip install 'moesaic[report]'")
    source = Path(path)
    with clear_errors():
        if source.is_dir():
            text = run_page(source)
        else:
            text = trace_page(source.name, TraceOptions.take(options).open(path, ranks))
        replace_text(out, text)
    click.echo(f"{out}: {len(text) / 1e6:.1f} MB")


def run_page(folder: Path) -> str:
    """The page of a run: summary if the run completed, curves of metrics.jsonl, migration decisions, and the trace.

    Raises `ValueError` if the folder is not a run's, or a line is damaged.
    """
    records = read_metrics(folder / "metrics.jsonl")
    body = []
    if (folder / "summary.json").exists():
        summary = _read_json((folder / "summary.json").read_text(encoding="utf-8"), f"{folder / 'summary.json'}")
        lines = [{"what": key, "value": value} for key, value in summary.items() if not isinstance(value, dict | list)]
        body.append(section("Summary", _pre(table(lines, ("what", "value")))))
    body += [section(chart.title, drawn) for chart in _CHARTS if (drawn := _curves(chart, records))]
    decisions: list[dict[str, Any]] = []
    for record in records:
        add_decisions(decisions, record)
    if decisions:
        body.append(section("Proposals to migrate experts", _pre(table(decisions, _DECISION_COLUMNS))))
    trace = folder / "trace.npz"
    if trace.exists():
        body.append(_trace_sections(open_source(trace)))
    return page(f"run {folder.name}", body)


def trace_page(name: str, source: LoadSource) -> str:
    """The page of a routing trace: a table by layer, and heat maps."""
    return page(f"trace {name}", [_trace_sections(source)])


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The records of metrics.jsonl, in order, without a last line that is incomplete, as after a killed run."""
    if not path.exists():
        raise ValueError(f"{path.parent} is no run: it has no {path.name}")
    lines = path.read_text(encoding="utf-8", errors="replace").splitlines(keepends=True)
    if lines and not lines[-1].endswith("\n"):
        lines.pop()
    records = [_read_json(line, f"{path} line {number}") for number, line in enumerate(lines, start=1)]
    if not any("loss" in record for record in records):
        raise ValueError(f"{path} has no training step yet; let the run go on")
    return records


def _read_json(text: str, where: str) -> dict[str, Any]:
    try:
        value = json.loads(text)
    except ValueError as error:
        raise ValueError(f"{where} is damaged: {error}") from None
    if not isinstance(value, dict):
        raise ValueError(f"{where} is damaged: it is no object")
    return value


def _trace_sections(source: LoadSource) -> str:
    meta = source.meta
    per_column = -(-source.num_steps // _MAX_COLUMNS)
    steps_S = np.bincount(np.arange(source.num_steps) // per_column)
    imbalance_LS = np.zeros((meta.num_layers, steps_S.size))
    shares_LES = np.zeros((meta.num_layers, meta.num_experts, steps_S.size))

    def add(step: int, layers: list[tuple[float, np.ndarray]]) -> None:
        column = step // per_column
        for layer, (imbalance, shares_E) in enumerate(layers):
            imbalance_LS[layer, column] += imbalance / steps_S[column]
            shares_LES[layer, :, column] += shares_E / steps_S[column]

    stats = [{**record, "layer": str(record["layer"])} for record in inspect_trace(source, add)]
    worst = int(imbalance_LS.mean(axis=1).argmax())
    span = (1, source.num_steps)
    return "".join(
        (
            section("Routing by layer", _pre(table(stats, INFO_COLUMNS))),
            section(
                "Busiest rank over the mean rank under static expert parallelism",
                _heat_map(imbalance_LS, "layer", span, "max/mean"),
            ),
            section(
                f"Shares of the experts in layer {worst}, times the experts",
                _heat_map(shares_LES[worst], "expert", span, "share"),
            ),
        )
    )


def _curves(chart: Chart, records: Sequence[Mapping[str, Any]]) -> str:
    """The chart as SVG; empty if no record has any of its keys."""
    curves = {name: [(r["step"], r[key]) for r in records if key in r] for name, key in chart.keys.items()}
    curves = {name: points for name, points in curves.items() if points}
    if not curves:
        return ""
    figure, axes = _figure(3.0)
    for name, points in curves.items():
        steps, values = zip(*points, strict=True)
        axes.plot(steps, values, label=name, linewidth=1.0, marker="." if len(points) < 20 else None)
    axes.set_xlabel("step")
    axes.set_ylabel(chart.unit)
    axes.grid(alpha=0.3)
    if chart.is_log:
        axes.set_yscale("log")
    if len(curves) > 1:
        axes.legend()
    return _svg(figure)


def _heat_map(values_YS: np.ndarray, what: str, span: tuple[int, int], unit: str) -> str:
    """Lines [Y] over columns of steps [S] as SVG."""
    figure, axes = _figure(1.5 + 0.12 * min(len(values_YS), 64))
    extent = (span[0] - 0.5, span[1] + 0.5, len(values_YS) - 0.5, -0.5)
    image = axes.imshow(values_YS, aspect="auto", interpolation="nearest", extent=extent, cmap="viridis")
    axes.set_xlabel("step")
    axes.set_ylabel(what)
    figure.colorbar(image, ax=axes, label=unit)
    return _svg(figure)


def _figure(height: float) -> tuple[Any, Any]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9.0, height), layout="constrained")
    return figure, figure.subplots()


def _svg(figure: Any) -> str:
    import matplotlib

    text = io.StringIO()
    # Without a date and random names the page depends on the run alone; text stays text.
    with matplotlib.rc_context({"svg.hashsalt": "moesaic", "svg.fonttype": "none"}):
        figure.savefig(text, format="svg", metadata={"Date": None})
    drawn = text.getvalue()
    return drawn[drawn.index("<svg") :]


def _pre(text: str) -> str:
    return f"<pre>{html.escape(text)}</pre>"
