"""The balance planner: fewest rows on the busiest rank first, then few copies, whatever they cost; and the forecast may be wrong.

Copies are bought for many loads at once: the forecast, and loads as far from it as forecasts have been lately, and further (a
sample average, as in stochastic programming). All are kept levelled over the same copies. Where rows of a load are stuck, the
ranks that hold all copies of what they compute are too busy together (Hall's condition), and a copy that leads out of them
relieves them; bought is always the one that relieves most over all loads. So a copy is never made without a load that needs it,
copies link ranks into chains along which rows can move (Jordan and Graves, 1995: a little flexibility, well placed, does almost
all that full flexibility does), and an exact forecast buys the forecast's copies only.

Its objective is lexicographic, rows then copies; `quota`'s is the weighted one of seconds, with copies that do not pay left out.
It is the policy where gathers hide under other work or straggling costs more than bytes: many small experts. `quota` is the
policy where experts are few and large: their copies can cost more than the balance they bring.
"""

from __future__ import annotations

from time import perf_counter

import numpy as np

from ..cost import Solution, evaluate
from ..values import Placement, Problem

# Loads beside the forecast; fewer for many ranks, because levelling one takes longer.
_MOST_LOADS, _LEAST_LOADS, _LOADS_TIMES_RANKS = 256, 16, 8192
# How far they lie from it, in multiples of its error: an average error is exceeded every other time.
_ERRORS = 2.5
# A rank is balanced when it is above the mean by one part in so many: of the forecast, and of the other loads. The last copies
# would buy less than anybody can measure.
_FORECAST_PARTS, _OTHER_PARTS = 100, 64
# Of the slots, where the forecast may be wrong: the rest stays free, and copies stay fewer than with full slots.
_UNCERTAIN_SHARE = 15 / 16


def solve(problem: Problem) -> Solution:
    """Copy experts until the load, and loads that differ from it by `problem.forecast_error`, can be split evenly."""
    # Imported here so that importing the package compiles nothing.
    from . import balance_numba

    start = perf_counter()
    owner_E, num_ranks = problem.expert_to_owner_E, problem.num_ranks
    num_others, share = 0, 1.0
    if problem.forecast_error > 0:
        num_others, share = max(_LEAST_LOADS, min(_MOST_LOADS, _LOADS_TIMES_RANKS // num_ranks)), _UNCERTAIN_SHARE
    errors_S = np.full(1 + num_others, round(1024 * _ERRORS * problem.forecast_error))
    errors_S[0] = 0
    totals_SE = balance_numba.loads_around(problem.load.totals_E, errors_S)
    mean_S = -(-totals_SE.sum(axis=1) // num_ranks)
    copies_2C = balance_numba.buy_copies(
        totals_SE,
        mean_S + mean_S // np.where(np.arange(errors_S.size) == 0, _FORECAST_PARTS, _OTHER_PARTS),
        int(problem.slots * num_ranks * share),
        owner_E,
        num_ranks,
        problem.slots,
        problem.min_rows_per_copy or 1,
        problem.topology.ranks_per_node,
    )
    return evaluate(problem, Placement.with_copies(owner_E, num_ranks, copies_2C), start, "balance")
