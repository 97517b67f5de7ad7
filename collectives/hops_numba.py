"""Compiled loops over the hops of schedules. Import this module lazily: it imports numba, and a first call compiles.

The copied experts are M rows of a sparse table: entries start_M[m] to start_M[m + 1] of `ranks_J` are the ranks that need a copy
of expert m, descending. Shape letters: R ranks, M copied experts, J (expert, copy) entries, G routes, H hops.
"""
# mypy: disable-error-code=no-untyped-def
# numba infers the types of compiled functions.

from __future__ import annotations

import numpy as np

from ..jit.decorators import njit


@njit(cache=True)
def count_loads(start_G, src_H, dst_H, chunks_G, num_chunks_G, num_ranks, ranks_per_node, item_bytes, rank_rate, node_rate):
    """The fields of `account.Loads` in order, float64 [5]; the fourth is in seconds, the last in hops."""
    num_nodes = num_ranks // ranks_per_node
    sent_R, received_R = np.zeros(num_ranks), np.zeros(num_ranks)
    messages_R = np.zeros(num_ranks, np.int64)
    left_N, entered_N = np.zeros(num_nodes), np.zeros(num_nodes)
    forwards_R, way_hops_R, way_s_R = np.zeros(num_ranks, np.int64), np.zeros(num_ranks, np.int64), np.zeros(num_ranks)
    fill_s, fill_hops = 0.0, 0
    for g in range(chunks_G.size):
        begin, end = start_G[g], start_G[g + 1]
        owner = src_H[begin]
        route_bytes = item_bytes * chunks_G[g] / num_chunks_G[g]
        chunk_s = item_bytes / num_chunks_G[g] / rank_rate
        crossing_s = max(chunk_s, item_bytes / num_chunks_G[g] / node_rate)
        for h in range(begin, end):
            forwards_R[src_H[h]] += 1
        way_s_R[owner], way_hops_R[owner] = 0.0, 0
        for h in range(begin, end):
            src, dst = src_H[h], dst_H[h]
            sent_R[src] += route_bytes
            received_R[dst] += route_bytes
            messages_R[src] += chunks_G[g]
            messages_R[dst] += chunks_G[g]
            from_node, to_node = src // ranks_per_node, dst // ranks_per_node
            step_s = chunk_s
            if from_node != to_node:
                left_N[from_node] += route_bytes
                entered_N[to_node] += route_bytes
                step_s = crossing_s
            times = 0 if src == owner else forwards_R[src]
            way_s_R[dst] = way_s_R[src] + times * step_s
            way_hops_R[dst] = way_hops_R[src] + times
            fill_s = max(fill_s, way_s_R[dst])
            fill_hops = max(fill_hops, way_hops_R[dst])
        for h in range(begin, end):
            forwards_R[src_H[h]] = 0
    loads = np.empty(5)
    loads[0] = max(sent_R.max(), received_R.max())
    loads[1] = max(left_N.max(), entered_N.max())
    loads[2] = messages_R.max()
    loads[3], loads[4] = fill_s, fill_hops
    return loads


@njit(cache=True)
def chain_sources(owners_M, start_M, ranks_J, num_ranks):
    """Source rank of each copy in chains of descending rank order, with the busiest ranks attached as leaves: [J].

    What a rank receives is fixed by its copies. Initially it sends one copy for each expert it owns and each chain it is in.
    While the next higher rank of a chain can take over the busiest rank's forwarding and stay less busy, it does.
    """
    num_experts = owners_M.size
    sends_R = np.zeros(num_ranks, np.int64)
    forwards_J = np.zeros(ranks_J.size, np.bool_)
    expert_J = np.empty(ranks_J.size, np.int64)
    first_R = np.zeros(num_ranks + 1, np.int64)  # entries of every rank: by_rank_J[first_R[r] : first_R[r + 1]]
    for m in range(num_experts):
        sends_R[owners_M[m]] += 1
        for j in range(start_M[m], start_M[m + 1]):
            expert_J[j] = m
            first_R[ranks_J[j] + 1] += 1
            if j + 1 < start_M[m + 1]:
                forwards_J[j] = True
                sends_R[ranks_J[j]] += 1
    first_R = np.cumsum(first_R)
    next_R, by_rank_J = first_R.copy(), np.empty(ranks_J.size, np.int64)
    for j in range(ranks_J.size):
        by_rank_J[next_R[ranks_J[j]]] = j
        next_R[ranks_J[j]] += 1
    while ranks_J.size:
        busiest = sends_R.argmax()
        best_j, best_heir, best_handed, best_sends = -1, 0, 0, sends_R[busiest]
        for i in range(first_R[busiest], first_R[busiest + 1]):
            j = by_rank_J[i]
            begin, end = start_M[expert_J[j]], start_M[expert_J[j] + 1]
            if not forwards_J[j] or j == begin:
                continue  # the lowest rank of a chain forwards nothing, and above the highest no rank could take over
            heir, below = j - 1, j + 1
            while not forwards_J[heir]:
                heir -= 1
            while below < end - 1 and not forwards_J[below]:
                below += 1
            if sends_R[ranks_J[heir]] + below - j < best_sends:
                best_j, best_heir, best_handed = j, heir, below - j
                best_sends = sends_R[ranks_J[heir]] + best_handed
        if best_j < 0:
            break
        forwards_J[best_j] = False
        sends_R[busiest] -= best_handed
        sends_R[ranks_J[best_heir]] += best_handed
    sources_J = np.empty(ranks_J.size, np.int64)
    for m in range(num_experts):
        source = owners_M[m]
        for j in range(start_M[m], start_M[m + 1]):
            sources_J[j] = source
            if forwards_J[j]:
                source = ranks_J[j]
    return sources_J


@njit(cache=True)
def tree_sources(owners_M, start_M, ranks_J):
    """Source rank of each copy where the owner sends to the highest rank, and copy i to copies 2i + 1 and 2i + 2: [J]."""
    sources_J = np.empty(ranks_J.size, np.int64)
    for m in range(owners_M.size):
        begin = start_M[m]
        for j in range(begin, start_M[m + 1]):
            sources_J[j] = owners_M[m] if j == begin else ranks_J[begin + (j - begin - 1) // 2]
    return sources_J


@njit(cache=True)
def node_hops(owners_M, start_M, ranks_J, num_ranks, ranks_per_node):
    """Chains over the nodes that need an expert and inside each of them: (src, dst) of every hop, [2, J].

    The leader of each node but the owner's is the rank with the fewest sends so far, the highest of several; it receives for the
    node, and both chains continue from it.
    """
    hops_2J = np.empty((2, ranks_J.size), np.int64)
    sends_R = np.zeros(num_ranks, np.int64)
    h = 0
    for m in range(owners_M.size):
        begin, end, first_hop = start_M[m], start_M[m + 1], h
        owner_node = owners_M[m] // ranks_per_node
        source = owners_M[m]
        for j in range(begin, end):
            if ranks_J[j] // ranks_per_node == owner_node:
                hops_2J[0, h], hops_2J[1, h] = source, ranks_J[j]
                source = ranks_J[j]
                h += 1
        entrance, j = owners_M[m], begin
        while j < end:
            node = ranks_J[j] // ranks_per_node
            node_begin = j
            while j < end and ranks_J[j] // ranks_per_node == node:
                j += 1
            if node == owner_node:
                continue
            leader = ranks_J[node_begin]
            for other in ranks_J[node_begin:j]:
                if sends_R[other] < sends_R[leader]:
                    leader = other
            hops_2J[0, h], hops_2J[1, h] = entrance, leader
            h += 1
            source = leader
            for other in ranks_J[node_begin:j]:
                if other != leader:
                    hops_2J[0, h], hops_2J[1, h] = source, other
                    source = other
                    h += 1
            entrance = leader
        for hop in range(first_hop, h):
            sends_R[hops_2J[0, hop]] += 1
    return hops_2J


@njit(cache=True)
def piece_hops(owners_M, start_M, ranks_J, num_hops):
    """One route per entry:

    the copy's piece from the owner to it, and from it to the other copies; (src, dst) of every hop, [2, H].
    """
    hops_2H = np.empty((2, num_hops), np.int64)
    h = 0
    for m in range(owners_M.size):
        ranks = ranks_J[start_M[m] : start_M[m + 1]]
        for rank in ranks:
            hops_2H[0, h], hops_2H[1, h] = owners_M[m], rank
            h += 1
            for other in ranks:
                if other != rank:
                    hops_2H[0, h], hops_2H[1, h] = rank, other
                    h += 1
    return hops_2H
