"""Exhaustive search for tiny layers: every placement is priced; the oracle of the tests."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from time import perf_counter

import numpy as np

from ..cost import Solution, cost, evaluate
from ..split import split_exact
from ..values import Placement, Problem

_MOST_PLACEMENTS = 200_000


def _num_choices(foreign: int, slots: int) -> int:
    return sum(math.comb(foreign, size) for size in range(min(slots, foreign) + 1))


def every_placement(problem: Problem) -> Iterator[Placement]:
    """Yield every placement with the current owners and at most `slots` copies per rank, the one without copies first."""
    base_RE = Placement.owners_only(problem.expert_to_owner_E, problem.num_ranks).replicas_RE
    choices = []
    for owned_E in base_RE:
        foreign = np.flatnonzero(~owned_E).tolist()
        sizes = range(min(problem.slots, len(foreign)) + 1)
        choices.append([list(copies) for size in sizes for copies in itertools.combinations(foreign, size)])
    for chosen in itertools.product(*choices):
        replicas_RE = base_RE.copy()
        for rank, copies in enumerate(chosen):
            replicas_RE[rank, copies] = True
        yield Placement(problem.expert_to_owner_E, replicas_RE)


def solve(problem: Problem) -> Solution:
    """Return the cheapest of all placements with the current owners; ValueError if there are too many to try."""
    start = perf_counter()
    owned_R = np.bincount(problem.expert_to_owner_E, minlength=problem.num_ranks).tolist()
    count = math.prod(_num_choices(problem.num_experts - owned, problem.slots) for owned in owned_R)
    if count > _MOST_PLACEMENTS:
        raise ValueError(f"{count} placements are too many to try, at most {_MOST_PLACEMENTS}; use milp, or fewer slots")

    def total_s(placement: Placement) -> float:
        return cost(problem, placement, split_exact(problem.load, placement, problem.topology)).total_s

    return evaluate(problem, min(every_placement(problem), key=total_s), start, "exhaustive")
