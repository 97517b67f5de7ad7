"""Reference implementations of the collectives on plain lists of per-rank values.

One process, no transport: the oracle of the tests.
"""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from functools import reduce

import numpy as np
import torch
from torch import Tensor

from ..placement import Placement
from .schedule import Schedule, chunk_bounds


def sparse_all_gather_reference(placement: Placement, items_E: Sequence[Tensor]) -> list[dict[int, Tensor]]:
    """The copies that every rank must hold: per rank, expert to a clone of the owner's tensor."""
    num_ranks = placement.replicas_RE.shape[0]
    return [{e: items_E[e].clone() for e in range(len(items_E)) if placement.copies_RE[r, e]} for r in range(num_ranks)]


def sparse_reduce_scatter_reference(
    placement: Placement, totals_E: Sequence[Tensor], contributions_R: Sequence[Mapping[int, Tensor]]
) -> list[Tensor]:
    """Every expert's total plus the sum of its copies' contributions, which are added in rank order, in fp32 (fp64 for fp64)."""
    sums = []
    for e, total in enumerate(totals_E):
        dtype = torch.promote_types(total.dtype, torch.float32)
        addends = [contributions_R[rank][e].to(dtype) for rank in np.flatnonzero(placement.copies_RE[:, e]).tolist()]
        value = total.to(dtype) + reduce(torch.add, addends) if addends else total
        sums.append(value.to(total.dtype))
    return sums


def reduce_along_reference(
    schedule: Schedule, totals_E: Sequence[Tensor], contributions_R: Sequence[Mapping[int, Tensor]]
) -> list[Tensor]:
    """Every expert's total after a reduce along the routes of `schedule`.

    Each rank sums what it receives in rank order, then adds its own part. A forwarded sum is rounded to the dtype of the part.
    """
    sums = [total.clone().view(-1) for total in totals_E]
    for route in schedule.routes:
        first, _ = chunk_bounds(route.first_chunk, route.num_chunks, sums[route.item].numel())
        _, end = chunk_bounds(route.end_chunk - 1, route.num_chunks, sums[route.item].numel())
        children: dict[int, list[int]] = defaultdict(list)
        for src, dst in route.hops:
            children[src].append(dst)

        def sum_at(
            rank: int,
            own: Tensor,
            part: slice = slice(first, end),
            children: dict[int, list[int]] = children,
            item: int = route.item,
        ) -> Tensor:
            addends = [sum_at(child, contributions_R[child][item].view(-1)[part]) for child in sorted(children[rank])]
            wide = torch.promote_types(own.dtype, torch.float32)
            return (own.to(wide) + reduce(torch.add, [a.to(wide) for a in addends])).to(own.dtype) if addends else own

        sums[route.item][first:end] = sum_at(route.owner, sums[route.item][first:end])
    return [value.view_as(total) for value, total in zip(sums, totals_E, strict=True)]


def average_reference(tensors_R: Sequence[Tensor]) -> Tensor:
    """The mean that replaces every rank's tensor: summed in rank order, in fp32 (fp64 for fp64)."""
    dtype = torch.promote_types(tensors_R[0].dtype, torch.float32)
    return (reduce(torch.add, [t.to(dtype) for t in tensors_R]) / len(tensors_R)).to(tensors_R[0].dtype)


def all_to_all_rows_reference(rows_RR: Sequence[Sequence[Tensor]]) -> list[Tensor]:
    """What every rank receives, in source order, where rank s sends rows_RR[s][d] to rank d."""
    num_ranks = len(rows_RR)
    return [torch.cat([rows_RR[src][dst] for src in range(num_ranks)]) for dst in range(num_ranks)]
