"""`moesaic place`: solve, compare, replay and show placements on recorded routing."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import click

from ...placement.files import clear_errors, digest_of
from ...placement.offline import simulate
from ...placement.offline.plans import SavedPlan, read_plan, read_topology
from ...placement.offline.solve import solve_plan
from ...placement.online.predict import PREDICTORS
from ...placement.solvers.registry import SOLVERS, get_solver
from ...placement.topology import Topology
from ...placement.traces.sources import LoadSource, resized
from ...placement.values import LayerShape
from ..output import JSON_OPTION, progress, publish
from .picture import write_picture
from .trace_options import Count, TraceOptions, trace_options

# The fast solvers; the exact ones take seconds per layer and run only if named.
COMPARED = ("static", "lpt", "smartmoe", "eplb", "flexmoe", "laer", "hecate", "quota", "balance")
COLUMNS = (
    *("solver", "ranks", "nodes", "slots", "knows", "split", "max_over_mean", "max_over_mean_p95", "max_over_mean_max"),
    *("bound", "copies", "off_rank_share", "cross_node_share", "step_s", "solve_s", "gap", "moves"),
)
PLAN_COLUMNS = ("layer", "copies", "copied_experts", "most_copies", "owned_min", "owned_max")

_SIMULATOR_OPTIONS = (
    click.option("--preset", default="h100", show_default=True, help="Rates of the machine: cpu, a100, h100, b200."),
    click.option("--overlap-s", type=float, help="Seconds that hide a gather; by default those of attention's projections."),
    click.option("--gathers", type=click.Choice(["1", "2"]), default="1", help="2: copies are gathered again in backward."),
    click.option("--recompute", is_flag=True, help="Expert forward is recomputed in backward."),
    click.option(
        "--scale",
        type=click.IntRange(1, 1 << 20),
        default=1,
        show_default=True,
        help="Tokens per recorded token.",
    ),
    click.option(
        "--bytes", "element_bytes", type=click.IntRange(1, 8), default=2, show_default=True, help="Bytes per weight in transit."
    ),
    click.option("--time-limit", "time_limit_s", type=float, help="Seconds per layer for milp and moetuner; by default 10."),
    click.option("--rehome-every", type=Count, default=1, show_default=True, help="Steps between changes of owners."),
)


def simulator_options(command: Any) -> Any:
    """Add the options that `_setting` reads to a command."""
    for option in reversed(_SIMULATOR_OPTIONS):
        command = option(command)
    return trace_options(command)


def _open(
    options: TraceOptions, path: str, text: str | None, preset: str, json_path: str | None = None
) -> tuple[LoadSource, Topology]:
    """Open a trace on the topology of `text`, NODESxRANKS or a JSON file; by default on its own ranks and the preset's nodes."""
    if text is None:
        source = options.open(path, None, json_path)
        return source, Topology.preset(preset, source.meta.num_ranks)
    topology = read_topology(text) if text.endswith(".json") else Topology.parse(text, preset)
    return options.open(path, topology.num_ranks, json_path), topology


def _setting(source: LoadSource, topology: Topology, given: dict[str, Any], predictor: str = "best") -> simulate.SimulatorSetting:
    """The simulator's setting, from the options and the trace."""
    meta = source.meta
    if not meta.dim or not meta.ffn_dim:
        raise ValueError("the trace does not say the sizes of an expert, which price a placement; give --dim and --ffn-dim")
    shape = LayerShape(
        num_experts=meta.num_experts,
        top_k=meta.top_k,
        dim=meta.dim,
        ffn_dim=meta.ffn_dim,
        num_matrices=meta.num_matrices,
        bytes_per_element=given["element_bytes"],
    )
    setting = simulate.SimulatorSetting(
        topology=topology,
        shape=shape,
        predictor=predictor,  # type: ignore[arg-type]  # checked by click and by the setting
        gathers=int(given["gathers"]),
        backward_multiplier=4 if given["recompute"] else 3,
        rehome_every=given["rehome_every"],
        scale=given["scale"],
        time_limit_s=10.0 if given["time_limit_s"] is None else given["time_limit_s"],
        overlap_s=given["overlap_s"] or 0.0,
    )
    return setting if given["overlap_s"] is not None else replace(setting, overlap_s=simulate.attention_s(source, setting))


def _records(
    path: str, source: LoadSource, setting: simulate.SimulatorSetting, outcomes: Sequence[simulate.Outcome]
) -> list[dict[str, Any]]:
    """One flat record per outcome."""
    records = []
    for outcome in outcomes:
        record = asdict(outcome)
        del record["max_over_mean_of_layer"]
        about = {"trace": Path(path).name, "ranks": source.meta.num_ranks, "nodes": setting.topology.num_nodes}
        records.append({**about, **record, "overlap_s": setting.overlap_s})
    return records


@click.group("place")
def command() -> None:
    """Solve, compare, replay and show placements on recorded routing."""


@command.command("compare")
@click.argument("paths", metavar="TRACE...", nargs=-1, required=True)
@click.option("--topology", "topologies", multiple=True, metavar="NxM|FILE.json", help="Nodes x ranks per node; repeatable.")
@click.option("--slots", type=click.IntRange(min=0), multiple=True, default=(2,), show_default=True, help="Repeatable.")
@click.option("--solver", "solvers", multiple=True, metavar="NAME", help=f"Repeatable; by default {', '.join(COMPARED)}.")
@click.option(
    "--knows",
    type=click.Choice(simulate.INFORMATION),
    multiple=True,
    default=simulate.INFORMATION,
    help="Repeatable; by default all.",
)
@click.option("--predictor", type=click.Choice(sorted(PREDICTORS)), default="best", show_default=True)
@click.option("--steps", type=Count, metavar="N", help="Simulate the first N steps only.")
@click.option("--picture", "picture_path", metavar="FILE.html", help="Draw bars and a heat map by layer, as one HTML file.")
@simulator_options
@JSON_OPTION
def compare_command(
    paths: tuple[str, ...],
    topologies: tuple[str, ...],
    slots: tuple[int, ...],
    solvers: tuple[str, ...],
    knows: tuple[str, ...],
    predictor: str,
    steps: int | None,
    picture_path: str | None,
    json_path: str | None,
    **given: Any,
) -> None:
    """Simulate every solver over whole traces as in training, beside perfect foresight, hindsight and the lower bound.

    knows: `predicted` places from past loads, `exact` from the load of the step itself, `future` once from the whole trace.
    """
    options = TraceOptions.take(given)
    names = solvers or COMPARED
    for name in names:
        get_solver(name)
    records: list[dict[str, Any]] = []
    panels: dict[str, list[simulate.Outcome]] = {}
    for path in paths:
        for text in topologies or (None,):
            source, topology = _open(options, path, text, given["preset"], json_path)
            setting = _setting(source, topology, given, predictor)
            with progress(min(source.num_steps, steps or source.num_steps), "step") as advance:
                outcomes = simulate.compare(
                    source, setting, names, slots=slots, information=knows, num_steps=steps, on_step=advance
                )
            records += _records(path, source, setting, outcomes)
            panels[f"{Path(path).name}, {topology.num_nodes} x {topology.ranks_per_node} ranks"] = outcomes
    if not records:
        raise ValueError("a trace of one step has nothing to predict from; give --knows exact or future")
    if picture_path is not None:
        with clear_errors():
            write_picture(picture_path, panels)
    publish("place.compare", records, ("trace", *COLUMNS) if len(paths) > 1 else COLUMNS, json_path)


@command.command("solve")
@click.argument("path", metavar="TRACE")
@click.option("--topology", "text", metavar="NxM|FILE.json", help="Nodes x ranks per node; by default the trace's ranks.")
@click.option("--slots", type=click.IntRange(min=0), default=2, show_default=True, help="Copies a rank may hold per layer.")
@click.option("--solver", default="milp", show_default=True, metavar="NAME", help=f"One of {', '.join(SOLVERS)}.")
@click.option(
    "--current", "current_path", metavar="PLAN", help="Start from the owners of this plan; by default contiguous blocks."
)
@click.option("-o", "--out", required=True, metavar="FILE", help="The plan to write.")
@simulator_options
def solve_command(path: str, text: str | None, slots: int, solver: str, current_path: str | None, out: str, **given: Any) -> None:
    """Solve one placement for a whole trace, and save it as a plan for `moesaic train --set placement.file=`."""
    options = TraceOptions.take(given)
    get_solver(solver)
    if given["time_limit_s"] is not None and not simulate.takes_time_limit(solver):
        limited = " or ".join(name for name in SOLVERS if simulate.takes_time_limit(name))
        raise ValueError(f"--time-limit {given['time_limit_s']:g}: {solver} ends by itself; leave it out, or use {limited}")
    source, topology = _open(options, path, text, given["preset"])
    setting = _setting(source, topology, given)
    current = None
    if current_path is not None:
        plan = read_plan(current_path)
        plan.check_model(source.meta, "the trace")
        current = plan.owners
    with clear_errors(), progress(source.meta.num_layers, "layer") as advance:
        digest = digest_of(path)
        solved = solve_plan(source, setting, solver, slots, current=current, trace_digest=digest, on_layer=advance)
        solved.write(out)
    click.echo(f"{out}: {_headline(solved)}")


@command.command("replay")
@click.argument("path", metavar="TRACE")
@click.option("--plan", "plan_path", required=True, metavar="PLAN", help="A plan that `place solve` wrote.")
@simulator_options
@JSON_OPTION
def replay_command(path: str, plan_path: str, json_path: str | None, **given: Any) -> None:
    """Simulate a saved plan over a trace, on the plan's machine; `knows` is future if the plan was solved on this trace."""
    options = TraceOptions.take(given)
    plan = read_plan(plan_path)
    source = options.open(path, plan.meta.num_ranks, json_path)
    if plan.meta.dim and plan.meta.ffn_dim and not source.meta.dim:
        source = resized(source, replace(options.sizes, dim=plan.meta.dim, ffn_dim=plan.meta.ffn_dim))
    setting = _setting(source, plan.topology, given)
    with clear_errors():
        knows = "future" if digest_of(path) == plan.trace_digest else "predicted"
    with progress(source.num_steps, "step") as advance:
        outcomes = simulate.replay(source, setting, plan, information=knows, on_step=advance)
    publish("place.replay", _records(path, source, setting, outcomes), COLUMNS, json_path)


@command.command("show")
@click.argument("path", metavar="PLAN")
@JSON_OPTION
def show_command(path: str, json_path: str | None) -> None:
    """Print a saved plan: its model and machine, and the copies and owners of every layer."""
    plan = read_plan(path)
    if json_path != "-":
        meta, topology = plan.meta, plan.topology
        click.echo(
            f"{path}: {_headline(plan)}\n"
            f"model: {meta.num_layers} layers, {meta.num_experts} experts, top-{meta.top_k}, dim {meta.dim}, ffn {meta.ffn_dim}; "
            f"machine: {topology.num_nodes} x {topology.ranks_per_node} ranks; trace {plan.trace_digest or 'unknown'}"
        )
    records = []
    for layer, placement in enumerate(plan.layers):
        copies_R = placement.copies_RE.sum(axis=1)
        owned_R = placement.replicas_RE.sum(axis=1) - copies_R
        records.append(
            {
                "layer": layer,
                "copies": placement.num_copies,
                "copied_experts": int((placement.num_replicas_E > 1).sum()),
                "most_copies": int(copies_R.max()),
                "owned_min": int(owned_R.min()),
                "owned_max": int(owned_R.max()),
                "owners": placement.expert_to_owner_E.tolist(),
            }
        )
    publish("place.show", records, PLAN_COLUMNS, json_path)


def _headline(plan: SavedPlan) -> str:
    return (
        f"solver {plan.solver}, {plan.slots} slots, {plan.num_copies} copies over {plan.meta.num_layers} layers, "
        f"{plan.moves} moves; step {plan.objective_s * 1e3:.4g} ms, bound {plan.bound_s * 1e3:.4g} ms, gap {plan.gap:.2%}, "
        f"solved in {plan.seconds:.1f} s"
    )
