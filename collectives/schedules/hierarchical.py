"""Hierarchical: an expert is sent to each node once and distributed inside it from there (after Janus, SIGCOMM 2023).

The owner starts a chain over the nodes that need the expert; in each node one rank, the node leader, receives it and starts a
chain over the others. Sums return along the same path, so they associate node by node: first within a node in rank order, then
the nodes further down the chain, then the rank that forwards.
"""

from ..hops import Copies, Hops


def hierarchical_hops(copies: Copies, ranks_per_node: int) -> Hops:
    """One crossing per expert and node, uncut. On one node this is a chain in descending rank order."""
    # Imported here so that importing the package compiles nothing.
    from ..hops_numba import node_hops

    src_J, dst_J = node_hops(copies.owners_M, copies.start_M, copies.ranks_J, copies.num_ranks, ranks_per_node)
    return copies.routes(src_J, dst_J)
