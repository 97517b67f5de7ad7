"""`moesaic bench`: one command a benchmark."""

from __future__ import annotations

from typing import Any

import click

from . import kernels, placement, step
from .rows import publish

JSON_OPTION = click.option("--json", "json_path", metavar="FILE", help="Write the rows as JSON; - for standard output.")


@click.group()
def bench() -> None:
    """Measure this machine: ratios within one run."""


@bench.command("step")
@click.option("--ranks", type=click.IntRange(min=1), default=2, show_default=True, help="Processes, one thread each.")
@click.option("--experts", type=click.IntRange(min=1), default=16, show_default=True)
@click.option("--hidden", type=click.IntRange(min=1), default=512, show_default=True, help="Model dim D.")
@click.option("--ffn", type=click.IntRange(min=1), default=1024, show_default=True, help="Expert ffn dim F.")
@click.option("--tokens", type=click.IntRange(min=1), default=4096, show_default=True, help="Tokens per rank.")
@click.option("--top-k", type=click.IntRange(min=1), default=2, show_default=True)
@click.option("--skew", type=click.FloatRange(min=0), default=1.2, show_default=True, help="Zipf exponent of expert popularity.")
@click.option("--slots", type=click.IntRange(min=0), default=2, show_default=True, help="Copies a rank may hold.")
@click.option("--rounds", type=click.IntRange(min=1), default=15, show_default=True, help="Timed steps of each policy.")
@click.option("--optimizer", type=click.Choice(list(step.OPTIMIZERS)), default="sgd", show_default=True)
@JSON_OPTION
def step_command(json_path: str | None, **case: int | float | str) -> None:
    """One MoE layer, forward, backward and optimizer, by placement policy; the hot experts all live on rank 0."""
    publish("step", step.run(step.StepCase(**case)), step.COLUMNS, json_path)  # type: ignore[arg-type]


@bench.command("kernels", context_settings={"ignore_unknown_options": True, "help_option_names": []})
@click.argument("arguments", nargs=-1, type=click.UNPROCESSED)
def kernels_command(arguments: tuple[str, ...]) -> int:
    """Every kernel against torch and this machine's ceilings; --help tells its options."""
    return kernels.main(arguments)


@bench.command("placement")
@click.option("--experts", type=click.IntRange(1, 4096), multiple=True, default=(64, 256), show_default=True, help="Repeatable.")
@click.option("--ranks", type=click.IntRange(1, 1024), multiple=True, default=(8, 64), show_default=True, help="Repeatable.")
@click.option(
    "--solver", "solvers", multiple=True, default=("quota", "hecate", "laer", "eplb"), show_default=True, help="Repeatable."
)
@click.option("--milp-limit", "limits_s", type=click.FloatRange(0.1, 600), multiple=True, default=(1.0, 10.0), show_default=True)
@click.option("--top-k", type=click.IntRange(min=1), default=8, show_default=True)
@click.option("--slots", type=click.IntRange(min=0), default=2, show_default=True, help="Copies a rank may hold.")
@click.option("--skew", type=click.FloatRange(0, 10), default=1.2, show_default=True, help="Zipf exponent of expert popularity.")
@click.option("--layers", type=click.IntRange(min=1), default=4, show_default=True, help="Layers timed, each another draw.")
@click.option("--rounds", type=click.IntRange(min=1), default=10, show_default=True)
@JSON_OPTION
def placement_command(json_path: str | None, **case: Any) -> None:
    """Planner and split time by experts and ranks, and the gap of the exact solver by time."""
    publish("placement", placement.run(**case), placement.COLUMNS, json_path)
