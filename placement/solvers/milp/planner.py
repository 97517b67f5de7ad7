"""The exact planner: searches for the best placement, and a mixed-integer program with a time limit that proves a gap.

It answers with the cheapest of what the engine found, of the heuristics and of annealing from them (search.py), priced by
cost.py under the better of the exact split and of priced.py's, so it is never worse than they are; as moves are charged, the
current owners stay where a change would not pay. The program holds only what would be cheaper than the answer by more than a
gap, at first a wide one: it is the easier to refute the less it holds (model.py). It is solved once for every number of
copies that the busiest device may send or receive; where that is one and owners stay, chains.py finds and proves the best
instead. The bound is the better of bounds.py's, which needs no engine, and the least of the programs' own; it holds for every
placement with as many owned experts per rank as now.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Sequence
from math import inf
from time import perf_counter
from typing import TYPE_CHECKING

import numpy as np

from ...content import check_seconds
from ...cost import Bound, Solution, prices_of, seconds_of, solution
from ...topology import Topology
from ...values import ExpertLoad, LayerShape, Placement, Problem
from .. import balance, joint, quota, static
from ..bounds import link_bound, range_bound_s, room_within
from . import chains
from .search import Candidate, SearchOn, best_heuristic, best_joint, best_owner_heuristic, candidate_of, search, search_owners

if TYPE_CHECKING:
    from .model import Answer, CopyRange

# Ranges of copies to prove one by one. Programs of more (expert, rank) pairs take so long to write down that one must do.
_MOST_RANGES, _MOST_STATES_OF_RANGES = 4, 4096
# Of the limit; and (expert, rank) pairs through which the joint form searches whole in a second.
_JOINT_SHARE, _JOINT_STATES_PER_S = 0.1, 4096
# The first a little below the percent that is promised, as bounds are rounded down.
_ROUGH_GAPS = (9.9e-3, 5e-3, 2.5e-3)
_FIND_GAP = 1e-3
# The engine's tolerances are about 1e-6 of the objective; a bound must not lean on them.
_ENGINE_SLACK = 1e-5
# What stays free of the time limit, in seconds and at most as a share of it: engines stop a little late.
_SPARE_S, _SPARE_SHARE = 0.5, 0.25
# Of the time limit: when heuristics and the first search are priced, and when chains.py ends; the engine has what is left.
_HEURISTICS_SHARE, _SEARCH_SHARE, _CHAINS_SHARE = 0.1, 0.2, 0.45
# Of the time left: what looking through the answers of the search beside the engine may take.
_TAKE_SHARE = 0.1
# Seconds that an (expert, rank) pair takes to write down, before the first program says so itself.
_WRITE_PAIR_S = 2e-4


@dataclasses.dataclass(frozen=True)
class _Attempt:
    """One go of the engine at a range of copies, with a share of the time that is left for it.

    It refutes what is better than the best by the tolerance, or by `least_gap` where that is less; midway, by half way from there
    to what is proven already. Much is refuted in no time, and what takes long may be a poor best placement.
    """

    share: float
    least_gap: float = inf
    is_midway: bool = False
    is_quick: bool = False  # comes before looking for better placements

    def gap(self, tolerance: float, proven_gap: float) -> float:
        """The gap to refute."""
        return (tolerance + proven_gap) / 2 if self.is_midway else min(tolerance, self.least_gap)


_QUICK_SHARE = 0.15
_MIDWAY = _Attempt(_QUICK_SHARE, is_midway=True, is_quick=True)
_ATTEMPTS = (
    _Attempt(_QUICK_SHARE, is_quick=True),
    _MIDWAY,
    _MIDWAY,
    _MIDWAY,
    _Attempt(0.55),
    _Attempt(0.6, _FIND_GAP),
    _Attempt(1.0),
)


@dataclasses.dataclass(frozen=True)
class _Clock:
    """When, by perf_counter, the parts of a run are over that may take `limit_s` from `start` on."""

    start: float
    limit_s: float

    def after(self, share: float) -> float:
        """A share of the limit."""
        return self.start + share * self.limit_s

    @property
    def end(self) -> float:
        """The engines' end."""
        return self.price_end - self._spare_s / 2

    @property
    def price_end(self) -> float:
        """The end of programs that price an answer."""
        return self.start + self.limit_s - self._spare_s / 2

    @property
    def _spare_s(self) -> float:
        return min(_SPARE_S, _SPARE_SHARE * self.limit_s)


def _copy_ranges(problem: Problem) -> list[CopyRange]:
    """Cut the copies of the busiest device into ranges of one price each, the last one open.

    With the number of copies fixed the program is far easier: a relaxation would pay for a fraction of a copy.
    """
    from .model import CopyRange

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

    def __init__(self, problem: Problem, move_owners: bool, engine: str, best: Candidate, bound_s: float, clock: _Clock) -> None:
        self._problem, self._move_owners, self._engine, self._clock = problem, move_owners, engine, clock
        self._write_s = _WRITE_PAIR_S * problem.num_experts * problem.num_ranks
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

    def search_chains(self, tolerance: float, searching: SearchOn) -> bool:
        """Look through single copies without an engine; return whether that brought every range's bound to within `tolerance`."""
        end = self._clock.after(_CHAINS_SHARE)
        self._take(searching, end)
        for copies in self._proven_s:
            if self._proven_s[copies] < self._wanted_s(tolerance):
                self._refute_chains(copies, tolerance, end)
        return self.bound_s >= self._wanted_s(tolerance)

    def tighten(self, tolerance: float, searching: SearchOn) -> None:
        """Bring every range's bound to within `tolerance` of the best placement, or stop when the time is over."""
        # The easiest first: they leave their time to the others.
        waiting = sorted(self._proven_s, key=lambda copies: -self._proven_s[copies])
        while waiting and not self.is_interrupted and self._may_start(self._clock.end):
            waiting = [copies for copies in waiting if self._proven_s[copies] < self._wanted_s(tolerance)]
            unfinished = []
            for i, copies in enumerate(waiting):
                now = perf_counter()
                share_end = now + (self._clock.end - now) / (len(waiting) - i)
                if not self.is_interrupted and now < share_end and not self._refute(copies, tolerance, share_end, searching):
                    unfinished.append(copies)
            waiting = unfinished

    def _may_start(self, end: float) -> bool:
        """Return whether an engine could be at work before `end`."""
        return perf_counter() + 1.5 * self._write_s < end

    def _wanted_s(self, tolerance: float) -> float:
        return self.best.cost.total_s * (1 - tolerance)

    def _refute_chains(self, copies: CopyRange, tolerance: float, end: float) -> bool:
        """Try to show it without an engine, where owners stay and the range has single copies, or none."""

        if copies.high not in (0, 1) or not chains.are_few(self._problem) or self._is_chained_out:
            return False
        if self._move_owners and _moves_may_pay(self._problem, self._wanted_s(tolerance), copies):
            return False
        if copies.high == 0:
            # One placement is left, the current one; what moves owners may still cost anything above what is wanted.
            static_s = static.solve(self._problem).cost.total_s
            proven_s = min(static_s, self._wanted_s(tolerance)) if self._move_owners else static_s
            self._proven_s[copies] = max(self._proven_s[copies], proven_s)
            return True
        try:
            is_refuted = chains.refute(self._problem, copies.low, lambda: self._wanted_s(tolerance), self._consider, end)
        except KeyboardInterrupt:
            self.is_interrupted = True
            return False
        if is_refuted:
            self._proven_s[copies] = max(self._proven_s[copies], self._wanted_s(tolerance))
        self._is_chained_out = not is_refuted
        return is_refuted

    def _consider(self, placement: Placement) -> bool:
        """Take a placement if it is the best so far; return whether it is."""
        found = candidate_of(self._problem, placement, self._clock.price_end, self.best.cost.total_s)
        is_better = found.cost.total_s < self.best.cost.total_s
        self.best = found if is_better else self.best
        return is_better

    def _take(self, searching: SearchOn, end: float) -> None:
        """Take what the search has found in the meantime, in a small part of the time until `end`."""
        now = perf_counter()
        if now < end:
            self.best = searching.take(self.best, now + _TAKE_SHARE * (end - now))

    def _refute(self, copies: CopyRange, tolerance: float, end: float, searching: SearchOn) -> bool:
        """Try to show that nothing in a range is below the bound that is wanted; return False if the time was too short.

        The program holds only placements below that bound: proving that there are none is far easier than finding the best, and
        one that is found after all is a better answer, with a new bound to want.
        """
        if self._refute_chains(copies, tolerance, end):
            return True
        is_too_long = False
        for attempt in _ATTEMPTS:
            if attempt.is_midway and is_too_long:
                continue
            if not attempt.is_quick:
                self._take(searching, end)
            is_over = False
            while not is_over and self._proven_s[copies] < self._wanted_s(tolerance):
                if self.is_interrupted or not self._may_start(end):
                    return False
                gap, best = attempt.gap(tolerance, 1 - self._proven_s[copies] / self.best.cost.total_s), self.best
                answer = self._ask_engine(copies, gap, attempt.share, end)
                # Only a better answer, found in time, is a reason to do the same again.
                is_over = self.best is best or not answer.is_complete
                if answer.is_complete and self.best is best and gap <= tolerance:
                    return True
                is_too_long = attempt.is_midway and not answer.is_complete
        return self._proven_s[copies] >= self._wanted_s(tolerance)

    def _ask_engine(self, copies: CopyRange, gap: float, share: float, end: float) -> Answer:
        """Look with the engine for placements that are better by more than `gap`, in a share of the time until `end`."""
        from .model import Model

        start = perf_counter()
        model = Model(self._problem, self._wanted_s(gap) / (1 - 1.01 * _ENGINE_SLACK), self._move_owners, copies)
        self._write_s = perf_counter() - start
        left_s = end - perf_counter()
        answer = model.solve(self._engine, max(left_s * share, min(left_s, 2 * self._write_s), 0.01), gap / 2)
        self.is_interrupted = answer.is_interrupted
        self._proven_s[copies] = max(self._proven_s[copies], answer.bound_s * (1 - _ENGINE_SLACK))
        if answer.placement is not None:
            self._consider(answer.placement)
        return answer


def _warm_up() -> None:
    """Compile what a first call compiles, so that no time limit pays for it."""
    from ..anneal_copies_numba import improve
    from .chains import find

    load = ExpertLoad(np.array([[2, 1], [2, 1]]))
    shape = LayerShape(num_experts=2, top_k=1, dim=1, ffn_dim=1)
    problem = Problem(load, np.array([0, 1]), Topology.preset("h100", 2), shape, slots=1)
    balance.solve(problem)
    placement = quota.solve(problem).placement
    improve(problem, placement, move_owners=True, proposals=1)
    search_owners(problem, placement.expert_to_owner_E, 1)
    joint.solve_joint([problem], effort=1e-3)
    find(problem, 0, 0)
    candidate_of(problem, Placement(np.array([0, 1]), np.ones((2, 2), dtype=np.bool_)))


def solve(
    problem: Problem,
    *,
    move_owners: bool = True,
    engine: str = "highs",
    time_limit_s: float = 10.0,
    relative_gap: float = 1e-4,
    starts: Sequence[Placement] = (),
    searches_beside: bool = True,
) -> Solution:
    """Place copies, and owners too if `move_owners`; stop after `time_limit_s` or at `relative_gap`.

    Ctrl-C stops early, with what is found and proven by then, once there is an answer of the heuristics. The limit and the
    answer's seconds do not count what a process pays once: imports and compilation. With `move_owners` the answer is no dearer
    than any of `starts`, which keep the number of experts of every rank. `searches_beside` takes a second core, beside the
    engine's.
    """
    check_seconds("time_limit_s", time_limit_s, positive=True)
    # Imported here so that importing the package loads no engine.
    from ..engines import check_engine

    check_engine(engine)
    _warm_up()
    clock = _Clock(perf_counter(), time_limit_s)
    bound = link_bound(problem, owners_may_move=move_owners)
    best = best_heuristic(problem, clock.after(_HEURISTICS_SHARE))
    if move_owners:
        states = problem.num_experts * problem.num_ranks
        joint_effort = min(1.0, _JOINT_SHARE * time_limit_s * _JOINT_STATES_PER_S / states)
        best = best_joint(problem, best, joint_effort, clock.after(_HEURISTICS_SHARE), starts)
    # Where one move alone costs too much, what is left is far easier.
    move_owners = move_owners and any(_moves_may_pay(problem, best.cost.total_s, copies) for copies in _copy_ranges(problem))
    if move_owners:
        best = best_owner_heuristic(problem, best, clock.after(_HEURISTICS_SHARE))
    proof = _Proof(problem, move_owners, engine, best, bound.total_s, clock)
    # A rough proof of every range of copies first: the last digits of one range are worth nothing while another is open.
    tolerances = sorted({*(gap for gap in _ROUGH_GAPS if gap > relative_gap), relative_gap}, reverse=True)
    effort = min(1.0, time_limit_s / 10)
    search_end = clock.after(_SEARCH_SHARE)
    try:
        proof.best, owner_SE = search(problem, proof.best, move_owners, effort, end=clock.end, price_end=search_end)
        with SearchOn(problem, owner_SE, move_owners, effort, is_on=searches_beside) as searching:
            if not all(proof.search_chains(tolerance, searching) for tolerance in tolerances) and not proof.is_interrupted:
                for tolerance in tolerances:
                    proof.tighten(tolerance, searching)
    except KeyboardInterrupt:
        # The best so far and what is proven of it are whole at any time.
        pass
    best = proof.best
    seconds = perf_counter() - clock.start
    found = solution(best.placement, best.cost, Bound(bound.max_rows, min(proof.bound_s, best.cost.total_s)), seconds, "milp")
    return dataclasses.replace(found, split=best.split)
