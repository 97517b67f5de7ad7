"""The exact planner: a mixed-integer program with a time limit, a warm start and a proven gap.

It answers with the cheapest of what the engine found and of the heuristics it starts from, priced by cost.py under the exact
split, so it is never worse than they are; as moves are charged, the current owners stay where a change would not pay. The bound
is the program's own, which holds for every placement with as many owned experts per rank as now.
"""

from __future__ import annotations

import dataclasses
from time import perf_counter

from . import flexmoe, hecate, laer, permutation, quota, static
from .content import check_seconds
from .cost import Bound, Cost, Solution, cost, lower_bound, solution
from .split import split_exact
from .values import Placement, Problem


def _heuristics(problem: Problem, move_owners: bool) -> list[Placement]:
    """Return placements to start from, the current one first."""
    solvers = [static.solve, quota.solve, hecate.solve, laer.solve, flexmoe.solve]
    found = [solve(problem).placement for solve in solvers]
    if move_owners:
        for permute in (permutation.solve_lpt, permutation.solve_smartmoe):
            owners = permute(problem).placement
            moved = dataclasses.replace(problem, expert_to_owner_E=owners.expert_to_owner_E)
            found += [owners, quota.solve(moved).placement]
    return found


@dataclasses.dataclass(frozen=True)
class _Priced:
    """A placement with its cost under the exact split."""

    placement: Placement
    cost: Cost


def _priced(problem: Problem, placement: Placement) -> _Priced:
    return _Priced(placement, cost(problem, placement, split_exact(problem.load, placement, problem.topology)))


def solve(
    problem: Problem,
    *,
    move_owners: bool = True,
    engine: str = "highs",
    time_limit_s: float = 10.0,
    relative_gap: float = 1e-4,
) -> Solution:
    """Place copies, and owners too if `move_owners`; stop after `time_limit_s` or at `relative_gap`. Ctrl-C stops early.

    With `move_owners` half of the time goes to the copies alone, a far smaller program, whose answer starts the full one.
    """
    start = perf_counter()
    check_seconds("time_limit_s", time_limit_s, positive=True)
    # Imported here so that importing the package loads no engine.
    from .engines import make_engine
    from .milp_model import Model

    make_engine(engine, time_limit_s, relative_gap)

    bound = lower_bound(problem, owners_may_move=move_owners)
    best = min((_priced(problem, p) for p in _heuristics(problem, move_owners)), key=lambda found: found.cost.total_s)
    stages = [False, True] if move_owners and problem.slots else [move_owners]
    for stage, owners_free in enumerate(stages):
        left_s = time_limit_s - (perf_counter() - start)
        if best.cost.total_s <= bound.total_s or left_s <= 0:
            break
        if not owners_free and (best.placement.expert_to_owner_E != problem.expert_to_owner_E).any():
            first = min((_priced(problem, p) for p in _heuristics(problem, False)), key=lambda found: found.cost.total_s)
        else:
            first = best
        model = Model(problem, seconds=first.cost.total_s, move_owners=owners_free)
        model.start_from(first.placement)
        answer = model.solve(engine, left_s / (len(stages) - stage), relative_gap)
        if answer.placement is not None:
            best = min(best, _priced(problem, answer.placement), key=lambda found: found.cost.total_s)
        if owners_free == move_owners:
            # The engine's tolerances are about 1e-6 of the objective; a bound must not lean on them.
            proven_s = min(answer.bound_s - 1e-5 * first.cost.total_s, best.cost.total_s)
            bound = Bound(bound.max_rows, max(bound.total_s, proven_s))
    return solution(best.placement, best.cost, bound, perf_counter() - start, "milp")
