"""The exact planner: a mixed-integer program with a time limit, a warm start and a proven gap.

It answers with the cheapest of what the engine found, of the heuristics and of annealing from them (exchange.py, improve.py),
priced by cost.py under the better of the exact split and of priced.py's, so it is never worse than they are; as moves are
charged, the current owners stay where a change would not pay. The program is solved once for every number of copies that the
busiest device may send or receive. The bound is the better of bounds.py's, which needs no engine, and the least of the programs'
own; it holds for every placement with as many owned experts per rank as now.
"""

from __future__ import annotations

import dataclasses
import itertools
from time import perf_counter
from typing import TYPE_CHECKING

import numpy as np

from . import balance, eplb, flexmoe, hecate, laer, permutation, quota, static
from .bounds import link_bound
from .content import check_seconds
from .cost import Bound, Cost, Solution, cost, prices_of, seconds_of, solution
from .split import Split
from .topology import Topology
from .values import ExpertLoad, LayerShape, Placement, Problem

if TYPE_CHECKING:
    from .milp_model import CopyRange

# Proposals of the two searches in ten seconds; fewer where there are fewer states to visit.
_OWNER_PROPOSALS, _COPY_PROPOSALS = 1_500_000, 200_000
# Ranges of copies to prove one by one. Programs of more (expert, rank) pairs take so long to write down that one must do.
_MOST_RANGES, _MOST_STATES_OF_RANGES = 4, 4096
_ROUGH_GAP = 5e-3
# Of the time limit; engines stop a little late, and their answer has to be priced.
_ENGINE_SHARE = 0.97


def _heuristics(problem: Problem, move_owners: bool) -> list[Placement]:
    """Return placements to start from, the current one first."""
    solvers = [static.solve, quota.solve, balance.solve, hecate.solve, laer.solve, flexmoe.solve]
    found = [solve(problem).placement for solve in solvers]
    if move_owners:
        owned_R = np.bincount(problem.expert_to_owner_E, minlength=problem.num_ranks)
        for solve_owners in (permutation.solve_lpt, permutation.solve_smartmoe, eplb.solve, eplb.solve_hierarchical):
            placed = solve_owners(problem).placement
            # EPLB packs copies first and may leave a rank with another number of experts to own, which is not allowed here.
            if (np.bincount(placed.expert_to_owner_E, minlength=problem.num_ranks) == owned_R).all():
                moved = dataclasses.replace(problem, expert_to_owner_E=placed.expert_to_owner_E)
                found += [placed, quota.solve(moved).placement]
    return found


@dataclasses.dataclass(frozen=True)
class _Priced:
    """A placement with its cheapest split known, and what they cost."""

    placement: Placement
    split: Split
    cost: Cost


def _priced(problem: Problem, placement: Placement) -> _Priced:
    from .priced import split_priced

    split = split_priced(problem, placement)
    return _Priced(placement, split, cost(problem, placement, split))


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


def _copy_ranges(problem: Problem) -> list[CopyRange]:
    """Cut the copies of the busiest device into ranges of one price each, the last one open.

    With the number of copies fixed the program is far easier: a relaxation would pay for a fraction of a copy.
    """
    from .milp_model import CopyRange

    prices = prices_of(problem)
    most = problem.num_experts * problem.num_ranks if problem.slots and problem.num_ranks > 1 else 0
    if problem.num_experts * problem.num_ranks > _MOST_STATES_OF_RANGES:
        return [CopyRange(0, None)]
    starts, price_s = [0], 0.0
    for copies in range(1, most + 1):
        stages = seconds_of(prices, 0, 0, 0, copies, 0, 0, 0)
        if stages[2] + stages[3] > price_s:
            starts.append(copies)
            price_s = stages[2] + stages[3]
        if len(starts) == _MOST_RANGES:
            break
    return [CopyRange(low, high - 1) for low, high in itertools.pairwise(starts)] + [CopyRange(starts[-1], None)]


class _Proof:
    """The best placement so far, and what is proven of every range of copies."""

    def __init__(self, problem: Problem, move_owners: bool, engine: str, best: _Priced, bound_s: float) -> None:
        self._problem, self._move_owners, self._engine = problem, move_owners, engine
        self.best = best
        self._proven_s = dict.fromkeys(_copy_ranges(problem), bound_s)

    @property
    def bound_s(self) -> float:
        """What no placement can go below."""
        return min(self._proven_s.values())

    def tighten(self, tolerance: float, end: float) -> None:
        """Bring every range's bound to within `tolerance` of the best placement, or stop when perf_counter reaches `end`."""
        from .milp_model import Model

        for copies in sorted(self._proven_s, key=lambda copies: self._proven_s[copies]):
            goal_s = self.best.cost.total_s * (1 - tolerance)
            num_open = sum(proven_s < goal_s for proven_s in self._proven_s.values())
            if self._proven_s[copies] >= goal_s or perf_counter() >= end:
                continue
            model = Model(self._problem, self.best.cost.total_s, self._move_owners, copies)
            model.start_from(self.best.placement)
            left_s = (end - perf_counter()) / num_open
            answer = model.solve(self._engine, max(left_s, 0.01), tolerance / 2)
            # The engine's tolerances are about 1e-6 of the objective; a bound must not lean on them.
            proven_s = answer.bound_s - 1e-5 * self.best.cost.total_s
            self._proven_s[copies] = max(self._proven_s[copies], proven_s)
            if answer.placement is not None:
                found = _priced(self._problem, answer.placement)
                self.best = min(self.best, found, key=lambda priced: priced.cost.total_s)


def _warm_up() -> None:
    """Compile what a first call compiles, so that no time limit pays for it."""
    from .improve import improve

    load = ExpertLoad(np.array([[2, 1], [2, 1]]))
    shape = LayerShape(num_experts=2, top_k=1, dim=1, ffn_dim=1)
    problem = Problem(load, np.array([0, 1]), Topology.preset("h100", 2), shape, slots=1)
    placement = quota.solve(problem).placement
    improve(problem, placement, move_owners=True, proposals=1)
    _search_owners(problem, placement.expert_to_owner_E, 1)
    _priced(problem, Placement(np.array([0, 1]), np.ones((2, 2), dtype=np.bool_)))


def solve(
    problem: Problem,
    *,
    move_owners: bool = True,
    engine: str = "highs",
    time_limit_s: float = 10.0,
    relative_gap: float = 1e-4,
) -> Solution:
    """Place copies, and owners too if `move_owners`; stop after `time_limit_s` or at `relative_gap`. Ctrl-C stops early.

    The limit and the answer's seconds do not count what a process pays once: imports and compilation.
    """
    check_seconds("time_limit_s", time_limit_s, positive=True)
    # Imported here so that importing the package loads no engine.
    from .engines import make_engine

    make_engine(engine, time_limit_s, relative_gap)
    _warm_up()
    start = perf_counter()
    bound = link_bound(problem, owners_may_move=move_owners)
    best = _incumbent(problem, move_owners, min(1.0, time_limit_s / 10))
    proof = _Proof(problem, move_owners, engine, best, bound.total_s)
    # A rough proof of every range of copies first: the last digits of one range are worth nothing while another is open.
    for tolerance in sorted({max(relative_gap, _ROUGH_GAP), relative_gap}, reverse=True):
        proof.tighten(tolerance, start + _ENGINE_SHARE * time_limit_s)
    best = proof.best
    seconds = perf_counter() - start
    found = solution(best.placement, best.cost, Bound(bound.max_rows, min(proof.bound_s, best.cost.total_s)), seconds, "milp")
    return dataclasses.replace(found, split=best.split)
