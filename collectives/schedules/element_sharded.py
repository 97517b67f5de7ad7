"""Element-sharded: every expert is split over the ranks that need it, which then exchange the pieces.

The gather of LAER-MoE's FSEP (arXiv 2602.11686), which runs over all ranks, each holding a permanent shard. Here owners hold
whole experts and only ranks with a copy have memory for a piece: the owner sends one piece to each copy, and each copy sends its
piece to all others. Every link then carries about one expert, at the cost of (copies squared) messages.
"""

import numpy as np

from ..hops import Copies, Hops


def element_sharded_hops(copies: Copies) -> Hops:
    """Piece j of an expert goes to the j-th copy and from there to the others. A reduce sums piece j at the j-th copy."""
    # Imported here so that importing the package compiles nothing.
    from ..hops_numba import piece_hops

    sizes_J = np.repeat(copies.num_copies_M, copies.num_copies_M)
    start_J = np.append(0, np.cumsum(sizes_J))
    src_H, dst_H = piece_hops(copies.owners_M, copies.start_M, copies.ranks_J, int(start_J[-1]))
    pieces_J = np.arange(sizes_J.size) - np.repeat(copies.start_M[:-1], copies.num_copies_M)
    experts_J = np.repeat(copies.experts_M, copies.num_copies_M)
    return Hops(copies.num_ranks, experts_J, start_J, src_H, dst_H, pieces_J, pieces_J + 1, sizes_J)
