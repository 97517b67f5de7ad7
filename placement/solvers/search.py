"""Compiled routines of the quota planner. Import this module lazily: it imports numba, and a first call compiles.

Shape letters: R ranks, E experts, N nodes, C copies, M replicated experts, J (expert, holder) entries, P plans. Integers
throughout, so every machine computes the same. Loads come transposed, load_ER, because every loop walks one expert's ranks.
"""
# mypy: disable-error-code=no-untyped-def
# numba infers the types of compiled functions.

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numba import njit

from ..cost import seconds_of
from ..flow import level, prefer_local
from ..values import Problem

_price = njit(cache=True)(seconds_of)


class Layer(NamedTuple):
    """The problem as arrays. `experts` lists every rank's experts, largest first, from first_R[rank]; `ranks` busiest first."""

    load_ER: np.ndarray
    totals_E: np.ndarray
    owner_E: np.ndarray
    owned_R: np.ndarray
    ranks: np.ndarray
    experts: np.ndarray
    first_R: np.ndarray
    ranks_per_node: int
    half_rate_rows: int
    slots: int


def layer_of(problem: Problem) -> Layer:
    """Arrange a problem as the compiled routines read it."""
    owner_E, totals_E, owned_R = problem.expert_to_owner_E, problem.load.totals_E, problem.owned_rows_R
    experts = np.lexsort((-totals_E, owner_E))
    return Layer(
        problem.load.load_ER,
        totals_E,
        owner_E,
        owned_R,
        np.argsort(-owned_R, kind="stable"),
        experts,
        np.searchsorted(owner_E[experts], np.arange(problem.num_ranks + 1)),
        problem.topology.ranks_per_node,
        problem.topology.half_rate_rows,
        problem.slots,
    )


class Traffic(NamedTuple):
    """Rows sent and received [2, R] and [2, N], and experts with rows [R], when nothing is copied."""

    rows_2R: np.ndarray
    rows_2N: np.ndarray
    groups_R: np.ndarray


@njit(cache=True)
def _pick_host(layer, rank, expert, amount, threshold, rows_R, free_R, hosts_R):
    """Return the rank that can take most of `amount` rows; among equals one of the same node, then the idlest; -1 for none."""
    best, best_rows, best_near, best_room = -1, 0, False, 0
    node_first = rank // layer.ranks_per_node * layer.ranks_per_node
    node_end = node_first + layer.ranks_per_node
    for other in range(rows_R.size):
        room = threshold - rows_R[other]
        if room <= 0 or free_R[other] == 0 or hosts_R[other] == expert:
            continue
        rows = min(amount, room)
        near = node_first <= other < node_end
        if rows > best_rows or (rows == best_rows and (near > best_near or (near == best_near and room > best_room))):
            best, best_rows, best_near, best_room = other, rows, near, room
    return best


@njit(cache=True)
def _export(layer, threshold, min_rows, copies_2C):
    """Try to bring every rank to `threshold` rows with few copies; return their number, or -1 if that failed.

    Ranks above the threshold, busiest first, hand their largest experts' rows to the ranks with most room. A copy takes at least
    `min_rows`. copies_2C receives (expert, rank) columns.
    """
    num_ranks = layer.owned_R.size
    rows_R = layer.owned_R.copy()
    free_R = np.full(num_ranks, layer.slots, np.int64)
    hosts_R = np.full(num_ranks, -1, np.int64)
    count = 0
    for rank in layer.ranks:
        need = rows_R[rank] - threshold
        if need <= 0:
            break
        for k in range(layer.first_R[rank], layer.first_R[rank + 1]):
            expert = layer.experts[k]
            left = layer.totals_E[expert]
            while need > 0 and left >= min_rows:
                amount = min(max(need, min_rows), left)
                host = _pick_host(layer, rank, expert, amount, threshold, rows_R, free_R, hosts_R)
                if host < 0:
                    break
                taken = min(amount, threshold - rows_R[host])
                if taken < min_rows:
                    break
                rows_R[host] += taken
                free_R[host] -= 1
                hosts_R[host] = expert
                copies_2C[0, count] = expert
                copies_2C[1, count] = host
                count += 1
                left -= taken
                need -= taken
            if need <= 0:
                break
        if need > 0:
            return -1
    return count


@njit(cache=True)
def _smallest_threshold(layer, least_rows, tolerance, min_rows, copies_2C):
    """Return a small threshold that `_export` reaches: steps that double up from `least_rows`, then bisection."""
    low, high, step = least_rows, layer.owned_R.max(), 0
    while low < high:
        threshold = least_rows + step
        if threshold >= high:
            break
        if _export(layer, threshold, min_rows, copies_2C) >= 0:
            high = threshold
            break
        low = threshold + 1
        step = max(2 * step, tolerance)
    while high - low > tolerance:
        middle = (low + high) // 2
        if _export(layer, middle, min_rows, copies_2C) >= 0:
            high = middle
        else:
            low = middle + 1
    return high


@njit(cache=True)
def _table(copies_2C, owner_E):
    """Turn copies into the sparse table of flow.py: experts ascending, holders of each ascending."""
    num_experts, count = owner_E.size, copies_2C.shape[1]
    holders_E = np.zeros(num_experts, np.int64)
    for c in range(count):
        holders_E[copies_2C[0, c]] += 1
    experts_M = np.flatnonzero(holders_E)
    start_M = np.zeros(experts_M.size + 1, np.int64)
    row_E = np.full(num_experts, -1, np.int64)
    for m in range(experts_M.size):
        start_M[m + 1] = start_M[m] + holders_E[experts_M[m]] + 1
        row_E[experts_M[m]] = m
    ranks_J = np.empty(start_M[-1], np.int64)
    used_M = np.ones(experts_M.size, np.int64)
    for m in range(experts_M.size):
        ranks_J[start_M[m]] = owner_E[experts_M[m]]
    for c in range(count):
        m, rank = row_E[copies_2C[0, c]], copies_2C[1, c]
        j = start_M[m] + used_M[m]
        used_M[m] += 1
        while j > start_M[m] and ranks_J[j - 1] > rank:
            ranks_J[j] = ranks_J[j - 1]
            j -= 1
        ranks_J[j] = rank
    return experts_M, start_M, ranks_J


@njit(cache=True)
def static_traffic(layer):
    """Count what static expert parallelism sends: all that is not computed where it came from."""
    num_experts, num_ranks = layer.load_ER.shape
    per_node = layer.ranks_per_node
    rows_2R = np.zeros((2, num_ranks), np.int64)
    rows_2N = np.zeros((2, num_ranks // per_node), np.int64)
    groups_R = np.zeros(num_ranks, np.int64)
    for expert in range(num_experts):
        owner = layer.owner_E[expert]
        home = owner // per_node
        for rank in range(num_ranks):
            rows_2R[0, rank] += layer.load_ER[expert, rank]
        rows_2R[0, owner] -= layer.load_ER[expert, owner]
        rows_2R[1, owner] += layer.totals_E[expert] - layer.load_ER[expert, owner]
        groups_R[owner] += layer.totals_E[expert] > 0
        inside = layer.load_ER[expert, home * per_node : (home + 1) * per_node].sum()
        rows_2N[0, home] += layer.load_ER[expert, owner] - inside
        rows_2N[1, home] += layer.totals_E[expert] - inside
    for rank in range(num_ranks):
        rows_2N[0, rank // per_node] += rows_2R[0, rank]
    return Traffic(rows_2R, rows_2N, groups_R)


@njit(cache=True)
def _tally(layer, static, experts_M, start_M, ranks_J, rows_J, rows_R, tally_5):
    """Write the first five fields of cost.Tally for one plan, from the static traffic and the replicated experts only.

    Own tokens come first and the node's next, so a holder gets min(rows, own load) from itself and a node min(rows, load) from
    inside: the traffic follows from the rows alone, without saying whose rows they are.
    """
    per_node = layer.ranks_per_node
    rows_2R, rows_2N, groups_R = static.rows_2R.copy(), static.rows_2N.copy(), static.groups_R.copy()
    copies_2R, copies_2N = np.zeros_like(rows_2R), np.zeros_like(rows_2N)
    rows_N = np.empty(rows_2N.shape[1], np.int64)
    for m in range(experts_M.size):
        expert = experts_M[m]
        owner, total = layer.owner_E[expert], layer.totals_E[expert]
        home = owner // per_node
        load_R = layer.load_ER[expert]
        rows_N[:] = 0
        rows_2R[0, owner] += load_R[owner]
        rows_2R[1, owner] -= total - load_R[owner]
        groups_R[owner] -= total > 0
        for j in range(start_M[m], start_M[m + 1]):
            rank = ranks_J[j]
            node = rank // per_node
            own = min(rows_J[j], load_R[rank])
            rows_2R[0, rank] -= own
            rows_2R[1, rank] += rows_J[j] - own
            groups_R[rank] += rows_J[j] > 0
            rows_N[node] += rows_J[j]
            if rank != owner:
                copies_2R[0, owner] += 1
                copies_2R[1, rank] += 1
                if node != home:
                    copies_2N[0, home] += 1
                    copies_2N[1, node] += 1
        for node in range(rows_N.size):
            inside = load_R[node * per_node : (node + 1) * per_node].sum()
            own = min(rows_N[node], inside)
            rows_2N[0, node] -= own
            rows_2N[1, node] += rows_N[node] - own
            if node == home:
                rows_2N[0, node] += inside
                rows_2N[1, node] -= total - inside
    tally_5[0] = (rows_R + layer.half_rate_rows * groups_R).max()
    tally_5[1] = rows_2R.max()
    tally_5[2] = rows_2N.max()
    tally_5[3] = copies_2R.max()
    tally_5[4] = copies_2N.max()


@njit(cache=True)
def score(layer, static, copies_2C, tally_5):
    """Split the load exactly over owners and copies, and write the first five fields of cost.Tally."""
    experts_M, start_M, ranks_J = _table(copies_2C, layer.owner_E)
    rows_R = layer.owned_R.copy()
    for m in range(experts_M.size):
        rows_R[layer.owner_E[experts_M[m]]] -= layer.totals_E[experts_M[m]]
    rows_J = np.zeros(ranks_J.size, np.int64)
    lower_bound = max(-(-layer.owned_R.sum() // rows_R.size), rows_R.max())
    prefer_local(layer.load_ER, experts_M, start_M, ranks_J, layer.owner_E, layer.ranks_per_node, rows_J, rows_R)
    level(start_M, ranks_J, rows_J, rows_R, lower_bound)
    _tally(layer, static, experts_M, start_M, ranks_J, rows_J, rows_R, tally_5)


@njit(cache=True)
def candidates(layer, least_rows, min_rows_P, rise_P):
    """Build and score one plan for every entry of `min_rows_P` (smallest group moved) and `rise_P` (threshold).

    A threshold is the smallest one reached with the first entry's groups, raised by rise_P 32nds. Returns tallies int64 [P, 5],
    the number of copies [P], and the copies [P, 2, R * slots] as (expert, rank) columns; plan 0 has no copies, and plans that
    failed or repeat the one before are left out.
    """
    num_ranks = layer.owned_R.size
    most = 1 + min_rows_P.size
    tallies = np.zeros((most, 5), np.int64)
    sizes = np.zeros(most, np.int64)
    copies = np.zeros((most, 2, num_ranks * layer.slots), np.int64)
    static = static_traffic(layer)
    score(layer, static, copies[0, :, :0], tallies[0])
    count = 1
    # A quarter of a percent of the mean rank: finer thresholds cost time and change no plan worth having.
    tolerance = max(layer.owned_R.sum() // num_ranks // 400, 1)
    lowest = _smallest_threshold(layer, least_rows, tolerance, min_rows_P[0], copies[count])
    for p in range(min_rows_P.size):
        size = _export(layer, lowest + lowest * rise_P[p] // 32, min_rows_P[p], copies[count])
        if size <= 0 or (size == sizes[count - 1] and (copies[count, :, :size] == copies[count - 1, :, :size]).all()):
            continue
        sizes[count] = size
        score(layer, static, copies[count, :, :size], tallies[count])
        count += 1
    return tallies[:count], sizes[:count], copies[:count]


class Plan(NamedTuple):
    """Copies, int64 [2, C] as (expert, rank) columns, with the first five fields of cost.Tally and the seconds of cost.Cost."""

    copies_2C: np.ndarray
    tally_5: np.ndarray
    stages: tuple[float, float, float, float, float]


@njit(cache=True)
def cheapest(prices, tallies, sizes, copies):
    """Return the cheapest plan of those that `candidates` lists, of equals the one with fewest copies and then the first."""
    best, best_s = -1, 0.0
    for p in range(sizes.size):
        stages = _price(prices, tallies[p, 0], tallies[p, 1], tallies[p, 2], tallies[p, 3], tallies[p, 4], 0, 0)
        total_s = stages[0] + stages[1] + stages[2] + stages[3] + stages[4]
        if best < 0 or total_s < best_s or (total_s == best_s and sizes[p] < sizes[best]):
            best, best_s = p, total_s
    t = tallies[best]
    return Plan(copies[best, :, : sizes[best]], t, _price(prices, t[0], t[1], t[2], t[3], t[4], 0, 0))
