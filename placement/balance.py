"""The balance planner: fewest rows on the busiest rank first, then few copies, whatever they cost; and the forecast may be wrong.

Loads are levelled one after another over the same copies: the forecast, and loads as far from it as forecasts have been lately,
and further. Where rows are stuck, the ranks that hold all copies of what they compute are too busy together (Hall's condition),
and one copy is bought there: of their expert that relieves them of most rows, for the rank that can take most. So a copy is never
made without a load that needs it, copies link ranks into chains along which rows can move (Jordan and Graves, 1995: a little
flexibility, well placed, does almost all that full flexibility does), and an exact forecast buys the forecast's copies only.

It is the policy where gathers hide under other work or straggling costs more than bytes: many small experts. `quota` weighs both
in seconds, and is the policy where experts are few and large: their copies can cost more than the balance they bring.
"""

from __future__ import annotations

from time import perf_counter

import numpy as np

from .cost import Solution, evaluate
from .values import Placement, Problem

# Levelled beside the forecast, in multiples of its error: an average error is exceeded every other time.
_ERRORS = (1,) * 8 + (2,) * 4 + (4,) * 4
# A rank is balanced when it is above the mean by one part in so many: of the forecast, and of the other loads. The last copies
# would buy less than anybody can measure.
_FORECAST_PARTS, _OTHER_PARTS = 100, 50
# Of the slots, for loads other than the forecast: the rest stays free, and copies stay fewer than with full slots.
_HEDGE_SHARE = 7 / 8


def solve(problem: Problem) -> Solution:
    """Copy experts until the load, and loads that differ from it by `problem.forecast_error`, can be split evenly."""
    # Imported here so that importing the package compiles nothing.
    from . import hedge

    start = perf_counter()
    owner_E, num_ranks = problem.expert_to_owner_E, problem.num_ranks
    errors = (0, *_ERRORS) if problem.forecast_error > 0 else (0,)
    errors_S = np.array([round(1024 * problem.forecast_error * times) for times in errors])
    totals_SE = hedge.loads_around(problem.load.totals_E, errors_S)
    mean_S = -(-totals_SE.sum(axis=1) // num_ranks)
    most = problem.slots * num_ranks
    is_forecast_S = np.arange(errors_S.size) == 0
    copies_2C = hedge.buy_copies(
        totals_SE,
        mean_S + mean_S // np.where(is_forecast_S, _FORECAST_PARTS, _OTHER_PARTS),
        np.where(is_forecast_S, most, int(_HEDGE_SHARE * most)),
        owner_E,
        num_ranks,
        problem.slots,
        problem.min_rows_per_copy or 1,
        problem.topology.ranks_per_node,
    )
    return evaluate(problem, Placement.with_copies(owner_E, num_ranks, copies_2C), start, "balance")
