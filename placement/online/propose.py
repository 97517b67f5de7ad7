"""Migration proposals: better owners for the coming steps, computed in a separate process that runs `main`.

The process reads pickled `Question`s from standard input and writes a pickled `OwnerMap` for each to standard output; both ends
of the pipes belong to this package. The parent process trains meanwhile.
"""

from __future__ import annotations

import os
import pickle
import signal
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from ..owners import OwnerMap
from ..solvers.joint import solve_joint
from ..solvers.registry import get_solver, policy_solvers
from ..topology import Topology
from ..values import ExpertLoad, LayerShape, Problem

# Exchanges tried on each starting point.
_TRIALS = 1000


@dataclass(frozen=True)
class Question:
    """The present state of one bank's layers: owners, observed load, slots, machine."""

    problems: tuple[Problem, ...]
    policy: str
    """The solver that places copies in training; owner maps are priced with its copies."""
    effort: float
    least_saved_s: float = 0.0
    """Seconds of a step that an exchange of two experts must save."""


def propose(question: Question) -> OwnerMap:
    """Answer a question. Deterministic. Every rank keeps its number of experts.

    `joint` searches globally, by owned loads alone. From its result, and from the present owners, pairs of experts are exchanged
    while that saves enough under the policy's copies. The cheaper outcome is proposed, the cost of its moves included.
    """
    problems = question.problems
    current = OwnerMap(np.stack([problem.expert_to_owner_E for problem in problems]), problems[0].num_ranks)
    starts = {current, solve_joint(problems, effort=question.effort).owners}
    outcomes = [_exchange(question, start) for start in sorted(starts, key=lambda owners: owners != current)]

    def price_s(outcome: tuple[OwnerMap, float]) -> float:
        owners, step_s = outcome
        return step_s + question.least_saved_s * len(current.moves_to(owners)) / 2

    return min(outcomes, key=price_s)[0]


def _exchange(question: Question, start: OwnerMap) -> tuple[OwnerMap, float]:
    """Owners after all exchanges that saved enough, within one layer or across two, and the seconds of their step."""
    problems, rng = question.problems, np.random.default_rng(0)
    owner_LE = start.expert_to_owner_LE.copy()
    num_layers, num_experts = owner_LE.shape
    seconds_L = [_layer_s(problem, owner_E, question.policy) for problem, owner_E in zip(problems, owner_LE, strict=True)]
    for _ in range(int(_TRIALS * question.effort)):
        here, there = rng.integers(num_layers, size=2)
        there = here if rng.random() < 0.5 else there
        first, second = (here, rng.integers(num_experts)), (there, rng.integers(num_experts))
        if owner_LE[first] == owner_LE[second]:
            continue
        owner_LE[first], owner_LE[second] = owner_LE[second], owner_LE[first]
        tried = {layer: _layer_s(problems[layer], owner_LE[layer], question.policy) for layer in {here, there}}
        if sum(tried.values()) + question.least_saved_s < sum(seconds_L[layer] for layer in tried):
            for layer, seconds in tried.items():
                seconds_L[layer] = seconds
        else:
            owner_LE[first], owner_LE[second] = owner_LE[second], owner_LE[first]
    return OwnerMap(owner_LE, start.num_ranks), sum(seconds_L)


def saved_s(problems: Sequence[Problem], owners: OwnerMap, policy: str) -> float:
    """Predicted seconds that other owners save per step, over all layers; the solver `policy` places the copies under both."""
    return sum(
        _layer_s(problem, problem.expert_to_owner_E, policy) - _layer_s(problem, owner_E, policy)
        for problem, owner_E in zip(problems, owners.expert_to_owner_LE, strict=True)
    )


def _layer_s(problem: Problem, owner_E: np.ndarray, policy: str) -> float:
    # Of several solvers, that which takes the fewest predicted seconds where the load is given, as here.
    solve = get_solver(policy_solvers(policy)[0], keeps_owners=True)
    return solve(replace(problem, expert_to_owner_E=owner_E)).cost.total_s


def main() -> None:
    """Answer questions until standard input ends, at a low priority, so that training keeps the cores.

    Compiled routines are loaded first, while training starts, because loading takes longer than most answers.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the parent process, whose exit closes the pipe
    propose(_smallest_question())
    os.nice(10)
    while True:
        try:
            question = pickle.load(sys.stdin.buffer)
        except EOFError:
            return
        pickle.dump(propose(question), sys.stdout.buffer)
        sys.stdout.buffer.flush()


def _smallest_question() -> Question:
    load, shape = ExpertLoad(np.array([[1, 2], [3, 4]])), LayerShape(num_experts=2, top_k=1, dim=1, ffn_dim=1)
    return Question((Problem(load, np.array([0, 1]), Topology.preset("cpu", 2), shape, slots=1),), "quota", 1e-3)
