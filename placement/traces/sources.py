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
    """What the laboratory plays: a meta with the number of ranks, and one step's loads after another."""

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
class RankedTrace:
    """A source of loads at another number of ranks: neighbours merged, or a rank's assignments dealt to several."""

    source: LoadSource
    num_ranks: int

    def __post_init__(self) -> None:
        recorded = self.source.meta.num_ranks
        if recorded % self.num_ranks and self.num_ranks % recorded:
            raise ValueError(
                f"{self.path} was recorded on {recorded} ranks without topk_ids; "
                f"it can be played on divisors and multiples of them, not on {self.num_ranks}"
            )

    @property
    def path(self) -> Path:
        """The file."""
        return self.source.path

    @property
    def meta(self) -> TraceMeta:
        """The source's, with the new number of ranks."""
        return replace(self.source.meta, num_ranks=self.num_ranks)

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
        tokens_SR = self.source.tokens_SR
        if tokens_SR is None:
            return None
        parts = self.num_ranks // self.source.meta.num_ranks
        if parts <= 1:
            return tokens_SR.reshape(len(tokens_SR), self.num_ranks, -1).sum(axis=2)
        return split_tokens(tokens_SR.ravel(), parts).reshape(len(tokens_SR), self.num_ranks)

    def steps(self) -> Iterator[np.ndarray]:
        """Yield every step's loads, int64 [L, R, E]."""
        num_layers, recorded, num_experts = self.source.meta.step_shape
        parts, tokens_SR = self.num_ranks // recorded, self.source.tokens_SR
        for step, loads_LRE in enumerate(self.source.steps()):
            if parts <= 1:
                yield loads_LRE.reshape(num_layers, self.num_ranks, -1, num_experts).sum(axis=2)
                continue
            tokens_R = loads_LRE[0].sum(axis=1) // self.meta.top_k if tokens_SR is None else tokens_SR[step]
            counts_NE = loads_LRE.reshape(num_layers * recorded, num_experts)
            dealt = deal(counts_NE, parts, np.tile(tokens_R, num_layers), self.meta.top_k)
            yield dealt.reshape(num_layers, self.num_ranks, num_experts)


def open_source(
    path: str | os.PathLike[str],
    num_ranks: int | None = None,
    *,
    tokens_per_step: int | None = None,
    array: str | None = None,
    shuffle_seed: int | None = None,
    axes: str | None = None,
    none_ids: tuple[int, ...] = (),
    as_shares: bool = False,
    sizes: Sizes | None = None,
) -> LoadSource:
    """Open a trace or a foreign recording at `num_ranks` ranks (a trace's own by default), or raise one clear ValueError.

    tokens_per_step: of recorded tokens and of shares. The others say how a foreign recording is read: see `Reading`.
    """
    sizes = sizes or Sizes()
    reading = Reading(
        array=array,
        axes=axes,
        none_ids=none_ids,
        as_shares=as_shares,
        tokens_per_step=tokens_per_step,
        shuffle_seed=shuffle_seed,
    )
    file = open_arrays(path, "trace")
    if "schema" in read_foreign_meta(file) and reading.array is None:
        source = _open_trace(file, num_ranks, reading)
    else:
        source = open_foreign(file, num_ranks, reading, sizes)
        if num_ranks is not None and source.meta.num_ranks != num_ranks:
            source = RankedTrace(source, check_positive_int("ranks", num_ranks))
    meta = source.meta
    if meta.num_ranks * meta.num_experts > MAX_LAYER_CELLS:
        raise ValueError(
            f"{meta.num_ranks} ranks x {meta.num_experts} experts are above the supported {MAX_LAYER_CELLS} cells a layer"
        )
    return resized(source, sizes)


def resized(source: LoadSource, sizes: Sizes) -> LoadSource:
    """Return a source whose meta says these sizes."""
    meta = sizes.apply(source.meta)
    return source if meta == source.meta else _Renamed(source, meta)


@dataclass(frozen=True)
class _Renamed:
    """A source under a meta with other sizes."""

    source: LoadSource
    meta: TraceMeta

    @property
    def path(self) -> Path:
        """The source's."""
        return self.source.path

    @property
    def num_steps(self) -> int:
        """The source's."""
        return self.source.num_steps

    @property
    def notes(self) -> tuple[str, ...]:
        """The source's."""
        return self.source.notes

    @property
    def tokens_SR(self) -> np.ndarray | None:
        """The source's."""
        return self.source.tokens_SR

    def steps(self) -> Iterator[np.ndarray]:
        """Yield the source's steps."""
        return self.source.steps()


def pair_counts_of(source: LoadSource) -> np.ndarray | None:
    """Return the layer-to-layer counts [L - 1, E, E] that a source recorded or can count; None where it knows no tokens."""
    if isinstance(source, _Renamed | RankedTrace):
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
    return trace if ranks == trace.meta.num_ranks else RankedTrace(trace, ranks)
