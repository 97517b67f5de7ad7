"""`moesaic bench`: one command per benchmark."""

from __future__ import annotations

from typing import Any

import click

from . import collectives, kernels, overlap, placement, scaling, step
from .records import JSON_OPTION, publish


@click.group()
def bench() -> None:
    """Measure this machine: ratios within one run."""


@bench.command("step", short_help="One MoE layer's training step, by placement policy.")
@click.option("--ranks", type=click.IntRange(min=1), default=2, show_default=True, help="Processes, one thread each.")
@step.layer_options(hidden=512, ffn=1024, tokens=4096, rounds=30)
@click.option("--optimizer", type=click.Choice(list(step.OPTIMIZERS)), default="sgd", show_default=True)
@JSON_OPTION
def step_command(json_path: str | None, **case: int | float | str) -> None:
    """One MoE layer, forward, backward and optimizer, by placement policy; rank 0 owns all hot experts."""
    publish("step", step.run(step.StepCase(**case)), step.COLUMNS, json_path)  # type: ignore[arg-type]


@bench.command("collectives", short_help="Collectives by transport and schedule, against Gloo and MPI.")
@click.option(
    "--ops", default=",".join(collectives.OPS), show_default=True, help="Collectives, separated by commas; also token_rows."
)
@click.option("--ranks", default="2,4", show_default=True, help="Numbers of processes, one run each.")
@click.option("--sizes", default="64K,1M,4M,16M", show_default=True, help="Bytes of one message; K, M and G are binary.")
@click.option("--transports", default="c10d,shm,mpi", show_default=True, help="Transports; c10d is Gloo.")
@click.option("--schedules", default="direct,relay", show_default=True, help="Schedules of the sparse collectives.")
@click.option("--nodes", type=click.IntRange(min=1), default=1, show_default=True, help="Network namespaces with links.")
@click.option("--link-mbit", type=click.FloatRange(min=0.1), default=200.0, show_default=True, help="Rate of a node's link.")
@click.option("--rounds", type=click.IntRange(min=1), default=9, show_default=True, help="Timed repetitions of each variant.")
@JSON_OPTION
def collectives_command(json_path: str | None, ranks: str, sizes: str, nodes: int, link_mbit: float, **given: Any) -> None:
    """Collectives by transport and schedule, against Gloo, MPI's own, a memory copy and the lower bound."""
    names = {key: tuple(value.split(",")) for key, value in given.items() if isinstance(value, str)}
    records: list[dict[str, Any]] = []
    for num_ranks in ranks.split(","):
        case = collectives.CollectivesCase(
            ranks=_count("--ranks", num_ranks, minimum=2),
            nodes=nodes,
            link_bits_per_s=link_mbit * 1e6,
            sizes=tuple(_bytes(size) for size in sizes.split(",")),
            rounds=given["rounds"],
            **names,
        )
        measured, unavailable = collectives.run(case)
        records += measured
        for transport in unavailable:
            click.echo(f"without {transport.name} at {case.ranks} ranks: {transport.reason}", err=True)
    publish("collectives", records, collectives.COLUMNS, json_path)


def _count(option: str, text: str, *, minimum: int) -> int:
    if not text.strip().isdecimal() or int(text) < minimum:
        raise ValueError(f"{option} has {text.strip()!r}; give whole numbers of {minimum} or more, separated by commas")
    return int(text)


def _bytes(text: str) -> int:
    """Read 65536, 64K or 4M."""
    number, unit = (text.strip()[:-1], text.strip()[-1]) if text.strip()[-1:] in ("K", "M", "G") else (text.strip(), "")
    return _count("--sizes", number, minimum=1) * {"": 1, "K": 2**10, "M": 2**20, "G": 2**30}[unit]


@bench.command(
    "kernels",
    short_help="Every kernel against torch and this machine's ceilings.",
    context_settings={"ignore_unknown_options": True, "help_option_names": []},
)
@click.argument("arguments", nargs=-1, type=click.UNPROCESSED)
def kernels_command(arguments: tuple[str, ...]) -> int:
    """Every kernel against torch and this machine's ceilings; --help tells its options."""
    return kernels.main(arguments)


@bench.command("placement", short_help="Planner and split time, the exact solver's gap, hops.")
@click.option(
    "--what",
    "whats",
    type=click.Choice(placement.WHATS),
    multiple=True,
    default=("plan", "milp"),
    show_default=True,
    help="plan: time of planner and split; milp: gap of the exact solver; joint: its gap over all layers together; "
    "moetuner: hops of owners from a trace. Repeatable.",
)
@click.option("--experts", type=click.IntRange(1, 4096), multiple=True, default=(64, 256), show_default=True, help="Repeatable.")
@click.option("--ranks", type=click.IntRange(1, 1024), multiple=True, default=(8, 64), show_default=True, help="Repeatable.")
@click.option(
    "--solver", "solvers", multiple=True, default=("quota", "hecate", "laer", "eplb"), show_default=True, help="Repeatable."
)
@click.option("--milp-limit", "limits_s", type=click.FloatRange(0.1, 600), multiple=True, default=(1.0, 10.0), show_default=True)
@click.option("--top-k", type=click.IntRange(min=1), default=8, show_default=True)
@click.option("--slots", type=click.IntRange(min=0), default=2, show_default=True, help="Copies a rank may hold.")
@click.option(
    "--skew",
    "skews",
    type=click.FloatRange(0, 10),
    multiple=True,
    default=(1.2,),
    show_default=True,
    help="Zipf exponent. Repeatable.",
)
@click.option(
    "--layers",
    type=click.IntRange(min=1),
    default=4,
    show_default=True,
    help="Layers timed or placed together, each with its own draw of loads.",
)
@click.option("--rounds", type=click.IntRange(min=1), default=10, show_default=True)
@click.option("--trace", "path", metavar="FILE.npz", help="Recorded topk_ids for milp and moetuner, at the first --ranks.")
@click.option(
    "--layer", "trace_layers", type=click.IntRange(min=0), multiple=True, help="Layer of the trace to solve; all if not given."
)
@click.option(
    "--overlap-us",
    type=click.FloatRange(min=0),
    default=0.0,
    show_default=True,
    help="Microseconds of other work that hide a gather.",
)
@click.option("--move-owners", is_flag=True, help="The exact solver may change the trace's owners too.")
@click.option("--nodes", type=click.IntRange(min=1), default=1, show_default=True, help="Nodes of a trace's ranks, for hops.")
@JSON_OPTION
def placement_command(
    path: str | None,
    trace_layers: tuple[int, ...],
    overlap_us: float,
    move_owners: bool,
    nodes: int,
    json_path: str | None,
    **case: Any,
) -> None:
    """Planner and split time by experts and ranks, the gap of the exact solver by time, and hops on recorded tokens."""
    trace = None
    if path is not None:
        trace = placement.TraceCase(
            path=path, layers=trace_layers, overlap_s=overlap_us * 1e-6, move_owners=move_owners, nodes=nodes
        )
    publish("placement", placement.run(trace=trace, **case), placement.COLUMNS, json_path)


bench.add_command(overlap.command)
bench.add_command(scaling.command)
