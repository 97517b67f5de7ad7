"""Command line options for opening a trace, shared by the offline commands."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

import click

from ...placement.traces.sources import LoadSource, Sizes, open_source

Command = TypeVar("Command", bound=Callable[..., Any])
Count = click.IntRange(min=1)

_OPTIONS = (
    click.option("--tokens-per-step", type=Count, metavar="N", help="Cut recorded tokens into steps of N, over all ranks."),
    click.option("--shuffle", "shuffle_seed", type=click.IntRange(min=0), metavar="SEED", help="Shuffle recorded tokens first."),
    click.option("--array", metavar="NAME", help="The array of a foreign file to read."),
    click.option(
        "--axes", metavar="LTK", help="The dims of a foreign array: S steps, T tokens, L layers, R ranks, K top-k, E experts."
    ),
    click.option("--none", "none_ids", type=int, multiple=True, metavar="ID", help="An id that means no expert; repeatable."),
    click.option("--shares", "as_shares", is_flag=True, help="Take loads as shares of --tokens-per-step tokens, not as counts."),
    click.option("--experts", "num_experts", type=Count, metavar="E", help="Experts, if the file does not say."),
    click.option("--top-k", type=Count, metavar="K", help="Experts per token, if the file does not say."),
    click.option("--dim", type=Count, metavar="D", help="Model dimension, if the file does not say."),
    click.option("--ffn-dim", type=Count, metavar="F", help="Expert ffn dimension, if the file does not say."),
    click.option("--matrices", "num_matrices", type=Count, metavar="N", help="Weight matrices of an expert; 3 is SwiGLU."),
)


@dataclass(frozen=True, kw_only=True)
class TraceOptions:
    """Options for reading a trace, by the argument names of `open_source`."""

    tokens_per_step: int | None
    shuffle_seed: int | None
    array: str | None
    axes: str | None
    none_ids: tuple[int, ...]
    as_shares: bool
    sizes: Sizes

    @classmethod
    def take(cls, options: dict[str, Any]) -> TraceOptions:
        """Remove the trace options from a command's keyword arguments, and return them."""
        sizes = Sizes(**{name: options.pop(name) for name in ("num_experts", "top_k", "dim", "ffn_dim", "num_matrices")})
        names = ("tokens_per_step", "shuffle_seed", "array", "axes", "none_ids", "as_shares")
        return cls(sizes=sizes, **{name: options.pop(name) for name in names})

    def open(self, path: str, num_ranks: int | None, json_path: str | None = None) -> LoadSource:
        """Open a trace or a foreign recording at this many ranks, and print the notes of the reader.

        json_path: where the command writes its records; if that is standard output, the lines go to standard error.
        """
        source = open_source(path, num_ranks, **vars(self))
        for note in source.notes:
            click.echo(f"{path}: {note}", err=json_path == "-")
        return source


def trace_options(command: Command) -> Command:
    """Add the options that `TraceOptions.take` removes to a command."""
    for option in reversed(_OPTIONS):
        command = option(command)
    return command
