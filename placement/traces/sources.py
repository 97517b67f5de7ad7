"""Where loads come from: traces at any number of ranks, and foreign recordings of tokens, counts or shares turned into loads.

A foreign recording is an `.npz` with one of these arrays (S steps or groups, L layers, E experts, K top-k, T tokens):
    topk_ids     integers [T, L, K], the experts of single tokens, cut into steps and dealt to ranks in blocks
    counts       integers [..., L, E], one step for each leading index, dealt evenly to ranks
    shares       floats [..., L, E], likewise, turned into whole assignments first
Everything is read as a stream, a step at a time.
Shape letters: S steps, L layers, R ranks, E experts, K top-k, T tokens.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from ..content import check_positive_int
from .format import Trace, TraceMeta
from .npz import NpzReader

_DEFAULT_TOKENS = 4096
_SHUFFLED_BYTES = 1 << 28
_MAX_STEP_IDS = 1 << 24
_MAX_PAIR_CELLS = 1 << 24
# Beyond these the tables of one layer no longer fit beside each other in a gigabyte.
MAX_LAYER_CELLS = 1 << 21
_MAX_META_BYTES = 1 << 20


class LoadSource(Protocol):
    """What the laboratory plays: a meta with the number of ranks, and one step's loads after another."""

    @property
    def meta(self) -> TraceMeta:
        """Model shape and ranks."""

    @property
    def num_steps(self) -> int:
        """Steps that `steps` yields."""

    def steps(self) -> Iterator[np.ndarray]:
        """Yield every step's loads, int64 [L, R, E]; may be called again."""


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """What the user knows of the model; it goes before what a file says. None where nothing was said."""

    num_experts: int | None = None
    top_k: int | None = None
    dim: int | None = None
    ffn_dim: int | None = None
    num_matrices: int | None = None

    def apply(self, meta: TraceMeta) -> TraceMeta:
        """Return `meta` with the sizes that price a placement replaced."""
        changes = {name: getattr(self, name) for name in ("dim", "ffn_dim", "num_matrices") if getattr(self, name) is not None}
        return replace(meta, **changes)


def deal(counts_LE: np.ndarray, num_ranks: int) -> np.ndarray:
    """Deal every expert's assignments to ranks one by one: int64 [L, R, E] with rows and columns as even as can be.

    Assignment j of a layer, counted expert by expert, goes to rank j % R. Example: counts [3, 1] on 2 ranks: [[2, 0], [1, 1]].
    """
    end_LE = np.cumsum(counts_LE, axis=1)
    rank_R1 = np.arange(num_ranks)[:, None]

    def dealt_before(position_LE: np.ndarray) -> np.ndarray:
        return (position_LE[:, None, :] - rank_R1 + num_ranks - 1) // num_ranks

    return dealt_before(end_LE) - dealt_before(end_LE - counts_LE)


def apportion(shares_LE: np.ndarray, total: int) -> np.ndarray:
    """Turn shares into whole counts that sum to `total` in every layer, int64 [L, E]: largest remainders, ties to the first."""
    exact_LE = shares_LE / shares_LE.sum(axis=1, keepdims=True) * total
    counts_LE = np.floor(exact_LE).astype(np.int64)
    for layer, left in enumerate(total - counts_LE.sum(axis=1)):
        counts_LE[layer, np.argsort(counts_LE[layer] - exact_LE[layer], kind="stable")[:left]] += 1
    return counts_LE


def _check_divides(num_tokens: int, num_ranks: int, whose: str) -> None:
    if num_tokens % num_ranks:
        raise ValueError(f"{whose} {num_tokens} tokens do not divide over {num_ranks} ranks; choose ranks that divide them")


@dataclass(frozen=True)
class RankedTrace:
    """A trace of loads at another number of ranks: neighbours merged, or a rank's assignments dealt to several."""

    trace: Trace
    num_ranks: int

    def __post_init__(self) -> None:
        recorded = self.trace.meta.num_ranks
        if recorded % self.num_ranks and self.num_ranks % recorded:
            raise ValueError(
                f"{self.trace.path} was recorded on {recorded} ranks without topk_ids; "
                f"it can be played on divisors and multiples of them, not on {self.num_ranks}"
            )

    @property
    def meta(self) -> TraceMeta:
        """The trace's, with the new number of ranks."""
        return replace(self.trace.meta, num_ranks=self.num_ranks)

    @property
    def num_steps(self) -> int:
        """The trace's steps."""
        return self.trace.num_steps

    def steps(self) -> Iterator[np.ndarray]:
        """Yield every step's loads, int64 [L, R, E]."""
        num_layers, recorded, num_experts = self.trace.meta.step_shape
        parts = self.num_ranks // recorded
        for loads_LRE in self.trace.steps():
            if parts <= 1:
                yield loads_LRE.reshape(num_layers, self.num_ranks, -1, num_experts).sum(axis=2)
                continue
            for assignments in np.unique(loads_LRE[0].sum(axis=1)).tolist():
                _check_divides(assignments // self.meta.top_k, parts, f"{self.trace.path}: a rank's")
            dealt = deal(loads_LRE.reshape(num_layers * recorded, num_experts), parts)
            yield dealt.reshape(num_layers, self.num_ranks, num_experts)


@dataclass(frozen=True)
class TokenFile:
    """Single tokens cut into steps of `tokens_per_step`, each dealt to ranks in consecutive blocks.

    Tokens left over at the end make no step. With `shuffle_seed` they are mixed first, as a training loader mixes documents.
    """

    reader: NpzReader
    meta: TraceMeta
    tokens_per_step: int
    shuffle_seed: int | None = None

    def __post_init__(self) -> None:
        check_positive_int("tokens per step", self.tokens_per_step)
        most = _MAX_STEP_IDS // (self.meta.num_layers * self.meta.top_k)
        if self.tokens_per_step > most:
            raise ValueError(f"{self.tokens_per_step} tokens per step are above the supported {most}; lower --tokens-per-step")
        if not self.num_steps:
            raise ValueError(
                f"{self.reader.path} holds {self._num_tokens} tokens, less than one step of {self.tokens_per_step}; "
                "lower --tokens-per-step"
            )

    @property
    def _num_tokens(self) -> int:
        return self.reader.members["topk_ids"].shape[0]

    @property
    def num_steps(self) -> int:
        """Whole steps in the file."""
        return self._num_tokens // self.tokens_per_step

    def _token_blocks(self) -> Iterator[np.ndarray]:
        if self.shuffle_seed is None:
            yield from self.reader.rows("topk_ids", self.tokens_per_step)
            return
        ids_TLK = self.reader.array("topk_ids", _SHUFFLED_BYTES)
        order = np.random.default_rng(self.shuffle_seed).permutation(len(ids_TLK))
        for start in range(0, len(order), self.tokens_per_step):
            yield ids_TLK[order[start : start + self.tokens_per_step]]

    def _checked_blocks(self) -> Iterator[np.ndarray]:
        """Yield the tokens of every whole step, integers [T, L, K], ids checked."""
        for ids_TLK in self._token_blocks():
            if ids_TLK.min() < 0 or ids_TLK.max() >= self.meta.num_experts:
                raise self.reader.error(f"topk_ids holds an expert outside 0 to {self.meta.num_experts - 1}")
            if len(ids_TLK) == self.tokens_per_step:
                yield ids_TLK

    def steps(self) -> Iterator[np.ndarray]:
        """Yield every step's loads, int64 [L, R, E]."""
        num_layers, num_ranks, num_experts = self.meta.step_shape
        rank_T = np.arange(self.tokens_per_step) * num_ranks // self.tokens_per_step
        for ids_TLK in self._checked_blocks():
            cell = (np.arange(num_layers)[:, None] * num_ranks + rank_T[:, None, None]) * num_experts + ids_TLK
            yield np.bincount(cell.ravel(), minlength=math.prod(self.meta.step_shape)).reshape(self.meta.step_shape)

    def pair_counts(self) -> np.ndarray:
        """Count the tokens that follow expert i in layer l by expert j in layer l + 1: int64 [L - 1, E, E]."""
        num_layers, _, num_experts = self.meta.step_shape
        if num_layers * num_experts**2 > _MAX_PAIR_CELLS:
            raise ValueError(f"pair counts of {num_layers} layers x {num_experts} experts are above {_MAX_PAIR_CELLS} cells")
        pairs_LEE = np.zeros((num_layers - 1, num_experts, num_experts), dtype=np.int64)
        for ids_TLK in self._checked_blocks():
            ids = ids_TLK.astype(np.int64)
            for layer in range(num_layers - 1):
                cell = ids[:, layer, :, None] * num_experts + ids[:, layer + 1, None, :]
                pairs_LEE[layer] += np.bincount(cell.ravel(), minlength=num_experts**2).reshape(num_experts, num_experts)
        return pairs_LEE


@dataclass(frozen=True)
class CountFile:
    """Loads per group without ranks: `name` is an array [..., L, E] of counts, or of shares of `tokens_per_step` tokens."""

    reader: NpzReader
    name: str
    meta: TraceMeta
    tokens_per_step: int

    @property
    def num_steps(self) -> int:
        """Groups in the file."""
        return math.prod(self.reader.members[self.name].shape[:-2])

    def steps(self) -> Iterator[np.ndarray]:
        """Yield every step's loads, int64 [L, R, E]."""
        num_layers, num_ranks, num_experts = self.meta.step_shape
        for block in self.reader.rows(self.name, 1):
            for step_LE in block.reshape(-1, num_layers, num_experts):
                counts_LE = self._counts(step_LE)
                num_tokens, rest = divmod(int(counts_LE[0].sum()), self.meta.top_k)
                if rest or (counts_LE.sum(axis=1) != num_tokens * self.meta.top_k).any():
                    raise self.reader.error(f"{self.name} does not count every token {self.meta.top_k} times in every layer")
                _check_divides(num_tokens, num_ranks, f"{self.reader.path}: a group's")
                yield deal(counts_LE, num_ranks)

    def _counts(self, values_LE: np.ndarray) -> np.ndarray:
        # float16 could not hold the limit it is compared with.
        shares_LE = values_LE.astype(np.float64)
        if not np.isfinite(shares_LE).all() or shares_LE.min() < 0 or shares_LE.max() > np.iinfo(np.int32).max:
            raise self.reader.error(f"{self.name} holds a value that is negative, not finite, or above int32")
        if values_LE.dtype.kind == "i":
            return values_LE.astype(np.int64)
        if (shares_LE.sum(axis=1) <= 0).any():
            raise self.reader.error(f"{self.name} has a layer without any load")
        return apportion(shares_LE, self.tokens_per_step * self.meta.top_k)


def open_source(
    path: str | os.PathLike[str],
    num_ranks: int | None = None,
    *,
    tokens_per_step: int | None = None,
    array: str | None = None,
    shuffle_seed: int | None = None,
    sizes: Sizes | None = None,
) -> LoadSource:
    """Open a trace or a foreign recording at `num_ranks` ranks (a trace's own by default), or raise one clear ValueError.

    tokens_per_step: of recorded tokens and of shares. array: which array of a foreign file to read, where its name does not say.
    """
    sizes = sizes or Sizes()
    reader = NpzReader(path, "trace")
    said = _read_foreign_meta(reader)
    if "schema" in said and array is None:
        source = _open_trace(reader, num_ranks, tokens_per_step, shuffle_seed)
    else:
        source = _open_foreign(reader, said, num_ranks, tokens_per_step, array, shuffle_seed, sizes)
    meta = sizes.apply(source.meta)
    if meta.num_ranks * meta.num_experts > MAX_LAYER_CELLS:
        raise ValueError(
            f"{meta.num_ranks} ranks x {meta.num_experts} experts are above the supported {MAX_LAYER_CELLS} cells a layer"
        )
    return source if meta == source.meta else _Renamed(source, meta)


@dataclass(frozen=True)
class _Renamed:
    """A source under a meta with other sizes."""

    source: LoadSource
    meta: TraceMeta

    @property
    def num_steps(self) -> int:
        """The source's."""
        return self.source.num_steps

    def steps(self) -> Iterator[np.ndarray]:
        """Yield the source's steps."""
        return self.source.steps()


def pair_counts_of(source: LoadSource) -> np.ndarray | None:
    """Return the layer-to-layer counts [L - 1, E, E] that a source recorded or can count; None where it knows no tokens."""
    if isinstance(source, _Renamed):
        return pair_counts_of(source.source)
    if isinstance(source, RankedTrace):
        return pair_counts_of(source.trace)
    if isinstance(source, Trace):
        return source.pair_counts() if source.has_pair_counts else None
    return source.pair_counts() if isinstance(source, TokenFile) else None


def _open_trace(reader: NpzReader, num_ranks: int | None, tokens_per_step: int | None, shuffle_seed: int | None) -> LoadSource:
    trace = Trace(reader.path)
    ranks = trace.meta.num_ranks if num_ranks is None else check_positive_int("ranks", num_ranks)
    if trace.has_topk_ids and (ranks != trace.meta.num_ranks or tokens_per_step is not None or shuffle_seed is not None):
        per_step = tokens_per_step or max(1, trace.num_tokens // trace.num_steps)
        return TokenFile(reader, replace(trace.meta, num_ranks=ranks), per_step, shuffle_seed)
    if tokens_per_step is not None or shuffle_seed is not None:
        raise ValueError(f"{reader.path} has no topk_ids; its steps cannot be cut anew")
    return trace if ranks == trace.meta.num_ranks else RankedTrace(trace, ranks)


def _open_foreign(
    reader: NpzReader,
    said: dict[str, Any],
    num_ranks: int | None,
    tokens_per_step: int | None,
    array: str | None,
    shuffle_seed: int | None,
    sizes: Sizes,
) -> LoadSource:
    name = array or next((known for known in ("topk_ids", "counts", "shares", "share") if known in reader.members), None)
    if name is None or name not in reader.members:
        found = ", ".join(sorted(reader.members)[:8])
        raise reader.error(f"it has no {name or 'topk_ids, counts or shares'} (its arrays: {found}); name one with --array")
    shape, kind = reader.members[name].shape, reader.members[name].dtype.kind
    is_tokens = name == "topk_ids"
    if kind not in ("i" if is_tokens else "if") or len(shape) < 3 or (is_tokens and len(shape) != 3) or 0 in shape:
        raise reader.error(f"{name} is {reader.members[name].dtype} {shape}, neither tokens [T, L, K] nor loads [..., L, E]")
    if num_ranks is None:
        raise ValueError(f"{reader.path} does not say how many ranks there are; give --ranks or --topology")
    top_k = shape[2] if is_tokens else sizes.top_k or said.get("top_k")
    num_experts = sizes.num_experts or said.get("n_experts", said.get("num_experts")) if is_tokens else shape[-1]
    if num_experts is None or top_k is None:
        raise ValueError(f"{reader.path} does not say its experts and top-k; give --experts and --top-k")
    meta = TraceMeta(
        num_layers=shape[-2] if not is_tokens else shape[1],
        num_experts=num_experts,
        top_k=top_k,
        num_ranks=check_positive_int("ranks", num_ranks),
        source=str(said.get("source", said.get("model", "")))[:200] or Path(reader.path).name,
    )
    tokens_per_step = tokens_per_step or _DEFAULT_TOKENS
    if is_tokens:
        return TokenFile(reader, meta, tokens_per_step, shuffle_seed)
    return CountFile(reader, name, meta, tokens_per_step)


def _read_foreign_meta(reader: NpzReader) -> dict[str, Any]:
    """Return what the file's `meta` says as JSON; nothing where it has none that can be read."""
    member = reader.members.get("meta")
    if member is None or member.dtype.kind != "U" or member.shape:
        return {}
    try:
        said = json.loads(str(reader.array("meta", _MAX_META_BYTES)))
    except RecursionError:
        return {}
    except json.JSONDecodeError:
        return {}
    return said if isinstance(said, dict) else {}
