"""The exact planner: a mixed-integer program with a time limit, a warm start and a proven gap.

It answers with the cheapest of what the engine found, of the heuristics and of annealing from them (exchange.py, improve.py),
priced by cost.py under the exact split, so it is never worse than they are; as moves are charged, the current owners stay where a
change would not pay. The bound is the better of bounds.py's, which needs no engine, and the program's own; it holds for every
placement with as many owned experts per rank as now.
"""

from __future__ import annotations

import dataclasses
from time import perf_counter

import numpy as np

from . import flexmoe, hecate, laer, permutation, quota, static
from .bounds import link_bound
from .content import check_seconds
from .cost import Bound, Cost, Solution, cost, prices_of, solution
from .split import split_exact
from .values import Placement, Problem

# Proposals of the two searches in ten seconds; fewer where there are fewer states to visit.
_OWNER_PROPOSALS, _COPY_PROPOSALS = 1_500_000, 200_000


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


def _search_owners(problem: Problem, owner_E: np.ndarray, proposals: int) -> np.ndarray:
    """Return owners that an annealing without copies reached from `owner_E`."""
    from .exchange import Layers, anneal

    no_pairs = np.zeros((0, problem.num_experts, problem.num_experts), dtype=np.int64)
    layers = Layers(
        problem.load.load_ER[None],
        problem.load.totals_E[None],
        problem.expert_to_owner_E[None],
        no_pairs,
        no_pairs,
        problem.topology.ranks_per_node,
        problem.topology.half_rate_rows,
        0.0,
        0.0,
        prices_of(problem),
    )
    owner_LE = owner_E[None].copy()
    anneal(layers, owner_LE, proposals, False, 1e-2, 1e-4)
    return owner_LE[0]


def _incumbent(problem: Problem, move_owners: bool, effort: float) -> _Priced:
    """Return the cheapest of the heuristics and of searches from them; `effort` 1 searches for about two seconds."""
    from .improve import improve

    best = min((_priced(problem, p) for p in _heuristics(problem, move_owners)), key=lambda found: found.cost.total_s)
    if problem.num_ranks == 1:
        return best
    states = problem.num_experts * problem.num_ranks
    starts = [best.placement]
    if move_owners:
        proposals = int(min(_OWNER_PROPOSALS, 2000 * states) * effort)
        owner_E = _search_owners(problem, best.placement.expert_to_owner_E, proposals)
        moved = dataclasses.replace(problem, expert_to_owner_E=owner_E)
        starts += [Placement.owners_only(owner_E, problem.num_ranks), quota.solve(moved).placement]
    if problem.slots:
        proposals = int(min(_COPY_PROPOSALS * 512 / max(states, 512), 200 * states) * effort) // len(starts)
        starts += [improve(problem, p, move_owners=move_owners, proposals=proposals) for p in starts]
    return min([best, *(_priced(problem, p) for p in starts)], key=lambda found: found.cost.total_s)


def solve(
    problem: Problem,
    *,
    move_owners: bool = True,
    engine: str = "highs",
    time_limit_s: float = 10.0,
    relative_gap: float = 1e-4,
) -> Solution:
    """Place copies, and owners too if `move_owners`; stop after `time_limit_s` or at `relative_gap`. Ctrl-C stops early."""
    start = perf_counter()
    check_seconds("time_limit_s", time_limit_s, positive=True)
    # Imported here so that importing the package loads no engine.
    from .engines import make_engine
    from .milp_model import Model

    make_engine(engine, time_limit_s, relative_gap)

    bound = link_bound(problem, owners_may_move=move_owners)
    best = _incumbent(problem, move_owners, min(1.0, time_limit_s / 10))
    left_s = time_limit_s - (perf_counter() - start)
    if best.cost.total_s > bound.total_s and left_s > 0:
        model = Model(problem, seconds=best.cost.total_s, move_owners=move_owners)
        model.start_from(best.placement)
        answer = model.solve(engine, max(time_limit_s - (perf_counter() - start), 0.01), relative_gap)
        # The engine's tolerances are about 1e-6 of the objective; a bound must not lean on them.
        proven_s = answer.bound_s - 1e-5 * best.cost.total_s
        if answer.placement is not None:
            best = min(best, _priced(problem, answer.placement), key=lambda found: found.cost.total_s)
        bound = Bound(bound.max_rows, max(bound.total_s, min(proven_s, best.cost.total_s)))
    return solution(best.placement, best.cost, bound, perf_counter() - start, "milp")
