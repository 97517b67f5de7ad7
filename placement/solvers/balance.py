"""The balance planner: fewest rows on the busiest rank, then few copies at any cost, robust to forecast errors.

Copies are chosen for many loads at once: the forecast, and sampled loads at and beyond the distance of recent forecast errors (a
sample average, as in stochastic programming). Every load is kept optimally split over the same copies. Where a load cannot be
split evenly, a set of ranks that hold all copies of what they compute is overloaded (Hall's condition), and a copy on a rank
outside the set relieves it; each step adds the copy that relieves most, summed over the loads. So every copy is needed by some
load, copies link ranks into chains along which rows can move (Jordan and Graves, 1995: a little flexibility, well placed, does
almost as much as full flexibility), and with an exact forecast only the forecast's copies are made.

The objective is lexicographic, rows before copies; `quota` minimises seconds and omits copies that cost more than they save. Use
`balance` where gathers are hidden under other work or imbalance costs more than bytes: many small experts. Use `quota` for few
large experts, whose copies can cost more than the balance they bring.
"""

from __future__ import annotations

from time import perf_counter

import numpy as np

from ..cost import Solution, evaluate
from ..values import Placement, Problem

# Number of sampled loads beside the forecast; fewer for many ranks, because splitting a load takes longer.
_MOST_LOADS, _LEAST_LOADS, _LOADS_TIMES_RANKS = 256, 16, 8192
# Their distance from the forecast, in multiples of its mean error, which half of all errors exceed.
_ERRORS = 2.5
# A rank counts as balanced up to mean + mean / parts rows: for the forecast, and for the sampled loads. Further copies would have
# no measurable effect.
_FORECAST_PARTS, _OTHER_PARTS = 100, 64
# Share of all slots used where the forecast may be wrong; the rest stays free, which limits the number of copies.
_UNCERTAIN_SHARE = 15 / 16


def solve(problem: Problem) -> Solution:
    """Copy experts until the load, and loads that differ from it by `problem.forecast_error`, can be split evenly."""
    # Imported here so that importing the package compiles nothing.
    from . import balance_numba

    start = perf_counter()
    owner_E, num_ranks, topology = problem.expert_to_owner_E, problem.num_ranks, problem.topology
    num_others, share = 0, 1.0
    if problem.forecast_error > 0:
        num_others, share = max(_LEAST_LOADS, min(_MOST_LOADS, _LOADS_TIMES_RANKS // num_ranks)), _UNCERTAIN_SHARE
    errors_S = np.full(1 + num_others, round(1024 * _ERRORS * problem.forecast_error))
    errors_S[0] = 0
    totals_SE = balance_numba.loads_around(problem.load.totals_E, errors_S)
    mean_S = np.array([topology.least_limit(total) for total in totals_SE.sum(axis=1).tolist()])
    copies_2C = balance_numba.choose_copies(
        totals_SE,
        mean_S + mean_S // np.where(np.arange(errors_S.size) == 0, _FORECAST_PARTS, _OTHER_PARTS),
        int(problem.slots * num_ranks * share),
        owner_E,
        topology.cost_R,
        problem.slots,
        problem.min_rows_per_copy or 1,
        topology.ranks_per_node,
    )
    return evaluate(problem, Placement.with_copies(owner_E, num_ranks, copies_2C), start, "balance")
