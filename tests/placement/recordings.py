"""Recordings of other systems, saved and opened, and their loads counted token by token."""

from pathlib import Path
from typing import Any

import numpy as np

from moesaic.placement.traces.foreign import Reading, Sizes
from moesaic.placement.traces.sources import LoadSource, open_source

NUM_EXPERTS = 6


def make_ids(num_tokens: int = 24, top_k: int = 2) -> np.ndarray:
    """Ids of different experts, int64 [T, 3, K]."""
    rng = np.random.default_rng(0)
    return np.stack([[rng.permutation(NUM_EXPERTS)[:top_k] for _ in range(3)] for _ in range(num_tokens)])


def make_counts(num_steps: int = 4, tokens: int = 8) -> np.ndarray:
    """Counts [S, 3, E] of tokens of top-2."""
    rng = np.random.default_rng(1)
    return rng.multinomial(tokens * 2, np.full(NUM_EXPERTS, 1 / NUM_EXPERTS), size=(num_steps, 3))


def open_saved(
    path: Path, num_ranks: int | None = 2, *, top_k: int | None = 2, experts: int | None = None, **given: Any
) -> LoadSource:
    """Save the arrays among what is given, and open them with the rest."""
    arrays = {name: value for name, value in given.items() if isinstance(value, np.ndarray)}
    options = {name: value for name, value in given.items() if name not in arrays}
    np.savez(path, **arrays)
    return open_source(path, num_ranks, Reading(**options), sizes=Sizes(top_k=top_k, num_experts=experts))


def loads_of(source: LoadSource) -> np.ndarray:
    """The loads of all steps, [S, L, R, E]."""
    return np.stack(list(source.steps()))


def naive_loads(ids_TLK: np.ndarray, num_ranks: int) -> np.ndarray:
    """Count token by token, negative ids left out: token t of T belongs to rank t * R // T."""
    loads_LRE = np.zeros((ids_TLK.shape[1], num_ranks, NUM_EXPERTS), dtype=np.int64)
    for token, ids_LK in enumerate(ids_TLK):
        for layer, ids_K in enumerate(ids_LK):
            for expert in ids_K:
                if expert >= 0:
                    loads_LRE[layer, token * num_ranks // len(ids_TLK), expert] += 1
    return loads_LRE


def changed(at: tuple[int, ...], value: float, array: np.ndarray) -> np.ndarray:
    """A copy with one value, or row, changed."""
    array = array.copy()
    array[at] = value
    return array
