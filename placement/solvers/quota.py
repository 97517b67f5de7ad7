"""The quota planner, for every step: a threshold search with few copies, priced in seconds.

The search is that of UltraEP (arXiv 2606.04101): find the smallest number of rows to which every rank can be reduced if busy
ranks give rows of their largest experts to ranks with room. It determines the copies only; the exact split then decides how many
rows each holder computes. Higher thresholds need fewer copies, so several plans are priced and the cheapest is taken: copies that
cost more than they save are never made, and a balanced load keeps the static placement. The copies that `balance` makes for this
load are priced as well: chains of copies level few large experts better. quota_reference.py states the planner in plain Python.
"""

from __future__ import annotations

import time

import numpy as np

from ..cost import Cost, Prices, Solution, lower_bound, prices_of, seconds_of, solution
from ..values import Placement, Problem
from . import balance


def _break_even_rows(problem: Problem, prices: Prices) -> int:
    """Return the rows whose compute takes as long as one copy's gathers and reduce across the slowest link it may use."""
    node_copies = problem.topology.node_unit * (problem.topology.num_nodes > 1)
    stages = seconds_of(prices._replace(overlap_s=0.0), 0, 0, 0, 1, node_copies, 0, 0)
    row_s = prices.work_row_s * problem.topology.least_cost
    return min(int((stages[2] + stages[3]) / row_s), problem.load.total) + 1


def plans_to_try(problem: Problem, prices: Prices) -> np.ndarray:
    """Return int64 [2, P]: for every plan to price, the fewest rows of a copy, and the increase of the threshold in 32nds."""
    smallest = problem.min_rows_per_copy or 1
    plans = [(smallest, 0), (smallest, 1), (smallest, 4), (smallest, 16)]
    if problem.min_rows_per_copy is None:
        # Rows whose compute pays for their copy; a quarter of the mean rank suffices on any machine.
        mean_rows = problem.load.total // problem.num_ranks
        plans.append((max(1, min(_break_even_rows(problem, prices), mean_rows // 4)), 8))
    return np.array(plans).T


def solve(problem: Problem) -> Solution:
    """Copy hot experts to ranks with room if that shortens the step; at most `problem.slots` copies per rank."""
    # Imported here so that importing the package compiles nothing.
    from . import quota_numba, score_numba

    start = time.perf_counter()
    prices, bound = prices_of(problem), lower_bound(problem)
    layer = score_numba.layer_of(problem)
    plan = quota_numba.plan(layer, problem.load.load_RE, prices, bound.max_rows, plans_to_try(problem, prices))
    if problem.slots:
        balanced = quota_numba.plan_of(layer, prices, balance.copies_for(problem, problem.load.totals_E[None]))
        plan = balanced if sum(balanced.stages) < sum(plan.stages) else plan
    placement = Placement.with_copies(problem.expert_to_owner_E, problem.num_ranks, plan.copies_2C)
    return solution(placement, Cost(*plan.stages), bound, time.perf_counter() - start, "quota")
