"""Compiled tabu search over the owners of one layer, without copies. Import this module lazily: it imports numba.

Every step exchanges the owners of that pair of experts which is best among all pairs with one expert on the rank with most work
or on a busiest link, or away from its present owner; also where no pair is an improvement. An expert may not return to the rank
that it left for some steps, unless that gives the best owners so far. What an exchange changes are sums of two ranks, so its
seconds follow from these and from the largest sums of the others. Seconds are maxima, which most exchanges leave as they are:
ranks' deviations from the mean are added with a small weight, so that exchanges which prepare an improvement are preferred.

Sums are float64 of integers, hence exact below 2**53. Shape letters: R ranks, N nodes, E experts, U units (ranks or nodes).
"""
# mypy: disable-error-code=no-untyped-def
# Numba infers the types of compiled functions.

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from ...jit.decorators import njit
from ..cost import Prices, seconds_of
from .random_numba import draw

_price = njit(cache=True, error_model="numpy", inline="always")(seconds_of)
# The weight of deviations, and the fewest steps before an expert may return; at most twice as many.
_SMOOTHING, _TENURE = 0.1, 8


class Layer(NamedTuple):
    """Constants of a search. work_E counts `half_rate_rows` too. share_R: how much of an expert that a rank sends is counted."""

    load_ER: np.ndarray
    load_EN: np.ndarray
    totals_E: np.ndarray
    work_E: np.ndarray
    current_E: np.ndarray
    node_of_rank_R: np.ndarray
    cost_R: np.ndarray
    node_cost_N: np.ndarray
    share_R: np.ndarray
    prices: Prices


class _Sums(NamedTuple):
    """Of ranks, or nodes: work times its cost, rows computed, local, source and link rows. Experts sent, as counted."""

    work_R: np.ndarray
    rows_R: np.ndarray
    stay_R: np.ndarray
    start_R: np.ndarray
    link_R: np.ndarray
    rows_N: np.ndarray
    stay_N: np.ndarray
    start_N: np.ndarray
    link_N: np.ndarray
    sent_1: np.ndarray


@njit(cache=True, error_model="numpy")
def _largest_3(sum_U):
    """Return the units with the three largest sums, -1 where there are fewer."""
    first, second, third = -1, -1, -1
    for unit in range(sum_U.size):
        if first < 0 or sum_U[unit] > sum_U[first]:
            first, second, third = unit, first, second
        elif second < 0 or sum_U[unit] > sum_U[second]:
            second, third = unit, second
        elif third < 0 or sum_U[unit] > sum_U[third]:
            third = unit
    return np.array([first, second, third])


@njit(cache=True, error_model="numpy")
def _largest_other(sum_U, largest_3, a, b):
    """Return the largest sum of the units besides two; 0 if there are no others."""
    for place in range(3):
        unit = largest_3[place]
        if unit >= 0 and unit != a and unit != b:
            return sum_U[unit]
    return 0.0


@njit(cache=True, error_model="numpy")
def _squares(squares, mean, a, b, new_a, new_b):
    """Summed squares of deviations from the mean after two of the numbers changed."""
    return max(squares - (a - mean) ** 2 - (b - mean) ** 2 + (new_a - mean) ** 2 + (new_b - mean) ** 2, 0.0)


@njit(cache=True, error_model="numpy")
def _seconds(prices, work, link, node, sent):
    stages = _price(prices, work, link, node, 0, 0, sent, 0.0)
    return stages[0] + stages[1] + stages[4]


@njit(cache=True, error_model="numpy")
def _best_exchange(layer, sums, owner_E, free_at_ER, step, best_s):
    """Return the pair of experts to exchange, (-1, -1) if none may be, and how many pairs were priced."""
    # Names of the arrays, as every access to a tuple's would count references.
    load_ER, load_EN, totals_E, work_E, current_E, node_R, cost_R, node_cost_N, share_R, prices = layer
    work_R, rows_R, stay_R, start_R, link_R, rows_N, stay_N, start_N, link_N, sent_1 = sums
    work_3, link_3, link_of_node_3 = _largest_3(work_R), _largest_3(link_R), _largest_3(link_N)
    mean_work, mean_link = work_R.mean(), link_R.mean()
    of_work, of_link = ((work_R - mean_work) ** 2).sum(), ((link_R - mean_link) ** 2).sum()
    chosen_s, chosen_first, chosen_second, num_priced = np.inf, -1, -1, owner_E.size
    for first in range(owner_E.size):
        a, home = owner_E[first], current_E[first]
        is_busiest = a == work_3[0] or a == link_3[0] or (link_N.size > 1 and node_R[a] == link_of_node_3[0])
        if not is_busiest and a == home:
            continue
        num_priced += owner_E.size
        for second in range(owner_E.size):
            b, other_home = owner_E[second], current_E[second]
            if a == b:
                continue
            rows, more = totals_E[second] - totals_E[first], work_E[second] - work_E[first]
            work_a, work_b = work_R[a] + cost_R[a] * more, work_R[b] - cost_R[b] * more
            link_a = max(rows_R[a] + rows, start_R[a]) - stay_R[a] - load_ER[second, a] + load_ER[first, a]
            link_b = max(rows_R[b] - rows, start_R[b]) - stay_R[b] - load_ER[first, b] + load_ER[second, b]
            work = max(_largest_other(work_R, work_3, a, b), work_a, work_b)
            link = max(_largest_other(link_R, link_3, a, b), link_a, link_b)
            m, n = node_R[a], node_R[b]
            node = link_N[link_of_node_3[0]]
            if m != n:
                rows_m = max(rows_N[m] + rows, start_N[m]) - stay_N[m] - load_EN[second, m] + load_EN[first, m]
                rows_n = max(rows_N[n] - rows, start_N[n]) - stay_N[n] - load_EN[first, n] + load_EN[second, n]
                node = max(_largest_other(link_N, link_of_node_3, m, n), node_cost_N[m] * rows_m, node_cost_N[n] * rows_n)
            sent = sent_1[0] + share_R[home] * (int(home != b) - int(home != a))
            sent += share_R[other_home] * (int(other_home != a) - int(other_home != b))
            work_off = np.sqrt(_squares(of_work, mean_work, work_R[a], work_R[b], work_a, work_b))
            link_off = np.sqrt(_squares(of_link, mean_link, link_R[a], link_R[b], link_a, link_b))
            smooth_s = _seconds(prices, work + _SMOOTHING * work_off, link + _SMOOTHING * link_off, node, sent)
            if smooth_s < chosen_s:
                is_free = free_at_ER[first, b] <= step and free_at_ER[second, a] <= step
                if is_free or _seconds(prices, work, link, node, sent) < best_s:
                    chosen_s, chosen_first, chosen_second = smooth_s, first, second
    return chosen_first, chosen_second, num_priced


@njit(cache=True, error_model="numpy")
def _count(layer, sums, expert, rank, sign):
    """Add (sign 1) or remove (-1) an expert at a rank."""
    home, node = layer.current_E[expert], layer.node_of_rank_R[rank]
    sums.work_R[rank] += sign * layer.cost_R[rank] * layer.work_E[expert]
    sums.rows_R[rank] += sign * layer.totals_E[expert]
    sums.stay_R[rank] += sign * layer.load_ER[expert, rank]
    sums.rows_N[node] += sign * layer.totals_E[expert]
    sums.stay_N[node] += sign * layer.load_EN[expert, node]
    if home != rank:
        sums.sent_1[0] += sign * layer.share_R[home]
    sums.link_R[rank] = max(sums.rows_R[rank], sums.start_R[rank]) - sums.stay_R[rank]
    if sums.link_N.size > 1:
        sums.link_N[node] = layer.node_cost_N[node] * (max(sums.rows_N[node], sums.start_N[node]) - sums.stay_N[node])


@njit(cache=True, error_model="numpy")
def _sums(layer, owner_E):
    """Compute all sums from scratch."""
    (num_experts, num_ranks), num_nodes = layer.load_ER.shape, layer.load_EN.shape[1]
    zero_R, zero_N = np.zeros(num_ranks), np.zeros(num_nodes)
    sums = _Sums(
        zero_R.copy(),
        zero_R.copy(),
        zero_R.copy(),
        layer.load_ER.sum(axis=0),
        layer.load_ER.sum(axis=0),
        zero_N.copy(),
        zero_N.copy(),
        layer.load_EN.sum(axis=0),
        zero_N.copy() if zero_N.size == 1 else layer.load_EN.sum(axis=0) * layer.node_cost_N,
        np.zeros(1),
    )
    for expert in range(num_experts):
        _count(layer, sums, expert, owner_E[expert], 1.0)
    return sums


@njit(cache=True, error_model="numpy")
def _present_s(layer, sums):
    return _seconds(layer.prices, sums.work_R.max(), sums.link_R.max(), sums.link_N.max(), sums.sent_1[0])


@njit(cache=True, error_model="numpy")
def search(layer, owner_E, tries):
    """Exchange owners until about so many pairs were priced; owner_E [E] becomes the best found. Return its seconds."""
    state_1 = np.array([88172645463325252], np.uint64)
    sums = _sums(layer, owner_E)
    best_s, best_E = _present_s(layer, sums), owner_E.copy()
    free_at_ER = np.zeros(layer.load_ER.shape, np.int64)  # the step from which an expert may be at a rank again
    num_priced, step = 0, 0
    while num_priced < tries:
        step += 1
        first, second, num = _best_exchange(layer, sums, owner_E, free_at_ER, step, best_s)
        num_priced += num
        if first < 0:
            continue
        a, b = owner_E[first], owner_E[second]
        for expert, src, dst in ((first, a, b), (second, b, a)):
            _count(layer, sums, expert, src, -1.0)
            _count(layer, sums, expert, dst, 1.0)
            owner_E[expert] = dst
            free_at_ER[expert, src] = step + _TENURE + draw(state_1, _TENURE + 1)
        seconds = _present_s(layer, sums)
        if seconds < best_s:
            best_s, best_E[:] = seconds, owner_E
    owner_E[:] = best_E
    return best_s
