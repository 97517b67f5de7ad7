"""Migration proposals: better owners for the coming steps, computed in a separate process that runs `main`.

The process reads pickled `Question`s from standard input and writes a pickled `Proposal` for each to standard output; both ends
of the pipes belong to this package. The parent process trains meanwhile.

A layer by itself is priced with the moves of the mean rank (`Problem.mean_moves`): all layers' moves are made together, and what
they cost is what the busiest rank sends, which is no less. First a tabu search finds owners of each layer, and layers that have
copies exchange pairs of experts. Then the exact planner (milp/planner.py) takes the layers one by one, those first
that are farthest above their bound, each with a share of the time limit. Of each layer the cheapest owners are kept; proposed is
what costs training least, so the exact planner makes no proposal worse. As training pays what the busiest rank sends, owners are
also proposed with the moves levelled over the ranks. Shape letters: L layers, R ranks, E experts.
"""

from __future__ import annotations

import os
import pickle
import signal
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from math import inf

import numpy as np

from ...jit import run_seconds
from ..cost import Solution, Tally, price, prices_of
from ..owners import OwnerMap
from ..solvers.bounds import link_bound
from ..solvers.exchange import level_moves, search_owners
from ..solvers.milp import planner as milp
from ..solvers.registry import get_solver, policy_solvers
from ..topology import Topology
from ..values import ExpertLoad, LayerShape, Placement, Problem

# Exchanges tried over all layers, from each of two starts.
_TRIALS = 1000
# The exact planner ends with a layer at this gap; "auto" does not begin with one whose owners are as near to their bound.
_NEAR = 0.01
# A layer is not begun with less time: the exact planner would not get beyond its heuristics.
_LEAST_S = 0.05


@dataclass(frozen=True)
class Question:
    """The present state of one bank's layers: owners, observed load, slots, machine, what it costs to move an expert."""

    problems: tuple[Problem, ...]
    policy: str
    """The solver that places copies in training; owner maps are priced with its copies."""
    effort: float
    """How long joint searches, relative to its default."""
    solver: str = "joint"
    """"joint": joint alone; "milp": then the exact planner; "auto": that, but for layers that are near their bound already."""
    time_limit_s: float = 0.0
    """Seconds for the answer. Joint ends by itself; the exact planner has what is left."""

    @cached_property
    def current(self) -> OwnerMap:
        """The present owners."""
        return OwnerMap(np.stack([problem.expert_to_owner_E for problem in self.problems]), self.problems[0].num_ranks)

    @cached_property
    def move_s(self) -> float:
        """Seconds of a step for every expert that a rank sends, the horizon's steps sharing them."""
        prices = prices_of(self.problems[0])
        return prices.state_bytes / prices.device_bytes_per_s / prices.move_horizon_steps

    def cost_s(self, owners: OwnerMap) -> float:
        """Predicted seconds of a step under other owners, with the moves as training pays them; see `OwnerMap.most_sent`."""
        layers = zip(self.problems, owners.expert_to_owner_LE, strict=True)
        sent = self.current.most_sent(owners, self.problems[0].topology)
        return sum(_layer_s(problem, owner_E, self.policy) for problem, owner_E in layers) + self.move_s * sent


@dataclass(frozen=True)
class Proposal:
    """Owners, what they cost, and what no owners go below. Every rank keeps its number of experts of every layer."""

    owners: OwnerMap
    solver: str
    """"milp" where the exact planner had a part in the owners or in their bound, else "joint"."""
    objective_s: float
    """`Question.cost_s` of these owners: seconds of a step, moves included."""
    bound_s: float
    """What the objective does not go below, whatever the copies and the split of tokens, for owners that keep these numbers."""
    gap: float
    """(objective - bound) / objective."""
    seconds: float
    """The time that it took."""
    note: str = ""
    """Why the exact planner had no part, or no more of it."""


def propose(question: Question) -> Proposal:
    """Answer a question: of the present owners and of the cheapest of each layer, before and after the exact planner, the best.

    Deterministic but for the exact planner's time limit. If that fails, what there is without it is the answer.
    """
    start, current = run_seconds(), question.current
    problems = [replace(problem, mean_moves=True) for problem in question.problems]
    layers = [_Layer(problem, question.policy) for problem in problems]
    searched = search_owners(problems, effort=question.effort)
    for layer, owner_E in zip(layers, searched.expert_to_owner_LE, strict=True):
        layer.consider(owner_E)
    far, rng = [layer for layer in layers if layer.may_gain_by_exchanges], np.random.default_rng(0)
    for layer in far:
        layer.exchange(rng, max(1, int(_TRIALS * question.effort) // len(far)))
    candidates, note = [current, *_of_layers(layers, problems, question.effort)], ""
    if question.solver != "joint":
        try:
            note = _solve_layers(layers, question, start + question.time_limit_s)
        except (Exception, KeyboardInterrupt) as error:  # whatever ends an engine, joint's answer stands
            note = f"the exact planner failed: {error!r}"
        if not np.array_equal(candidates[1].expert_to_owner_LE, [layer.owner_E for layer in layers]):
            candidates += _of_layers(layers, problems, question.effort)
    costs_s = [question.cost_s(owners) for owners in candidates]
    objective_s = min(costs_s)
    owners = candidates[costs_s.index(objective_s)]
    bound_s = min(sum(layer.bound_s for layer in layers), objective_s)
    return Proposal(
        owners,
        "milp" if any(layer.is_solved for layer in layers) else "joint",
        objective_s,
        bound_s,
        1 - bound_s / objective_s if objective_s else 0.0,
        run_seconds() - start,
        note,
    )


class _Layer:
    """The cheapest owners of one layer so far that keep the number of experts of every rank there, and a bound for all such."""

    def __init__(self, problem: Problem, policy: str):
        self._problem, self._policy = problem, policy
        self.bound_s = link_bound(problem, owners_may_move=True).total_s
        self.is_solved = False
        self._starts: list[Placement] = []
        self.cost_s = inf
        self.consider(problem.expert_to_owner_E)

    def solve(self, time_limit_s: float) -> None:
        """Look for cheaper owners, and a higher bound."""
        found = milp.solve(
            self._problem, time_limit_s=time_limit_s, relative_gap=_NEAR, starts=tuple(self._starts), searches_beside=False
        )
        self.bound_s, self.is_solved = found.bound.total_s, True
        self.consider(found.placement.expert_to_owner_E)

    def consider(self, owner_E: np.ndarray) -> None:
        """Take owners if they keep the numbers and are cheaper."""
        is_known = any(np.array_equal(owner_E, start.expert_to_owner_E) for start in self._starts)
        if is_known or not _keeps_counts(self._problem, owner_E):
            return
        self._starts.append(_placed(self._problem, owner_E, self._policy).placement)
        cost_s = self._cost_s(owner_E)
        if cost_s < self.cost_s:
            self.owner_E, self.cost_s = owner_E, cost_s

    @property
    def may_gain_by_exchanges(self) -> bool:
        """Whether it is not near its bound, and has copies, which the search for owners does not see."""
        return self.bound_s < (1 - _NEAR) * self.cost_s and any(start.num_copies for start in self._starts)

    def exchange(self, rng: np.random.Generator, trials: int) -> None:
        """Exchange pairs of experts while that is cheaper with the policy's copies, from the present owners and from the best."""
        for start_E in (self._problem.expert_to_owner_E, self.owner_E):
            owner_E, cost_s = start_E.copy(), self._cost_s(start_E)
            for pair in rng.integers(owner_E.size, size=(trials, 2)):
                owner_E[pair] = owner_E[pair[::-1]]
                tried_s = self._cost_s(owner_E) if owner_E[pair[0]] != owner_E[pair[1]] else inf
                if tried_s < cost_s:
                    cost_s = tried_s
                else:
                    owner_E[pair] = owner_E[pair[::-1]]
            self.consider(owner_E)

    def _cost_s(self, owner_E: np.ndarray) -> float:
        moves = np.count_nonzero(owner_E != self._problem.expert_to_owner_E) / self._problem.num_ranks
        return _layer_s(self._problem, owner_E, self._policy) + price(self._problem, Tally(0, 0, 0, 0, 0, moves)).move_s


def _of_layers(layers: Sequence[_Layer], problems: Sequence[Problem], effort: float) -> list[OwnerMap]:
    """The cheapest owners of each layer, and owners from there on whose moves are levelled over the ranks."""
    owners = OwnerMap(np.stack([layer.owner_E for layer in layers]), problems[0].num_ranks)
    return [owners, *level_moves(problems, owners, effort=effort)]


def _solve_layers(layers: Sequence[_Layer], question: Question, end: float) -> str:
    """Give the layers to the exact planner until run_seconds reaches `end`, the largest possible saving first.

    Each has an equal share of the time that is left. Returns why none, or not all, had their turn.
    """
    waiting = sorted(layers, key=lambda layer: layer.bound_s - layer.cost_s)
    if question.solver == "auto":
        waiting = [layer for layer in waiting if layer.bound_s < (1 - _NEAR) * layer.cost_s]
    for turn, layer in enumerate(waiting):
        left_s = end - run_seconds()
        if left_s < _LEAST_S:
            return f"the time limit of {question.time_limit_s:.3g} s left the exact planner {turn} of {len(waiting)} layers"
        layer.solve(max(left_s / (len(waiting) - turn), _LEAST_S))
    return "" if waiting else f"the exact planner was not asked: every layer is within {_NEAR:.0%} of its bound"


def _keeps_counts(problem: Problem, owner_E: np.ndarray) -> bool:
    """Whether every rank owns as many experts of the layer as now."""
    before_R, after_R = (np.bincount(owners_E, minlength=problem.num_ranks) for owners_E in (problem.expert_to_owner_E, owner_E))
    return np.array_equal(before_R, after_R)


def saved_s(problems: Sequence[Problem], owners: OwnerMap, policy: str) -> float:
    """Predicted seconds that other owners save per step, over all layers; the solver `policy` places the copies under both."""
    return sum(
        _layer_s(problem, problem.expert_to_owner_E, policy) - _layer_s(problem, owner_E, policy)
        for problem, owner_E in zip(problems, owners.expert_to_owner_LE, strict=True)
    )


def _placed(problem: Problem, owner_E: np.ndarray, policy: str) -> Solution:
    """The policy's copies under other owners, without the cost of moves."""
    # Of several solvers, that which takes the fewest predicted seconds where the load is given, as here.
    solve = get_solver(policy_solvers(policy)[0], keeps_owners=True)
    return solve(replace(problem, expert_to_owner_E=owner_E))


def _layer_s(problem: Problem, owner_E: np.ndarray, policy: str) -> float:
    return _placed(problem, owner_E, policy).cost.total_s


def main() -> None:
    """Answer questions until standard input ends, at a low priority, so that training keeps the cores.

    Compiled routines are loaded first, while training starts, because loading takes longer than most answers.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the parent process, whose exit closes the pipe
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # whatever an engine prints is no answer
    propose(_smallest_question())
    os.nice(10)
    while True:
        try:
            question = pickle.load(sys.stdin.buffer)
        except EOFError:
            return
        pickle.dump(propose(question), answers)
        answers.flush()


def _smallest_question() -> Question:
    """A question as the process receives it: unpickled arrays are not read-only, for which routines are compiled once more."""
    load, shape = ExpertLoad(np.array([[1, 2], [3, 4]])), LayerShape(num_experts=2, top_k=1, dim=1, ffn_dim=1)
    problem = Problem(load, np.array([0, 1]), Topology.preset("cpu", 2), shape, slots=1)
    question: Question = pickle.loads(pickle.dumps(Question((problem,), "quota", 1e-3, "milp", 1.0)))
    return question
