"""Relay: a rank that received a chunk forwards it, so that a hot owner sends each of its experts exactly once.

Chain. The copies of an expert pass it on in descending rank order, chunk by chunk, so the time is that of one copy plus the
way of one chunk. A rank that already has much to send (hot experts of its own, copies of several experts) leaves the chain and
becomes a leaf: the next higher rank of the chain sends to it as well. On the way back every rank of the chain adds the partial
sum of the ranks below, then its leaves in rank order, then itself: the sum from left to right in rank order that the direct
schedule makes at the owner, so both give the same bits.

Tree. Where latency counts for more than bytes, every copy forwards to two: depth log2 of the copies instead of their number. Its
sums associate differently (each rank: its subtrees, the lower rank's first, then itself) but always alike.
"""

from bisect import insort

from ...placement import Placement, Topology
from ..account import predicted_s
from ..schedule import Route, Schedule
from .chunks import with_best_chunks
from .direct import copy_holders


def relay_gather(placement: Placement, topology: Topology, item_bytes: int) -> Schedule:
    """The chain or the tree, whichever is predicted to be faster for items of `item_bytes`; in doubt the chain."""
    chain = with_best_chunks(chain_gather(placement), topology, item_bytes)
    if placement.num_copies == 0 or int(placement.num_replicas_E.max()) <= 3:
        return chain  # up to two copies, chain and tree differ in nothing that could gain
    tree = with_best_chunks(tree_gather(placement), topology, item_bytes)
    return min(chain, tree, key=lambda schedule: predicted_s(schedule, topology, item_bytes))


def chain_gather(placement: Placement) -> Schedule:
    """Chains in descending rank order, uncut; busy ranks hang on them as leaves."""
    owners_E = placement.expert_to_owner_E.tolist()
    holders = copy_holders(placement)
    spines = _balanced_spines(holders, owners_E, placement.num_ranks)
    routes = []
    for expert, ranks in holders.items():
        parent, hops = owners_E[expert], []
        for rank in ranks:
            hops.append((parent, rank))
            if rank in spines[expert]:
                parent = rank
        routes.append(Route(expert, tuple(hops)))
    return Schedule(placement.num_ranks, tuple(routes))


def tree_gather(placement: Placement) -> Schedule:
    """Binary trees, uncut: the owner sends to the highest rank, the i-th copy forwards to copies 2i + 1 and 2i + 2."""
    owners_E = placement.expert_to_owner_E.tolist()
    routes = []
    for expert, ranks in copy_holders(placement).items():
        parents = [owners_E[expert], *(ranks[(i - 1) // 2] for i in range(1, len(ranks)))]
        routes.append(Route(expert, tuple(zip(parents, ranks, strict=True))))
    return Schedule(placement.num_ranks, tuple(routes))


def _balanced_spines(holders: dict[int, list[int]], owners_E: list[int], num_ranks: int) -> dict[int, list[int]]:
    """The ranks of every chain that forward, ascending, chosen so that the busiest sender has as little to send as moves allow.

    What a rank receives is fixed by its copies. What it sends starts as one copy for each expert it owns and each chain it is in;
    while the busiest rank can hand its part of a chain to the next higher rank of it, and that one stays less busy, it does.
    """
    sends_R = [0] * num_ranks
    spines: dict[int, list[int]] = {}
    chains_of: dict[int, list[int]] = {}  # experts whose chain a rank could leave: not the lowest (a leaf anyway) nor the highest
    for expert, ranks in holders.items():
        sends_R[owners_E[expert]] += 1
        spines[expert] = []
        for rank in ranks[:-1]:
            sends_R[rank] += 1
            insort(spines[expert], rank)
        for rank in ranks[1:-1]:
            chains_of.setdefault(rank, []).append(expert)
    while holders:
        busiest = max(range(num_ranks), key=sends_R.__getitem__)
        best: tuple[int, int, int, int] | None = None
        for expert in chains_of.get(busiest, ()):
            spine = spines[expert]
            at = spine.index(busiest)
            heir, ranks = spine[at + 1], holders[expert]
            below = spine[at - 1] if at else ranks[-1]
            handed = ranks.index(below) - ranks.index(busiest)
            if sends_R[heir] + handed < sends_R[busiest]:
                best = min(best or (1 << 62, 0, 0, 0), (sends_R[heir] + handed, expert, heir, handed))
        if best is None:
            break
        _, expert, heir, handed = best
        sends_R[busiest] -= handed
        sends_R[heir] += handed
        spines[expert].remove(busiest)
        chains_of[busiest].remove(expert)
    return spines
