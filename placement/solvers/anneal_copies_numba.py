"""Simulated annealing over copies and owners, priced under the exact split: the exact planner's incumbents.

Proposals: empty a slot of a rank, fill it with any expert or with another one of the same owner, exchange two ranks' slots, or
exchange the owners of two experts. The search ends after a number of proposals, not a time, and its random seed is constant, so a
run repeats exactly. The method is the textbook one (Kirkpatrick et al. 1983) with a geometric schedule; equal costs are always
accepted, because a maximum has wide plateaus. Shape letters: R ranks, E experts, S slots. Import this module lazily: it imports
numba, and a first call compiles.
"""
# mypy: disable-error-code=no-untyped-def
# Numba infers the types of compiled functions.

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from ...jit.decorators import njit
from ..cost import Prices, prices_of, seconds_of
from ..values import Placement, Problem
from .random_numba import draw
from .score_numba import Layer, score, static_traffic

_price = njit(cache=True)(seconds_of)
# First and last temperature, as fractions of the initial cost.
_HOT, _COLD = 3e-3, 2e-5
_EMPTY = -1


class _Setting(NamedTuple):
    """Constants of a search. `current_E`: the present owners; `cost_R` and what follows as in `Topology`."""

    load_ER: np.ndarray
    totals_E: np.ndarray
    current_E: np.ndarray
    cost_R: np.ndarray
    node_cost_N: np.ndarray
    ranks_per_node: int
    half_rate_rows: int
    prices: Prices


@njit(cache=True)
def _busiest_moves(setting, owner_E, num_ranks):
    """Return the number of owner moves as cost.Tally counts them, of devices and of node links."""
    per_node = setting.ranks_per_node
    moves_2R = np.zeros((2, num_ranks), np.int64)
    moves_2N = np.zeros((2, num_ranks // per_node), np.int64)
    for expert in range(owner_E.size):
        src, dst = setting.current_E[expert], owner_E[expert]
        if src == dst:
            continue
        moves_2R[0, src] += 1
        moves_2R[1, dst] += 1
        if src // per_node != dst // per_node:
            moves_2N[0, src // per_node] += 1
            moves_2N[1, dst // per_node] += 1
    if setting.prices.mean_moves:
        return moves_2R[0].sum() / num_ranks, 0.0
    return float(moves_2R.max()), float((setting.node_cost_N * moves_2N).max())


@njit(cache=True)
def _cost(setting, owner_E, copy_RS):
    """Return the cost of one state in seconds."""
    num_ranks = copy_RS.shape[0]
    owned_R = np.zeros(num_ranks, np.int64)
    for expert in range(owner_E.size):
        owned_R[owner_E[expert]] += setting.totals_E[expert]
    copies_2C = np.empty((2, copy_RS.size), np.int64)
    count = 0
    for rank in range(num_ranks):
        for slot in range(copy_RS.shape[1]):
            if copy_RS[rank, slot] != _EMPTY:
                copies_2C[0, count] = copy_RS[rank, slot]
                copies_2C[1, count] = rank
                count += 1
    none = np.empty(0, np.int64)
    layer = Layer(
        setting.load_ER,
        setting.totals_E,
        owner_E,
        owned_R,
        setting.cost_R,
        setting.node_cost_N,
        none,
        none,
        none,
        setting.ranks_per_node,
        setting.half_rate_rows,
        copy_RS.shape[1],
    )
    tally_5 = np.empty(5, np.int64)
    score(layer, static_traffic(layer), copies_2C[:, :count], tally_5)
    moves = _busiest_moves(setting, owner_E, num_ranks)
    stages = _price(setting.prices, tally_5[0], tally_5[1], tally_5[2], tally_5[3], tally_5[4], moves[0], moves[1])
    return stages[0] + stages[1] + stages[2] + stages[3] + stages[4]


@njit(cache=True)
def _exchange_owners(first, second, owner_E, copy_RS):
    """Exchange two owners; a copy on the new owner's rank is removed."""
    a, b = owner_E[first], owner_E[second]
    owner_E[first], owner_E[second] = b, a
    for slot in range(copy_RS.shape[1]):
        if copy_RS[b, slot] == first:
            copy_RS[b, slot] = _EMPTY
        if copy_RS[a, slot] == second:
            copy_RS[a, slot] = _EMPTY


@njit(cache=True)
def _fits(owner_E, copy_RS, rank, expert):
    """Return whether a rank may hold a further copy of an expert (or of none)."""
    return expert == _EMPTY or (owner_E[expert] != rank and not (copy_RS[rank] == expert).any())


@njit(cache=True)
def _propose(state_1, move_owners, owner_E, copy_RS):
    """Change the state in place by one random step; return whether the result is a different, valid state."""
    num_ranks, slots = copy_RS.shape
    if move_owners and (slots == 0 or draw(state_1, 2)):
        first, second = draw(state_1, owner_E.size), draw(state_1, owner_E.size)
        if owner_E[first] == owner_E[second]:
            return False
        _exchange_owners(first, second, owner_E, copy_RS)
        return True
    if slots == 0:
        return False
    rank, slot = draw(state_1, num_ranks), draw(state_1, slots)
    kind, held = draw(state_1, 4), copy_RS[rank, slot]
    if kind == 0:
        copy_RS[rank, slot] = _EMPTY
        return held != _EMPTY
    if kind == 1:
        # Exchange two ranks' slots.
        other_rank, other_slot = draw(state_1, num_ranks), draw(state_1, slots)
        other = copy_RS[other_rank, other_slot]
        if other == held or not _fits(owner_E, copy_RS, rank, other) or not _fits(owner_E, copy_RS, other_rank, held):
            return False
        copy_RS[rank, slot], copy_RS[other_rank, other_slot] = other, held
        return True
    expert = draw(state_1, owner_E.size)
    if kind == 2 and held != _EMPTY:
        # Another expert of the same owner, which sends as many copies as before.
        while owner_E[expert] != owner_E[held]:
            expert = (expert + 1) % owner_E.size
    if not _fits(owner_E, copy_RS, rank, expert):
        return False
    copy_RS[rank, slot] = expert
    return True


@njit(cache=True, nogil=True)
def _anneal(setting, move_owners, proposals, owner_E, copy_RS, hot, cold, run):
    """Search from the given state; leave the best state found in owner_E and copy_RS, and return its cost."""
    state_1 = np.array([88172645463325252 + 7919 * run], np.uint64)
    now = best = _cost(setting, owner_E, copy_RS)
    now_E, now_RS = owner_E.copy(), copy_RS.copy()
    new_E, new_RS = owner_E.copy(), copy_RS.copy()
    temperature, cooling = best * hot, (cold / hot) ** (1 / max(proposals, 1))
    for _ in range(proposals):
        temperature *= cooling
        if not _propose(state_1, move_owners, new_E, new_RS):
            continue
        cost = _cost(setting, new_E, new_RS)
        uniform = (draw(state_1, 1 << 30) + 1) / (1 << 30)
        if cost <= now - temperature * np.log(uniform):
            now = cost
            now_E[:] = new_E
            now_RS[:, :] = new_RS
            if now < best:
                best = now
                owner_E[:] = now_E
                copy_RS[:, :] = now_RS
        else:
            new_E[:] = now_E
            new_RS[:, :] = now_RS
    return best


def improve(problem: Problem, placement: Placement, *, move_owners: bool, proposals: int, run: int = 0) -> Placement:
    """Return the best placement found by a search from `placement`, or `placement` itself; `run` selects the random seed.

    Slots are respected, and every rank owns as many experts as in `placement`.
    """
    owner_E = placement.expert_to_owner_E.copy()
    copy_RS = np.full((problem.num_ranks, problem.slots), _EMPTY, dtype=np.int64)
    for rank, copies_E in enumerate(placement.copies_RE):
        held = np.flatnonzero(copies_E)
        copy_RS[rank, : held.size] = held
    topology = problem.topology
    setting = _Setting(
        problem.load.load_ER,
        problem.load.totals_E,
        problem.expert_to_owner_E,
        topology.cost_R,
        topology.node_cost_N,
        topology.ranks_per_node,
        topology.half_rate_rows,
        prices_of(problem),
    )
    _anneal(setting, move_owners, proposals, owner_E, copy_RS, _HOT, _COLD, run)
    replicas_RE = Placement.owners_only(owner_E, problem.num_ranks).replicas_RE.copy()
    ranks, slots = np.nonzero(copy_RS != _EMPTY)
    replicas_RE[ranks, copy_RS[ranks, slots]] = True
    return Placement(owner_E, replicas_RE)
