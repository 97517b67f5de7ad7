"""Element-sharded: every expert is cut over the ranks that need it, and they exchange the pieces.

The gather of LAER-MoE's FSEP (arXiv 2602.11686), there over all ranks, each of which keeps a shard for good. Here experts are
kept whole, and a rank that needs no copy has no room for a piece: the owner sends one piece to each copy, and each copy sends
its piece to all the others. Every link then carries about one expert, at the price of (copies squared) messages.
"""

import numpy as np

from ...placement import Placement, Topology
from ..hops import Copies, Hops
from ..schedule import Schedule
from .chunks import with_best_chunks


def element_sharded_hops(copies: Copies) -> Hops:
    """Piece j of an expert goes to the j-th copy and from there to the others. Sums are made piece by piece, at its copy."""
    # Imported here so that importing the package compiles nothing.
    from ..hops_numba import piece_hops

    sizes_J = np.repeat(copies.num_copies_M, copies.num_copies_M)
    start_J = np.append(0, np.cumsum(sizes_J))
    src_H, dst_H = piece_hops(copies.owners_M, copies.start_M, copies.ranks_J, int(start_J[-1]))
    pieces_J = np.arange(sizes_J.size) - np.repeat(copies.start_M[:-1], copies.num_copies_M)
    experts_J = np.repeat(copies.experts_M, copies.num_copies_M)
    return Hops(copies.num_ranks, experts_J, start_J, src_H, dst_H, pieces_J, pieces_J + 1, sizes_J)


def element_sharded_gather(placement: Placement, topology: Topology, item_bytes: int) -> Schedule:
    """The same in as many chunks as are predicted to be fastest."""
    return with_best_chunks(element_sharded_hops(Copies.of(placement)), topology, item_bytes).hops.schedule()
