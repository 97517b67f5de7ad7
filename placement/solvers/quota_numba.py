"""Compiled routines of the quota planner: copies for balance, further copies that save dispatch bytes, the cheapest plan.

Import this module lazily: it imports numba, and a first call compiles. Shape letters: R ranks, E experts, N nodes, C copies,
P plans.
"""
# mypy: disable-error-code=no-untyped-def
# Numba infers the types of compiled functions.

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from ...jit.decorators import njit
from ..cost import seconds_of
from .score_numba import score, static_traffic

_price = njit(cache=True)(seconds_of)


@njit(cache=True)
def _pick_host(layer, rank, expert, amount, room_R, free_R, hosts_R):
    """Return the rank that can take most of `amount` rows, of equals one in the same node, then with most room; -1 for none."""
    best, best_rows, best_near, best_room = -1, 0, False, 0
    node_first = rank // layer.ranks_per_node * layer.ranks_per_node
    node_end = node_first + layer.ranks_per_node
    for other in range(room_R.size):
        room = room_R[other]
        if room <= 0 or free_R[other] == 0 or hosts_R[other] == expert:
            continue
        rows = min(amount, room)
        near = node_first <= other < node_end
        if rows > best_rows or (rows == best_rows and (near > best_near or (near == best_near and room > best_room))):
            best, best_rows, best_near, best_room = other, rows, near, room
    return best


@njit(cache=True)
def _export(layer, threshold, min_rows, copies_2C):
    """Try to bring every rank to a cost of `threshold` with few copies; return their number, or -1 if that failed.

    Ranks above the threshold, busiest first, give rows of their largest experts to the ranks with most room. A copy takes at
    least `min_rows` rows. copies_2C receives (expert, rank) columns.
    """
    num_ranks = layer.owned_R.size
    room_R = threshold // layer.cost_R - layer.owned_R
    free_R = np.full(num_ranks, layer.slots, np.int64)
    hosts_R = np.full(num_ranks, -1, np.int64)
    count = 0
    for rank in layer.ranks:
        need = -room_R[rank]
        if need <= 0:
            break
        for k in range(layer.first_R[rank], layer.first_R[rank + 1]):
            expert = layer.experts[k]
            left = layer.totals_E[expert]
            while need > 0 and left >= min_rows:
                amount = min(max(need, min_rows), left)
                host = _pick_host(layer, rank, expert, amount, room_R, free_R, hosts_R)
                if host < 0:
                    break
                taken = min(amount, room_R[host])
                if taken < min_rows:
                    break
                room_R[host] -= taken
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
    """Return a small threshold that `_export` reaches: doubling steps up from `least_rows`, then bisection."""
    low, high, step = least_rows, (layer.cost_R * layer.owned_R).max(), 0
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
def candidates(layer, least_rows, min_rows_P, rise_P):
    """Build and score one plan for every entry of `min_rows_P` (fewest rows of a copy) and `rise_P` (threshold).

    The threshold is the smallest that is reached with the first entry of `min_rows_P`, increased by rise_P 32nds. Returns tallies
    int64 [P, 5], the number of copies [P], and the copies [P, 2, R * slots] as (expert, rank) columns; plan 0 has no copies, and
    plans that failed or repeat the one before are left out.
    """
    num_ranks = layer.owned_R.size
    most = 1 + min_rows_P.size
    tallies = np.zeros((most, 5), np.int64)
    sizes = np.zeros(most, np.int64)
    copies = np.zeros((most, 2, num_ranks * layer.slots), np.int64)
    static = static_traffic(layer)
    score(layer, static, copies[0, :, :0], tallies[0])
    count = 1
    # 1/400 of the mean rank: finer thresholds cost time without improving the plan.
    tolerance = max(layer.owned_R.sum() // num_ranks // 400, 1) * layer.cost_R.min()
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
    """Return the cheapest of the plans that `candidates` returns, of equals the one with fewest copies, then the first."""
    best, best_s = -1, 0.0
    for p in range(sizes.size):
        stages = _price(prices, tallies[p, 0], tallies[p, 1], tallies[p, 2], tallies[p, 3], tallies[p, 4], 0, 0)
        total_s = stages[0] + stages[1] + stages[2] + stages[3] + stages[4]
        if best < 0 or total_s < best_s or (total_s == best_s and sizes[p] < sizes[best]):
            best, best_s = p, total_s
    t = tallies[best]
    return Plan(copies[best, :, : sizes[best]], t, _price(prices, t[0], t[1], t[2], t[3], t[4], 0, 0))


class Holdings(NamedTuple):
    """A plan to which copies are added: its holders (owners and copies), and the copies that ranks and nodes receive and send.

    Those of nodes times the cost of their links.
    """

    holds_RE: np.ndarray
    holds_NE: np.ndarray
    got_R: np.ndarray
    sent_R: np.ndarray
    got_N: np.ndarray
    sent_N: np.ndarray


@njit(cache=True)
def _add(layer, state, expert, rank):
    """Add a copy on a rank."""
    owner, per_node = layer.owner_E[expert], layer.ranks_per_node
    state.holds_RE[rank, expert] = True
    state.holds_NE[rank // per_node, expert] = True
    state.got_R[rank] += 1
    state.sent_R[owner] += 1
    if rank // per_node != owner // per_node:
        state.got_N[rank // per_node] += layer.node_cost_N[rank // per_node]
        state.sent_N[owner // per_node] += layer.node_cost_N[owner // per_node]


@njit(cache=True)
def _start(layer, copies_2C):
    """The state of a plan without additions."""
    num_experts, num_ranks = layer.load_ER.shape
    per_node = layer.ranks_per_node
    num_nodes = num_ranks // per_node
    state = Holdings(
        np.zeros((num_ranks, num_experts), np.bool_),
        np.zeros((num_nodes, num_experts), np.bool_),
        np.zeros(num_ranks, np.int64),
        np.zeros(num_ranks, np.int64),
        np.zeros(num_nodes, np.int64),
        np.zeros(num_nodes, np.int64),
    )
    for expert in range(num_experts):
        state.holds_RE[layer.owner_E[expert], expert] = True
        state.holds_NE[layer.owner_E[expert] // per_node, expert] = True
    for c in range(copies_2C.shape[1]):
        _add(layer, state, copies_2C[0, c], copies_2C[1, c])
    return state


@njit(cache=True)
def _best_for_bytes(layer, load_RE, first_s_NE, state, rank, most, most_node, row_s, least_s):
    """Return the expert whose copy at `rank` saves most seconds of dispatch; -1 if none saves more than least_s.

    A copy keeps the rank's own tokens local and, if it is its node's first, the node's tokens in the node: first_s_NE.
    """
    best, best_s = -1, least_s
    node = rank // layer.ranks_per_node
    load_E, first_s_E, holds_E = load_RE[rank], first_s_NE[node], state.holds_RE[rank]
    for expert in range(load_E.size):
        saved_s = load_E[expert] * row_s + first_s_E[expert]
        if saved_s <= best_s or holds_E[expert]:
            continue
        owner = layer.owner_E[expert]
        owner_node = owner // layer.ranks_per_node
        if state.sent_R[owner] >= most:
            continue
        cost_N = layer.node_cost_N
        got, sent = state.got_N[node] + cost_N[node], state.sent_N[owner_node] + cost_N[owner_node]
        if owner_node != node and max(got, sent) > most_node:
            continue
        best, best_s = expert, saved_s
    return best


@njit(cache=True)
def _node_seconds(load_RE, ranks_per_node, node_row_s):
    """Return the seconds on the node link of every node's rows of every expert, float64 [N, E]."""
    load_s_NE = np.zeros((load_RE.shape[0] // ranks_per_node, load_RE.shape[1]))
    if node_row_s > 0:
        for rank in range(load_RE.shape[0]):
            for expert in range(load_RE.shape[1]):
                load_s_NE[rank // ranks_per_node, expert] += load_RE[rank, expert]
        load_s_NE *= node_row_s
    return load_s_NE


@njit(cache=True)
def with_further_copies(layer, load_RE, copies_2C, most_2P, least_P, min_rows, row_s, node_row_s):
    """Add copies that save dispatch bytes to one plan, once for every column of most_2P, and score the results.

    Afterwards no device sends or receives more than most_2P[0] copies, and no node link more than most_2P[1], unless the plan
    already did. Ranks take turns, each adding its best copy, so that all links are relieved evenly; a copy must save more than
    least_P seconds and keep `min_rows` rows of its rank local. row_s and node_row_s are the seconds of one row on the links.
    Returns the same as `candidates`.
    """
    given = copies_2C.shape[1]
    num_plans, slots = least_P.size, layer.slots
    tallies = np.zeros((num_plans, 5), np.int64)
    sizes = np.zeros(num_plans, np.int64)
    copies = np.zeros((num_plans, 2, layer.owned_R.size * slots), np.int64)
    static = static_traffic(layer)
    load_s_NE = _node_seconds(load_RE, layer.ranks_per_node, node_row_s) * layer.node_cost_N.reshape(-1, 1)
    for p in range(num_plans):
        most, most_node, count = most_2P[0, p], most_2P[1, p], given
        copies[p, :, :given] = copies_2C
        state = _start(layer, copies_2C)
        first_s_NE = np.where(state.holds_NE, 0.0, load_s_NE)
        for turn in range(min(most, slots)):
            for rank in layer.ranks:
                if state.got_R[rank] > turn:
                    continue
                expert = _best_for_bytes(layer, load_RE, first_s_NE, state, rank, most, most_node, row_s, least_P[p])
                if expert < 0 or load_RE[rank, expert] < min_rows:
                    continue
                _add(layer, state, expert, rank)
                first_s_NE[rank // layer.ranks_per_node, expert] = 0.0
                copies[p, 0, count], copies[p, 1, count] = expert, rank
                count += 1
        sizes[p] = count
        score(layer, static, copies[p, :, :count], tallies[p])
    return tallies, sizes, copies


@njit(cache=True)
def _limits_to_try(layer, prices, tally_5):
    """Return int64 [2, P], the most copies per device and per node link, and float [P], the seconds a further copy must save.

    A copy of expert e on rank d that serves dispatch bytes only saves n rows of dispatch and combine, forward and backward: the
    bytes of 4 * n rows; it costs its gathers and its reduce. So it pays from n = (gathers * expert bytes + gradient bytes) / (4 *
    row bytes) rows on: w * F * (q + beta) / 4, whatever the model dimension. Copies that hide under other work, or beside the
    busiest device's copies, cost one more small group of rows instead.
    """
    num_nodes, per_node = layer.owned_R.size // layer.ranks_per_node, layer.ranks_per_node
    group_s = prices.work_row_s * layer.half_rate_rows * layer.cost_R.min()
    shown_s = (prices.gathers * prices.expert_bytes + prices.gradient_bytes) / prices.device_bytes_per_s
    beside_s = prices.expert_bytes * max(tally_5[3] / prices.device_bytes_per_s, tally_5[4] / prices.node_bytes_per_s)
    # The forward's gather is hidden by the work before the layer, the backward's gather and reduce by twice that.
    behind = ((prices.gathers - 1) * prices.expert_bytes + prices.gradient_bytes) / prices.expert_bytes
    room_s = min(prices.overlap_s - prices.latency_s, (2 * prices.overlap_s - prices.gathers * prices.latency_s) / behind)
    # A small margin, so that rounding excludes no copy.
    free = max(beside_s, room_s, 0.0) / prices.expert_bytes * (1 + 1e-9)
    most_2P, least_P = np.empty((2, 2), np.int64), np.array([group_s, group_s + shown_s])
    all_copies, node_copies = layer.owned_R.size * layer.slots, layer.slots * per_node * layer.node_cost_N.max()
    most_2P[0, 0] = int(min(free * prices.device_bytes_per_s, all_copies))
    most_2P[1, 0] = int(min(free * prices.node_bytes_per_s, num_nodes * node_copies))
    most_2P[0, 1], most_2P[1, 1] = tally_5[3] + layer.slots, tally_5[4] + node_copies
    is_tight = most_2P[0, 0] < layer.slots or (num_nodes > 1 and most_2P[1, 0] < node_copies)
    return most_2P[:, : 1 + is_tight], least_P[: 1 + is_tight]


@njit(cache=True)
def _total(stages):
    """The sum of the stages, in the order of cost.Cost."""
    return stages[0] + stages[1] + stages[2] + stages[3] + stages[4]


@njit(cache=True)
def plan(layer, load_RE, prices, least_rows, plans_2P):
    """Return the cheapest plan found: the best for balance, then with further copies that save dispatch bytes.

    plans_2P: `min_rows_P` and `rise_P` of the plans that `candidates` builds; every copy takes at least plans_2P[0, 0] rows.
    """
    best = cheapest(prices, *candidates(layer, least_rows, plans_2P[0], plans_2P[1]))
    if layer.slots == 0 or best.tally_5[1] == 0:
        return best
    row_s, node_row_s = 4 * prices.row_bytes / prices.device_bytes_per_s, 4 * prices.row_bytes / prices.node_bytes_per_s
    # Only the slowest link matters; all ranks of a node relieve its link together.
    node_counts = best.tally_5[2] * node_row_s > best.tally_5[1] * row_s
    node_row_s = node_row_s * layer.ranks_per_node if node_counts else 0.0
    most_2P, least_P = _limits_to_try(layer, prices, best.tally_5)
    plans = with_further_copies(layer, load_RE, best.copies_2C, most_2P, least_P, plans_2P[0, 0], row_s, node_row_s)
    more = cheapest(prices, *plans)
    return more if _total(more.stages) < _total(best.stages) else best


@njit(cache=True)
def plan_of(layer, prices, copies_2C):
    """Return the plan of these copies."""
    tally_5 = np.zeros(5, np.int64)
    score(layer, static_traffic(layer), copies_2C, tally_5)
    return Plan(copies_2C, tally_5, _price(prices, tally_5[0], tally_5[1], tally_5[2], tally_5[3], tally_5[4], 0, 0))
