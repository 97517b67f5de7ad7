"""Compiled routines of chains.py. Import this module lazily: it imports numba, and a first call compiles.

If every rank sends and receives at most one copy, copies connect ranks to paths and rings. What a rank may pass on depends only
on what it receives, so a dynamic program enumerates all of them at once. Its state is a set of ranks, the last arc, and an
interval of rows that this arc may carry; the intervals of all walks to one state are merged into their hull. A ring is opened at
its lowest rank: the rows received there are guessed as a range, which is halved until no walk closes the ring or the range is
narrow.

An arc is a copy, (expert * R + receiver) * 2 + whole; whole where the owner keeps no rows of the expert, saving the group. Let a
rank receive y rows of an expert, of which `own` can be its own tokens, and pass on x rows of an expert, of which `foreign` can be
other ranks' tokens. The rank stays within its limits if
    x >= hand_on + y (+ half_rate_rows for the group)              work
    min(x, foreign) >= hand_on_foreign + max(0, y - own)           rows that it receives
    max(0, x - foreign) <= spare_own + min(own, y)                 rows that it sends
These (x, y) are a convex set whose smallest and largest x increase with y, so an interval of y gives an interval of x, in
integers. Shape letters: R ranks, E experts, A arcs, M sets of ranks as bit masks.
"""
# mypy: disable-error-code=no-untyped-def
# Numba infers the types of compiled functions.

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from ....jit.decorators import njit

NOTHING, FOUND, UNKNOWN = range(3)
_NONE = -1
_EMPTY = (1, 0)


class Limits(NamedTuple):
    """A layer with limits. `experts` lists every rank's experts with rows, from first_R[rank]; for the other fields see above."""

    load_ER: np.ndarray
    totals_E: np.ndarray
    owner_E: np.ndarray
    experts: np.ndarray
    first_R: np.ndarray
    half_rate_rows: int
    hand_on_R: np.ndarray
    hand_on_foreign_R: np.ndarray
    spare_own_R: np.ndarray


class _Walks(NamedTuple):
    """States reached by walks: rows low_MA to high_MA (unreached if low is above high) and the previous arc, _NONE at a start."""

    low_MA: np.ndarray
    high_MA: np.ndarray
    before_MA: np.ndarray


@njit(cache=True)
def _handed_on(limits, rank, arc, low, high, expert, whole):
    """Return the fewest and most rows of `expert` that a rank may pass on if it receives low to high rows by `arc`.

    `arc` may be _NONE: the rank receives nothing. `expert` may be _NONE: it passes on nothing, and the interval is empty if that
    is not permitted.
    """
    hand_on, hand_on_foreign, spare_own = limits.hand_on_R[rank], limits.hand_on_foreign_R[rank], limits.spare_own_R[rank]
    own = 0
    if arc != _NONE:
        hand_on += limits.half_rate_rows
        own = limits.load_ER[arc // 2 // limits.hand_on_R.size, rank]
    low = max(low, -spare_own)
    if own < -spare_own:
        return _EMPTY
    if expert == _NONE:
        high = min(high, -hand_on, own - hand_on_foreign)
        return (0, 0) if hand_on_foreign <= 0 and low <= high else _EMPTY
    total = limits.totals_E[expert]
    kept_own = limits.load_ER[expert, rank]
    foreign = total - kept_own
    high = min(high, own + foreign - hand_on_foreign)
    if hand_on_foreign > foreign:
        return _EMPTY
    if whole:
        low, high = max(low, kept_own - spare_own), min(high, total + limits.half_rate_rows - hand_on)
        return (total, total) if low <= high and own >= kept_own - spare_own else _EMPTY
    # Fewer than all rows: what must be passed on is at most what can be.
    most = total - 1
    low = max(low, hand_on_foreign - foreign - spare_own)
    high = min(high, most - hand_on, foreign + own + spare_own - hand_on)
    high = min(high, most - hand_on_foreign + own, foreign + 2 * own + spare_own - hand_on_foreign)
    if low > high or hand_on > foreign + spare_own or hand_on_foreign > most:
        return _EMPTY
    return max(0, hand_on + low, hand_on_foreign + max(0, low - own)), min(most, foreign + spare_own + min(own, high))


@njit(cache=True)
def _extend(limits, walks, mask, rank, arc, low, high, allowed):
    """Extend a walk from a rank by each of its arcs to ranks of `allowed` outside of `mask`."""
    num_ranks = limits.hand_on_R.size
    for k in range(limits.first_R[rank], limits.first_R[rank + 1]):
        expert = limits.experts[k]
        for whole in range(2):
            least, most = _handed_on(limits, rank, arc, low, high, expert, whole)
            for receiver in range(num_ranks if least <= most else 0):
                if mask >> receiver & 1 or not allowed >> receiver & 1:
                    continue
                reached, out = mask | 1 << receiver, (expert * num_ranks + receiver) * 2 + whole
                is_new = walks.low_MA[reached, out] > walks.high_MA[reached, out]
                if is_new or least < walks.low_MA[reached, out]:
                    # The lowest interval comes from the lowest, so tracing back these arcs yields a single walk, not parts of
                    # several.
                    walks.low_MA[reached, out], walks.before_MA[reached, out] = least, arc
                if is_new or most > walks.high_MA[reached, out]:
                    walks.high_MA[reached, out] = most


@njit(cache=True)
def _walk_on(limits, walks, mask, allowed, stop):
    """Extend every walk over `mask` that is not at rank `stop`; return their number."""
    num_ranks, count = limits.hand_on_R.size, 0
    for expert in range(limits.totals_E.size if allowed & ~mask else 0):
        if not mask >> limits.owner_E[expert] & 1:
            continue
        for rank in range(num_ranks):
            if rank == stop or not mask >> rank & 1:
                continue
            for whole in range(2):
                arc = (expert * num_ranks + rank) * 2 + whole
                low, high = walks.low_MA[mask, arc], walks.high_MA[mask, arc]
                if low <= high:
                    _extend(limits, walks, mask, rank, arc, low, high, allowed)
                    count += 1
    return count


@njit(cache=True)
def _last_arc(limits, walks, mask, rank, expert, whole, low, high):
    """Return the last arc of a walk over `mask` to `rank` that can pass on low to high rows of `expert`; _NONE if none can."""
    num_ranks = limits.hand_on_R.size
    for brought in range(limits.totals_E.size):
        for part in range(2):
            arc = (brought * num_ranks + rank) * 2 + part
            if walks.low_MA[mask, arc] > walks.high_MA[mask, arc]:
                continue
            least, most = _handed_on(limits, rank, arc, walks.low_MA[mask, arc], walks.high_MA[mask, arc], expert, whole)
            if max(least, low) <= min(most, high):
                return arc
    return _NONE


@njit(cache=True)
def _note(limits, walks, mask, arc, first, arcs_R):
    """Record the arc by which every rank of a walk sends, tracing back from its last arc to the arc `first`."""
    num_ranks = limits.hand_on_R.size
    while arc != first:
        arcs_R[limits.owner_E[arc // 2 // num_ranks]] = arc
        before = walks.before_MA[mask, arc]
        mask &= ~(1 << (arc // 2 % num_ranks))
        arc = before


@njit(cache=True)
def _find_paths(limits, walks, is_joined_M, arcs_MR):
    """Mark the sets of ranks that a path can connect, and record one path for each; return the number of walks."""
    num_ranks, count = limits.hand_on_R.size, 0
    everyone = (1 << num_ranks) - 1
    for rank in range(num_ranks):
        least, most = _handed_on(limits, rank, _NONE, 0, 0, _NONE, 0)
        is_joined_M[1 << rank] = least <= most
        _extend(limits, walks, 1 << rank, rank, _NONE, 0, 0, everyone)
    for mask in range(1, everyone + 1):
        count += _walk_on(limits, walks, mask, everyone, _NONE)
        for rank in range(num_ranks):
            if not is_joined_M[mask] and mask >> rank & 1:
                arc = _last_arc(limits, walks, mask, rank, _NONE, 0, 0, 0)
                if arc != _NONE:
                    is_joined_M[mask] = True
                    _note(limits, walks, mask, arc, _NONE, arcs_MR[mask])
    return count


@njit(cache=True)
def _clear(walks, root, rest):
    """Clear the walks over the root and any ranks of `rest`."""
    part = rest
    while True:
        walks.low_MA[part | root], walks.high_MA[part | root] = 1, 0
        if part == 0:
            return
        part = (part - 1) & rest


@njit(cache=True)
def _close(limits, walks, root, back, low, high, is_wanted_M, last_M):
    """Search walks from rank `root`, which receives low to high rows by arc `back`, to their sender; return the number of walks.

    last_M receives the last arc of a ring over every wanted set of ranks, _NONE if there is none.
    """
    num_ranks = limits.hand_on_R.size
    everyone = (1 << num_ranks) - 1
    above = everyone & ~((2 << root) - 1)
    expert, whole = back // 2 // num_ranks, back % 2
    end = limits.owner_E[expert]
    last_M[:] = _NONE
    _clear(walks, 1 << root, above)
    _extend(limits, walks, 1 << root, root, back, low, high, above)
    count = 0
    for mask in range(3 << root, everyone + 1, 2 << root):
        count += _walk_on(limits, walks, mask, above, end)
        if mask >> end & 1 and is_wanted_M[mask]:
            last_M[mask] = _last_arc(limits, walks, mask, end, expert, whole, low, high)
    return count


@njit(cache=True)
def _find_rings(limits, walks, root, back, width, is_wanted_M, is_joined_M, arcs_MR, most_walks):
    """Mark the wanted sets of ranks that a ring from `root` through arc `back` can connect; return the number of walks."""
    expert = back // 2 // limits.hand_on_R.size
    total = limits.totals_E[expert]
    last_M = np.empty(is_joined_M.size, np.int64)
    ranges = np.empty((64, 2), np.int64)
    ranges[0, 0], ranges[0, 1] = (total, total) if back % 2 else (0, total - 1)
    size, count = 1, 0
    while size and count <= most_walks:
        size -= 1
        low, high = ranges[size, 0], ranges[size, 1]
        count += _close(limits, walks, root, back, low, high, is_wanted_M, last_M)
        closed = np.flatnonzero(last_M != _NONE)
        if high - low > width and closed.size:
            middle = (low + high) // 2
            ranges[size, 0], ranges[size, 1] = low, middle
            ranges[size + 1, 0], ranges[size + 1, 1] = middle + 1, high
            size += 2
            continue
        for mask in closed:
            is_joined_M[mask], is_wanted_M[mask] = True, False
            arcs_MR[mask, limits.owner_E[expert]] = back
            _note(limits, walks, mask, last_M[mask], back, arcs_MR[mask])
    return count


@njit(cache=True)
def _first_part(mask, is_joined_M, is_covered_M):
    """Return a connected set with the lowest rank of `mask` whose complement in `mask` is covered; 0 if there is none."""
    lowest = mask & -mask
    rest = mask & ~lowest
    part = rest
    while True:
        if is_joined_M[part | lowest] and is_covered_M[rest & ~part]:
            return part | lowest
        if part == 0:
            return 0
        part = (part - 1) & rest


@njit(cache=True, nogil=True)
def find(limits, width, most_walks):
    """Search for a placement within the limits; return FOUND, NOTHING or UNKNOWN, and the arc by which every rank sends [R].

    The arc is -1 where a rank sends nothing. NOTHING is certain. A placement FOUND may exceed the limits slightly: intervals of
    walks are merged, and rings guessed to `width` rows. UNKNOWN: deciding takes more than `most_walks` walks.
    """
    num_ranks, num_arcs = limits.hand_on_R.size, limits.totals_E.size * limits.hand_on_R.size * 2
    everyone = (1 << num_ranks) - 1
    walks = _Walks(
        np.ones((everyone + 1, num_arcs), np.int64),
        np.zeros((everyone + 1, num_arcs), np.int64),
        np.empty((everyone + 1, num_arcs), np.int64),
    )
    is_joined_M, is_covered_M = np.zeros(everyone + 1, np.bool_), np.zeros(everyone + 1, np.bool_)
    arcs_MR, arcs_R = np.full((everyone + 1, num_ranks), _NONE, np.int64), np.full(num_ranks, _NONE, np.int64)
    count = _find_paths(limits, walks, is_joined_M, arcs_MR)
    is_covered_M[0] = True
    for root in range(num_ranks - 1, -1, -1):
        is_wanted_M = ~is_joined_M
        for mask in range(everyone + 1):
            # Only the set of all ranks is needed at the end.
            is_wanted_M[mask] &= root > 0 or is_covered_M[everyone & ~mask]
        for expert in range(limits.totals_E.size):
            for whole in range(2 if limits.owner_E[expert] > root and limits.totals_E[expert] else 0):
                back = (expert * num_ranks + root) * 2 + whole
                count += _find_rings(limits, walks, root, back, width, is_wanted_M, is_joined_M, arcs_MR, most_walks - count)
                if count > most_walks:
                    return UNKNOWN, arcs_R
        for mask in range(1 << root, everyone + 1, 2 << root):
            is_covered_M[mask] = _first_part(mask, is_joined_M, is_covered_M) > 0
    if not is_covered_M[everyone]:
        return NOTHING, arcs_R
    left = everyone
    while left:
        part = _first_part(left, is_joined_M, is_covered_M)
        for rank in range(num_ranks):
            if part >> rank & 1:
                arcs_R[rank] = arcs_MR[part, rank]
        left &= ~part
    return FOUND, arcs_R
