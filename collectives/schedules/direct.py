"""Direct: the owner sends every copy itself."""

import numpy as np

from ...placement import Placement
from ..hops import Copies, Hops
from ..schedule import Schedule


def direct_hops(copies: Copies) -> Hops:
    """One hop to every copy."""
    return copies.routes(np.repeat(copies.owners_M, copies.num_copies_M))


def direct_gather(placement: Placement, *, num_chunks: int = 1) -> Schedule:
    """One hop to every copy.

    Example: with owners [0, 1] and a copy of expert 0 on rank 1, the one message is item 0 from rank 0 to rank 1.
    """
    return direct_hops(Copies.of(placement)).cut(num_chunks).schedule()
