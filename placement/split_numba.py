"""Compiled integer routines of the exact split. Import this module lazily: it imports numba, and a first call compiles.

The replicated experts are M rows of a sparse table: entries start_M[m] to start_M[m + 1] of `ranks_J` are the ranks that hold
expert experts_M[m], ascending, and `rows_J` the rows each of them computes. Shape letters: R ranks, E experts, M replicated
experts, J (expert, holder) entries, G segments. Integer arithmetic throughout, so every machine computes the same. Loads are
transposed, load_ER, because every loop runs over one expert's ranks.
"""
# mypy: disable-error-code=no-untyped-def
# Numba infers the types of compiled functions.

from __future__ import annotations

import numpy as np

from ..jit.decorators import njit
from . import topology

least_limit = njit(cache=True)(topology.least_limit)


@njit(cache=True)
def prefer_local(load_ER, experts_M, start_M, ranks_J, owner_E, ranks_per_node, rows_J, rows_R):
    """Fill rows_J with the locality-first assignment and add it to rows_R.

    A source rank keeps its tokens if it holds the expert; else the holders of its node share them; else the owner takes them.
    """
    num_ranks = load_ER.shape[1]
    for m in range(experts_M.size):
        expert = experts_M[m]
        begin, end = start_M[m], start_M[m + 1]
        to_owner = 0
        j = begin
        for node_first in range(0, num_ranks, ranks_per_node):
            node_end = node_first + ranks_per_node
            first_j = j
            while j < end and ranks_J[j] < node_end:
                j += 1
            holders = j - first_j
            rest = 0
            for rank in range(node_first, node_end):
                rest += load_ER[expert, rank]
            if holders == 0:
                to_owner += rest
                continue
            for i in range(first_j, j):
                rows_J[i] = load_ER[expert, ranks_J[i]]
                rest -= rows_J[i]
            for i in range(first_j, j):
                rows_J[i] += rest // holders + (1 if i - first_j < rest % holders else 0)
        for i in range(begin, end):
            if ranks_J[i] == owner_E[expert]:
                rows_J[i] += to_owner
            rows_R[ranks_J[i]] += rows_J[i]


@njit(cache=True)
def _shortest_path(source, limit, cost_R, expert_of_J, start_M, ranks_J, by_rank_J, rank_start_R, rows_J, rows_R, state):
    """Search breadth-first from `source` for a rank with room for a row below `limit`; return it or -1.

    An edge u -> v exists where v holds an expert of which u computes rows. `state` is [queue, seen, entry taken, seen experts];
    its row 0 holds the reached ranks in order and state[4, 0] their number.
    """
    queue, seen, via, seen_expert = state[0], state[1], state[2], state[3]
    seen[:] = 0
    seen_expert[:] = 0
    queue[0] = source
    seen[source] = 1
    head, tail = 0, 1
    while head < tail:
        u = queue[head]
        head += 1
        for k in range(rank_start_R[u], rank_start_R[u + 1]):
            entry = by_rank_J[k]
            m = expert_of_J[entry]
            if rows_J[entry] == 0 or seen_expert[m]:
                continue
            seen_expert[m] = 1
            for j in range(start_M[m], start_M[m + 1]):
                v = ranks_J[j]
                if seen[v]:
                    continue
                seen[v] = 1
                via[v] = entry
                if (rows_R[v] + 1) * cost_R[v] <= limit:
                    state[4, 0] = tail
                    return v
                queue[tail] = v
                tail += 1
    state[4, 0] = tail
    return -1


@njit(cache=True)
def _push(source, target, limit, cost_R, expert_of_J, start_M, ranks_J, rows_J, rows_R, via):
    """Move as many rows as possible along the path that `_shortest_path` left in `via`."""
    amount = min(rows_R[source] - limit // cost_R[source], limit // cost_R[target] - rows_R[target])
    v = target
    while v != source:
        amount = min(amount, rows_J[via[v]])
        v = ranks_J[via[v]]
    v = target
    while v != source:
        entry = via[v]
        rows_J[entry] -= amount
        j = start_M[expert_of_J[entry]]
        while ranks_J[j] != v:
            j += 1
        rows_J[j] += amount
        v = ranks_J[entry]
    rows_R[source] -= amount
    rows_R[target] += amount


@njit(cache=True)
def limit_of(ranks, cost_R, rows_R):
    """Return the least limit within which `ranks` can together compute their rows."""
    least, most, rows = cost_R[ranks[0]], cost_R[ranks[0]], 0
    for rank in ranks:
        least, most, rows = min(least, cost_R[rank]), max(most, cost_R[rank]), rows + rows_R[rank]
    # Equal ranks are by far the most frequent, and this is called often.
    return least * -(-rows // ranks.size) if least == most else least_limit(cost_R[ranks], rows)


@njit(cache=True)
def level(start_M, ranks_J, cost_R, rows_J, rows_R, lower_bound):
    """Minimise max(cost_R * rows_R) exactly by moving rows between holders of one expert; return the optimum.

    Z starts at a lower bound. A rank may compute Z // cost rows; while one has more, rows move along a shortest path to one with
    fewer. If none is reachable, no row computed in the reached set of ranks can be computed outside it, so Z becomes the least at
    which the set may compute as many. Every Z is a lower bound, so the Z at which all ranks fit is the optimum. Ranks that fit at
    an earlier Z stay so, hence one pass over the ranks.
    """
    num_ranks, num_entries, num_rows = rows_R.size, ranks_J.size, start_M.size - 1
    expert_of_J = np.empty(num_entries, np.int64)
    rank_start_R = np.zeros(num_ranks + 1, np.int64)
    for m in range(num_rows):
        for j in range(start_M[m], start_M[m + 1]):
            expert_of_J[j] = m
            rank_start_R[ranks_J[j] + 1] += 1
    for rank in range(num_ranks):
        rank_start_R[rank + 1] += rank_start_R[rank]
    by_rank_J = np.empty(num_entries, np.int64)
    fill_R = rank_start_R[:num_ranks].copy()
    for j in range(num_entries):
        by_rank_J[fill_R[ranks_J[j]]] = j
        fill_R[ranks_J[j]] += 1

    state = np.zeros((5, max(num_ranks, num_rows, 1)), np.int64)
    limit = lower_bound
    for source in range(num_ranks):
        while rows_R[source] * cost_R[source] > limit:
            target = _shortest_path(
                source, limit, cost_R, expert_of_J, start_M, ranks_J, by_rank_J, rank_start_R, rows_J, rows_R, state
            )
            if target >= 0:
                _push(source, target, limit, cost_R, expert_of_J, start_M, ranks_J, rows_J, rows_R, state[2])
                continue
            limit = limit_of(state[0, : state[4, 0]], cost_R, rows_R)
    return limit


@njit(cache=True)
def _match(give_R, take_R, first, end, m, segments_4G, count):
    """Match rows that ranks first to end still give with rows they still take, in rank order; return the new segment count."""
    src, dst = first, first
    while True:
        while src < end and give_R[src] == 0:
            src += 1
        while dst < end and take_R[dst] == 0:
            dst += 1
        if src == end or dst == end:
            return count
        rows = min(give_R[src], take_R[dst])
        give_R[src] -= rows
        take_R[dst] -= rows
        segments_4G[0, count] = m
        segments_4G[1, count] = src
        segments_4G[2, count] = dst
        segments_4G[3, count] = rows
        count += 1


@njit(cache=True)
def decompose(load_ER, experts_M, start_M, ranks_J, rows_J, ranks_per_node):
    """Assign source ranks' rows to the holders: own tokens first, then the node's, then the rest, each in rank order.

    Returns int64 [4, G]: replicated-expert index, source rank, destination rank, rows. A (source, destination) pair appears at
    most once per expert, because every phase leaves its sources or its destinations empty.
    """
    num_ranks = load_ER.shape[1]
    segments_4G = np.empty((4, 2 * num_ranks * experts_M.size + 3 * ranks_J.size), np.int64)
    give_R = np.empty(num_ranks, np.int64)
    take_R = np.empty(num_ranks, np.int64)
    count = 0
    for m in range(experts_M.size):
        for rank in range(num_ranks):
            give_R[rank] = load_ER[experts_M[m], rank]
        take_R[:] = 0
        for j in range(start_M[m], start_M[m + 1]):
            rank = ranks_J[j]
            own = min(rows_J[j], give_R[rank])
            take_R[rank] = rows_J[j] - own
            if own > 0:
                give_R[rank] -= own
                segments_4G[0, count] = m
                segments_4G[1, count] = rank
                segments_4G[2, count] = rank
                segments_4G[3, count] = own
                count += 1
        for first in range(0, num_ranks, ranks_per_node):
            count = _match(give_R, take_R, first, first + ranks_per_node, m, segments_4G, count)
        count = _match(give_R, take_R, 0, num_ranks, m, segments_4G, count)
    return segments_4G[:, :count].copy()


@njit(cache=True)
def share_evenly(load_ER, experts_M, start_M, ranks_J, ranks_per_node):
    """Assign source ranks' rows to the holders without regard to load: to the rank itself, else its node's holders, else all.

    Holders share a rank's rows evenly, the first of them the remainder. Returns the same as `decompose`.
    """
    num_ranks, most = load_ER.shape[1], 0
    for m in range(experts_M.size):
        most += num_ranks * (start_M[m + 1] - start_M[m])
    segments_4G, count = np.empty((4, most), np.int64), 0
    for m in range(experts_M.size):
        node_j = start_M[m]
        for rank in range(num_ranks):
            node_end = (rank // ranks_per_node + 1) * ranks_per_node
            while node_j < start_M[m + 1] and ranks_J[node_j] < node_end - ranks_per_node:
                node_j += 1
            first, end = node_j, node_j
            while end < start_M[m + 1] and ranks_J[end] < node_end:
                end += 1
            for j in range(node_j, end):
                if ranks_J[j] == rank:
                    first, end = j, j + 1
                    break
            if first == end:
                first, end = start_M[m], start_M[m + 1]
            rows = load_ER[experts_M[m], rank]
            for j in range(first, end):
                share = rows // (end - first) + (j - first < rows % (end - first))
                if share:
                    segments_4G[0, count] = m
                    segments_4G[1, count] = rank
                    segments_4G[2, count] = ranks_J[j]
                    segments_4G[3, count] = share
                    count += 1
    return segments_4G[:, :count].copy()


@njit(cache=True)
def flow(segments_4G, load_ER, owner_E, is_single_E):
    """Return the rows that every rank computes by source rank, int64 [R, R]: of single experts' loads, and of segments."""
    num_experts, num_ranks = load_ER.shape
    flow_DS = np.zeros((num_ranks, num_ranks), np.int64)  # by destination first, so that loads are added in order of memory
    for expert in range(num_experts):
        if is_single_E[expert]:
            for src in range(num_ranks):
                flow_DS[owner_E[expert], src] += load_ER[expert, src]
    for place in range(segments_4G.shape[1]):
        flow_DS[segments_4G[2, place], segments_4G[1, place]] += segments_4G[3, place]
    return np.ascontiguousarray(flow_DS.T)
