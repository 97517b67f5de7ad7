"""The best placement whose ranks send and receive at most one copy: found, and proven best, without an integer program.

Where a second copy on the busiest device costs more than it saves, only these placements remain, and an integer program takes
minutes to refute the apparent savings of fractional copies. The cost of a placement depends on the work of its busiest rank and
the traffic of its busiest device. For any limit on both, a search over all paths and rings that single copies can form
(chains_numba.py) finds a placement or proves that there is none. A range of work is proven with the least work in it and the most
rows for which that leaves time, and is halved where this is too loose. Owners are fixed; node links are only bounded, as in
bounds.py.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from time import perf_counter
from typing import TYPE_CHECKING

import numpy as np

from ...cost import price
from ...values import Placement, Problem
from ..bounds import least_tallies

if TYPE_CHECKING:
    from .chains_numba import Limits

# Sets of ranks times arcs: size of a table that is kept and scanned often.
_MOST_STATES = 1 << 20
# Width of the range of rows that is guessed for a ring.
_RING_ROWS = 8
# Most walks of one call, walks per remaining second, and most inconclusive calls before the search is abandoned.
_MOST_WALKS, _WALKS_PER_S, _MOST_UNKNOWN = 3_000_000, 2_000_000, 3


def are_few(problem: Problem) -> bool:
    """Return whether single copies can be searched, which enumerates every set of ranks."""
    arcs = 2 * problem.num_experts * problem.num_ranks
    return problem.slots > 0 and problem.num_ranks > 1 and arcs << min(problem.num_ranks, 30) <= _MOST_STATES


def limits_of(problem: Problem, work_rows: int, device_rows: int) -> Limits:
    """Return what every rank must and may pass on to stay within limits of work rows and of rows on its link."""
    from .chains_numba import Limits

    load_ER, totals_E, owner_E = problem.load.load_ER, problem.load.totals_E, problem.expert_to_owner_E
    experts = np.argsort(owner_E, kind="stable")
    experts = experts[totals_E[experts] > 0]
    first_R = np.searchsorted(owner_E[experts], np.arange(problem.num_ranks + 1))
    own_R = np.bincount(owner_E, weights=load_ER[np.arange(owner_E.size), owner_E], minlength=problem.num_ranks).astype(np.int64)
    half_rate, owned_R = problem.topology.half_rate_rows, problem.owned_rows_R
    work_R = owned_R + half_rate * np.diff(first_R)
    return Limits(
        load_ER,
        totals_E,
        owner_E,
        experts,
        first_R,
        half_rate,
        work_R - work_rows // problem.topology.cost_R,
        owned_R - own_R - device_rows,
        own_R - load_ER.sum(axis=0) + device_rows,
    )


def find(problem: Problem, work_rows: int, device_rows: int, most_walks: int = _MOST_WALKS) -> tuple[bool, Placement | None]:
    """Search for a placement of single copies within both limits; return (whether one may exist, one nearly within the limits).

    None if there is none, or if deciding takes more than `most_walks` walks.
    """
    from . import chains_numba

    status, arcs_R = chains_numba.find(limits_of(problem, work_rows, device_rows), _RING_ROWS, most_walks)
    if status != chains_numba.FOUND:
        return status == chains_numba.UNKNOWN, None
    copies_2C = np.stack(np.divmod(arcs_R[arcs_R >= 0] // 2, problem.num_ranks))
    return True, Placement.with_copies(problem.expert_to_owner_E, problem.num_ranks, copies_2C)


def _most(is_within: Callable[[int], bool], low: int, high: int) -> int:
    """Return the largest number from low to high that is within, low - 1 if none is; `is_within` is monotone."""
    while low <= high:
        middle = (low + high) // 2
        low, high = (middle + 1, high) if is_within(middle) else (low, middle - 1)
    return high


def refute(problem: Problem, low: int, wanted_s: Callable[[], float], consider: Callable[[Placement], bool], end: float) -> bool:
    """Return whether it is proven that no placement with `low` to one copies on the busiest device costs at most `wanted_s`.

    Placements found are passed to `consider`, which returns whether one is the best so far; then `wanted_s` may decrease. The
    proof is abandoned if it would take too many walks, and when perf_counter reaches `end`.
    """
    tallies = least_tallies(problem, low, 1)

    def is_within(work_rows: int, device_rows: int) -> bool:
        at_least = (replace(t, work_rows=work_rows, device_rows=device_rows) for t in tallies)
        return min(price(problem, counts).total_s for counts in at_least) <= wanted_s()

    least, total = tallies[-1], problem.load.total
    most_work = (total + problem.topology.half_rate_rows * problem.num_experts) * int(problem.topology.cost_R.max())
    waiting = [(least.work_rows, _most(lambda work: is_within(work, least.device_rows), least.work_rows, most_work))]
    num_unknown = 0
    while waiting:
        low_work, high_work = waiting.pop()
        rows = _most(partial(is_within, low_work), least.device_rows, total)
        if low_work > high_work or rows < least.device_rows:
            continue
        left_s = end - perf_counter()
        if left_s <= 0 or num_unknown > _MOST_UNKNOWN:
            return False
        may_be, placement = find(problem, high_work, rows, int(min(_MOST_WALKS, _WALKS_PER_S * left_s)))
        if not may_be:
            continue
        num_unknown += placement is None
        is_better = placement is not None and consider(placement)
        middle = (low_work + high_work) // 2
        if low_work < high_work:
            waiting += [(middle + 1, high_work), (low_work, middle)]
        elif is_better:
            waiting.append((low_work, high_work))
        else:
            return False
    return True
