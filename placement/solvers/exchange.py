"""Owners of layers by exchanges of experts, without copies: a tabu search of each layer (exchange_numba.py).

Every rank keeps its number of each layer's experts, so all that couples the layers is what the busiest rank sends: it costs a
step as much as every rank's moves of all layers take together. Layers are searched with the moves of the mean rank first, then
again, one after the other, with those of the busiest. Shape letters: L layers, R ranks, E experts.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from ..cost import prices_of
from ..owners import OwnerMap
from ..values import Problem

if TYPE_CHECKING:
    from .exchange_numba import Layer

# Exchanges priced, per (layer, expert, rank), and over all layers at most.
_TRIES_PER_STATE, _MOST_TRIES = 800, 400_000_000
# Rounds over all layers with the moves of the busiest rank, and the share of the exchanges that one of them prices.
_LEVEL_ROUNDS, _LEVEL_SHARE = 2, 0.25


def search_owners(problems: Sequence[Problem], *, effort: float = 1.0) -> OwnerMap:
    """Owners of each layer by itself, from the present ones, by the seconds without copies. `effort` scales the search."""
    owner_LE, no_others_R = np.stack([problem.expert_to_owner_E for problem in problems]), np.zeros(0)
    for problem, owner_E in zip(problems, owner_LE, strict=True):
        _search(problem, owner_E, no_others_R, _tries(problems, effort))
    return OwnerMap(owner_LE, problems[0].num_ranks)


def level_moves(problems: Sequence[Problem], owners: OwnerMap, *, effort: float = 1.0) -> OwnerMap:
    """Better owners from these on, where the experts that the busiest rank sends over all layers count; never worse by that."""
    owner_LE, num_ranks = owners.expert_to_owner_LE.copy(), owners.num_ranks
    current_LE = np.stack([problem.expert_to_owner_E for problem in problems])
    for _ in range(_LEVEL_ROUNDS):
        for layer, problem in enumerate(problems):
            is_other_LE = owner_LE != current_LE
            is_other_LE[layer] = False
            others_R = np.bincount(current_LE[is_other_LE], minlength=num_ranks).astype(np.float64)
            _search(problem, owner_LE[layer], others_R, _tries(problems, effort * _LEVEL_SHARE))
    return OwnerMap(owner_LE, num_ranks)


def _tries(problems: Sequence[Problem], effort: float) -> int:
    states = problems[0].num_experts * problems[0].num_ranks
    return max(1, int(min(_TRIES_PER_STATE * states, _MOST_TRIES // len(problems)) * effort))


def _search(problem: Problem, owner_E: np.ndarray, others_R: np.ndarray, tries: int) -> None:
    if problem.num_ranks == 1:
        return
    from .exchange_numba import search

    search(_layer_of(problem, others_R), owner_E, tries)


def _layer_of(problem: Problem, others_R: np.ndarray) -> Layer:
    from .exchange_numba import Layer

    topology, load, totals_E = problem.topology, problem.load.load_ER, problem.load.totals_E
    load_EN = load.reshape(problem.num_experts, topology.num_nodes, topology.ranks_per_node).sum(axis=2)
    work_E = totals_E + topology.half_rate_rows * (totals_E > 0)
    floats = (np.ascontiguousarray(array, dtype=np.float64) for array in (load, load_EN, totals_E, work_E))
    costs = (topology.cost_R.astype(np.float64), topology.node_cost_N.astype(np.float64))
    return Layer(*floats, problem.expert_to_owner_E.copy(), topology.node_of_rank_R.copy(), *costs, others_R, prices_of(problem))
