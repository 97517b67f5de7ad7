"""Where loads come from: traces at any number of ranks, and foreign recordings turned into loads; all read as a stream.

Shape letters: S steps, L layers, R ranks, E experts.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Protocol

import numpy as np

from ..content import check_positive_int
from .dealing import deal, split_tokens
from .dumps import open_arrays
from .foreign import Arranged, Reading, Sizes, open_foreign, read_foreign_meta
from .format import Trace, TraceMeta
from .npz import ArrayFile
from .tokens import Cells, TokenFile

# Beyond these the tables of one layer no longer fit beside each other in a gigabyte.
MAX_LAYER_CELLS = 1 << 21


class LoadSource(Protocol):
    """What the policy simulator reads: a meta with the number of ranks, and one step's loads after another."""

    @property
    def path(self) -> Path:
        """The file."""

    @property
    def meta(self) -> TraceMeta:
        """Model shape and ranks."""

    @property
    def num_steps(self) -> int:
        """Steps that `steps` yields."""

    @property
    def notes(self) -> tuple[str, ...]:
        """A line for each thing about a foreign recording that was not plain, such as what was left out or rescaled."""

    @property
    def tokens_SR(self) -> np.ndarray | None:
        """Tokens of every step and source rank, int64 [S, R], where assignments were dropped; None where none was."""

    def steps(self) -> Iterator[np.ndarray]:
        """Yield every step's loads, int64 [L, R, E]; may be called again."""


@dataclass(frozen=True)
class ResizedSource:
    """A source under a meta with other sizes, or at another number of ranks, which a multiple or a divisor of its own must be.

    Fewer ranks merge neighbours, more distribute each rank's assignments over several.
    """

    source: LoadSource
    meta: TraceMeta

    def __post_init__(self) -> None:
        recorded, wanted = self.source.meta.num_ranks, self.meta.num_ranks
        if recorded % wanted and wanted % recorded:
            raise ValueError(
                f"{self.path} was recorded on {recorded} ranks without topk_ids; "
                f"it can be played on divisors and multiples of them, not on {wanted}"
            )

    @property
    def path(self) -> Path:
        """The file."""
        return self.source.path

    @property
    def num_steps(self) -> int:
        """The source's steps."""
        return self.source.num_steps

    @property
    def notes(self) -> tuple[str, ...]:
        """The source's."""
        return self.source.notes

    @cached_property
    def tokens_SR(self) -> np.ndarray | None:
        """Tokens of every step and rank, int64 [S, R], where assignments were dropped; None where none was."""
        tokens_SR, num_ranks = self.source.tokens_SR, self.meta.num_ranks
        if tokens_SR is None:
            return None
        parts = num_ranks // self.source.meta.num_ranks
        if parts <= 1:
            return tokens_SR.reshape(len(tokens_SR), num_ranks, -1).sum(axis=2)
        return split_tokens(tokens_SR.ravel(), parts).reshape(len(tokens_SR), num_ranks)

    def steps(self) -> Iterator[np.ndarray]:
        """Yield every step's loads, int64 [L, R, E]."""
        num_layers, recorded, num_experts = self.source.meta.step_shape
        num_ranks, tokens_SR = self.meta.num_ranks, self.source.tokens_SR
        parts = num_ranks // recorded
        for step, loads_LRE in enumerate(self.source.steps()):
            if parts <= 1:
                yield loads_LRE.reshape(num_layers, num_ranks, -1, num_experts).sum(axis=2)
                continue
            tokens_R = loads_LRE[0].sum(axis=1) // self.meta.top_k if tokens_SR is None else tokens_SR[step]
            counts_NE = loads_LRE.reshape(num_layers * recorded, num_experts)
            dealt = deal(counts_NE, parts, np.tile(tokens_R, num_layers), self.meta.top_k)
            yield dealt.reshape(num_layers, num_ranks, num_experts)


def open_source(
    path: str | os.PathLike[str], num_ranks: int | None = None, reading: Reading | None = None, *, sizes: Sizes | None = None
) -> LoadSource:
    """Open a trace or a foreign recording at `num_ranks` ranks (a trace's own by default), or raise one clear ValueError."""
    reading, sizes = reading or Reading(), sizes or Sizes()
    file = open_arrays(path, "trace")
    is_trace = "schema" in read_foreign_meta(file) and reading.array is None
    source: LoadSource = _open_trace(file, num_ranks, reading) if is_trace else open_foreign(file, num_ranks, reading, sizes)
    source = resized(source, sizes, num_ranks)
    meta = source.meta
    if meta.num_ranks * meta.num_experts > MAX_LAYER_CELLS:
        raise ValueError(
            f"{meta.num_ranks} ranks x {meta.num_experts} experts are above the supported {MAX_LAYER_CELLS} cells a layer"
        )
    return source


def resized(source: LoadSource, sizes: Sizes, num_ranks: int | None = None) -> LoadSource:
    """Return a source whose meta says these sizes, at this number of ranks where one is given."""
    meta = sizes.apply(source.meta)
    if num_ranks is not None:
        meta = replace(meta, num_ranks=check_positive_int("ranks", num_ranks))
    return source if meta == source.meta else ResizedSource(source, meta)


def pair_counts_of(source: LoadSource) -> np.ndarray | None:
    """Return the layer-to-layer counts [L - 1, E, E] that a source recorded or can count; None for one of counts alone."""
    if isinstance(source, ResizedSource):
        return pair_counts_of(source.source)
    if isinstance(source, Trace):
        return source.pair_counts() if source.has_pair_counts else None
    return source.pair_counts() if isinstance(source, TokenFile) else None


def _open_trace(file: ArrayFile, num_ranks: int | None, reading: Reading) -> LoadSource:
    trace = Trace(file.path)
    if reading.axes is not None or reading.none_ids or reading.as_shares:
        raise ValueError(f"{file.path} is a trace, which says what it holds; leave out --axes, --none and --shares")
    ranks = trace.meta.num_ranks if num_ranks is None else check_positive_int("ranks", num_ranks)
    is_cut_anew = reading.tokens_per_step is not None or reading.shuffle_seed is not None
    if trace.has_topk_ids and (ranks != trace.meta.num_ranks or is_cut_anew):
        per_step = reading.tokens_per_step or max(1, trace.num_tokens // trace.num_steps)
        cells = Cells(num_experts=trace.meta.num_experts, none_ids=(-1,) if trace.meta.dropped else ())
        array = Arranged(file, "topk_ids", "TLK", "TLK")
        return TokenFile(file.path, array, cells, replace(trace.meta, num_ranks=ranks), per_step, reading.shuffle_seed)
    if is_cut_anew:
        raise ValueError(f"{file.path} has no topk_ids; its steps cannot be cut anew")
    return trace
