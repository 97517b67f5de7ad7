"""What each collective means, on plain lists of per-rank values. One process, no transport: the oracle of the tests."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from ..placement import Placement


def sparse_all_gather_reference(placement: Placement, items_E: Sequence[Tensor]) -> list[dict[int, Tensor]]:
    """The copies that every rank must hold: per rank, expert to a clone of the owner's tensor."""
    num_ranks = placement.replicas_RE.shape[0]
    return [{e: items_E[e].clone() for e in range(len(items_E)) if placement.copies_RE[r, e]} for r in range(num_ranks)]


def sparse_reduce_scatter_reference(
    placement: Placement, totals_E: Sequence[Tensor], contributions_R: Sequence[Mapping[int, Tensor]]
) -> list[Tensor]:
    """Every expert's total after the contributions of its copies were added in rank order."""
    sums = []
    for e, total in enumerate(totals_E):
        value = total.clone()
        for rank, contributions in enumerate(contributions_R):
            if placement.copies_RE[rank, e]:
                value = value + contributions[e].to(value.dtype)
        sums.append(value)
    return sums


def all_to_all_rows_reference(rows_RR: Sequence[Sequence[Tensor]]) -> list[Tensor]:
    """What every rank receives, in source order, where rank s sends rows_RR[s][d] to rank d."""
    num_ranks = len(rows_RR)
    return [torch.cat([rows_RR[src][dst] for src in range(num_ranks)]) for dst in range(num_ranks)]
