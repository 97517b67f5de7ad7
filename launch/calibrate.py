"""`moesaic calibrate`: measure this machine, or under a launcher this cluster, and write its machine file.

Without a launcher the command starts ranks of its own on this machine; every rank runs this module as a program.
"""

import os
import sys
import tempfile
from collections.abc import Sequence
from contextlib import ExitStack
from typing import Any

import click

from ..collectives.lifetime import first_failure, start
from ..placement.files import writable
from ..placement.machine import Machine, write_machine
from .config import LaunchConfig
from .entry import run_command
from .launcher import launcher_of
from .measure import measure_machine
from .output import publish
from .run.process import agreed, find_process, process_group, reuse_memory, set_threads, stop_with_launcher

COLUMNS = ("rate", "value", "spread")
_TIMEOUT_S = 120.0


@click.command("calibrate")
@click.option("-o", "--out", default="machine.toml", show_default=True, metavar="FILE", help="The machine file to write.")
@click.option("--ranks", type=click.IntRange(min=2), default=2, show_default=True, help="Processes, if no launcher started any.")
@click.option("--seconds", type=click.FloatRange(min=0), default=30.0, show_default=True, help="About how long to measure.")
@click.option("--device", type=click.Choice(["auto", "cpu", "cuda"]), default="auto", show_default=True)
@click.option("--json", "json_path", metavar="FILE", help="Write the rates as JSON; - for standard output.")
@click.option("--init-method", default="env://", hidden=True)
def command(out: str, ranks: int, seconds: float, device: str, json_path: str | None, init_method: str) -> int:
    """Measure links, expert products and copies, and write them as the machine file that planners price with.

    Alone it starts --ranks processes on this machine. On a cluster start it as you start training:
    torchrun ... -m moesaic.launch.calibrate -o machine.toml.
    """
    if launcher_of(os.environ) is None:
        arguments = ["--out", out, "--seconds", str(seconds), "--device", device]
        return start_ranks(ranks, arguments + (["--json", json_path] if json_path else []))
    config = LaunchConfig(device=device, init_method=init_method)  # type: ignore[arg-type]  # checked by click
    try:
        process = find_process(config, os.environ)
    except ValueError as error:
        raise ValueError(str(error).replace("--set launch.device=cpu", "--device cpu")) from None
    stop_with_launcher(process, os.environ)
    set_threads(process, config, os.environ)
    reuse_memory(process, config)
    with process_group(process, config, timeout_s=_TIMEOUT_S) as mesh:
        agreed(process, lambda: [writable(path) for path in (out, json_path)] if process.is_first else None)
        machine = measure_machine(
            mesh.get_group(),
            process.device,
            seconds=seconds,
            say=lambda stage: click.echo(f"moesaic: {stage}", err=True) if process.is_first else None,
        )
        agreed(process, lambda: write_machine(out, machine) if process.is_first else None)
        if process.is_first:
            _report(machine, out, json_path)
    return 0


def start_ranks(num_ranks: int, arguments: Sequence[str], **options: Any) -> int:
    """Run this module on ranks of this machine, started with options of Popen; none outlives the call. Returns the status of the
    first that fails, or 0."""
    with ExitStack() as stack:
        folder = stack.enter_context(tempfile.TemporaryDirectory())
        program = [sys.executable, "-m", "moesaic.launch.calibrate", "--init-method", f"file://{folder}/store", *arguments]
        processes = []
        for rank in range(num_ranks):
            ranks = {"RANK": rank, "WORLD_SIZE": num_ranks, "LOCAL_RANK": rank, "LOCAL_WORLD_SIZE": num_ranks}
            process = start(program, env=os.environ | {name: str(value) for name, value in ranks.items()}, **options)
            stack.callback(process.wait)
            stack.callback(process.kill)
            processes.append(process)
        return first_failure([process.poll for process in processes])


def _report(machine: Machine, out: str, json_path: str | None) -> None:
    records = [{"rate": name, "value": value, "spread": machine.spread[name]} for name, value in machine.rates.items()]
    publish("calibrate", records, COLUMNS, json_path)
    if json_path == "-":
        return
    for what, times in {**machine.slow_ranks, **machine.slow_links}.items():
        click.echo(f"slow: {what} takes {times:.2f} times the median")
    click.echo(f"{out}: {machine.num_nodes} x {machine.ranks_per_node} ranks, transport {machine.transport}, {machine.device}")


if __name__ == "__main__":
    sys.exit(run_command(command))
