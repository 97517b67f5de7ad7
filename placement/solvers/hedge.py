"""Plans that withstand several loads: of several solvers' copies, and of copies for all loads, those of the fewest mean seconds.

A plan for one load, the mean of a recording say, makes the copies that this load needs and no other. Here the candidates are such
plans, and the copies that `balance` makes on their owners for all loads together, in the order of their use: on up to as many
slots of a rank as there are, with limits to what one rank sends, and cut off after some. Each is priced for every load as the
cost model prices a step.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from time import perf_counter
from types import MappingProxyType

import numpy as np

from ..cost import Solution, cost, prices_of, solution
from ..split import split_exact
from ..values import Placement, Problem
from . import balance, quota
from .baselines import eplb, laer

# Lengths of the list of copies that are tried, at equal distances; and most loads that candidates are priced for.
_CUTS, _MOST_PRICED = 8, 96
# Loads that `balance` samples, and the most cells of their splits, [S, R, E], of 8 bytes.
_SAMPLED, _MOST_CELLS = 1024, 1 << 24

HEDGED: Mapping[str, tuple[Callable[[Problem], Solution], ...]] = MappingProxyType(
    {"quota": (laer.solve,), "joint": (quota.solve, laer.solve, eplb.solve), "milp": (quota.solve, laer.solve, eplb.solve)}
)
"""Solvers that plan for one load, and whose plans for scenarios are hedged; with others whose placements are candidates too."""


def solve_hedged(problem: Problem, name: str, solver: Callable[[Problem], Solution]) -> Solution:
    """Solve a problem that may have scenarios by the named solver, and choose from its placement and others for all loads.

    The answer's cost, bound and gap are for `problem.load`.
    """
    if problem.scenarios_SE is not None and name == "balance":
        return balance.solve(problem, _num_sampled(problem))
    if problem.scenarios_SE is None or name not in HEDGED:
        return solver(problem)
    sure = replace(problem, scenarios_SE=None, forecast_error=0.0)
    found, owned_R = solver(sure), np.bincount(problem.expert_to_owner_E, minlength=problem.num_ranks)
    others = [solve(sure).placement for solve in HEDGED[name]]
    # A rank keeps its number of experts, as bounds and memory assume.
    kept = [p for p in others if (np.bincount(p.expert_to_owner_E, minlength=problem.num_ranks) == owned_R).all()]
    return hedged(problem, found, [found.placement, *kept])


def _num_sampled(problem: Problem) -> int:
    return max(min(_SAMPLED, _MOST_CELLS // problem.load.load_RE.size), 1)


def hedged(problem: Problem, found: Solution, starts: Sequence[Placement]) -> Solution:
    """Return the best placement that `hedge` finds, with the bound of `found` and its cost for `problem.load` alone."""
    if problem.scenarios_SE is None:
        return found
    start, placement = perf_counter(), hedge(problem, starts)
    if placement == found.placement:
        return found
    seconds = cost(problem, placement, split_exact(problem.load, placement, problem.topology))
    return solution(placement, seconds, found.bound, found.seconds + perf_counter() - start, found.solver)


def hedge(problem: Problem, starts: Sequence[Placement]) -> Placement:
    """Return the placement of the fewest mean seconds over the problem's loads: of `starts` and other copies on their owners."""
    totals_SE = balance.loads_of(problem, _num_sampled(problem))
    best: tuple[float, Placement] | None = None
    for owners in dict.fromkeys(start.expert_to_owner_E.tobytes() for start in starts):
        placed = [start for start in starts if start.expert_to_owner_E.tobytes() == owners]
        seconds, placement = _best_copies(problem, placed, totals_SE)
        if best is None or seconds < best[0]:
            best = seconds, placement
    assert best is not None, "a placement to start from is missing"
    return best[1]


def _best_copies(problem: Problem, starts: Sequence[Placement], totals_SE: np.ndarray) -> tuple[float, Placement]:
    """The best copies for owners that all of `starts` share, with their mean seconds, moves of owners included."""
    # Imported here so that importing the package compiles nothing.
    from . import hedge_numba, score_numba

    owner_E, num_ranks = starts[0].expert_to_owner_E, problem.num_ranks
    moved = replace(problem, expert_to_owner_E=owner_E)
    copies = [np.stack(np.nonzero(start.copies_RE.T)) for start in starts] + [np.empty((2, 0), dtype=np.int64)]
    for slots in range(1, problem.slots + 1):
        budget = replace(moved, slots=slots)
        for sent in (1 << i for i in range((slots * num_ranks).bit_length())):
            copies_2C = balance.copies_for(budget, totals_SE, sent)
            copies += [copies_2C[:, : -(-copies_2C.shape[1] * cut // _CUTS)] for cut in range(1, _CUTS + 1)]
            if copies_2C.size and np.bincount(owner_E[copies_2C[0]]).max() < sent:
                break
    sizes_P = np.array([copies_2C.shape[1] for copies_2C in copies])
    copies_P2C = np.zeros((len(copies), 2, max(sizes_P.max(), 1)), dtype=np.int64)
    for table_2C, copies_2C in zip(copies_P2C, copies, strict=True):
        table_2C[:, : copies_2C.shape[1]] = copies_2C
    priced_SE = np.ascontiguousarray(totals_SE[:: -(-len(totals_SE) // _MOST_PRICED)])
    layer = score_numba.layer_of(moved)
    seconds_P = hedge_numba.seconds_of_plans(layer, priced_SE, prices_of(moved), copies_P2C, sizes_P) / len(priced_SE)
    best = min(range(len(copies)), key=lambda p: (seconds_P[p], sizes_P[p], p))
    placement = Placement.with_copies(owner_E, num_ranks, copies[best])
    moves_s = cost(problem, placement, split_exact(problem.load, placement, problem.topology)).move_s
    return seconds_P[best] + moves_s, placement
