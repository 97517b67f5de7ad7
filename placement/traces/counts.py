"""Recordings of loads: counts or shares by layer and expert, of one step for each leading index, with or without source ranks.

Whole numbers are counts, also in float arrays, and are kept exactly. Others are shares: each step's become the assignments of
`tokens_per_step` tokens. Layers without load in any step are those of dense layers, steps without load are unused parts of a
recorder's buffer; both are left out. Tokens of a step are as many as its fullest layer needs; what other layers lack was dropped.
Shape letters: S steps, L layers, R ranks, E experts, M layers of the recording.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from ..content import MAX_TOTAL
from .dealing import apportion, deal, split_tokens
from .format import TraceMeta
from .tokens import left_out_layers

_MAX_SHARED = int(np.iinfo(np.int32).max)


class LoadArray(Protocol):
    """Loads in the order of their dims, [S, M, E] or, with source ranks, [S, M, R, E]."""

    name: str
    shape: tuple[int, ...]
    dtype: np.dtype[Any]

    def rows(self, count: int) -> Iterator[np.ndarray]:
        """Yield blocks of about `count` steps."""

    def error(self, problem: str) -> ValueError:
        """The one line for an array that cannot be used."""


@dataclass(frozen=True, kw_only=True)
class Survey:
    """What one reading of all loads found: the steps and layers that hold any, the tokens of each kept step (and rank).

    layers is empty where all are kept. tokens_SR has one rank where the recording has none. are_shares: the loads are no counts.
    """

    steps: np.ndarray
    layers: tuple[int, ...]
    tokens_SR: np.ndarray
    are_shares: bool
    is_dropped: bool
    notes: tuple[str, ...]


def _steps(array: LoadArray) -> Iterator[np.ndarray]:
    """Yield every step's loads, [M, R, E], one rank where the recording has none."""
    num_layers, num_experts = array.shape[1], array.shape[-1]
    for block in array.rows(1):
        yield from block.reshape(-1, num_layers, array.shape[2] if len(array.shape) == 4 else 1, num_experts)


def survey(array: LoadArray, top_k: int, tokens_per_step: int, *, as_shares: bool) -> Survey:
    """Read all loads once, and check them. as_shares: take them as shares even if they are whole numbers."""
    sums, odd = [], None
    for step, loads_MRE in enumerate(_steps(array)):
        _check_step(array, loads_MRE, step)
        if odd is None and loads_MRE.dtype.kind == "f" and (loads_MRE != np.rint(loads_MRE)).any():
            odd = (step, *np.argwhere(loads_MRE != np.rint(loads_MRE))[0].tolist(), loads_MRE)
        sums.append(loads_MRE.sum(axis=2, dtype=np.float64 if loads_MRE.dtype.kind == "f" else np.int64))
    sums_SMR = np.stack(sums)
    kept_S, kept_L = np.flatnonzero(sums_SMR.any(axis=(1, 2))), np.flatnonzero(sums_SMR.any(axis=(0, 2)))
    if not kept_S.size:
        raise array.error(f"{array.name} holds no load at all, only zeros")
    notes = _left_out(array, kept_S, kept_L)
    kept_SLR = sums_SMR[kept_S][:, kept_L]
    are_shares = as_shares or odd is not None
    if are_shares:
        why = "--shares or its name say so"
        if odd is not None:
            step, layer, rank, expert, loads = odd
            why = f"it holds {loads[layer, rank, expert]:g} (step {step}, layer {layer}, expert {expert})"
        notes.append(_check_shares(array, kept_SLR, kept_S, kept_L, top_k, tokens_per_step, why))
        tokens_SR = np.full((kept_S.size, 1), tokens_per_step)
    else:
        kept_SLR = kept_SLR.astype(np.int64)
        tokens_SR = -(-kept_SLR.max(axis=1) // top_k)
        notes += _count_notes(array, kept_SLR, tokens_SR, top_k)
    is_dropped = not are_shares and bool((kept_SLR != tokens_SR[:, None] * top_k).any())
    layers = tuple(kept_L.tolist()) if kept_L.size < array.shape[1] else ()
    return Survey(
        steps=kept_S, layers=layers, tokens_SR=tokens_SR, are_shares=are_shares, is_dropped=is_dropped, notes=tuple(notes)
    )


def _check_step(array: LoadArray, loads_MRE: np.ndarray, step: int) -> None:
    """Raise ValueError if one step holds what is no load."""
    wrong = loads_MRE < 0 if loads_MRE.dtype.kind != "f" else ~np.isfinite(loads_MRE) | (loads_MRE < 0)
    if wrong.any():
        layer, rank, expert = np.argwhere(wrong)[0]
        of_rank = f"rank {rank}, " if len(array.shape) == 4 else ""
        raise array.error(
            f"{array.name} holds {loads_MRE[layer, rank, expert]} (step {step}, layer {layer}, {of_rank}expert {expert}): "
            "loads are finite and not negative"
        )
    if loads_MRE.sum(axis=(1, 2), dtype=np.float64).max() > MAX_TOTAL:
        layer = int(loads_MRE.sum(axis=(1, 2), dtype=np.float64).argmax())
        raise array.error(
            f"{array.name} sums to {loads_MRE[layer].sum(dtype=np.float64):.3g} (step {step}, layer {layer}), above {MAX_TOTAL}; "
            "divide it, and give --shares"
        )


def _left_out(array: LoadArray, kept_S: np.ndarray, kept_L: np.ndarray) -> list[str]:
    notes = [left_out_layers(array.name, array.shape[1], tuple(kept_L.tolist()))] if kept_L.size < array.shape[1] else []
    if kept_S.size < array.shape[0]:
        empty = array.shape[0] - kept_S.size
        notes.append(f"{array.name} has no load in {empty:,} of {array.shape[0]:,} steps: left out")
    return notes


def _check_shares(
    array: LoadArray,
    sums_SLR: np.ndarray,
    kept_S: np.ndarray,
    kept_L: np.ndarray,
    top_k: int,
    tokens_per_step: int,
    why: str,
) -> str:
    """Return the line that says how shares are scaled; ValueError if they cannot be."""
    if len(array.shape) == 4:
        raise array.error(f"{array.name} is no count ({why}), and shares have no source ranks; sum it over its ranks first")
    if not sums_SLR.all():
        step, layer, _ = np.argwhere(sums_SLR == 0)[0]
        raise array.error(
            f"{array.name} is taken as shares ({why}), but has no load in step {kept_S[step]}, layer {kept_L[layer]}, where "
            "other steps have; leave the step out, or give whole counts"
        )
    if tokens_per_step * top_k > _MAX_SHARED:
        raise ValueError(f"{tokens_per_step} tokens per step x top-{top_k} are above {_MAX_SHARED}; lower --tokens-per-step")
    return (
        f"{array.name} is taken as shares ({why}): rescaled to {tokens_per_step:,} tokens x top-{top_k} = "
        f"{tokens_per_step * top_k:,} assignments a layer and step (--tokens-per-step)"
    )


def _count_notes(array: LoadArray, sums_SLR: np.ndarray, tokens_SR: np.ndarray, top_k: int) -> list[str]:
    """Say what is not plain about counts; ValueError where they are of another top-k."""
    notes = []
    exact = {"f": {2: 1 << 11, 4: 1 << 24}}.get(array.dtype.kind, {}).get(array.dtype.itemsize)
    if exact is not None and sums_SLR.max() > exact:
        notes.append(
            f"{array.name} is {array.dtype}, whose counts above {exact:,} may have been rounded before; they are kept as they are"
        )
    # Whole numbers of Python: sums over steps may leave int64.
    total, num_tokens = sum(sums_SLR.sum(axis=(1, 2)).tolist()), sum(tokens_SR.sum(axis=1).tolist())
    expected = num_tokens * top_k * sums_SLR.shape[1]
    if total == expected:
        return notes
    # Layers that agree on a number of assignments dropped none: their tokens are of another top-k.
    same = (sums_SLR == sums_SLR[:, :1]).all()
    if same and sums_SLR.shape[1] > 1:
        step, rank = np.argwhere(sums_SLR[:, 0] % top_k)[0]
        raise array.error(
            f"{array.name} counts {sums_SLR[step, 0, rank]} assignments in every layer of step {step}, not tokens x top-{top_k}; "
            "correct --top-k"
        )
    notes.append(
        f"{array.name} lacks {expected - total:,} of {expected:,} assignments ({num_tokens:,} tokens, as many as the "
        f"fullest layers need, x top-{top_k} in every layer), kept as dropped"
    )
    return notes


@dataclass(frozen=True)
class CountFile:
    """Loads of a foreign recording, as `found` by a survey: counts without ranks are dealt to those of `meta`."""

    path: Path
    array: LoadArray
    found: Survey
    meta: TraceMeta
    notes: tuple[str, ...] = ()

    @property
    def num_steps(self) -> int:
        """Steps that hold load."""
        return int(self.found.steps.size)

    @property
    def _has_ranks(self) -> bool:
        return len(self.array.shape) == 4

    @cached_property
    def tokens_SR(self) -> np.ndarray | None:
        """Tokens of every step and rank, int64 [S, R], where assignments were dropped; None where none was."""
        if not self.meta.dropped:
            return None
        return self.found.tokens_SR if self._has_ranks else split_tokens(self.found.tokens_SR[:, 0], self.meta.num_ranks)

    def steps(self) -> Iterator[np.ndarray]:
        """Yield every step's loads, int64 [L, R, E]."""
        wanted = set(self.found.steps.tolist())
        kept = (loads for step, loads in enumerate(_steps(self.array)) if step in wanted)
        for loads_MRE, tokens_R in zip(kept, self.found.tokens_SR, strict=True):
            loads_LRE = loads_MRE[list(self.found.layers)] if self.found.layers else loads_MRE
            if self._has_ranks:
                yield loads_LRE.astype(np.int64)
                continue
            counts_LE = loads_LRE[:, 0]
            if self.found.are_shares:
                counts_LE = apportion(counts_LE.astype(np.float64), int(tokens_R[0]) * self.meta.top_k)
            yield deal(
                counts_LE.astype(np.int64),
                self.meta.num_ranks,
                np.repeat(tokens_R, self.meta.num_layers),
                self.meta.top_k,
            )
