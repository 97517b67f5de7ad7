"""EPLB, DeepSeek's replicate-then-pack balancer (deepseek-ai/EPLB), the public baseline.

Shape letters: L layers, E logical experts, P physical experts (replicas, in GPU order), G GPUs.
"""

from __future__ import annotations

from dataclasses import dataclass
from time import perf_counter

import numpy as np

from ...cost import Solution, evaluate
from ...values import Placement, Problem


@dataclass(frozen=True)
class Packing:
    """The pack of every item and its position in the pack, int64 [n] each."""

    pack: np.ndarray
    position: np.ndarray


def balanced_packing(weights: np.ndarray, num_packs: int) -> Packing:
    """Distribute n weighted items over packs of equal size: heaviest first, each to the lightest pack with room."""
    count = weights.size
    if count % num_packs:
        raise ValueError(f"{count} items do not fill {num_packs} packs evenly")
    room = count // num_packs
    if room == 1:
        return Packing(np.arange(count), np.zeros(count, dtype=np.int64))
    pack, position = np.empty(count, dtype=np.int64), np.empty(count, dtype=np.int64)
    weight_of_pack, items_of_pack = np.zeros(num_packs), np.zeros(num_packs, dtype=np.int64)
    for item in np.argsort(-weights, kind="stable"):
        chosen = int(np.argmin(np.where(items_of_pack < room, weight_of_pack, np.inf)))
        pack[item], position[item] = chosen, items_of_pack[chosen]
        weight_of_pack[chosen] += weights[item]
        items_of_pack[chosen] += 1
    return Packing(pack, position)


def replicate(weights_E: np.ndarray, num_physical: int) -> np.ndarray:
    """Return the logical expert of every physical one, int64 [P]: one each, then always the one with most load per replica."""
    counts_E = np.ones(weights_E.size)
    chosen = list(range(weights_E.size))
    for _ in range(num_physical - weights_E.size):
        chosen.append(int(np.argmax(weights_E / counts_E)))
        counts_E[chosen[-1]] += 1
    return np.array(chosen, dtype=np.int64)


def _rebalance_layer(weights_E: np.ndarray, num_physical: int, num_groups: int, num_nodes: int, num_gpus: int) -> np.ndarray:
    group_size, groups_per_node = weights_E.size // num_groups, num_groups // num_nodes
    # Step 1: pack groups of experts to nodes; node_E lists the experts node by node.
    groups = balanced_packing(weights_E.reshape(num_groups, group_size).sum(axis=1), num_nodes)
    slot_of_group = groups.pack * groups_per_node + groups.position
    node_E = (np.argsort(slot_of_group)[:, None] * group_size + np.arange(group_size)).reshape(num_nodes, -1)
    physical = []
    for experts in node_E:
        # Step 2: replicate inside the node. Step 3: pack the replicas to its GPUs.
        copies = replicate(weights_E[experts], num_physical // num_nodes)
        counts = np.bincount(copies)
        gpus = balanced_packing((weights_E[experts] / counts)[copies], num_gpus // num_nodes)
        placed = np.empty(copies.size, dtype=np.int64)
        placed[gpus.pack * (num_physical // num_gpus) + gpus.position] = experts[copies]
        physical.append(placed)
    return np.concatenate(physical)


def rebalance(weights_LE: np.ndarray, num_physical: int, num_groups: int, num_nodes: int, num_gpus: int) -> np.ndarray:
    """Return the logical expert of every physical expert, int64 [L, P], GPU by GPU.

    Hierarchical if the nodes divide the groups (groups to nodes, replicas inside a node, replicas to GPUs), else global (one
    group, one node). Replicas of one expert may be placed on one GPU, as in the original.
    """
    weights_LE = np.asarray(weights_LE, dtype=np.float64)
    num_experts = weights_LE.shape[1]
    if num_groups % num_nodes:
        num_groups = num_nodes = 1
    if num_physical % num_gpus or num_gpus % num_nodes or num_experts % num_groups or num_physical < num_experts:
        raise ValueError(
            f"{num_physical} replicas of {num_experts} experts in {num_groups} groups do not divide over {num_nodes} nodes "
            f"and {num_gpus} GPUs; make replicas a multiple of the GPUs and experts one of the groups"
        )
    return np.stack([_rebalance_layer(weights_E, num_physical, num_groups, num_nodes, num_gpus) for weights_E in weights_LE])


def choose_owners(problem: Problem, held_RE: np.ndarray) -> np.ndarray:
    """Choose an owner among every expert's holders so that every rank keeps its number of experts, current owners first.

    Augmenting paths of a bipartite matching; an expert that no path reaches goes to its first holder.
    """
    current_E = problem.expert_to_owner_E
    room_R = np.bincount(current_E, minlength=problem.num_ranks)
    owner_E = np.full(problem.num_experts, -1, dtype=np.int64)
    stays = held_RE[current_E, np.arange(problem.num_experts)]
    owner_E[stays] = current_E[stays]
    room_R -= np.bincount(current_E[stays], minlength=problem.num_ranks)

    def place(expert: int, seen: set[int]) -> bool:
        for rank in np.flatnonzero(held_RE[:, expert]).tolist():
            if rank in seen:
                continue
            seen.add(rank)
            if room_R[rank] > 0:
                room_R[rank] -= 1
                owner_E[expert] = rank
                return True
            for other in np.flatnonzero(owner_E == rank).tolist():
                if place(other, seen):
                    owner_E[expert] = rank
                    return True
        return False

    for expert in np.flatnonzero(~stays).tolist():
        if not place(expert, set()):
            owner_E[expert] = int(np.argmax(held_RE[:, expert]))
    return owner_E


def _within_slots(problem: Problem, owner_E: np.ndarray, held_RE: np.ndarray) -> Placement:
    """Build the placement; a rank that would hold more copies than it has slots drops those of the least loaded experts."""
    replicas_RE = held_RE.copy()
    replicas_RE[owner_E, np.arange(owner_E.size)] = True
    for rank in range(problem.num_ranks):
        copies = np.flatnonzero(replicas_RE[rank] & (owner_E != rank))
        by_load = copies[np.argsort(-problem.load.totals_E[copies], kind="stable")]
        replicas_RE[rank, by_load[problem.slots :]] = False
    return Placement(owner_E, replicas_RE)


def _solve(problem: Problem, num_groups: int, solver: str) -> Solution:
    start = perf_counter()
    num_ranks, num_experts = problem.num_ranks, problem.num_experts
    # Physical experts per rank: the mean number owned plus the slots, but at least the mean number owned, rounded up.
    per_rank = max((num_experts + num_ranks * problem.slots) // num_ranks, -(-num_experts // num_ranks))
    weights_LE = problem.load.totals_E[None, :]
    physical_P = rebalance(weights_LE, per_rank * num_ranks, num_groups, problem.topology.num_nodes, num_ranks)[0]
    held_RE = np.zeros((num_ranks, num_experts), dtype=np.bool_)
    held_RE[np.repeat(np.arange(num_ranks), per_rank), physical_P] = True
    placement = _within_slots(problem, choose_owners(problem, held_RE), held_RE)
    return evaluate(problem, placement, start, solver, owners_may_move=True)


def solve(problem: Problem) -> Solution:
    """Run global EPLB. It migrates experts: an owner is chosen among the holders, and the moves are charged."""
    return _solve(problem, 1, "eplb")


def solve_hierarchical(problem: Problem) -> Solution:
    """Run hierarchical EPLB with every expert its own group; global where the nodes do not divide the experts."""
    divides = problem.num_experts % problem.topology.num_nodes == 0
    return _solve(problem, problem.num_experts if divides else 1, "eplb_hierarchical")
