"""Direct: every copy comes straight from the expert's owner."""

import numpy as np

from ...placement import Placement
from ..schedule import Route, Schedule


def copy_holders(placement: Placement) -> dict[int, list[int]]:
    """The ranks that need a copy, in descending order, of every expert that is copied."""
    holders: dict[int, list[int]] = {}
    for expert, rank in zip(*(ids.tolist() for ids in np.nonzero(placement.copies_RE.T)), strict=True):
        holders.setdefault(expert, []).append(rank)
    return {expert: ranks[::-1] for expert, ranks in holders.items()}


def direct_gather(placement: Placement, *, num_chunks: int = 1) -> Schedule:
    """One hop to every copy.

    Example: with owners [0, 1] and a copy of expert 0 on rank 1, the one message is item 0 from rank 0 to rank 1.
    """
    owners_E = placement.expert_to_owner_E.tolist()
    routes = [
        Route(expert, tuple((owners_E[expert], rank) for rank in ranks), 0, num_chunks, num_chunks)
        for expert, ranks in copy_holders(placement).items()
    ]
    return Schedule(placement.num_ranks, tuple(routes))
