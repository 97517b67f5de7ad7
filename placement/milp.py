"""The exact planner: searches for the best placement, and a mixed-integer program with a time limit that proves a gap.

It answers with the cheapest of what the engine found, of the heuristics and of annealing from them (exchange.py, improve.py),
priced by cost.py under the better of the exact split and of priced.py's, so it is never worse than they are; as moves are
charged, the current owners stay where a change would not pay. The program holds only what would be cheaper than the answer by
more than a gap, at first a wide one: it is the easier to refute the less it holds (milp_model.py). It is solved once for every
number of copies that the busiest device may send or receive; where that is one and owners stay, chains.py finds and proves the
best instead. The bound is the better of bounds.py's, which needs no engine, and the least of the programs' own; it holds for
every placement with as many owned experts per rank as now.
"""

from __future__ import annotations

import dataclasses
import itertools
import threading
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from time import perf_counter
from typing import TYPE_CHECKING, Self

import numpy as np

from . import balance, chains, eplb, flexmoe, hecate, laer, permutation, quota, static
from .bounds import link_bound, range_bound_s, room_within
from .content import check_seconds
from .cost import Bound, Cost, Solution, cost, prices_of, seconds_of, solution
from .split import Split, split_exact
from .topology import Topology
from .values import ExpertLoad, LayerShape, Placement, Problem

if TYPE_CHECKING:
    from .milp_model import CopyRange

# Proposals of the two searches in ten seconds; fewer where there are fewer states to visit.
_OWNER_PROPOSALS, _COPY_PROPOSALS = 1_500_000, 400_000
# Runs that share the first, and proposals of a run that the second pays for.
_OWNER_RUNS, _COPY_RUN_PROPOSALS = 4, 10_000
# Numbers of slots that copies are searched under, and answers whose best split is worth an integer program.
_MOST_BUDGETS, _MOST_PRICED = 4, 8
# Ranges of copies to prove one by one. Programs of more (expert, rank) pairs take so long to write down that one must do.
_MOST_RANGES, _MOST_STATES_OF_RANGES = 4, 4096
_ROUGH_GAPS = (1e-2, 5e-3, 2.5e-3)
_FIND_GAP = 1e-3
# The engine's tolerances are about 1e-6 of the objective; a bound must not lean on them.
_ENGINE_SLACK = 1e-5
# Of the time limit; engines stop a little late, and their answer has to be priced.
_ENGINE_SHARE = 0.97
# What chains.py may take of the time limit; the search takes a quarter of it, the engine what is left.
_CHAINS_SHARE = 0.45


def _heuristics(problem: Problem) -> list[Placement]:
    """Return placements with the current owners to start from."""
    solvers = (static.solve, quota.solve, balance.solve, hecate.solve, laer.solve, flexmoe.solve)
    return [solve(problem).placement for solve in solvers]


def _owner_heuristics(problem: Problem) -> list[Placement]:
    """Return placements with other owners to start from."""
    found, owned_R = [], np.bincount(problem.expert_to_owner_E, minlength=problem.num_ranks)
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
    """Return the best owners that annealings without copies reached from `owner_E`."""
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
    found: list[tuple[float, np.ndarray]] = []
    for run in range(_OWNER_RUNS):
        owner_LE = owner_E[None].copy()
        change_s = anneal(layers, owner_LE, proposals // _OWNER_RUNS, False, 3e-3, 1e-5, run)
        found.append((change_s, owner_LE[0]))
    return min(found, key=lambda run: run[0])[1]


def _search_copies(
    problem: Problem, owner_SE: Sequence[np.ndarray], move_owners: bool, effort: float, search: int = 0
) -> Iterator[tuple[float, Placement]]:
    """Yield answers of many short searches with their seconds under the exact split.

    Every other `search` starts from `quota` or from `balance`, over each of the given owners, and each makes other draws. A price
    that counts the busiest rank and link only is rugged: short runs from other draws, and under fewer slots, find more than one
    long run.
    """
    from .improve import improve

    states = problem.num_experts * problem.num_ranks
    proposals = int(min(_COPY_PROPOSALS * 512 / max(states, 512), 200 * states) * effort)
    budgets = [dataclasses.replace(problem, slots=slots) for slots in range(1, min(problem.slots, _MOST_BUDGETS) + 1)]
    runs = max(1, proposals // (_COPY_RUN_PROPOSALS * len(budgets) * len(owner_SE)))
    solve_copies = (quota.solve, balance.solve)[search % 2]
    for budget, owner_E in itertools.product(budgets, owner_SE):
        start = solve_copies(dataclasses.replace(budget, expert_to_owner_E=owner_E)).placement
        for run in range(search * runs, (search + 1) * runs):
            placement = improve(budget, start, move_owners=move_owners, proposals=min(proposals, _COPY_RUN_PROPOSALS), run=run)
            yield cost(problem, placement, split_exact(problem.load, placement, problem.topology)).total_s, placement


def _cheapest(problem: Problem, found: Iterable[tuple[float, Placement]]) -> list[_Priced]:
    """Return the answers whose best split is worth an integer program."""
    seconds = {placement: seconds for seconds, placement in found}
    return [_priced(problem, placement) for placement in sorted(seconds, key=lambda p: seconds[p])[:_MOST_PRICED]]


class _SearchOn:
    """Searches for better copies on and on in a thread of its own, beside the engine, which leaves the other cores alone."""

    def __init__(self, problem: Problem, owner_SE: Sequence[np.ndarray], move_owners: bool, effort: float):
        self._problem, self._owner_SE, self._move_owners, self._effort = problem, owner_SE, move_owners, effort
        self._found: deque[tuple[float, Placement]] = deque()
        self._is_over = threading.Event()
        self._pool = ThreadPoolExecutor(1)
        self._searching = self._pool.submit(self._search)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self._is_over.set()
        self._searching.result()
        self._pool.shutdown()

    def take(self) -> list[_Priced]:
        """Return the cheapest answers since the last time."""
        found = [self._found.popleft() for _ in range(len(self._found))]
        return _cheapest(self._problem, found)

    def _search(self) -> None:
        for search in itertools.count(1) if self._problem.slots and self._problem.num_ranks > 1 else ():
            for answer in _search_copies(self._problem, self._owner_SE, self._move_owners, self._effort, search):
                self._found.append(answer)
                if self._is_over.is_set():
                    return


def _cheapest_of(problem: Problem, placements: Iterable[Placement]) -> _Priced:
    return min((_priced(problem, placement) for placement in placements), key=lambda found: found.cost.total_s)


def _search(problem: Problem, best: _Priced, move_owners: bool, effort: float) -> tuple[_Priced, list[np.ndarray]]:
    """Return the cheapest of `best` and of searches from it, and the owners that they started from.

    `effort` 1 searches for about two seconds.
    """
    owner_SE, candidates = [best.placement.expert_to_owner_E], [best]
    if move_owners and problem.num_ranks > 1:
        proposals = int(min(_OWNER_PROPOSALS, 2000 * problem.num_experts * problem.num_ranks) * effort)
        owner_SE.append(_search_owners(problem, owner_SE[0], proposals))
        candidates.append(_priced(problem, Placement.owners_only(owner_SE[1], problem.num_ranks)))
    if problem.slots and problem.num_ranks > 1:
        candidates += _cheapest(problem, _search_copies(problem, owner_SE, move_owners, effort))
    return min(candidates, key=lambda found: found.cost.total_s), owner_SE


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


def _moves_may_pay(problem: Problem, seconds: float, copies: CopyRange) -> bool:
    """Return whether a placement in a range that changes an owner may cost no more than some seconds."""
    return room_within(problem, seconds, copies.low, copies.high, owners_may_move=True).moves > 0


class _Proof:
    """The best placement so far, and what is proven of every range of copies."""

    def __init__(self, problem: Problem, move_owners: bool, engine: str, best: _Priced, bound_s: float) -> None:
        self._problem, self._move_owners, self._engine = problem, move_owners, engine
        self.best = best
        self.is_interrupted = False
        self._is_chained_out = False
        self._proven_s = {
            copies: max(bound_s, range_bound_s(problem, copies.low, copies.high, owners_may_move=move_owners))
            for copies in _copy_ranges(problem)
        }

    @property
    def bound_s(self) -> float:
        """What no placement can go below."""
        return min(self._proven_s.values())

    def search_chains(self, tolerance: float, end: float) -> bool:
        """Look through single copies without an engine; return whether that brought every range's bound to within `tolerance`."""
        for copies in self._proven_s:
            if self._proven_s[copies] < self._wanted_s(tolerance):
                self._refute_chains(copies, tolerance, end)
        return self.bound_s >= self._wanted_s(tolerance)

    def tighten(self, tolerance: float, end: float, search: _SearchOn) -> None:
        """Bring every range's bound to within `tolerance` of the best placement, or stop when perf_counter reaches `end`."""
        # The easiest first: they leave their time to the others.
        waiting = sorted(self._proven_s, key=lambda copies: -self._proven_s[copies])
        while waiting and not self.is_interrupted and perf_counter() < end:
            waiting = [copies for copies in waiting if self._proven_s[copies] < self._wanted_s(tolerance)]
            unfinished = []
            for i, copies in enumerate(waiting):
                share_s = (end - perf_counter()) / (len(waiting) - i)
                if not self.is_interrupted and share_s > 0 and not self._refute(copies, tolerance, share_s, search):
                    unfinished.append(copies)
            waiting = unfinished

    def _wanted_s(self, tolerance: float) -> float:
        return self.best.cost.total_s * (1 - tolerance)

    def _refute_chains(self, copies: CopyRange, tolerance: float, end: float) -> bool:
        """Try to show it without an engine, where owners stay and the range has single copies, or none."""

        def consider(placement: Placement) -> bool:
            found = _priced(self._problem, placement)
            is_better = found.cost.total_s < self.best.cost.total_s
            self.best = found if is_better else self.best
            return is_better

        if copies.high not in (0, 1) or not chains.are_few(self._problem) or self._is_chained_out:
            return False
        if self._move_owners and _moves_may_pay(self._problem, self._wanted_s(tolerance), copies):
            return False
        if copies.high == 0:
            # One placement is left, the current one; what moves owners may still cost anything above what is wanted.
            static_s = _priced(self._problem, static.solve(self._problem).placement).cost.total_s
            proven_s = min(static_s, self._wanted_s(tolerance)) if self._move_owners else static_s
            self._proven_s[copies] = max(self._proven_s[copies], proven_s)
            return True
        try:
            is_refuted = chains.refute(self._problem, copies.low, lambda: self._wanted_s(tolerance), consider, end)
        except KeyboardInterrupt:
            self.is_interrupted = True
            return False
        if is_refuted:
            self._proven_s[copies] = max(self._proven_s[copies], self._wanted_s(tolerance))
        self._is_chained_out = not is_refuted
        return is_refuted

    def _refute(self, copies: CopyRange, tolerance: float, time_limit_s: float, search: _SearchOn) -> bool:
        """Try to show that nothing in a range is below the bound that is wanted; return False if the time was too short.

        The program holds only placements below that bound: proving that there are none is far easier than finding the best, and
        one that is found after all is a better answer, with a new bound to want.
        """
        from .milp_model import Model

        end = perf_counter() + time_limit_s
        if self._refute_chains(copies, tolerance, end):
            return True
        # A refutation that takes long is one of a poor answer, perhaps: look for any better one before going on.
        attempts = [(tolerance, 0.55), (min(tolerance, _FIND_GAP), 0.6), (tolerance, 1.0)]
        while self._proven_s[copies] < self._wanted_s(tolerance):
            gap, share = attempts[0]
            model = Model(self._problem, self._wanted_s(gap) / (1 - 1.01 * _ENGINE_SLACK), self._move_owners, copies)
            answer = model.solve(self._engine, max((end - perf_counter()) * share, 0.01), gap / 2)
            self.is_interrupted = answer.is_interrupted
            self._proven_s[copies] = max(self._proven_s[copies], answer.bound_s * (1 - _ENGINE_SLACK))
            found = None if answer.placement is None else _priced(self._problem, answer.placement)
            is_better = found is not None and found.cost.total_s < self.best.cost.total_s
            if found is not None and is_better:
                self.best = found
            elif answer.is_complete or self.is_interrupted or len(attempts) == 1:
                return answer.is_complete
            if not is_better or not answer.is_complete:
                attempts = attempts[1:] or attempts
            if not is_better and not answer.is_complete:
                self.best = min([self.best, *search.take()], key=lambda priced: priced.cost.total_s)
            if perf_counter() >= end:
                return False
        return True


def _warm_up() -> None:
    """Compile what a first call compiles, so that no time limit pays for it."""
    from .chains import find
    from .improve import improve

    load = ExpertLoad(np.array([[2, 1], [2, 1]]))
    shape = LayerShape(num_experts=2, top_k=1, dim=1, ffn_dim=1)
    problem = Problem(load, np.array([0, 1]), Topology.preset("h100", 2), shape, slots=1)
    balance.solve(problem)
    placement = quota.solve(problem).placement
    improve(problem, placement, move_owners=True, proposals=1)
    _search_owners(problem, placement.expert_to_owner_E, 1)
    find(problem, 0, 0)
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
    end = start + _ENGINE_SHARE * time_limit_s
    bound = link_bound(problem, owners_may_move=move_owners)
    best = _cheapest_of(problem, _heuristics(problem))
    # Where one move alone costs too much, what is left is far easier.
    move_owners = move_owners and any(_moves_may_pay(problem, best.cost.total_s, copies) for copies in _copy_ranges(problem))
    if move_owners:
        best = _cheapest_of(problem, [best.placement, *_owner_heuristics(problem)])
    proof = _Proof(problem, move_owners, engine, best, bound.total_s)
    # A rough proof of every range of copies first: the last digits of one range are worth nothing while another is open.
    tolerances = sorted({*(gap for gap in _ROUGH_GAPS if gap > relative_gap), relative_gap}, reverse=True)
    effort = min(1.0, time_limit_s / 10)
    is_proven = all(proof.search_chains(tolerance, start + _CHAINS_SHARE * time_limit_s) for tolerance in tolerances)
    if not is_proven and not proof.is_interrupted:
        proof.best, owner_SE = _search(problem, proof.best, move_owners, effort)
        with _SearchOn(problem, owner_SE, move_owners, effort) as search:
            for tolerance in tolerances:
                proof.tighten(tolerance, end, search)
    best = proof.best
    seconds = perf_counter() - start
    found = solution(best.placement, best.cost, Bound(bound.max_rows, min(proof.bound_s, best.cost.total_s)), seconds, "milp")
    return dataclasses.replace(found, split=best.split)
