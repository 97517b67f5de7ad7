"""The online planner: an exact-load threshold search with few copies, priced in seconds.

The search is UltraEP's idea (arXiv 2606.04101): find the smallest number of rows to which every rank can be brought when busy
ranks hand rows of their largest experts to ranks with room. It fixes the copies only; who computes how many rows is then the
exact split's answer. Plans at coarser thresholds need fewer copies, so several are priced and the cheapest is taken: copies that
do not pay for themselves are never made, and a balanced load keeps the static placement.
"""

from __future__ import annotations

import time

import numpy as np

from .cost import Bound, Cost, Prices, Solution, lower_bound, prices_of, seconds_of, solution
from .values import Placement, Problem


def _break_even_rows(problem: Problem, prices: Prices) -> int:
    """Return the rows whose compute takes as long as one copy's gathers and reduce across the slowest link it may use."""
    stages = seconds_of(prices._replace(overlap_s=0.0), 0, 0, 0, 1, int(problem.topology.num_nodes > 1), 0, 0)
    return min(int((stages[2] + stages[3]) / prices.work_row_s), problem.load.total) + 1


def _plans_to_try(problem: Problem, prices: Prices) -> np.ndarray:
    """Return int64 [2, P]: the smallest group moved and the threshold's rise, in 32nds, of every plan to price."""
    smallest = problem.min_rows_per_copy or 1
    plans = [(smallest, 0), (smallest, 1), (smallest, 4), (smallest, 16), (smallest, 40)]
    if problem.min_rows_per_copy is None:
        # Groups that pay for their copy by compute alone; a quarter of the mean rank is large enough for any machine.
        mean_rows = problem.load.total // problem.num_ranks
        plans += [(max(1, min(_break_even_rows(problem, prices), mean_rows // 4)), rise) for rise in (1, 8)]
    return np.array(plans).T


def _cheapest(problem: Problem, bound: Bound) -> tuple[np.ndarray, Cost]:
    """Return the copies, int64 [2, C] as (expert, rank) columns, and the cost of the cheapest plan found."""
    # Imported here so that importing the package compiles nothing.
    from . import search

    prices = prices_of(problem)
    owner_E, totals_E, owned_R = problem.expert_to_owner_E, problem.load.totals_E, problem.owned_rows_R
    experts = np.lexsort((-totals_E, owner_E))
    first_R = np.searchsorted(owner_E[experts], np.arange(problem.num_ranks + 1))
    tallies, sizes, copies = search.candidates(
        problem.load.load_ER,
        totals_E,
        owner_E,
        owned_R,
        np.argsort(-owned_R, kind="stable"),
        experts,
        first_R,
        problem.topology.ranks_per_node,
        problem.topology.half_rate_rows,
        problem.slots,
        bound.max_rows,
        *_plans_to_try(problem, prices),
    )
    costs = [Cost(*seconds_of(prices, a, b, c, d, e, 0, 0)) for a, b, c, d, e in tallies.tolist()]
    # The first of equals, and plan 0 has no copies.
    best = min(range(len(costs)), key=lambda i: (costs[i].total_s, sizes[i], i))
    return copies[best, :, : sizes[best]], costs[best]


def solve(problem: Problem) -> Solution:
    """Copy hot experts to ranks with room where that shortens the step; at most `problem.slots` copies per rank."""
    start = time.perf_counter()
    bound = lower_bound(problem)
    copies_2C, seconds = _cheapest(problem, bound)
    replicas_RE = np.zeros((problem.num_ranks, problem.num_experts), dtype=np.bool_)
    replicas_RE[problem.expert_to_owner_E, np.arange(problem.num_experts)] = True
    replicas_RE[copies_2C[1], copies_2C[0]] = True
    placement = Placement(problem.expert_to_owner_E, replicas_RE)
    return solution(placement, seconds, bound, time.perf_counter() - start, "quota")
