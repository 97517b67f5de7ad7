"""Recordings of single tokens: ids of their experts, or bool routing maps, cut into steps and split over ranks in blocks.

An id stands for no expert where it is -1, what -1 becomes in an unsigned type (255, 65,535, ...), or named so by the user;
recorders fill with it what was padded or dropped. Recorders that fill with zeros leave K zeros, which no routing gives: no token
chooses an expert twice. Layers without any expert are those of dense layers, and are left out.
Shape letters: L layers, R ranks, E experts, K top-k, T tokens, M layers of the recording.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Protocol

import numpy as np

from ..content import check_positive_int
from .format import TraceMeta

# What -1 becomes in an unsigned type.
_MINUS_ONES = (-1, (1 << 8) - 1, (1 << 16) - 1, (1 << 32) - 1)
# Cells of a block that is held at once, with its temporaries.
_BLOCK_CELLS = 1 << 21
_MAX_PAIR_CELLS = 1 << 24


class TokenArray(Protocol):
    """Values of single tokens in the order of their dims: ids [T, M, K] or maps [T, M, E]."""

    name: str
    shape: tuple[int, ...]

    def rows(self, count: int) -> Iterator[np.ndarray]:
        """Yield blocks of `count` tokens, the last one shorter."""

    def whole(self) -> np.ndarray:
        """Return all tokens."""

    def error(self, problem: str) -> ValueError:
        """The one line for an array that cannot be used."""


@dataclass(frozen=True, kw_only=True)
class Cells:
    """How a recording's values are read: turned into ids of `num_experts` experts, -1 for none, and checked.

    is_map: the values are bool maps. top_k: most experts of a token, None for as many as there are. none_ids: what stands for no
    expert. is_foreign: K zeros stand for no expert, and any other id twice is an error. layers: the recording's layers that are
    kept, None for all.
    """

    num_experts: int
    is_map: bool = False
    top_k: int | None = None
    none_ids: tuple[int, ...] = ()
    is_foreign: bool = False
    layers: tuple[int, ...] | None = None

    def read(self, array: TokenArray, values: np.ndarray, first_token: int) -> np.ndarray:
        """Return a block's ids, int64 [T, L, K]; ValueError at the first that cannot come from routing."""
        if self.layers is not None:
            values = values[:, self.layers]
        if self.is_map:
            ids_TLK = _ids_of_map(array, values)
        else:
            ids_TLK = self._ids(array, values, first_token)
            if self.is_foreign:
                self._check_once(array, ids_TLK, first_token)
        if self.top_k is not None and ids_TLK.shape[2] > self.top_k:
            named_TL = (ids_TLK >= 0).sum(axis=2)
            if (named_TL > self.top_k).any():
                where, named = self._where(named_TL > self.top_k, first_token), int(named_TL.max())
                raise array.error(f"{array.name} names up to {named} experts ({where}), top-k is {self.top_k}; correct --top-k")
        return ids_TLK

    def _where(self, wrong_TL: np.ndarray, first_token: int) -> str:
        token, layer = np.argwhere(wrong_TL)[0][:2]
        return f"token {first_token + token}, layer {layer if self.layers is None else self.layers[layer]}"

    def _ids(self, array: TokenArray, values_TLK: np.ndarray, first_token: int) -> np.ndarray:
        if values_TLK.dtype.kind == "f":
            broken_TLK = ~np.isfinite(values_TLK) | (values_TLK != np.rint(values_TLK))
            if broken_TLK.any():
                value, where = float(values_TLK[broken_TLK][0]), self._where(broken_TLK, first_token)
                raise array.error(f"{array.name} holds {value:g} ({where}); ids of experts are whole numbers")
        # 2**64 - 1 is -1 again.
        ids_TLK = values_TLK.astype(np.int64)
        outside_TLK = (ids_TLK < 0) | (ids_TLK >= self.num_experts)
        if outside_TLK.any():
            wrong_TLK = outside_TLK & ~np.isin(ids_TLK, self.none_ids)
            if wrong_TLK.any():
                value = int(values_TLK[wrong_TLK][0])
                raise array.error(
                    f"{array.name} holds expert {value} ({self._where(wrong_TLK, first_token)}), outside 0 to "
                    f"{self.num_experts - 1}; correct --experts, or give --none {value} if it stands for no expert"
                )
            ids_TLK[outside_TLK] = -1
        if self.is_foreign and ids_TLK.shape[2] > 1:
            ids_TLK[(ids_TLK == 0).all(axis=2)] = -1
        return ids_TLK

    def _check_once(self, array: TokenArray, ids_TLK: np.ndarray, first_token: int) -> None:
        """Raise ValueError if a token names an expert twice."""
        sorted_TLK = np.sort(ids_TLK, axis=2)
        twice_TLK = (sorted_TLK[:, :, 1:] == sorted_TLK[:, :, :-1]) & (sorted_TLK[:, :, 1:] >= 0)
        if twice_TLK.any():
            expert = int(sorted_TLK[:, :, 1:][twice_TLK][0])
            raise array.error(
                f"{array.name} names expert {expert} twice ({self._where(twice_TLK, first_token)}), but a token chooses other "
                "experts; correct the recording, or give --axes SLE if these are loads"
            )


def _ids_of_map(array: TokenArray, map_TLE: np.ndarray) -> np.ndarray:
    """Turn a routing map into ids, int64 [T, L, K]: as many slots as the fullest row needs, -1 in those left over."""
    if map_TLE.dtype != np.bool_ and not np.isin(map_TLE, (0, 1)).all():
        raise array.error(f"{array.name} is a routing map, but holds more than 0 and 1")
    named_TL = np.count_nonzero(map_TLE, axis=2)
    ids_TLK = np.full((*named_TL.shape, max(1, int(named_TL.max(initial=0)))), -1, dtype=np.int64)
    token_N, layer_N, expert_N = np.nonzero(map_TLE)
    before_TL = (np.cumsum(named_TL) - named_TL.ravel()).reshape(named_TL.shape)
    ids_TLK[token_N, layer_N, np.arange(expert_N.size) - before_TL[token_N, layer_N]] = expert_N
    return ids_TLK


@dataclass
class _Seen:
    """What a recording holds: experts named by layer, slots without one, rows of zeros, padding."""

    named_M: np.ndarray
    zero_rows_M: np.ndarray
    most_named: int = 0
    padding: int = 0
    none_ids: set[int] = field(default_factory=set)

    def add(self, ids_TMK: np.ndarray, values: np.ndarray, is_map: bool) -> None:
        """Take in a block: its ids, and the values they were read from."""
        named_TM = (ids_TMK >= 0).sum(axis=2)
        self.named_M += named_TM.sum(axis=0)
        self.most_named = max(self.most_named, int(named_TM.max(initial=0)))
        self.padding += int((named_TM.sum(axis=1) == 0).sum())
        if not is_map and (named_TM < ids_TMK.shape[2]).any():
            unnamed = values[ids_TMK < 0]
            self.zero_rows_M += ((named_TM == 0) & (values == 0).all(axis=2)).sum(axis=0)
            self.none_ids |= set(np.unique(unnamed[unnamed != 0]).tolist())


@dataclass(frozen=True, kw_only=True)
class Survey:
    """What one reading of all tokens found: how to read them from now on, what the meta says, a line for what was not plain.

    layers: the recording's layers that are kept; empty where all are.
    """

    cells: Cells
    top_k: int
    is_dropped: bool
    layers: tuple[int, ...]
    notes: tuple[str, ...]


def survey(array: TokenArray, cells: Cells) -> Survey:
    """Read a foreign recording once, and check all of it."""
    num_tokens, num_recorded = array.shape[:2]
    cells = replace(cells, none_ids=(*_MINUS_ONES, *cells.none_ids), is_foreign=True)
    seen = _Seen(np.zeros(num_recorded, dtype=np.int64), np.zeros(num_recorded, dtype=np.int64))
    for first, values in _blocks(array, num_tokens):
        seen.add(cells.read(array, values, first), values, cells.is_map)
    kept = np.flatnonzero(seen.named_M)
    if not kept.size:
        raise array.error(f"{array.name} names no expert in any of its {num_tokens} tokens")
    top_k = cells.top_k or (seen.most_named if cells.is_map else array.shape[2])
    layers = tuple(kept.tolist()) if kept.size < num_recorded else ()
    notes = [left_out_layers(array.name, num_recorded, layers)] if layers else []
    named, expected = int(seen.named_M.sum()), num_tokens * kept.size * top_k
    if named != expected:
        notes.append(_dropped_note(array, seen, kept, named, expected, top_k))
    cells = replace(cells, top_k=top_k, layers=layers or None)
    return Survey(cells=cells, top_k=top_k, is_dropped=named != expected, layers=layers, notes=tuple(notes))


def _dropped_note(array: TokenArray, seen: _Seen, kept: np.ndarray, named: int, expected: int, top_k: int) -> str:
    why = [f"ids {', '.join(map(str, sorted(seen.none_ids)))} stand for none"] if seen.none_ids else []
    if seen.zero_rows_M[kept].any():
        why.append(f"{int(seen.zero_rows_M[kept].sum()):,} rows of zeros are taken as not recorded")
    if seen.padding:
        why.append(f"{seen.padding:,} tokens name no expert in any layer")
    if seen.most_named < top_k:
        why.append(f"no token names more than {seen.most_named}: if that is the model's top-k, give --top-k {seen.most_named}")
    reasons = f" ({'; '.join(why)})" if why else ""
    return f"{array.name} lacks {expected - named:,} of {expected:,} assignments, kept as dropped{reasons}"


def left_out_layers(name: str, num_recorded: int, layers: tuple[int, ...]) -> str:
    """The line that says which layers of a recording are not in its trace."""
    missing = sorted(set(range(num_recorded)) - set(layers))
    runs: list[list[int]] = []
    for layer in missing:
        if runs and runs[-1][1] == layer - 1:
            runs[-1][1] = layer
        else:
            runs.append([layer, layer])
    listed = ", ".join(str(first) if first == last else f"{first} to {last}" for first, last in runs)
    return (
        f"{name} has no load in layer{'s' if len(missing) > 1 else ''} {listed} of {num_recorded} (dense layers): left out; "
        "the meta's layers keep the numbers of the others"
    )


def _blocks(array: TokenArray, step_tokens: int, order: np.ndarray | None = None) -> Iterator[tuple[int, np.ndarray]]:
    """Yield (first token, values) of blocks that are small, and cross no border between steps of `step_tokens`."""
    count = max(1, min(step_tokens, _BLOCK_CELLS // math.prod(array.shape[1:])))
    blocks = array.rows(count)
    if order is not None:
        whole = array.whole()
        blocks = (whole[order[start : start + count]] for start in range(0, len(order), count))
    first = 0
    for values in blocks:
        end = first + len(values)
        border = end - end % step_tokens
        if first < border < end:
            yield first, values[: border - first]
            yield border, values[border - first :]
        else:
            yield first, values
        first = end


@dataclass(frozen=True)
class TokenFile:
    """Single tokens cut into steps of `tokens_per_step`, each split over ranks in consecutive blocks.

    Tokens left over at the end make no step. With `shuffle_seed` they are mixed first, as a training loader mixes documents.
    """

    path: Path
    array: TokenArray
    cells: Cells
    meta: TraceMeta
    tokens_per_step: int
    shuffle_seed: int | None = None
    notes: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        check_positive_int("tokens per step", self.tokens_per_step)
        if not self.num_steps:
            raise ValueError(
                f"{self.path} holds {self._num_tokens} tokens, less than one step of {self.tokens_per_step}; "
                "lower --tokens-per-step"
            )

    @property
    def _num_tokens(self) -> int:
        return self.array.shape[0]

    @property
    def num_steps(self) -> int:
        """Whole steps in the file."""
        return self._num_tokens // self.tokens_per_step

    @cached_property
    def tokens_SR(self) -> np.ndarray | None:
        """Tokens of every step and rank, int64 [S, R], where assignments were dropped; None where none was."""
        if not self.meta.dropped:
            return None
        return np.tile(np.bincount(self._rank_T, minlength=self.meta.num_ranks), (self.num_steps, 1))

    @property
    def _rank_T(self) -> np.ndarray:
        """The rank of each token of a step."""
        return np.arange(self.tokens_per_step) * self.meta.num_ranks // self.tokens_per_step

    def _step_blocks(self) -> Iterator[tuple[int, np.ndarray]]:
        """Yield (first token, ids [T, L, K]) of blocks of every whole step."""
        order = None
        if self.shuffle_seed is not None:
            order = np.random.default_rng(self.shuffle_seed).permutation(self._num_tokens)
        for first, values in _blocks(self.array, self.tokens_per_step, order):
            if first < self.num_steps * self.tokens_per_step:
                yield first, self.cells.read(self.array, values, first)

    def steps(self) -> Iterator[np.ndarray]:
        """Yield every step's loads, int64 [L, R, E]."""
        num_layers, num_ranks, num_experts = self.meta.step_shape
        rank_T, num_cells = self._rank_T, math.prod(self.meta.step_shape)
        layer_L1 = np.arange(num_layers)[:, None]
        loads = np.zeros(num_cells, dtype=np.int64)
        for first, ids_TLK in self._step_blocks():
            start = first % self.tokens_per_step
            rank_T11 = rank_T[start : start + len(ids_TLK), None, None]
            cell_TLK = (layer_L1 * num_ranks + rank_T11) * num_experts + ids_TLK
            loads += np.bincount(cell_TLK[ids_TLK >= 0], minlength=num_cells)
            if start + len(ids_TLK) == self.tokens_per_step:
                yield loads.reshape(self.meta.step_shape)
                loads = np.zeros(num_cells, dtype=np.int64)

    def pair_counts(self) -> np.ndarray:
        """Count the tokens that follow expert i in layer l by expert j in layer l + 1: int64 [L - 1, E, E]."""
        num_layers, _, num_experts = self.meta.step_shape
        if num_layers * num_experts**2 > _MAX_PAIR_CELLS:
            raise ValueError(f"pair counts of {num_layers} layers x {num_experts} experts are above {_MAX_PAIR_CELLS} cells")
        pairs_LEE = np.zeros((num_layers - 1, num_experts, num_experts), dtype=np.int64)
        for _, ids_TLK in self._step_blocks():
            for layer in range(num_layers - 1):
                before_TK1, after_T1K = ids_TLK[:, layer, :, None], ids_TLK[:, layer + 1, None, :]
                cell_TKK = before_TK1 * num_experts + after_T1K
                found = cell_TKK[(before_TK1 >= 0) & (after_T1K >= 0)]
                pairs_LEE[layer] += np.bincount(found, minlength=num_experts**2).reshape(num_experts, num_experts)
        return pairs_LEE
