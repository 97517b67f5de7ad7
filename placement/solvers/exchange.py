"""Owners of layers by exchanges of experts, without copies: a tabu search of each layer (exchange_numba.py).

Every rank keeps its number of each layer's experts, so what couples the layers is only that moves cost what the busiest rank
sends over all of them. Layers are searched with the moves of the mean rank first; then again with moves that cost more from
ranks that have sent more, in the manner of Lagrange multipliers. Shape letters: L layers, R ranks, E experts.
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
# Rounds over all layers that level moves, the share of the exchanges that one of them prices, and how fast the shares change.
_LEVEL_ROUNDS, _LEVEL_SHARE, _LEVEL_RATE = 8, 0.1, 1.0


def search_owners(problems: Sequence[Problem], *, effort: float = 1.0) -> OwnerMap:
    """Owners of each layer by itself, from the present ones, by the seconds without copies and the mean rank's moves.

    `effort` scales the search.
    """
    current, num_ranks = _current(problems), problems[0].num_ranks
    return _searched(problems, current, np.full(num_ranks, 1 / num_ranks), effort)


def level_moves(problems: Sequence[Problem], owners: OwnerMap, *, effort: float = 1.0) -> list[OwnerMap]:
    """Further owners, found from these on; of many, those under which all ranks send about as many experts."""
    current, share_R, answers = _current(problems), np.full(owners.num_ranks, 1 / owners.num_ranks), []
    for _ in range(_LEVEL_ROUNDS):
        sources = [move.src for move in current.moves_to(owners)]
        if not sources:
            break
        sent_R = np.bincount(sources, minlength=owners.num_ranks)
        share_R = share_R * np.exp(_LEVEL_RATE * (sent_R / sent_R.mean() - 1))
        share_R /= share_R.sum()
        owners = _searched(problems, owners, share_R, effort * _LEVEL_SHARE)
        answers.append(owners)
    return answers


def _current(problems: Sequence[Problem]) -> OwnerMap:
    return OwnerMap(np.stack([problem.expert_to_owner_E for problem in problems]), problems[0].num_ranks)


def _searched(problems: Sequence[Problem], owners: OwnerMap, share_R: np.ndarray, effort: float) -> OwnerMap:
    """Search every layer from these owners on, with so much of an expert counted that a rank sends."""
    owner_LE, num_ranks = owners.expert_to_owner_LE.copy(), owners.num_ranks
    if num_ranks > 1:
        from .exchange_numba import search

        tries = min(_TRIES_PER_STATE * owner_LE.size * num_ranks, _MOST_TRIES) * effort / len(problems)
        for problem, owner_E in zip(problems, owner_LE, strict=True):
            search(_layer_of(problem, share_R), owner_E, max(1, int(tries)))
    return OwnerMap(owner_LE, num_ranks)


def _layer_of(problem: Problem, share_R: np.ndarray) -> Layer:
    from .exchange_numba import Layer

    topology, load, totals_E = problem.topology, problem.load.load_ER, problem.load.totals_E
    load_EN = load.reshape(problem.num_experts, topology.num_nodes, topology.ranks_per_node).sum(axis=2)
    work_E = totals_E + topology.half_rate_rows * (totals_E > 0)
    return Layer(
        _as_floats(load),
        _as_floats(load_EN),
        _as_floats(totals_E),
        _as_floats(work_E),
        problem.expert_to_owner_E.copy(),
        topology.node_of_rank_R.copy(),
        _as_floats(topology.cost_R),
        _as_floats(topology.node_cost_N),
        share_R,
        prices_of(problem),
    )


def _as_floats(array: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(array, dtype=np.float64)
