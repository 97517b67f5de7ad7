"""The balance planner: fewest rows on the busiest rank, then few copies at any cost, robust to forecast errors.

Copies are chosen for many loads at once: the forecast, scenarios (loads that came, or could have), and sampled ones at and beyond
the distance of recent forecast errors (a sample average, as in stochastic programming). Every load is kept optimally split over
the same copies. Where a load cannot be split evenly, a set of ranks that hold all copies of what they compute is overloaded
(Hall's condition), and a copy on a rank outside the set relieves it; each step adds the copy that relieves most, summed over the
loads. So every copy is needed by some load, copies link ranks into chains along which rows can move (Jordan and Graves, 1995: a
little flexibility, well placed, does almost as much as full flexibility), and with an exact forecast only the forecast's copies
are made.

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
# In training, one slot in so many stays free where the forecast may be wrong and only sampled loads say how, which limits the
# number of copies. Scenarios came, or nearly: for them a single slot does.
_FREE_SLOTS = 16


def solve(problem: Problem, most_sampled: int | None = None) -> Solution:
    """Copy experts until the load, and those that may come instead, can be split evenly: `scenarios_SE`, and sampled loads.

    most_sampled: the number of the latter; by default one for which there is time in training, and some slots stay free.
    """
    start = perf_counter()
    num_free = problem.slots * problem.num_ranks // _FREE_SLOTS if problem.forecast_error > 0 and most_sampled is None else 0
    num_free = num_free if problem.scenarios_SE is None else min(num_free, 1)
    copies_2C = copies_for(problem, loads_of(problem, most_sampled), num_free=num_free)
    placement = Placement.with_copies(problem.expert_to_owner_E, problem.num_ranks, copies_2C)
    return evaluate(problem, placement, start, "balance")


def loads_of(problem: Problem, most_sampled: int | None = None) -> np.ndarray:
    """The loads to hedge against, int64 [S, E]: the problem's, its scenarios, and sampled loads if the forecast has an error.

    most_sampled: the number of the latter, by default one for which there is time in training.
    """
    # Imported here so that importing the package compiles nothing.
    from . import balance_numba

    totals_E, num_sampled = problem.load.totals_E, 0
    if problem.forecast_error > 0:
        in_training = max(_LEAST_LOADS, min(_MOST_LOADS, _LOADS_TIMES_RANKS // problem.num_ranks))
        num_sampled = most_sampled or in_training
    sampled_SE = balance_numba.loads_around(totals_E, np.full(1 + num_sampled, round(1024 * _ERRORS * problem.forecast_error)))
    scenarios_SE = totals_E[None][:0] if problem.scenarios_SE is None else problem.scenarios_SE
    return np.concatenate([totals_E[None], scenarios_SE, sampled_SE[1:]])


def copies_for(problem: Problem, totals_SE: np.ndarray, most_sent: int | None = None, num_free: int = 0) -> np.ndarray:
    """Return the copies with which loads can be split evenly, in the order of their use, int64 [2, C] as (expert, rank) columns.

    totals_SE: the forecast first. most_sent: limits the copies that one rank sends. num_free: slots that stay free.
    """
    # Imported here so that importing the package compiles nothing.
    from . import balance_numba

    topology, num_places = problem.topology, problem.slots * problem.num_ranks
    mean_S = np.array([topology.least_limit(total) for total in totals_SE.sum(axis=1).tolist()])
    return balance_numba.choose_copies(
        np.array(totals_SE),  # a read-only array would be compiled for anew
        mean_S + mean_S // np.where(np.arange(mean_S.size) == 0, _FORECAST_PARTS, _OTHER_PARTS),
        num_places - num_free,
        problem.expert_to_owner_E,
        topology.cost_R,
        problem.slots,
        problem.min_rows_per_copy or 1,
        topology.ranks_per_node,
        num_places if most_sent is None else most_sent,
    )
