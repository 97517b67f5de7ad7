"""The options by which every offline command opens a trace."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

import click

from ..placement.traces.sources import LoadSource, Sizes, open_source

Command = TypeVar("Command", bound=Callable[..., Any])
Count = click.IntRange(min=1)

_OPTIONS = (
    click.option("--tokens-per-step", type=Count, metavar="N", help="Cut recorded tokens into steps of N, over all ranks."),
    click.option("--shuffle", "shuffle_seed", type=click.IntRange(min=0), metavar="SEED", help="Mix recorded tokens first."),
    click.option("--array", metavar="NAME", help="Which array of a foreign .npz to read."),
    click.option("--experts", "num_experts", type=Count, metavar="E", help="Experts, where the file does not say."),
    click.option("--top-k", type=Count, metavar="K", help="Experts per token, where the file does not say."),
    click.option("--dim", type=Count, metavar="D", help="Model dimension, where the file does not say."),
    click.option("--ffn-dim", type=Count, metavar="F", help="Expert ffn dimension, where the file does not say."),
    click.option("--matrices", "num_matrices", type=Count, metavar="N", help="Weight matrices of an expert; 3 is SwiGLU."),
)


@dataclass(frozen=True, kw_only=True)
class TraceOptions:
    """How a trace is to be read."""

    tokens_per_step: int | None
    shuffle_seed: int | None
    array: str | None
    sizes: Sizes

    @classmethod
    def take(cls, options: dict[str, Any]) -> TraceOptions:
        """Take this command's trace options out of its keyword arguments."""
        sizes = Sizes(**{name: options.pop(name) for name in ("num_experts", "top_k", "dim", "ffn_dim", "num_matrices")})
        return cls(sizes=sizes, **{name: options.pop(name) for name in ("tokens_per_step", "shuffle_seed", "array")})

    def open(self, path: str, num_ranks: int | None) -> LoadSource:
        """Open a trace or a foreign recording at this many ranks."""
        return open_source(
            path,
            num_ranks,
            tokens_per_step=self.tokens_per_step,
            array=self.array,
            shuffle_seed=self.shuffle_seed,
            sizes=self.sizes,
        )


def trace_options(command: Command) -> Command:
    """Give a command the options that `TraceOptions.take` takes."""
    for option in reversed(_OPTIONS):
        command = option(command)
    return command
