"""FlexMoE's scheduler (SIGMOD 2023) as LAER-MoE's artifact ports it: expand and shrink replicas for a few rounds.

Shape letters: E experts, R ranks.
"""

from __future__ import annotations

from dataclasses import dataclass
from time import perf_counter

import numpy as np

from ...cost import Solution, cost, evaluate
from ...split import split_local_even
from ...values import Placement, Problem

_ROUNDS = 10


@dataclass(frozen=True)
class _Rating:
    """Two measures under the even dispatch, of which a round must improve one, and the rows of every rank."""

    total_s: float
    max_over_min: float
    rows_R: np.ndarray


def _rate(problem: Problem, placement: Placement) -> _Rating:
    split = split_local_even(problem.load, placement, problem.topology)
    # Adding one row to both keeps the ratio finite for an idle rank.
    ratio = (int(split.rows_R.max()) + 1) / (int(split.rows_R.min()) + 1)
    return _Rating(cost(problem, placement, split).total_s, ratio, split.rows_R)


def _change_node(
    problem: Problem, ranks: np.ndarray, rows_R: np.ndarray, replicas_RE: np.ndarray, num_replicas_E: np.ndarray
) -> None:
    """Use one slot of the node for the expert with most load per replica; without a free slot, replace the least loaded copy."""
    owner_E = problem.expert_to_owner_E
    per_replica_E = problem.load.totals_E / num_replicas_E
    hot = int(np.argmax(per_replica_E))
    lacking = ranks[~replicas_RE[ranks, hot]]
    copies_RE = replicas_RE[lacking] & (owner_E != lacking[:, None])
    free = copies_RE.sum(axis=1) < problem.slots
    if free.any():
        rank = lacking[free][np.argmin(rows_R[lacking[free]])]
    elif copies_RE.any():
        row, cold = np.unravel_index(np.argmin(np.where(copies_RE, per_replica_E, np.inf)), copies_RE.shape)
        rank = lacking[row]
        replicas_RE[rank, cold] = False
        num_replicas_E[cold] -= 1
    else:
        return
    replicas_RE[rank, hot] = True
    num_replicas_E[hot] += 1


def solve(problem: Problem) -> Solution:
    """Change one slot per node and round, at most 10 rounds; keep a round if the cost or the max/min of rows improves."""
    start = perf_counter()
    placement = Placement.owners_only(problem.expert_to_owner_E, problem.num_ranks)
    rating = _rate(problem, placement)
    for _ in range(_ROUNDS if problem.slots else 0):
        replicas_RE, num_replicas_E = placement.replicas_RE.copy(), placement.num_replicas_E.copy()
        for ranks in np.arange(problem.num_ranks).reshape(problem.topology.num_nodes, -1):
            _change_node(problem, ranks, rating.rows_R, replicas_RE, num_replicas_E)
        changed = Placement(problem.expert_to_owner_E, replicas_RE)
        new = _rate(problem, changed)
        if new.total_s >= rating.total_s and new.max_over_min >= rating.max_over_min:
            break
        placement, rating = changed, new
    return evaluate(problem, placement, start, "flexmoe")
