"""Command line options for opening a trace, shared by the offline commands."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any, TypeVar

import click

from ...placement.traces.foreign import Reading, Sizes
from ...placement.traces.sources import LoadSource, open_source
from ..output import JSON_OPTION, with_options

_Values = TypeVar("_Values", Reading, Sizes)
Count = click.IntRange(min=1)

trace_options = with_options(
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
"""Adds the options that `TraceOptions.take` removes to a command."""
RANKS_OPTION = click.option("--ranks", type=Count, metavar="R", help="Use R ranks instead of the trace's own.")
inspect_options = with_options(RANKS_OPTION, trace_options, JSON_OPTION)


@dataclass(frozen=True)
class TraceOptions:
    """Options for reading a trace."""

    reading: Reading
    sizes: Sizes

    @classmethod
    def take(cls, options: dict[str, Any]) -> TraceOptions:
        """Remove the trace options from a command's keyword arguments, and return them."""
        return cls(_take(Reading, options), _take(Sizes, options))

    def open(self, path: str, num_ranks: int | None, json_path: str | None = None) -> LoadSource:
        """Open a trace or a foreign recording at this many ranks, and print the notes of the reader.

        json_path: where the command writes its records; if that is standard output, the lines go to standard error.
        """
        source = open_source(path, num_ranks, self.reading, sizes=self.sizes)
        for note in source.notes:
            click.echo(f"{path}: {note}", err=json_path == "-")
        return source


def _take(kind: type[_Values], options: dict[str, Any]) -> _Values:
    return kind(**{field.name: options.pop(field.name) for field in fields(kind)})
