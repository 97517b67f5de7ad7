"""The online planner: an exact-load threshold search with few copies, priced in seconds.

The search is UltraEP's idea (arXiv 2606.04101): find the smallest number of rows to which every rank can be brought when busy
ranks hand rows of their largest experts to ranks with room. It fixes the copies only; who computes how many rows is then the
exact split's answer. Plans at coarser thresholds need fewer copies, so several are priced and the cheapest is taken: copies that
do not pay for themselves are never made, and a balanced load keeps the static placement.
"""

from __future__ import annotations

import time
from dataclasses import dataclass

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
    plans = [(smallest, 0), (smallest, 1), (smallest, 4), (smallest, 16)]
    if problem.min_rows_per_copy is None:
        # Groups that pay for their copy by compute alone; a quarter of the mean rank is large enough for any machine.
        mean_rows = problem.load.total // problem.num_ranks
        plans.append((max(1, min(_break_even_rows(problem, prices), mean_rows // 4)), 8))
    return np.array(plans).T


@dataclass(frozen=True)
class _Plan:
    """Copies, int64 [2, C] as (expert, rank) columns, with the first five fields of cost.Tally and their cost."""

    copies_2C: np.ndarray
    tally: tuple[int, int, int, int, int]
    cost: Cost


def _cheapest(prices: Prices, tallies: np.ndarray, sizes: np.ndarray, copies: np.ndarray) -> _Plan:
    """Return the first of the cheapest plans with fewest copies."""
    from .search import cheapest

    best, stages = cheapest(prices, tallies, sizes)
    return _Plan(copies[best, :, : sizes[best]], tuple(tallies[best].tolist()), Cost(*stages))


def _fills_to_try(problem: Problem, prices: Prices, plan: _Plan) -> tuple[np.ndarray, np.ndarray]:
    """Return int64 [2, P], the most copies per device and per node link, and float [P], the seconds a further copy must save.

    A copy of expert e at rank d that is worth its bytes only saves n rows of dispatch and combine, forward and backward: 4 * n
    rows' bytes; it costs its gathers and its reduce. So it pays from n = (gathers * expert bytes + gradient bytes) / (4 * row
    bytes) rows on: w * F * (q + beta) / 4, whatever the model dimension. Copies that hide under other work, or beside the
    busiest device's copies, cost one more small group of rows instead.
    """
    expert_s = prices.expert_bytes / prices.device_bytes_per_s
    group_s = prices.work_row_s * problem.topology.half_rate_rows
    shown_s = (prices.gathers * prices.expert_bytes + prices.gradient_bytes) / prices.device_bytes_per_s
    beside_s = max(plan.tally[3] * expert_s, plan.tally[4] * prices.expert_bytes / prices.node_bytes_per_s)
    # The gather hides under the work ahead, and gather and reduce of the backward under twice that.
    behind = ((prices.gathers - 1) * prices.expert_bytes + prices.gradient_bytes) / prices.expert_bytes
    hidden_s = max(
        0.0, min(prices.overlap_s - prices.latency_s, (2 * prices.overlap_s - prices.gathers * prices.latency_s) / behind)
    )
    # A little more, so that rounding takes no copy away.
    free = max(beside_s, hidden_s) / prices.expert_bytes * (1 + 1e-9)
    fills = [(int(free * prices.device_bytes_per_s), int(free * prices.node_bytes_per_s), group_s)]
    per_node = problem.topology.ranks_per_node
    if fills[0][0] < problem.slots or (problem.topology.num_nodes > 1 and fills[0][1] < problem.slots * per_node):
        fills.append((plan.tally[3] + problem.slots, plan.tally[4] + problem.slots * per_node, group_s + shown_s))
    return np.array([fill[:2] for fill in fills], dtype=np.int64).T, np.array([fill[2] for fill in fills])


def _plan(problem: Problem, bound: Bound) -> _Plan:
    """Return the cheapest plan found: first the best for balance, then what copies for dispatch bytes add to it."""
    # Imported here so that importing the package compiles nothing.
    from . import search

    prices = prices_of(problem)
    owner_E, totals_E, owned_R = problem.expert_to_owner_E, problem.load.totals_E, problem.owned_rows_R
    experts = np.lexsort((-totals_E, owner_E))
    layer = search.Layer(
        problem.load.load_ER,
        totals_E,
        owner_E,
        owned_R,
        np.argsort(-owned_R, kind="stable"),
        experts,
        np.searchsorted(owner_E[experts], np.arange(problem.num_ranks + 1)),
        problem.topology.ranks_per_node,
        problem.topology.half_rate_rows,
        problem.slots,
    )
    plan = _cheapest(prices, *search.candidates(layer, bound.max_rows, *_plans_to_try(problem, prices)))
    if not problem.slots or problem.num_ranks == 1 or not plan.tally[1]:
        return plan
    row_s, node_row_s = 4 * prices.row_bytes / prices.device_bytes_per_s, 4 * prices.row_bytes / prices.node_bytes_per_s
    # Only the slowest link counts; all ranks of a node relieve its link together.
    node_counts = plan.tally[2] * node_row_s > plan.tally[1] * row_s
    node_row_s = node_row_s * problem.topology.ranks_per_node if node_counts else 0.0
    smallest = problem.min_rows_per_copy or 1
    fills = search.filled(layer, plan.copies_2C, *_fills_to_try(problem, prices, plan), smallest, row_s, node_row_s)
    filled = _cheapest(prices, *fills)
    return filled if filled.cost.total_s < plan.cost.total_s else plan


def solve(problem: Problem) -> Solution:
    """Copy hot experts to ranks with room where that shortens the step; at most `problem.slots` copies per rank."""
    start = time.perf_counter()
    bound = lower_bound(problem)
    plan = _plan(problem, bound)
    replicas_RE = np.zeros((problem.num_ranks, problem.num_experts), dtype=np.bool_)
    replicas_RE[problem.expert_to_owner_E, np.arange(problem.num_experts)] = True
    replicas_RE[plan.copies_2C[1], plan.copies_2C[0]] = True
    placement = Placement(problem.expert_to_owner_E, replicas_RE)
    return solution(placement, plan.cost, bound, time.perf_counter() - start, "quota")
