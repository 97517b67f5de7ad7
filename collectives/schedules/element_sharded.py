"""Element-sharded: every expert is cut over the ranks that need it, and they exchange the pieces.

The gather of LAER-MoE's FSEP (arXiv 2602.11686), there over all ranks, each of which keeps a shard for good. Here experts are
kept whole, and a rank that needs no copy has no room for a piece: the owner deals one piece to each copy, and each copy sends
its piece to all the others. Every link then carries about one expert, at the price of (copies squared) messages.
"""

from ...placement import Placement, Topology
from ..schedule import Route, Schedule
from .chunks import with_best_chunks
from .direct import copy_holders


def element_sharded_gather(placement: Placement, topology: Topology, item_bytes: int) -> Schedule:
    """Piece j of an expert goes to the j-th copy and from there to the others. Sums are made piece by piece, at its copy."""
    owners_E = placement.expert_to_owner_E.tolist()
    routes = []
    for expert, ranks in copy_holders(placement).items():
        for piece, rank in enumerate(ranks):
            hops = ((owners_E[expert], rank), *((rank, other) for other in ranks if other != rank))
            routes.append(Route(expert, hops, piece, piece + 1, len(ranks)))
    return with_best_chunks(Schedule(placement.num_ranks, tuple(routes)), topology, item_bytes)
