"""Static expert parallelism: the placement without copies."""

from __future__ import annotations

import time

from .cost import Solution, cost, lower_bound, solution
from .split import split_exact
from .values import Placement, Problem


def solve(problem: Problem) -> Solution:
    """Keep every expert at its owner only."""
    start = time.perf_counter()
    placement = Placement.owners_only(problem.expert_to_owner_E, problem.num_ranks)
    seconds = cost(problem, placement, split_exact(problem.load, placement, problem.topology))
    return solution(placement, seconds, lower_bound(problem), time.perf_counter() - start, "static")
