"""Compiled scoring of copies: the exact split over them, and the counts from which its cost is computed.

Import this module lazily: it imports numba, and a first call compiles. Shape letters: R ranks, E experts, N nodes, C copies, M
replicated experts, J (expert, holder) entries. Integer arithmetic throughout, so every machine computes the same. Loads are
transposed, load_ER, because every loop runs over one expert's ranks.
"""
# mypy: disable-error-code=no-untyped-def
# Numba infers the types of compiled functions.

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from ...jit.decorators import njit
from ..split_numba import least_limit, level, prefer_local
from ..values import Problem


class Layer(NamedTuple):
    """The problem as arrays. `experts` lists every rank's experts, largest first, from first_R[rank]; `ranks` busiest first."""

    load_ER: np.ndarray
    totals_E: np.ndarray
    owner_E: np.ndarray
    owned_R: np.ndarray
    cost_R: np.ndarray
    node_cost_N: np.ndarray
    ranks: np.ndarray
    experts: np.ndarray
    first_R: np.ndarray
    ranks_per_node: int
    half_rate_rows: int
    slots: int


def layer_of(problem: Problem) -> Layer:
    """Convert a problem to the arrays of the compiled routines."""
    owner_E, totals_E, owned_R = problem.expert_to_owner_E, problem.load.totals_E, problem.owned_rows_R
    cost_R, node_cost_N = problem.topology.cost_R, problem.topology.node_cost_N
    experts = np.lexsort((-totals_E, owner_E))
    return Layer(
        problem.load.load_ER,
        totals_E,
        owner_E,
        owned_R,
        cost_R,
        node_cost_N,
        np.argsort(-cost_R * owned_R, kind="stable"),
        experts,
        np.searchsorted(owner_E[experts], np.arange(problem.num_ranks + 1)),
        problem.topology.ranks_per_node,
        problem.topology.half_rate_rows,
        problem.slots,
    )


class Traffic(NamedTuple):
    """Rows sent and received [2, R] and [2, N], and experts with rows [R], without copies."""

    rows_2R: np.ndarray
    rows_2N: np.ndarray
    groups_R: np.ndarray


@njit(cache=True)
def _table(copies_2C, owner_E):
    """Convert copies to the sparse table of split_numba.py: experts ascending, holders of each ascending."""
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
    """Count the traffic of static expert parallelism: all rows not computed on their source rank."""
    num_experts, num_ranks = layer.load_ER.shape
    per_node = layer.ranks_per_node
    rows_2R = np.zeros((2, num_ranks), np.int64)
    rows_2N = np.zeros((2, num_ranks // per_node), np.int64)
    groups_R = np.zeros(num_ranks, np.int64)
    for expert in range(num_experts):
        owner = layer.owner_E[expert]
        owner_node = owner // per_node
        for rank in range(num_ranks):
            rows_2R[0, rank] += layer.load_ER[expert, rank]
        rows_2R[0, owner] -= layer.load_ER[expert, owner]
        rows_2R[1, owner] += layer.totals_E[expert] - layer.load_ER[expert, owner]
        groups_R[owner] += layer.totals_E[expert] > 0
        inside = layer.load_ER[expert, owner_node * per_node : (owner_node + 1) * per_node].sum()
        rows_2N[0, owner_node] += layer.load_ER[expert, owner] - inside
        rows_2N[1, owner_node] += layer.totals_E[expert] - inside
    for rank in range(num_ranks):
        rows_2N[0, rank // per_node] += rows_2R[0, rank]
    return Traffic(rows_2R, rows_2N, groups_R)


@njit(cache=True)
def _tally(layer, static, experts_M, start_M, ranks_J, rows_J, rows_R, tally_5):
    """Write the first five fields of cost.Tally for one plan, from the static traffic and the replicated experts only.

    Own tokens come first and the node's next, so a holder gets min(rows, own load) from itself and a node min(rows, load) from
    inside: the traffic follows from the numbers of rows alone, without assigning them to source ranks.
    """
    per_node = layer.ranks_per_node
    rows_2R, rows_2N, groups_R = static.rows_2R.copy(), static.rows_2N.copy(), static.groups_R.copy()
    copies_2R, copies_2N = np.zeros_like(rows_2R), np.zeros_like(rows_2N)
    rows_N = np.empty(rows_2N.shape[1], np.int64)
    for m in range(experts_M.size):
        expert = experts_M[m]
        owner, total = layer.owner_E[expert], layer.totals_E[expert]
        owner_node = owner // per_node
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
                if node != owner_node:
                    copies_2N[0, owner_node] += 1
                    copies_2N[1, node] += 1
        for node in range(rows_N.size):
            inside = load_R[node * per_node : (node + 1) * per_node].sum()
            own = min(rows_N[node], inside)
            rows_2N[0, node] -= own
            rows_2N[1, node] += rows_N[node] - own
            if node == owner_node:
                rows_2N[0, node] += inside
                rows_2N[1, node] -= total - inside
    tally_5[0] = (layer.cost_R * (rows_R + layer.half_rate_rows * groups_R)).max()
    tally_5[1] = rows_2R.max()
    tally_5[2] = (layer.node_cost_N * rows_2N).max()
    tally_5[3] = copies_2R.max()
    tally_5[4] = (layer.node_cost_N * copies_2N).max()


@njit(cache=True)
def score(layer, static, copies_2C, tally_5):
    """Split the load exactly over owners and copies, and write the first five fields of cost.Tally."""
    experts_M, start_M, ranks_J = _table(copies_2C, layer.owner_E)
    rows_R = layer.owned_R.copy()
    for m in range(experts_M.size):
        rows_R[layer.owner_E[experts_M[m]]] -= layer.totals_E[experts_M[m]]
    rows_J = np.zeros(ranks_J.size, np.int64)
    lower_bound = max(least_limit(layer.cost_R, layer.owned_R.sum()), (layer.cost_R * rows_R).max())
    prefer_local(layer.load_ER, experts_M, start_M, ranks_J, layer.owner_E, layer.ranks_per_node, rows_J, rows_R)
    level(start_M, ranks_J, layer.cost_R, rows_J, rows_R, lower_bound)
    _tally(layer, static, experts_M, start_M, ranks_J, rows_J, rows_R, tally_5)
