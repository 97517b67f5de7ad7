"""Hecate's heuristics (arXiv 2502.02581): sparse materialization (Algorithm 1) and heterogeneous sharding (Algorithm 2).

Shape letters: L layers, E experts, R ranks, N nodes.
"""

from __future__ import annotations

from time import perf_counter

import numpy as np

from ...content import as_counts, check_positive_int
from ...cost import Solution, evaluate
from ...owners import OwnerMap
from ...topology import Topology
from ...values import Placement, Problem


def overlap_degree(problem: Problem) -> int:
    """Return t, the number of experts whose transfer is hidden by the work before the layer.

    The bandwidth is the inter-node rate when there is more than one node, else the device rate, as in the paper.
    """
    topology = problem.topology
    rate = topology.node_bytes_per_s if topology.num_nodes > 1 else topology.device_bytes_per_s
    return int(min(problem.overlap_s * rate / problem.shape.expert_bytes, problem.num_experts))


def _slots_by_load(load: int, top_load: int, slots: int, left: int, most: int) -> int:
    """Return an expert's number of copies: its share of all slots, rounded half up, at least 1, at most `left` and `most`.

    The paper does not give the rounding of assignSlotsByLoad.
    """
    share = (2 * slots * load + top_load) // (2 * top_load) if top_load else 0
    return min(max(share, 1), left, most)


def _spread(problem: Problem, top_experts: np.ndarray, memory: int, replicas_RE: np.ndarray) -> None:
    """Algorithm 1 with limited memory: copies in proportion to load, to nodes without the expert first."""
    totals_E, per_node = problem.load.totals_E, problem.topology.ranks_per_node
    node_R = problem.topology.node_of_rank_R
    free_R = np.full(problem.num_ranks, memory, dtype=np.int64)
    all_slots = problem.num_ranks * memory
    top_load = int(totals_E[top_experts].sum())
    for expert in top_experts:
        copies = _slots_by_load(int(totals_E[expert]), top_load, all_slots, int(free_R.sum()), problem.num_ranks - 1)
        for _ in range(copies):
            open_R = (free_R > 0) & ~replicas_RE[:, expert]
            if not open_R.any():
                break
            held_N = replicas_RE[:, expert].reshape(-1, per_node).sum(axis=1)
            free_N = free_R.reshape(-1, per_node).sum(axis=1)
            # lexsort is stable and its last key is primary: fewest copies in the node, most room in the node, most room on the
            # device.
            order = np.lexsort((-free_R, -free_N[node_R], held_N[node_R], ~open_R))
            rank = int(order[0])
            replicas_RE[rank, expert] = True
            free_R[rank] -= 1


def solve(problem: Problem, *, degree: int | None = None) -> Solution:
    """Algorithm 1: materialize the most loaded experts, on every rank if memory allows, else by load.

    `degree` is t, the number of experts considered; by default as many as `problem.overlap_s` hides. Memory is `problem.slots`:
    at most `slots` copies per rank.
    """
    start = perf_counter()
    degree = (
        overlap_degree(problem) if degree is None else min(check_positive_int("degree", degree, minimum=0), problem.num_experts)
    )
    memory = min(problem.slots, degree)
    replicas_RE = Placement.owners_only(problem.expert_to_owner_E, problem.num_ranks).replicas_RE.copy()
    top_experts = np.argsort(-problem.load.totals_E, kind="stable")[:degree]
    if degree <= memory:
        replicas_RE[:, top_experts] = True
    elif memory:
        _spread(problem, top_experts, memory, replicas_RE)
    return evaluate(problem, Placement(problem.expert_to_owner_E, replicas_RE), start, "hecate")


def hecate_owners(loads_LE: np.ndarray, topology: Topology, degree: int) -> OwnerMap:
    """Algorithm 2: shard all layers jointly, experts without copies by load, with an equal number of bank rows per rank.

    loads_LE: predicted load, int [L, E]. degree: t, the experts of every layer that will be materialized in any case; they fill
    the remaining bank rows. Layers are processed by their largest uncopied expert, descending; each uncopied expert goes to the
    least loaded node and device of its layer with a free row (tie: fewer free rows, then the lower index). Loads are compared
    within a layer, because a layer's dispatch waits for that layer only. The paper's "filled arbitrarily" is by load here. Rows
    per rank differ by at most one if L * E does not divide.
    """
    loads_LE = as_counts("loads_LE", loads_LE, ndim=2)
    if loads_LE.min() < 0:
        raise ValueError(f"loads_LE must not be negative, got {int(loads_LE.min())}")
    check_positive_int("degree", degree, minimum=0)
    num_layers = loads_LE.shape[0]
    base, extra = divmod(loads_LE.size, topology.num_ranks)
    free_R = np.full(topology.num_ranks, base, dtype=np.int64)
    free_R[:extra] += 1
    load_LR = np.zeros((num_layers, topology.num_ranks), dtype=np.int64)
    owner_LE = np.full(loads_LE.shape, -1, dtype=np.int64)
    order_LE = np.argsort(-loads_LE, axis=1, kind="stable")
    cold_LE, hot_LE = order_LE[:, degree:], order_LE[:, :degree]

    def assign(layer: int, expert: int) -> None:
        free_N = free_R.reshape(topology.num_nodes, -1).sum(axis=1)
        load_N = load_LR[layer].reshape(topology.num_nodes, -1).sum(axis=1)
        node = int(np.lexsort((free_N, load_N, free_N == 0))[0])
        ranks = np.arange(node * topology.ranks_per_node, (node + 1) * topology.ranks_per_node)
        rank = int(ranks[np.lexsort((free_R[ranks], load_LR[layer, ranks], free_R[ranks] == 0))[0]])
        owner_LE[layer, expert] = rank
        free_R[rank] -= 1
        load_LR[layer, rank] += loads_LE[layer, expert]

    largest_cold_L = np.take_along_axis(loads_LE, cold_LE, axis=1).max(axis=1, initial=0)
    for layer in np.argsort(-largest_cold_L, kind="stable"):
        for expert in cold_LE[layer]:
            assign(layer, expert)
    for layer in range(num_layers):
        for expert in hot_LE[layer]:
            assign(layer, expert)
    return OwnerMap(owner_LE, topology.num_ranks)
