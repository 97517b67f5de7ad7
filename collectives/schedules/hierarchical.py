"""Hierarchical: an expert crosses to each node once and spreads inside it from there (Janus, SIGCOMM 2023, for the idea).

The owner starts a chain over the nodes that need the expert; in each node one rank receives for all and starts a chain over the
others. Sums come back the same way, so they associate node by node: within a node in rank order, then the nodes behind it, then
the rank that forwards.
"""

from itertools import pairwise

from ...placement import Placement, Topology
from ..schedule import Route, Schedule
from .chunks import with_best_chunks
from .direct import copy_holders


def hierarchical_gather(placement: Placement, topology: Topology, item_bytes: int) -> Schedule:
    """One crossing per expert and node. On one node this is a chain in descending rank order."""
    owners_E = placement.expert_to_owner_E.tolist()
    sends_R = [0] * placement.num_ranks
    routes = []
    for expert, ranks in copy_holders(placement).items():
        owner = owners_E[expert]
        by_node: dict[int, list[int]] = {}
        for rank in ranks:
            by_node.setdefault(rank // topology.ranks_per_node, []).append(rank)
        hops = _chain([owner, *by_node.pop(owner // topology.ranks_per_node, [])])
        entrance = owner
        for members in by_node.values():
            # The rank with the least to send so far takes the expert in, and both chains go on from it.
            leader = min(members, key=lambda rank: (sends_R[rank], -rank))
            hops.append((entrance, leader))
            hops += _chain([leader, *(rank for rank in members if rank != leader)])
            entrance = leader
        for src, _ in hops:
            sends_R[src] += 1
        routes.append(Route(expert, tuple(hops)))
    return with_best_chunks(Schedule(placement.num_ranks, tuple(routes)), topology, item_bytes)


def _chain(ranks: list[int]) -> list[tuple[int, int]]:
    return list(pairwise(ranks))
