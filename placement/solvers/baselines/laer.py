"""LAER-MoE's planner (arXiv 2602.11686, ASPLOS 2026): replica counts by load, spread over nodes, candidates compared by cost.

LAER has no owners; here an expert's first replica is the one at its owner, and only further replicas take slots. Shape letters: E
experts, R ranks, N nodes.
"""

from __future__ import annotations

import heapq
from time import perf_counter

import numpy as np

from ...cost import Solution, cost, evaluate
from ...split import split_local_even
from ...values import Placement, Problem


def _even_counts(problem: Problem, num_replicas: int) -> np.ndarray | None:
    """Give every expert the same number of replicas, if that divides."""
    share, rest = divmod(num_replicas, problem.num_experts)
    return None if rest else np.full(problem.num_experts, share, dtype=np.int64)


def _precise_counts(problem: Problem, num_replicas: int) -> np.ndarray:
    """Give replicas to the expert with most load per replica: singly up to one per node, then one for every node.

    Every expert starts with one replica per node if all of them fit.
    """
    totals_E, num_nodes = problem.load.totals_E, problem.topology.num_nodes
    first = num_nodes if num_nodes * problem.num_experts <= num_replicas else 1
    counts_E = np.full(problem.num_experts, first, dtype=np.int64)
    left = num_replicas - int(counts_E.sum())
    heap = [(-totals_E[e] / counts_E[e], e) for e in range(problem.num_experts)]
    heapq.heapify(heap)
    while left > 0 and heap:
        _, expert = heapq.heappop(heap)
        more = min(num_nodes if counts_E[expert] >= num_nodes else 1, left, problem.num_ranks - int(counts_E[expert]))
        if more > 0:
            counts_E[expert] += more
            left -= more
            heapq.heappush(heap, (-totals_E[expert] / counts_E[expert], expert))
    return counts_E


def _place(problem: Problem, counts_E: np.ndarray) -> Placement:
    """Place replicas, largest share first: in the nodes with fewest of the expert, on their least loaded rank with a slot."""
    owner_E, node_R, num_nodes = problem.expert_to_owner_E, problem.topology.node_of_rank_R, problem.topology.num_nodes
    share_E = problem.load.totals_E / counts_E
    replicas_RE = Placement.owners_only(owner_E, problem.num_ranks).replicas_RE.copy()
    rows_R = np.zeros(problem.num_ranks)
    np.add.at(rows_R, owner_E, share_E)
    free_R = np.full(problem.num_ranks, problem.slots, dtype=np.int64)
    for expert in np.argsort(-share_E, kind="stable"):
        held_N = np.zeros(num_nodes, dtype=np.int64)
        held_N[node_R[owner_E[expert]]] = 1
        for _ in range(int(counts_E[expert]) - 1):
            open_R = (free_R > 0) & ~replicas_RE[:, expert]
            if not open_R.any():
                break
            fewest = held_N[node_R[open_R]].min()
            open_R &= held_N[node_R] == fewest
            rank = int(np.argmin(np.where(open_R, rows_R, np.inf)))
            replicas_RE[rank, expert] = True
            rows_R[rank] += share_E[expert]
            free_R[rank] -= 1
            held_N[node_R[rank]] += 1
    return Placement(owner_E, replicas_RE)


def solve(problem: Problem) -> Solution:
    """Take the cheaper of the even and the load-based replica counts, under LAER's own even dispatch."""
    start = perf_counter()
    num_replicas = problem.num_experts + problem.num_ranks * problem.slots
    counts = [_precise_counts(problem, num_replicas)]
    even = _even_counts(problem, num_replicas)
    if even is not None:
        counts.append(even)
    placements = [_place(problem, counts_E) for counts_E in counts]

    def even_cost(placement: Placement) -> float:
        return cost(problem, placement, split_local_even(problem.load, placement, problem.topology)).total_s

    return evaluate(problem, min(placements, key=even_cost), start, "laer")
