"""The `moesaic` command: a table of commands, each imported only when it runs."""

import difflib
import importlib
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

import click

from .. import __version__
from .entry import run_command


@dataclass(frozen=True)
class LazyCommand:
    """The import path of a command, and its line in the overview."""

    target: str
    """module:attribute of a click command."""
    summary: str

    def load(self) -> click.Command:
        """Import the command."""
        module, _, attribute = self.target.partition(":")
        command = getattr(importlib.import_module(module), attribute)
        assert isinstance(command, click.Command), self.target
        return command


COMMANDS: Mapping[str, LazyCommand] = MappingProxyType(
    {
        "train": LazyCommand("moesaic.launch.train:command", "Train the demo language model."),
        "place": LazyCommand(
            "moesaic.launch.offline.place:command", "Solve, compare, replay and show placements on recorded routing."
        ),
        "trace": LazyCommand("moesaic.launch.offline.trace:command", "Inspect, convert, generate and back-test routing traces."),
        "bench": LazyCommand("moesaic.benchmarks.cli:bench", "Measure this machine: ratios within one run."),
        "report": LazyCommand("moesaic.launch.offline.report:command", "Write a run or a trace as one HTML page."),
        "calibrate": LazyCommand(
            "moesaic.launch.calibrate:command", "Measure links and kernels of this machine or cluster, for the planners."
        ),
        "doctor": LazyCommand("moesaic.launch.doctor.command:command", "Show what is installed and what works on this machine."),
    }
)


class LazyGroup(click.Group):
    """A group that imports a command only to run it."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        """Names, in the table's order."""
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """The command of this name, imported now."""
        return COMMANDS[cmd_name].load() if cmd_name in COMMANDS else None

    def resolve_command(self, ctx: click.Context, args: list[str]) -> tuple[str | None, click.Command | None, list[str]]:
        """Find the command that `args` begins with; the error for a wrong name proposes the nearest one."""
        near = difflib.get_close_matches(args[0], COMMANDS, n=1)
        if args[0] not in COMMANDS and near:
            ctx.fail(f"unknown command '{args[0]}'; did you mean '{near[0]}'?")
        return super().resolve_command(ctx, args)

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """The overview, from the table alone."""
        with formatter.section("Commands"):
            formatter.write_dl([(name, command.summary) for name, command in COMMANDS.items()])


@click.group(cls=LazyGroup, context_settings={"show_default": True})
@click.version_option(__version__, prog_name="moesaic")
def cli() -> None:
    """Load-adaptive Mixture-of-Experts training."""


def main() -> None:
    """The console script: exit status 0 done, 1 failed, 2 wrong use."""
    sys.exit(run_command(cli))
