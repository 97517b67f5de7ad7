"""Hecate's sparse materialization (arXiv 2502.02581, Algorithm 1).

Shape letters: E experts, R ranks, N nodes.
"""

from __future__ import annotations

from time import perf_counter

import numpy as np

from ...content import check_positive_int
from ...cost import Solution, cost, evaluate
from ...split import split_local_even
from ...values import Placement, Problem

# Of the slots: the largest number of experts that are tried as t is 16 times as many.
_MOST_DOUBLES = 5
_CLOSED = np.iinfo(np.int64).max


def overlap_degree(problem: Problem) -> int:
    """Return t, the number of experts whose transfer is hidden by the work before the layer.

    The bandwidth is the inter-node rate when there is more than one node, else the device rate, as in the paper.
    """
    topology = problem.topology
    rate = topology.node_bytes_per_s if topology.num_nodes > 1 else topology.device_bytes_per_s
    return int(min(problem.overlap_s * rate / problem.shape.expert_bytes, problem.num_experts))


def _slots_by_load(load: int, top_load: int, slots: int, left: int, most: int) -> int:
    """Return an expert's number of copies: its share of all slots, rounded half up, at least 1, at most `left` and `most`.

    The paper does not give the rounding of assignSlotsByLoad.
    """
    share = (2 * slots * load + top_load) // (2 * top_load) if top_load else 0
    return min(max(share, 1), left, most)


def _spread(problem: Problem, top_experts: np.ndarray, memory: int, replicas_RE: np.ndarray) -> None:
    """Algorithm 1 with limited memory: copies in proportion to load, to nodes without the expert first."""
    totals_E, per_node = problem.load.totals_E, problem.topology.ranks_per_node
    node_R = problem.topology.node_of_rank_R
    free_R = np.full(problem.num_ranks, memory, dtype=np.int64)
    free_N = free_R.reshape(-1, per_node).sum(axis=1)
    left = all_slots = problem.num_ranks * memory
    top_load = int(totals_E[top_experts].sum())
    for expert in top_experts:
        copies = _slots_by_load(int(totals_E[expert]), top_load, all_slots, left, problem.num_ranks - 1)
        held_N = replicas_RE[:, expert].reshape(-1, per_node).sum(axis=1)
        for _ in range(copies):
            # Fewest copies in the node, then most room in the node, then most room on the device, then the lowest rank.
            order_R = (held_N[node_R] * (all_slots + 1) - free_N[node_R]) * (memory + 1) - free_R
            order_R[(free_R == 0) | replicas_RE[:, expert]] = _CLOSED
            rank = int(order_R.argmin())
            if order_R[rank] == _CLOSED:
                break
            replicas_RE[rank, expert] = True
            free_R[rank] -= 1
            free_N[node_R[rank]] -= 1
            held_N[node_R[rank]] += 1
            left -= 1


def solve(problem: Problem, *, degree: int | None = None) -> Solution:
    """Algorithm 1: materialize the most loaded experts, on every rank if memory allows, else by load.

    `degree` is t, the number of experts considered; by default as many as `problem.overlap_s` hides. Memory is `problem.slots`:
    at most `slots` copies per rank.
    """
    start = perf_counter()
    degree = (
        overlap_degree(problem) if degree is None else min(check_positive_int("degree", degree, minimum=0), problem.num_experts)
    )
    memory = min(problem.slots, degree)
    replicas_RE = Placement.owners_only(problem.expert_to_owner_E, problem.num_ranks).replicas_RE.copy()
    top_experts = np.argsort(-problem.load.totals_E, kind="stable")[:degree]
    if degree <= memory:
        replicas_RE[:, top_experts] = True
    elif memory:
        _spread(problem, top_experts, memory, replicas_RE)
    return evaluate(problem, Placement(problem.expert_to_owner_E, replicas_RE), start, "hecate")


def solve_with_best_degree(problem: Problem) -> Solution:
    """Algorithm 1 with the t that costs least under Hecate's own even split: as many as hide, or 1, 2, 4, ... times the slots.

    t follows from the seconds of work before the layer, which a recording does not say; so it is what suits Hecate best.
    """
    start = perf_counter()
    degrees = {overlap_degree(problem), *(min(problem.slots << double, problem.num_experts) for double in range(_MOST_DOUBLES))}
    placements = [solve(problem, degree=degree).placement for degree in sorted(degrees)]

    def even_cost(placement: Placement) -> float:
        return cost(problem, placement, split_local_even(problem.load, placement, problem.topology)).total_s

    return evaluate(problem, min(placements, key=even_cost), start, "hecate")
