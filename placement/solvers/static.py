"""Static expert parallelism: the placement without copies."""

from __future__ import annotations

from time import perf_counter

from ..cost import Solution, evaluate
from ..values import Placement, Problem


def solve(problem: Problem) -> Solution:
    """Keep every expert at its owner only."""
    start = perf_counter()
    return evaluate(problem, Placement.owners_only(problem.expert_to_owner_E, problem.num_ranks), start, "static")
