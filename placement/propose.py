"""Owners for the steps to come, proposed in a process of its own, which calls `main`.

It reads a pickled `Question` from standard input and writes a pickled `Proposal` to standard output; both ends are this
package's. The one who asks goes on training meanwhile.
"""

from __future__ import annotations

import os
import pickle
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace

from .joint import solve_joint
from .owners import OwnerMap
from .registry import get_solver
from .values import Problem


@dataclass(frozen=True)
class Question:
    """The layers of one bank as they are: owners, observed load, slots, machine."""

    problems: tuple[Problem, ...]
    policy: str
    """The solver that places copies in training; both owner maps are judged with its copies."""
    effort: float


@dataclass(frozen=True)
class Proposal:
    """An owner map, and what a step costs under it and under the current one: predicted seconds, all layers."""

    owners: OwnerMap
    step_s: float
    current_step_s: float


def propose(question: Question) -> Proposal:
    """Answer a question. Deterministic. The ranks keep their numbers of experts."""
    problems = question.problems
    owners = solve_joint(problems, effort=question.effort).owners
    moved = [
        replace(problem, expert_to_owner_E=owner_E) for problem, owner_E in zip(problems, owners.expert_to_owner_LE, strict=True)
    ]
    return Proposal(owners, _step_s(moved, question.policy), _step_s(problems, question.policy))


def _step_s(problems: Sequence[Problem], policy: str) -> float:
    solve = get_solver(policy, keeps_owners=True)
    return sum(solve(problem).cost.total_s for problem in problems)


def main() -> None:
    """Answer one question at the lowest priority, so that training keeps the cores."""
    os.nice(10)
    answer = propose(pickle.load(sys.stdin.buffer))
    pickle.dump(answer, sys.stdout.buffer)
