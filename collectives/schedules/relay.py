"""Relay: ranks forward the chunks they receive, so that the owner of hot experts sends each of them exactly once.

Chain. The copies of an expert forward it in descending rank order, chunk by chunk, so the time is that of one copy plus the path
of one chunk. A rank that already has much to send (hot experts of its own, copies of several experts) leaves the chain and
becomes a leaf: the next higher rank of the chain sends to it as well. In the reduce every rank of the chain adds the partial sum
of the ranks below it, then its leaves in rank order, then its own part: the left-to-right sum in rank order that the direct
schedule computes at the owner, so both give the same bits.

Tree. Where latency matters more than bytes, every copy forwards to two others: the depth is log2 of the number of copies instead
of the number. Sums associate differently (at each rank: its subtrees, the lower rank's first, then its own part), but always in
the same way.
"""

from ...placement import Topology
from ..hops import Copies, Hops
from .chunks import Candidate, with_best_chunks


def best_relay(copies: Copies, topology: Topology, item_bytes: int) -> Candidate:
    """The chain or the tree, whichever has the smaller predicted time for items of `item_bytes`; the chain on a tie."""
    chain = with_best_chunks(chain_hops(copies), topology, item_bytes)
    if copies.num_copies_M.max(initial=0) <= 2:
        return chain  # with at most two copies a tree is never faster than a chain
    return min(chain, with_best_chunks(tree_hops(copies), topology, item_bytes), key=lambda relay: relay.seconds)


def chain_hops(copies: Copies) -> Hops:
    """Chains in descending rank order, uncut, with busy ranks attached as leaves."""
    # Imported here so that importing the package compiles nothing.
    from ..hops_numba import chain_sources

    return copies.routes(chain_sources(copies.owners_M, copies.start_M, copies.ranks_J, copies.num_ranks))


def tree_hops(copies: Copies) -> Hops:
    """Binary trees, uncut: the owner sends to the highest rank, the i-th copy forwards to copies 2i + 1 and 2i + 2."""
    from ..hops_numba import tree_sources

    return copies.routes(tree_sources(copies.owners_M, copies.start_M, copies.ranks_J))
