"""Placements that only exchange owners: longest processing time first, and SmartMoE's guarded form of it.

Every rank keeps its number of experts. Without copies no such placement has fewer rows on the busiest rank than the busiest
expert.
"""

from __future__ import annotations

from time import perf_counter

import numpy as np

from ...cost import Solution, evaluate
from ...values import Placement, Problem


def by_load(totals_E: np.ndarray, current_E: np.ndarray, num_ranks: int, *, keep_on_tie: bool) -> np.ndarray:
    """Assign experts, largest first, to the least loaded rank that owns fewer than in `current_E`; return the owners [E].

    Ties go to the current owner if `keep_on_tie`, and otherwise to the lowest rank.
    """
    free_R = np.bincount(current_E, minlength=num_ranks)
    rows_R = np.zeros(num_ranks, dtype=np.int64)
    owner_E = np.empty_like(current_E)
    for expert in np.argsort(-totals_E, kind="stable"):
        open_R = np.flatnonzero(free_R)
        rank = int(open_R[np.argmin(rows_R[open_R])])
        kept = int(current_E[expert])
        if keep_on_tie and free_R[kept] and rows_R[kept] == rows_R[rank]:
            rank = kept
        owner_E[expert] = rank
        free_R[rank] -= 1
        rows_R[rank] += totals_E[expert]
    return owner_E


def solve_lpt(problem: Problem) -> Solution:
    """Migrate by longest processing time first (Graham 1969 with a cardinality cap), whatever the moves cost."""
    start = perf_counter()
    owner_E = by_load(problem.load.totals_E, problem.expert_to_owner_E, problem.num_ranks, keep_on_tie=False)
    placement = Placement.owners_only(owner_E, problem.num_ranks)
    return evaluate(problem, placement, start, "lpt", owners_may_move=True)


def solve_smartmoe(problem: Problem) -> Solution:
    """Migrate as SmartMoE (ATC 2023) does: keep the old rank on a tie, accept only if the busiest rank's rows decrease."""
    start = perf_counter()
    owner_E = by_load(problem.load.totals_E, problem.expert_to_owner_E, problem.num_ranks, keep_on_tie=True)
    rows_R = np.zeros(problem.num_ranks, dtype=np.int64)
    np.add.at(rows_R, owner_E, problem.load.totals_E)
    if rows_R.max() >= problem.owned_rows_R.max():
        owner_E = problem.expert_to_owner_E
    placement = Placement.owners_only(owner_E, problem.num_ranks)
    return evaluate(problem, placement, start, "smartmoe", owners_may_move=True)
