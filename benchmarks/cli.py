"""`moesaic bench`: one command per benchmark."""

from __future__ import annotations

from typing import Any

import click

from ..placement.traces.workloads import WORKLOADS
from . import collectives, kernels, overlap, placement, scaling, step
from .collectives_rank import OPS, CollectivesCase
from .records import JSON_OPTION, MACHINE_OPTION, publish

Count = click.IntRange(min=1)


@click.group()
def bench() -> None:
    """Measure this machine: ratios within one run."""


@bench.command("step", short_help="One MoE layer's training step, by placement policy.")
@click.option("--ranks", type=Count, default=2, help="Processes, one thread each.")
@click.option("--nodes", type=Count, default=1, help="Network namespaces with links, which the ranks fill.")
@click.option("--link-mbit", type=click.FloatRange(min=0.1), default=200.0, help="Rate of a node's link.")
@step.layer_options(hidden=512, ffn=1024, tokens=4096, rounds=30)
@click.option("--optimizer", type=click.Choice(list(step.OPTIMIZERS)), default="sgd")
@click.option(
    "--workload",
    type=click.Choice([*WORKLOADS, "all"]),
    help="Routing of a workload in place of --skew; all: of one after the other, and what each takes over w0.",
)
@MACHINE_OPTION
@JSON_OPTION
def step_command(json_path: str | None, workload: str | None, **layer: int | float | str) -> None:
    """One MoE layer, forward, backward and optimizer, by placement policy; rank 0 owns all hot experts."""
    names = WORKLOADS if workload == "all" else (workload,)
    records = [record for name in names for record in step.run(step.StepCase(workload=name, **layer))]  # type: ignore[arg-type]
    if workload == "all":
        step.add_spread(records)
    publish("step", records, step.WORKLOAD_COLUMNS if workload else step.COLUMNS, json_path)


@bench.command("collectives", short_help="Collectives by transport and schedule, against Gloo and MPI.")
@click.option("--ops", default=",".join(OPS), help="Collectives, separated by commas; also token_rows.")
@click.option("--ranks", default="2,4", help="Numbers of processes, one run each.")
@click.option("--sizes", default="64K,1M,4M,16M", help="Bytes of one message; K, M and G are binary.")
@click.option("--transports", default="c10d,shm,mpi", help="Transports; c10d is Gloo.")
@click.option("--schedules", default="direct,relay", help="Schedules of the sparse collectives.")
@click.option("--nodes", type=Count, default=1, help="Network namespaces with links.")
@click.option("--link-mbit", type=click.FloatRange(min=0.1), default=200.0, help="Rate of a node's link.")
@click.option("--rounds", type=Count, default=9, help="Timed repetitions of each variant.")
@JSON_OPTION
def collectives_command(json_path: str | None, ranks: str, sizes: str, nodes: int, link_mbit: float, **given: Any) -> None:
    """Collectives by transport and schedule, against Gloo, MPI's own, a memory copy and the lower bound."""
    names = {key: tuple(value.split(",")) for key, value in given.items() if isinstance(value, str)}
    records: list[dict[str, Any]] = []
    for num_ranks in ranks.split(","):
        case = CollectivesCase(
            ranks=_count("--ranks", num_ranks, minimum=2),
            nodes=nodes,
            link_bits_per_s=link_mbit * 1e6,
            sizes=tuple(_bytes(size) for size in sizes.split(",")),
            rounds=given["rounds"],
            **names,
        )
        measured, unavailable = collectives.run(case)
        records += measured
        for name, reason in unavailable.items():
            click.echo(f"without {name} at {case.ranks} ranks: {reason}", err=True)
    publish("collectives", records, collectives.COLUMNS, json_path)


def _count(option: str, text: str, *, minimum: int) -> int:
    if not text.strip().isdecimal() or int(text) < minimum:
        raise ValueError(f"{option} has {text.strip()!r}; give whole numbers of {minimum} or more, separated by commas")
    return int(text)


def _bytes(text: str) -> int:
    """Read 65536, 64K or 4M."""
    number, unit = (text.strip()[:-1], text.strip()[-1]) if text.strip()[-1:] in ("K", "M", "G") else (text.strip(), "")
    return _count("--sizes", number, minimum=1) * {"": 1, "K": 2**10, "M": 2**20, "G": 2**30}[unit]


@bench.command("placement", short_help="Planner and split time, the exact solver's gap, hops.")
@click.option(
    "--what",
    "whats",
    type=click.Choice(placement.WHATS),
    multiple=True,
    default=("plan", "milp"),
    help="plan: time of planner and split; milp: gap of the exact solver; joint: its gap over all layers together; "
    "moetuner: hops of owners from a trace. Repeatable.",
)
@click.option("--experts", type=click.IntRange(1, 4096), multiple=True, default=(64, 256), help="Repeatable.")
@click.option("--ranks", type=click.IntRange(1, 1024), multiple=True, default=(8, 64), help="Repeatable.")
@click.option("--solver", "solvers", multiple=True, default=("quota", "hecate", "laer", "eplb"), help="Repeatable.")
@click.option("--milp-limit", "limits_s", type=click.FloatRange(0.1, 600), multiple=True, default=(1.0, 10.0))
@click.option("--top-k", type=Count, default=8)
@click.option("--slots", type=click.IntRange(min=0), default=2, help="Copies a rank may hold.")
@click.option("--skew", "skews", type=click.FloatRange(0, 10), multiple=True, default=(1.2,), help="Zipf exponent. Repeatable.")
@click.option("--layers", type=Count, default=4, help="Layers timed or placed together, each with its own draw of loads.")
@click.option("--rounds", type=Count, default=10)
@click.option("--trace", "path", metavar="FILE.npz", help="Recorded topk_ids for milp and moetuner, at the first --ranks.")
@click.option(
    "--layer", "trace_layers", type=click.IntRange(min=0), multiple=True, help="Layer of the trace to solve; all if not given."
)
@click.option("--overlap-us", type=click.FloatRange(min=0), default=0.0, help="Microseconds of other work that hide a gather.")
@click.option("--move-owners", is_flag=True, help="The exact solver may change the trace's owners too.")
@click.option("--nodes", type=Count, default=1, help="Nodes of a trace's ranks, for hops.")
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


for _command in (kernels.command, overlap.command, scaling.command):
    bench.add_command(_command)
