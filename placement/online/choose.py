"""Choosing between solvers for a layer in training: the one whose steps take fewer predicted seconds, planning included.

A forecast is solved by all candidates in the first forwards, and in every so many after. Once the exact load is known, each
placement is priced for it, as the cost model prices a step, and the planner's own seconds are added. These follow from the sizes
of the problem and not from a clock, since every rank must reach the same choice.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Mapping

from ..cost import Solution, cost
from ..split import Split
from ..topology import Topology
from ..values import ExpertLoad, Placement, Problem

# Forwards that are tried one after the other at first, whose mean decides; then one in so many is.
FIRST_TRIALS = 8
TRIAL_EVERY = 64

PLANNER_S: Mapping[str, Callable[[int, int], float]] = {
    "quota": lambda num_ranks, num_experts: 1e-4 + 2e-7 * num_ranks * num_experts,
    "balance": lambda num_ranks, num_experts: 1e-3 + 2.2e-6 * num_ranks * num_experts,
}
"""Seconds of one plan by ranks and experts, as measured on one core (`moesaic bench placement`)."""


class SolverChoice:
    """Solves one layer's problems, forward after forward, by the best of its candidates.

    Args:
        candidates: solvers by name; one is always taken. Before the first trial ends, the first.
        split: splits a load over a placement, as the layer does.
    """

    def __init__(
        self,
        candidates: Mapping[str, Callable[[Problem], Solution]],
        split: Callable[[ExpertLoad, Placement, Topology], Split],
    ):
        self._candidates, self._split = dict(candidates), split
        self._num_observed = 0  # of the forecasts that a forward followed which is observed
        self._trial: dict[str, Placement] = {}
        self._seconds: dict[str, deque[float]] = {name: deque(maxlen=FIRST_TRIALS) for name in candidates}
        self.chosen = next(iter(candidates))
        """The name of the solver that places the copies."""

    @property
    def solver(self) -> Callable[[Problem], Solution]:
        """The solver that places the copies."""
        return self._candidates[self.chosen]

    @property
    def is_trying(self) -> bool:
        """Whether all candidates have placed the copies of the forward that comes, and `observe` is to price them."""
        return bool(self._trial)

    def solve(self, forecast: Problem, *, is_observed: bool = True) -> Placement:
        """The placement for a forecast, by the chosen solver.

        `is_observed`: the load that comes will be observed, so that all candidates may be tried.
        """
        self._trial = {}
        if is_observed and len(self._candidates) > 1:
            if self._num_observed < FIRST_TRIALS or self._num_observed % TRIAL_EVERY == 0:
                self._trial = {name: solver(forecast).placement for name, solver in self._candidates.items()}
                return self._trial[self.chosen]
            self._num_observed += 1
        return self.solver(forecast).placement

    def observe(self, exact: Problem) -> None:
        """Price the placements of a trial for the exact load, and choose anew."""
        if not self.is_trying:
            return
        for name, placement in self._trial.items():
            predicted = cost(exact, placement, self._split(exact.load, placement, exact.topology))
            self._seconds[name].append(predicted.total_s + PLANNER_S[name](exact.num_ranks, exact.shape.num_experts))
        self._num_observed += 1
        self._trial = {}
        self.chosen = min(self._seconds, key=lambda name: sum(self._seconds[name]))
