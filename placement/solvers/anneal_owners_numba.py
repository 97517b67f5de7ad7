"""Simulated annealing over owners, of one layer or of many jointly, without copies. Import this module lazily: it imports numba.

A layer's seconds are those of the cost model without copies. Layers are coupled twice: a token routed to expert i of a layer and
expert j of the next stays on its rank or node if both experts are there; and an expert may change its rank in one layer if an
expert of another layer moves in the opposite direction, so that every rank keeps its number of bank rows. The state of a layer is
a few sums per rank, of which an exchange changes those of two ranks; half of the proposals start at the layer's busiest rank,
because others rarely change a maximum. Shape letters: L layers, R ranks, N nodes, E experts.
"""
# mypy: disable-error-code=no-untyped-def
# Numba infers the types of compiled functions.

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from ...jit.decorators import njit
from ..cost import Prices, seconds_of
from .random_numba import draw

_price = njit(cache=True)(seconds_of)


class Layers(NamedTuple):
    """Constants of a search. Loads are int64 [L, E, R]; `current_LE`: the present owners; hops are priced in seconds per row.

    `back_LEE` is `pairs_LEE` with every pair of layers transposed.
    """

    load_LER: np.ndarray
    totals_LE: np.ndarray
    current_LE: np.ndarray
    pairs_LEE: np.ndarray
    back_LEE: np.ndarray
    cost_R: np.ndarray
    node_cost_N: np.ndarray
    ranks_per_node: int
    half_rate_rows: int
    rank_hop_s: float
    node_hop_s: float
    prices: Prices


class _Sums(NamedTuple):
    """Per layer and rank, or node: cost of rows and small groups, rows computed, local rows, source rows; moves out and in."""

    work_LR: np.ndarray
    rows_LR: np.ndarray
    stay_LR: np.ndarray
    start_LR: np.ndarray
    rows_LN: np.ndarray
    stay_LN: np.ndarray
    start_LN: np.ndarray
    moves_2LR: np.ndarray
    moves_2LN: np.ndarray
    # Tokens between an expert and all experts of the neighbouring layers that a rank owns.
    near_LRE: np.ndarray


@njit(cache=True)
def _count(layers, sums, layer, expert, rank, sign):
    """Add (sign 1) or remove (-1) one expert at one rank."""
    per_node = layers.ranks_per_node
    node, total = rank // per_node, layers.totals_LE[layer, expert]
    load_R = layers.load_LER[layer, expert]
    sums.rows_LR[layer, rank] += sign * total
    sums.work_LR[layer, rank] += sign * layers.cost_R[rank] * (total + (layers.half_rate_rows if total else 0))
    sums.stay_LR[layer, rank] += sign * load_R[rank]
    current = layers.current_LE[layer, expert]
    if current != rank:
        sums.moves_2LR[0, layer, current] += sign
        sums.moves_2LR[1, layer, rank] += sign
    if sums.rows_LN.shape[1] == 1:
        return
    sums.rows_LN[layer, node] += sign * total
    for r in range(node * per_node, (node + 1) * per_node):
        sums.stay_LN[layer, node] += sign * load_R[r]
    if current // per_node != node:
        sums.moves_2LN[0, layer, current // per_node] += sign
        sums.moves_2LN[1, layer, node] += sign


@njit(cache=True)
def _link(layers, near_LRE, layer, expert, rank, sign):
    """Update the neighbouring layers' sums for an expert that joins (1) or leaves (-1) a rank."""
    num_layers, num_experts = layers.totals_LE.shape
    if layers.pairs_LEE.shape[0] == 0:
        return
    for other in range(num_experts):
        if layer + 1 < num_layers:
            near_LRE[layer + 1, rank, other] += sign * layers.pairs_LEE[layer, expert, other]
        if layer > 0:
            near_LRE[layer - 1, rank, other] += sign * layers.back_LEE[layer - 1, expert, other]


@njit(cache=True)
def _sums(layers, owner_LE):
    """Compute all sums from scratch."""
    num_layers, num_experts, num_ranks = layers.load_LER.shape
    num_nodes = num_ranks // layers.ranks_per_node
    start_LR = np.zeros((num_layers, num_ranks), np.int64)
    start_LN = np.zeros((num_layers, num_nodes), np.int64)
    for layer in range(num_layers):
        for expert in range(num_experts):
            start_LR[layer] += layers.load_LER[layer, expert]
        for rank in range(num_ranks):
            start_LN[layer, rank // layers.ranks_per_node] += start_LR[layer, rank]
    has_pairs = layers.pairs_LEE.shape[0] > 0
    sums = _Sums(
        np.zeros_like(start_LR),
        np.zeros_like(start_LR),
        np.zeros_like(start_LR),
        start_LR,
        np.zeros_like(start_LN),
        np.zeros_like(start_LN),
        start_LN,
        np.zeros((2, num_layers, num_ranks), np.int64),
        np.zeros((2, num_layers, num_nodes), np.int64),
        np.zeros((num_layers if has_pairs else 0, num_ranks, num_experts), np.int64),
    )
    for layer in range(num_layers):
        for expert in range(num_experts):
            _count(layers, sums, layer, expert, owner_LE[layer, expert], 1)
            _link(layers, sums.near_LRE, layer, expert, owner_LE[layer, expert], 1)
    return sums


@njit(cache=True)
def _layer_seconds(layers, sums, layer):
    """Return the seconds of one layer."""
    work, device, node, moves, node_moves, moved = 0, 0, 0, 0.0, 0.0, 0
    for r in range(sums.work_LR.shape[1]):
        work = max(work, sums.work_LR[layer, r])
        device = max(device, max(sums.rows_LR[layer, r], sums.start_LR[layer, r]) - sums.stay_LR[layer, r])
        moved += sums.moves_2LR[0, layer, r]
        moves = max(moves, float(max(sums.moves_2LR[0, layer, r], sums.moves_2LR[1, layer, r])))
    if sums.rows_LN.shape[1] > 1:
        for n in range(sums.rows_LN.shape[1]):
            cost, rows = layers.node_cost_N[n], max(sums.rows_LN[layer, n], sums.start_LN[layer, n]) - sums.stay_LN[layer, n]
            node = max(node, cost * rows)
            node_moves = max(node_moves, float(cost * max(sums.moves_2LN[0, layer, n], sums.moves_2LN[1, layer, n])))
    if layers.prices.mean_moves:
        moves, node_moves = moved / sums.work_LR.shape[1], 0.0
    stages = _price(layers.prices, work, device, node, 0, 0, moves, node_moves)
    return stages[0] + stages[1] + stages[4]


@njit(cache=True)
def _busiest(layers, sums, layer, by_work):
    """Return the rank with most rows of a layer, computed or exchanged."""
    best, most = 0, -1
    for r in range(sums.work_LR.shape[1]):
        rows = sums.work_LR[layer, r]
        if not by_work:
            rows = max(sums.rows_LR[layer, r], sums.start_LR[layer, r]) - sums.stay_LR[layer, r]
        if rows > most:
            best, most = r, rows
    return best


@njit(cache=True)
def _hop_seconds(layers, near_LRE, layer, expert, src, dst):
    """Return the change of all hops' seconds if one expert goes from src to dst."""
    if layers.pairs_LEE.shape[0] == 0:
        return 0.0
    near_R, per_node = near_LRE[layer, :, expert], layers.ranks_per_node
    change = layers.rank_hop_s * (near_R[src] - near_R[dst])
    if src // per_node != dst // per_node:
        inside = 0
        for i in range(per_node):
            inside += near_R[src // per_node * per_node + i] - near_R[dst // per_node * per_node + i]
        change += layers.node_hop_s * inside
    return change


@njit(cache=True)
def _pair_seconds(layers, first_layer, first, second_layer, second, src, dst):
    """Correct the sum of two hop changes, of experts of neighbouring layers that exchange ranks src and dst."""
    if layers.pairs_LEE.shape[0] == 0 or abs(first_layer - second_layer) != 1:
        return 0.0
    if first_layer < second_layer:
        count = layers.pairs_LEE[first_layer, first, second]
    else:
        count = layers.pairs_LEE[second_layer, second, first]
    across = src // layers.ranks_per_node != dst // layers.ranks_per_node
    return 2.0 * count * (layers.rank_hop_s + (layers.node_hop_s if across else 0.0))


@njit(cache=True)
def _draw_expert(state_1, layers, sums, owner_LE, layer):
    """Draw an expert of a layer; every second time one of the busiest rank, if it owns any."""
    num_experts = owner_LE.shape[1]
    expert = draw(state_1, num_experts)
    kind = draw(state_1, 4)
    if kind < 2:
        return expert
    rank = _busiest(layers, sums, layer, kind == 2)
    for _ in range(num_experts):
        if owner_LE[layer, expert] == rank:
            break
        expert = (expert + 1) % num_experts
    return expert


@njit(cache=True)
def _place(layers, sums, owner_LE, layer, expert, rank):
    _count(layers, sums, layer, expert, owner_LE[layer, expert], -1)
    _count(layers, sums, layer, expert, rank, 1)
    owner_LE[layer, expert] = rank


@njit(cache=True)
def anneal(layers, owner_LE, proposals, is_uneven, hot, cold, run=0):
    """Reduce the total seconds of all layers and hops by exchanging owners; owner_LE changes in place.

    `is_uneven` lets ranks own different numbers of one layer's experts. Temperatures fall from `hot` to `cold`, as fractions of
    the mean layer's seconds; the last tenth of the proposals accepts no increase. `run` selects the random seed. Returns the
    change in seconds, never above 0.
    """
    num_layers, num_experts = owner_LE.shape
    state_1 = np.array([88172645463325252 + 7919 * run], np.uint64)
    sums = _sums(layers, owner_LE)
    seconds_L = np.array([_layer_seconds(layers, sums, layer) for layer in range(num_layers)])
    best_LE, best, notable = owner_LE.copy(), 0.0, seconds_L.mean() * 1e-5
    change, temperature, cooling = 0.0, seconds_L.mean() * hot, (cold / hot) ** (1 / max(proposals, 1))
    for step in range(proposals):
        temperature *= cooling
        layer = draw(state_1, num_layers)
        other = draw(state_1, num_layers) if is_uneven and draw(state_1, 2) else layer
        first, second = _draw_expert(state_1, layers, sums, owner_LE, layer), draw(state_1, num_experts)
        a, b = owner_LE[layer, first], owner_LE[other, second]
        if a == b:
            continue
        _place(layers, sums, owner_LE, layer, first, b)
        _place(layers, sums, owner_LE, other, second, a)
        new, new_other = _layer_seconds(layers, sums, layer), 0.0
        rise = new - seconds_L[layer]
        if other != layer:
            new_other = _layer_seconds(layers, sums, other)
            rise += new_other - seconds_L[other]
        rise += _hop_seconds(layers, sums.near_LRE, layer, first, a, b)
        rise += _hop_seconds(layers, sums.near_LRE, other, second, b, a)
        rise += _pair_seconds(layers, layer, first, other, second, a, b)
        allowed = 0.0
        if step < proposals - proposals // 10:
            uniform = (draw(state_1, 1 << 30) + 1) / (1 << 30)
            allowed = -temperature * np.log(uniform)
        if rise <= allowed:
            seconds_L[layer] = new
            if other != layer:
                seconds_L[other] = new_other
            change += rise
            _link(layers, sums.near_LRE, layer, first, a, -1)
            _link(layers, sums.near_LRE, layer, first, b, 1)
            _link(layers, sums.near_LRE, other, second, b, -1)
            _link(layers, sums.near_LRE, other, second, a, 1)
            # Copying all owners is expensive: only notable improvements are saved; the final state is compared anyway.
            if change < best - notable:
                best = change
                best_LE[:] = owner_LE
        else:
            _place(layers, sums, owner_LE, layer, first, a)
            _place(layers, sums, owner_LE, other, second, b)
    if change > best or change > 0.0:
        owner_LE[:] = best_LE
        return best
    return change
