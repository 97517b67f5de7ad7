"""`moesaic place`: solve, compare, replay and show placements on recorded routing."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import click

from ...placement.files import clear_errors, digest_of
from ...placement.machine import topology_of
from ...placement.offline import simulate
from ...placement.offline.plans import SavedPlan, read_plan, read_topology
from ...placement.offline.setting import SimulatorSetting, attention_s, takes_time_limit
from ...placement.offline.solve import solve_plan
from ...placement.online.predict import PREDICTORS
from ...placement.solvers.registry import SOLVERS, get_solver, policy_solvers
from ...placement.topology import Topology, parse_nodes
from ...placement.traces.sources import LoadSource, resized
from ...placement.values import LayerShape
from ..entry import INTERRUPTED_STATUS
from ..output import JSON_OPTION, progress, publish, with_options
from .picture import write_picture
from .trace_options import Count, TraceOptions, trace_options

# The fast solvers; the exact ones take seconds per layer and run only if named.
COMPARED = ("static", "lpt", "smartmoe", "eplb", "flexmoe", "laer", "hecate", "quota", "balance")
COLUMNS = (
    *("solver", "ranks", "nodes", "slots", "knows", "split", "max_over_mean", "max_over_mean_p95", "max_over_mean_max"),
    *("bound", "copies", "off_rank_share", "cross_node_share", "step_s", "solve_s", "gap", "moves"),
)
PLAN_COLUMNS = ("layer", "copies", "copied_experts", "most_copies", "owned_min", "owned_max")

_PRESET = "h100"


def _old_name(context: click.Context, option: click.Parameter, value: int | None) -> int | None:
    if value is not None:
        click.echo("moesaic: --rehome-every is now --migrate-every; the old name works for one more release", err=True)
    return value


simulator_options = with_options(
    click.option(
        *("--machine", "--preset", "machine"),
        default=_PRESET,
        help="Rates of the machine: cpu, a100, h100, b200, or a file of `moesaic calibrate`.",
    ),
    click.option("--overlap-s", type=float, help="Seconds that hide a gather; by default those of attention's projections."),
    click.option("--gathers", type=click.IntRange(1, 2), default=1, help="2: copies are gathered again in backward."),
    click.option("--recompute", is_flag=True, help="Expert forward is recomputed in backward."),
    click.option("--scale", type=click.IntRange(1, 1 << 20), help="Tokens per recorded token; by default 1, or the plan's."),
    click.option("--bytes", "element_bytes", type=click.IntRange(1, 8), default=2, help="Bytes per weight in transit."),
    click.option("--time-limit", "time_limit_s", type=float, help="Seconds per layer for milp and moetuner; by default 10."),
    click.option(
        "--migrate-every",
        type=Count,
        help="Steps between changes of owners; by default 1, for a plan the whole run, at least 100.",
    ),
    click.option("--rehome-every", type=Count, hidden=True, callback=_old_name),
    trace_options,
)
"""Adds the options that `_setting` and `TraceOptions.take` read to a command."""


def _open(
    options: TraceOptions, path: str, text: str | None, machine: str, json_path: str | None = None
) -> tuple[LoadSource, Topology]:
    """Open a trace on the topology of `text`, NODESxRANKS or a JSON file; by default on its own ranks and the machine's nodes."""
    if text is None:
        source = options.open(path, None, json_path)
        return source, topology_of(machine, source.meta.num_ranks)
    if text.endswith(".json"):
        if machine != _PRESET:
            raise ValueError(f"the topology {text} has rates of its own; leave out --machine, or give --topology NxM")
        click.echo(f"{text}: topologies in JSON are read for one more release; put the rates into a --machine file", err=True)
        topology = read_topology(text)
    else:
        num_nodes, ranks_per_node = parse_nodes(text)
        topology = topology_of(machine, num_nodes=num_nodes, ranks_per_node=ranks_per_node)
    return options.open(path, topology.num_ranks, json_path), topology


def _setting(source: LoadSource, topology: Topology, given: dict[str, Any], predictor: str = "best") -> SimulatorSetting:
    """The simulator's setting, from the options and the trace."""
    meta = source.meta
    if not meta.dim or not meta.ffn_dim:
        raise ValueError("the trace does not say the sizes of an expert, which price a placement; give --dim and --ffn-dim")
    sizes = {name: getattr(meta, name) for name in ("num_experts", "top_k", "dim", "ffn_dim", "num_matrices")}
    setting = SimulatorSetting(
        topology=topology,
        shape=LayerShape(**sizes, bytes_per_element=given["element_bytes"]),
        predictor=predictor,  # type: ignore[arg-type]  # checked by click and by the setting
        gathers=given["gathers"],
        backward_multiplier=4 if given["recompute"] else 3,
        migrate_every=given["rehome_every"] or given["migrate_every"] or 1,
        scale=given["scale"] or 1,
        time_limit_s=10.0 if given["time_limit_s"] is None else given["time_limit_s"],
        overlap_s=given["overlap_s"] or 0.0,
    )
    return setting if given["overlap_s"] is not None else replace(setting, overlap_s=attention_s(source, setting))


def _records(
    path: str,
    source: LoadSource,
    setting: SimulatorSetting,
    outcomes: Sequence[simulate.Outcome],
    *,
    is_interrupted: bool = False,
) -> list[dict[str, Any]]:
    """One flat record per outcome, marked where Ctrl-C ended the simulation."""
    records = []
    for outcome in outcomes:
        record = asdict(outcome)
        del record["max_over_mean_of_layer"]
        about = {"trace": Path(path).name, "ranks": source.meta.num_ranks, "nodes": setting.topology.num_nodes}
        records.append({**about, **record, "overlap_s": setting.overlap_s, **({"interrupted": True} if is_interrupted else {})})
    return records


@click.group("place")
def command() -> None:
    """Solve, compare, replay and show placements on recorded routing."""


@command.command("compare")
@click.argument("paths", metavar="TRACE...", nargs=-1, required=True)
@click.option("--topology", "topologies", multiple=True, metavar="NxM", help="Nodes x ranks per node; repeatable.")
@click.option("--slots", type=click.IntRange(min=0), multiple=True, default=(2,), help="Repeatable.")
@click.option(
    "--solver", "solvers", multiple=True, metavar="NAME", help=f"Repeatable, also auto; by default {', '.join(COMPARED)}."
)
@click.option(
    "--knows", type=click.Choice(simulate.INFORMATION), multiple=True, default=simulate.COMPARED_INFORMATION, help="Repeatable."
)
@click.option("--predictor", type=click.Choice(sorted(PREDICTORS)), default="best")
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
) -> int:
    """Simulate every solver over whole traces as in training, beside perfect foresight, hindsight and the lower bound.

    knows: `predicted` places from past loads, `calibrated` adds copies once the load is known where that pays, `exact` places
    from the load of the step itself, `future` once from all steps together.
    Ctrl-C ends it with the rows of the steps so far; while milp solves, it ends the solving of that layer.
    """
    options = TraceOptions.take(given)
    names = solvers or COMPARED
    for name in itertools.chain.from_iterable(policy_solvers(name) for name in names):
        get_solver(name)
    records: list[dict[str, Any]] = []
    panels: dict[str, list[simulate.Outcome]] = {}
    columns, is_interrupted = ("trace", *COLUMNS) if len(paths) > 1 else COLUMNS, False
    for path, text in itertools.product(paths, topologies or (None,)):
        source, topology = _open(options, path, text, given["machine"], json_path)
        setting = _setting(source, topology, given, predictor)
        num_passes = min(source.num_steps, steps or source.num_steps) + ("future" in knows)
        try:
            with progress(num_passes * source.meta.num_layers, "layer") as advance:
                outcomes = simulate.compare(
                    source, setting, names, slots=slots, information=knows, num_steps=steps, on_layer=advance
                )
        except simulate.Interrupted as error:
            outcomes, is_interrupted = error.outcomes, True
            columns = (*columns, "num_steps")
            so_far = max((outcome.num_steps for outcome in outcomes), default=0)
            click.echo(f"{path}: interrupted; its rows are of {so_far} steps, and what comes after it has none", err=True)
        records += _records(path, source, setting, outcomes, is_interrupted=is_interrupted)
        if outcomes:
            panels[f"{Path(path).name}, {topology.num_nodes} x {topology.ranks_per_node} ranks"] = outcomes
        if is_interrupted:
            break
    if not records and is_interrupted:
        return INTERRUPTED_STATUS
    if not records:
        raise ValueError("a trace of one step has nothing to predict from; give --knows exact or future")
    if picture_path is not None:
        with clear_errors():
            write_picture(picture_path, panels)
    publish("place.compare", records, columns, json_path)
    return INTERRUPTED_STATUS if is_interrupted else 0


@command.command("solve")
@click.argument("path", metavar="TRACE")
@click.option("--topology", "text", metavar="NxM", help="Nodes x ranks per node; by default the trace's ranks.")
@click.option("--slots", type=click.IntRange(min=0), default=2, help="Copies a rank may hold per layer.")
@click.option("--solver", default="milp", metavar="NAME", help=f"One of {', '.join(SOLVERS)}.")
@click.option(
    "--current", "current_path", metavar="PLAN", help="Start from the owners of this plan; by default contiguous blocks."
)
@click.option("-o", "--out", required=True, metavar="FILE", help="The plan to write.")
@simulator_options
def solve_command(path: str, text: str | None, slots: int, solver: str, current_path: str | None, out: str, **given: Any) -> None:
    """Solve one placement for a whole trace, and save it as a plan for `moesaic train --set placement.file=`."""
    options = TraceOptions.take(given)
    get_solver(solver)
    if given["time_limit_s"] is not None and not takes_time_limit(solver):
        limited = " or ".join(name for name in SOLVERS if takes_time_limit(name))
        raise ValueError(f"--time-limit {given['time_limit_s']:g}: {solver} ends by itself; leave it out, or use {limited}")
    source, topology = _open(options, path, text, given["machine"])
    setting = _setting(source, topology, given)
    current = None
    if current_path is not None:
        plan = read_plan(current_path)
        plan.check_model(source.meta, "the trace")
        current = plan.owners
    with clear_errors(), progress(source.meta.num_layers, "layer") as advance:
        digest = digest_of(path)
        horizon = given["rehome_every"] or given["migrate_every"]
        solved = solve_plan(
            source, setting, solver, slots, current=current, horizon=horizon, trace_digest=digest, on_layer=advance
        )
        solved.write(out)
    click.echo(f"{out}: {_headline(solved)}")


@command.command("replay")
@click.argument("path", metavar="TRACE")
@click.option("--plan", "plan_path", required=True, metavar="PLAN", help="A plan that `place solve` wrote.")
@simulator_options
@JSON_OPTION
def replay_command(path: str, plan_path: str, json_path: str | None, **given: Any) -> None:
    """Simulate a saved plan over a trace, on the plan's machine and at its scale.

    `knows` is future if the plan was solved on this trace.
    """
    if given["machine"] != _PRESET:
        raise ValueError("a plan is replayed on the machine it was solved for; leave out --machine")
    for name, option in (("migrate_every", "--migrate-every"), ("time_limit_s", "--time-limit")):
        if given[name] is not None:
            raise ValueError(f"a replay solves nothing and moves no expert; leave out {option}")
    options = TraceOptions.take(given)
    plan = read_plan(plan_path)
    source = options.open(path, plan.meta.num_ranks, json_path)
    if plan.meta.dim and plan.meta.ffn_dim and not source.meta.dim:
        source = resized(source, replace(options.sizes, dim=plan.meta.dim, ffn_dim=plan.meta.ffn_dim))
    setting = _setting(source, plan.topology, {**given, "scale": given["scale"] or plan.scale})
    with clear_errors():
        knows = "future" if digest_of(path) == plan.trace_digest else "predicted"
    with progress(source.num_steps * source.meta.num_layers, "layer") as advance:
        outcomes = simulate.replay(source, setting, plan, information=knows, on_layer=advance)
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
