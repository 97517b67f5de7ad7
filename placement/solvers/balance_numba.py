"""Compiled routines of the balance planner. Import this module lazily: it imports numba, and a first call compiles.

Every load is kept optimally split over the copies chosen so far, by the algorithm of split_numba.level; the next copy is the one
that removes most of the rows above the mean, summed over the loads. Shape letters: R ranks, E experts, S loads, C copies. Floats
are used only in single operations, which IEEE 754 rounds identically everywhere, so every machine computes the same.
"""
# mypy: disable-error-code=no-untyped-def
# Numba infers the types of compiled functions.

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from ...jit.decorators import njit
from ..split_numba import least_limit, limit_of
from .random_numba import draw


class Holders(NamedTuple):
    """Holders both ways: holder_ER[e, :holders_E[e]] are ranks, held_RE[r, :held_R[r]] experts with several holders."""

    holder_ER: np.ndarray
    holders_E: np.ndarray
    held_RE: np.ndarray
    held_R: np.ndarray
    free_R: np.ndarray
    sent_R: np.ndarray


@njit(cache=True)
def _add_copy(holders, expert, rank):
    """Add a rank to an expert's holders."""
    count = holders.holders_E[expert]
    if count == 1:
        owner = holders.holder_ER[expert, 0]
        holders.held_RE[owner, holders.held_R[owner]] = expert
        holders.held_R[owner] += 1
    holders.holder_ER[expert, count] = rank
    holders.holders_E[expert] += 1
    holders.held_RE[rank, holders.held_R[rank]] = expert
    holders.held_R[rank] += 1
    holders.free_R[rank] -= 1
    holders.sent_R[holders.holder_ER[expert, 0]] += 1


@njit(cache=True)
def _reach(holders, source, limit, cost_R, rows_ER, rows_R, queue, via, seen_E):
    """Search breadth-first from `source` for a rank with room for a row below `limit`; return it or -1, and how many it reached.

    via[0, v] is the rank before v and via[1, v] the expert whose rows can move on to v; via[0, v] is -1 if v was not reached.
    """
    via[0, :] = -1
    seen_E[:] = False
    queue[0] = source
    via[0, source] = source
    head, tail = 0, 1
    while head < tail:
        u = queue[head]
        head += 1
        for k in range(holders.held_R[u]):
            expert = holders.held_RE[u, k]
            if seen_E[expert] or rows_ER[expert, u] == 0:
                continue
            seen_E[expert] = True
            for h in range(holders.holders_E[expert]):
                v = holders.holder_ER[expert, h]
                if via[0, v] >= 0:
                    continue
                via[0, v], via[1, v] = u, expert
                if (rows_R[v] + 1) * cost_R[v] <= limit:
                    return v, tail
                queue[tail] = v
                tail += 1
    return -1, tail


@njit(cache=True)
def _push(source, target, limit, cost_R, rows_ER, rows_R, via):
    """Move as many rows as possible along the path in `via`."""
    amount = min(rows_R[source] - limit // cost_R[source], limit // cost_R[target] - rows_R[target])
    v = target
    while v != source:
        amount = min(amount, rows_ER[via[1, v], via[0, v]])
        v = via[0, v]
    v = target
    while v != source:
        u, expert = via[0, v], via[1, v]
        rows_ER[expert, u] -= amount
        rows_ER[expert, v] += amount
        v = u
    rows_R[source] -= amount
    rows_R[target] += amount


class Splits(NamedTuple):
    """Loads and their splits over the copies so far: rows_SER, rows_SR are rows by rank, limit_S the cost of the busiest.

    A rank computes limit // cost_R rows at most; mean_SR are those of mean_S. Where limit_S is above mean_S, stuck_SR is a set of
    ranks that compute as many each and hold all copies of what they compute; of the other ranks, those in open_SR are below the
    mean, or their rows can move on to a rank that is.
    """

    cost_R: np.ndarray
    totals_SE: np.ndarray
    mean_S: np.ndarray
    mean_SR: np.ndarray
    target_S: np.ndarray
    rows_SER: np.ndarray
    rows_SR: np.ndarray
    limit_S: np.ndarray
    stuck_SR: np.ndarray
    open_SR: np.ndarray


@njit(cache=True)
def _find_open(holders, most_R, rows_ER, rows_R, open_R):
    """Mark the ranks with fewer rows than their most_R, and those whose rows can move on to them."""
    open_R[:] = rows_R < most_R
    changed = True
    while changed:
        changed = False
        for rank in range(rows_R.size):
            for k in range(holders.held_R[rank] if not open_R[rank] else 0):
                expert = holders.held_RE[rank, k]
                for h in range(holders.holders_E[expert] if rows_ER[expert, rank] > 0 else 0):
                    if open_R[holders.holder_ER[expert, h]]:
                        open_R[rank] = changed = True


@njit(cache=True)
def _level(holders, splits, s):
    """Minimise the cost of load s on the busiest rank, from the present split; split_numba.level has the proof."""
    rows_ER, rows_R, stuck_R, cost_R = splits.rows_SER[s], splits.rows_SR[s], splits.stuck_SR[s], splits.cost_R
    queue = np.empty(rows_R.size, np.int64)
    via = np.empty((2, rows_R.size), np.int64)
    seen_E = np.empty(rows_ER.shape[0], np.bool_)
    limit = splits.mean_S[s]
    stuck_R[:] = False
    for source in range(rows_R.size):
        while rows_R[source] * cost_R[source] > limit:
            found, reached = _reach(holders, source, limit, cost_R, rows_ER, rows_R, queue, via, seen_E)
            if found >= 0:
                _push(source, found, limit, cost_R, rows_ER, rows_R, via)
                continue
            stuck_R[:] = False
            for i in range(reached):
                stuck_R[queue[i]] = True
            limit = limit_of(queue[:reached], cost_R, rows_R)
    splits.limit_S[s] = limit
    _find_open(holders, splits.mean_SR[s], rows_ER, rows_R, splits.open_SR[s])


@njit(cache=True)
def _is_bound(holders, stuck_R, expert):
    """Return whether all holders of an expert are stuck."""
    num_stuck = 0
    for h in range(holders.holders_E[expert]):
        num_stuck += stuck_R[holders.holder_ER[expert, h]]
    return num_stuck == holders.holders_E[expert]


@njit(cache=True)
def _count_relief(holders, splits, s, sign, min_rows, relief_ER):
    """Add to relief_ER, `sign` times, what every copy would take from the cost of each stuck rank of load s.

    The host takes at most the expert's rows and the excess. Rows that fit below the host's own mean count twice, because the
    others may not find a rank to move on to.
    """
    stuck_R, rows_R, cost_R = splits.stuck_SR[s], splits.rows_SR[s], splits.cost_R
    if splits.limit_S[s] <= splits.target_S[s]:
        return
    # Rows above the mean, and rows that the stuck ranks compute together at a cost of 1: their number, where all are as fast.
    mean_R, excess, rate = splits.mean_SR[s], 0, 0.0
    for rank in range(rows_R.size):
        if stuck_R[rank]:
            excess += splits.limit_S[s] // cost_R[rank] - mean_R[rank]
            rate += 1 / cost_R[rank]
    for expert in range(relief_ER.shape[0]):
        total = splits.totals_SE[s, expert]
        if total < min_rows or not _is_bound(holders, stuck_R, expert):
            continue
        rows = min(total, excess)
        for rank in range(rows_R.size):
            if splits.open_SR[s, rank] and not stuck_R[rank]:
                fits = max(min(rows, mean_R[rank] - rows_R[rank]), 0)
                relief_ER[expert, rank] += sign * int(np.ceil((rows + fits) / rate))


@njit(cache=True)
def _pick(holders, relief_ER, per_node, most_sent):
    """Return the copy (expert, rank) of most relief on a rank with a free slot, preferring the owner's node; -1 for none.

    An owner sends at most `most_sent` copies.
    """
    best_expert, best_rank, best, best_near = -1, -1, 0, False
    for expert in range(relief_ER.shape[0]):
        if holders.sent_R[holders.holder_ER[expert, 0]] >= most_sent:
            continue
        for rank in range(relief_ER.shape[1]):
            relief = relief_ER[expert, rank]
            if relief < max(best, 1) or holders.free_R[rank] == 0:
                continue
            near = rank // per_node == holders.holder_ER[expert, 0] // per_node
            if relief > best or near > best_near:
                best_expert, best_rank, best, best_near = expert, rank, relief, near
    return best_expert, best_rank


@njit(cache=True)
def _start(totals_SE, target_S, owner_E, cost_R, slots):
    """Return the state without copies, all rows at their owners."""
    num_loads, num_experts = totals_SE.shape
    num_ranks = cost_R.size
    holders = Holders(
        np.zeros((num_experts, num_ranks), np.int64),
        np.ones(num_experts, np.int64),
        np.zeros((num_ranks, num_experts), np.int64),
        np.zeros(num_ranks, np.int64),
        np.full(num_ranks, slots, np.int64),
        np.zeros(num_ranks, np.int64),
    )
    holders.holder_ER[:, 0] = owner_E
    splits = Splits(
        cost_R,
        totals_SE,
        np.zeros(num_loads, np.int64),
        np.zeros((num_loads, num_ranks), np.int64),
        target_S,
        np.zeros((num_loads, num_experts, num_ranks), np.int64),
        np.zeros((num_loads, num_ranks), np.int64),
        np.zeros(num_loads, np.int64),
        np.zeros((num_loads, num_ranks), np.bool_),
        np.zeros((num_loads, num_ranks), np.bool_),
    )
    for s in range(num_loads):
        splits.mean_S[s] = least_limit(cost_R, totals_SE[s].sum())
        splits.mean_SR[s] = splits.mean_S[s] // cost_R
        for expert in range(num_experts):
            splits.rows_SER[s, expert, owner_E[expert]] = totals_SE[s, expert]
            splits.rows_SR[s, owner_E[expert]] += totals_SE[s, expert]
    return holders, splits


@njit(cache=True)
def choose_copies(totals_SE, target_S, most, owner_E, cost_R, slots, min_rows, ranks_per_node, most_sent):
    """Add copies until every load can be split to a cost of at most target_S per rank; int64 [2, C] as (expert, rank).

    target_S is at least the mean. At most `most` copies in total, `slots` per rank, and `most_sent` from one owner; no copy for
    an expert of fewer than min_rows rows.
    """
    num_loads, num_experts = totals_SE.shape
    holders, splits = _start(totals_SE, target_S, owner_E, cost_R, slots)
    relief_ER = np.zeros((num_experts, cost_R.size), np.int64)
    min_rows = max(min_rows, 1)
    for s in range(num_loads):
        _level(holders, splits, s)
        _count_relief(holders, splits, s, 1, min_rows, relief_ER)
    copies_2C = np.empty((2, most), np.int64)
    count = 0
    while count < most:
        expert, rank = _pick(holders, relief_ER, ranks_per_node, most_sent)
        if expert < 0:
            break
        # A load whose rows of the expert are not stuck, or whose stuck ranks include the host, does not change.
        is_relieved_S = np.zeros(num_loads, np.bool_)
        for s in range(num_loads):
            is_stuck = splits.limit_S[s] > splits.target_S[s] and not splits.stuck_SR[s, rank]
            is_relieved_S[s] = is_stuck and _is_bound(holders, splits.stuck_SR[s], expert)
            if is_relieved_S[s]:
                _count_relief(holders, splits, s, -1, min_rows, relief_ER)
        _add_copy(holders, expert, rank)
        copies_2C[0, count], copies_2C[1, count] = expert, rank
        count += 1
        for s in range(num_loads):
            if is_relieved_S[s]:
                _level(holders, splits, s)
                _count_relief(holders, splits, s, 1, min_rows, relief_ER)
    return copies_2C[:, :count].copy()


@njit(cache=True)
def _toward(totals_E, other_E, error):
    """Return the load moved towards another load by `error` / 1024 of the total, int64 [E]."""
    total = totals_E.sum()
    scale = total / max(other_E.sum(), 1)
    differ = 0
    for e in range(totals_E.size):
        other_E[e] = np.int64(other_E[e] * scale)
        differ += abs(totals_E[e] - other_E[e])
    # Total variation is half of the sum of differences. Products of full loads would overflow int64.
    part = min(1024, int(2 * error * (total / max(differ, 1))))
    more_E = other_E - totals_E
    return totals_E + more_E // 1024 * part + more_E % 1024 * part // 1024


@njit(cache=True)
def loads_around(totals_E, errors_S):
    """Return loads at total variation errors_S / 1024 from the given one, or as near to that as possible: int64 [S, E].

    The first error is usually 0, for the forecast itself. The other loads lie between it and loads of three alternating kinds:
    every expert's rows times a random weight (experts gain and lose); the weights alone (a different text); the rows with experts
    permuted. The weights are the expected order statistics of E exponential draws (Renyi 1953), in random order.
    """
    num_experts = totals_E.size
    totals_SE = np.empty((errors_S.size, num_experts), np.int64)
    state_1 = np.array([88172645463325252], np.uint64)
    weight_E = np.cumsum((1 << 20) // np.arange(num_experts, 0, -1)) >> 10
    order_E = np.arange(num_experts)
    other_E = np.empty(num_experts, np.int64)
    for s in range(errors_S.size):
        for i in range(num_experts - 1, 0, -1):
            j = draw(state_1, i + 1)
            order_E[i], order_E[j] = order_E[j], order_E[i]
        for e in range(num_experts):
            weight = weight_E[order_E[e]]
            if s % 3 == 1:
                other_E[e] = totals_E[e] // 1024 * weight + totals_E[e] % 1024 * weight // 1024
            else:
                other_E[e] = weight if s % 3 == 2 else totals_E[order_E[e]]
        totals_SE[s] = _toward(totals_E, other_E, errors_S[s])
    return totals_SE
