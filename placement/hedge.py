"""Compiled routines of the balance planner. Import this module lazily: it imports numba, and a first call compiles.

Shape letters: R ranks, E experts, S loads, C copies. Integers, but for one correctly rounded quotient,
so every machine computes the same.
"""
# mypy: disable-error-code=no-untyped-def
# numba infers the types of compiled functions.

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numba import njit

from .exchange import draw


class Holders(NamedTuple):
    """Who holds what, both ways: holder_ER[e, :holders_E[e]] are ranks, held_RE[r, :held_R[r]] experts with several holders."""

    holder_ER: np.ndarray
    holders_E: np.ndarray
    held_RE: np.ndarray
    held_R: np.ndarray
    free_R: np.ndarray


@njit(cache=True)
def _add_copy(holders, expert, rank):
    """Let a rank hold an expert too."""
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


@njit(cache=True)
def _reach(holders, source, limit, rows_ER, rows_R, queue, via, seen_E):
    """Search breadth-first from `source` for a rank below `limit`; return it or -1, and the number of ranks reached.

    via[0, v] is the rank before v and via[1, v] the expert whose rows can go on to v; via[0] is -1 where v was not reached.
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
                if rows_R[v] < limit:
                    return v, tail
                queue[tail] = v
                tail += 1
    return -1, tail


@njit(cache=True)
def _push(source, target, limit, rows_ER, rows_R, via):
    """Move as many rows as fit along the path in `via`."""
    amount = min(rows_R[source] - limit, limit - rows_R[target])
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


@njit(cache=True)
def _can_reach_room(holders, limit, rows_ER, rows_R):
    """Return bool [R]: ranks below `limit`, and those from which rows can flow on to them."""
    can_R = rows_R < limit
    changed = True
    while changed:
        changed = False
        for rank in range(rows_R.size):
            for k in range(holders.held_R[rank] if not can_R[rank] else 0):
                expert = holders.held_RE[rank, k]
                for h in range(holders.holders_E[expert] if rows_ER[expert, rank] > 0 else 0):
                    if can_R[holders.holder_ER[expert, h]]:
                        can_R[rank] = changed = True
    return can_R


@njit(cache=True)
def _pick_host(holders, source, limit, excess, per_node, rows_ER, rows_R):
    """Return a rank with a free slot that can take most of `excess` rows, among equals one of the node of `source`; -1 for none.

    Where no slot is free on a rank with room, a rank serves from which rows can flow on to one.
    """
    best, best_room, best_near = -1, 0, False
    for rank in range(rows_R.size):
        if holders.free_R[rank] == 0 or rows_R[rank] >= limit:
            continue
        room, near = min(limit - rows_R[rank], excess), rank // per_node == source // per_node
        if room > best_room or (room == best_room and near > best_near):
            best, best_room, best_near = rank, room, near
    if best < 0:
        can_R = _can_reach_room(holders, limit, rows_ER, rows_R)
        for rank in range(rows_R.size):
            if can_R[rank] and holders.free_R[rank] > holders.free_R[best] * (best >= 0):
                best = rank
    return best


@njit(cache=True)
def _pick_expert(holders, source, most_rows, min_rows, totals_E, rows_ER, via):
    """Return the expert computed on the reached ranks that a copy relieves of most rows, up to `most_rows`; -1 for none.

    Among equals one with rows on `source`, then the largest: it will be of use to other loads too.
    """
    best, best_rows, best_own, best_total = -1, 0, False, 0
    for expert in range(totals_E.size):
        total = totals_E[expert]
        rows, own = min(total, most_rows), rows_ER[expert, source] > 0
        if total < max(min_rows, 1) or rows < best_rows or (rows == best_rows and own < best_own):
            continue
        if rows == best_rows and own == best_own and total <= best_total:
            continue
        for h in range(holders.holders_E[expert]):
            rank = holders.holder_ER[expert, h]
            if rows_ER[expert, rank] > 0 and via[0, rank] >= 0:
                best, best_rows, best_own, best_total = expert, rows, own, total
                break
    return best


@njit(cache=True)
def _buy(holders, source, limit, totals_E, min_rows, per_node, rows_ER, rows_R, queue, reached, via):
    """Copy an expert of the `reached` ranks, which hold all copies of what they compute, to a rank outside; False if none can."""
    excess = -limit * reached
    for i in range(reached):
        excess += rows_R[queue[i]]
    host = _pick_host(holders, source, limit, excess, per_node, rows_ER, rows_R)
    if host < 0:
        return False
    room = limit - rows_R[host]
    expert = _pick_expert(holders, source, min(excess, room) if room > 0 else excess, min_rows, totals_E, rows_ER, via)
    if expert < 0:
        return False
    _add_copy(holders, expert, host)
    return True


@njit(cache=True)
def _fit(holders, totals_E, owner_E, target, most_copies, min_rows, per_node):
    """Level one load to `target` rows, buying a copy wherever rows are stuck; return the number of copies bought.

    Where nothing can be bought any more, the target rises to the mean of the ranks that are stuck, as in flow.level.
    """
    num_ranks = holders.held_R.size
    queue = np.empty(num_ranks, np.int64)
    via = np.empty((2, num_ranks), np.int64)
    seen_E = np.empty(totals_E.size, np.bool_)
    rows_ER = np.zeros((totals_E.size, num_ranks), np.int64)
    rows_R = np.zeros(num_ranks, np.int64)
    for expert in range(totals_E.size):
        rows_ER[expert, owner_E[expert]] = totals_E[expert]
        rows_R[owner_E[expert]] += totals_E[expert]
    limit, bought = target, 0
    for source in np.argsort(-rows_R):
        while rows_R[source] > limit:
            found, reached = _reach(holders, source, limit, rows_ER, rows_R, queue, via, seen_E)
            if found >= 0:
                _push(source, found, limit, rows_ER, rows_R, via)
                continue
            if bought < most_copies and _buy(
                holders, source, limit, totals_E, min_rows, per_node, rows_ER, rows_R, queue, reached, via
            ):
                bought += 1
                continue
            rows = 0
            for i in range(reached):
                rows += rows_R[queue[i]]
            limit = -(-rows // reached)
    return bought


@njit(cache=True)
def buy_copies(totals_SE, target_S, most_S, owner_E, num_ranks, slots, min_rows, ranks_per_node):
    """Buy copies until every load, one after another, can be brought to target_S rows a rank; int64 [2, C] as (expert, rank).

    A load buys none beyond most_S copies in all, none of an expert of fewer than min_rows rows, and `slots` at most for a rank.
    """
    num_experts = owner_E.size
    holders = Holders(
        np.zeros((num_experts, num_ranks), np.int64),
        np.ones(num_experts, np.int64),
        np.zeros((num_ranks, num_experts), np.int64),
        np.zeros(num_ranks, np.int64),
        np.full(num_ranks, slots, np.int64),
    )
    holders.holder_ER[:, 0] = owner_E
    bought = 0
    for s in range(totals_SE.shape[0]):
        bought += _fit(holders, totals_SE[s], owner_E, target_S[s], most_S[s] - bought, min_rows, ranks_per_node)
    copies_2C = np.empty((2, bought), np.int64)
    count = 0
    for expert in range(num_experts):
        for h in range(1, holders.holders_E[expert]):
            copies_2C[0, count], copies_2C[1, count] = expert, holders.holder_ER[expert, h]
            count += 1
    return copies_2C


@njit(cache=True)
def loads_around(totals_E, errors_S):
    """Return loads that differ from the given one by errors_S / 1024 in total variation, as far as they can: int64 [S, E].

    So much of the load as it takes is played with the experts in another order: the shape of the popularity stays.
    """
    num_experts, total = totals_E.size, totals_E.sum()
    totals_SE = np.empty((errors_S.size, num_experts), np.int64)
    state_1 = np.array([88172645463325252], np.uint64)
    for s in range(errors_S.size):
        order_E = np.arange(num_experts)
        for i in range(num_experts - 1, 0, -1):
            j = draw(state_1, i + 1)
            order_E[i], order_E[j] = order_E[j], order_E[i]
        differ = 0
        for e in range(num_experts):
            differ += abs(totals_E[e] - totals_E[order_E[e]])
        # Total variation is half of the sum of differences. Products of whole loads would not fit int64.
        part = min(1024, int(2 * errors_S[s] * (total / max(differ, 1))))
        for e in range(num_experts):
            more = totals_E[order_E[e]] - totals_E[e]
            totals_SE[s, e] = totals_E[e] + more // 1024 * part + more % 1024 * part // 1024
    return totals_SE
