"""The collective operations: each is launched by its call and completed by waiting on the handle that it returns.

    sparse_all_gather      copy items along a schedule (SparseAllGather: Hecate, arXiv 2502.02581, section 3)
    sparse_reduce_scatter  its transpose: contributions flow back and are summed on the way to the owner
    all_to_all_rows        a variable number of rows from every rank to every rank

Shape letters: M rows, D columns, R ranks.
"""

import time
from collections import Counter
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from .executor import launch
from .messages import Pending, RowLayout
from .progress import TimedWork
from .schedule import Message, Schedule
from .transport import Transport

# The tensors one item is made of, in a fixed order (for an expert: gate_up, down), contiguous.
Item = Sequence[Tensor]


def sparse_all_gather(
    schedule: Schedule,
    transport: Transport,
    owned: Mapping[int, Item],
    copies: Mapping[int, Item],
    *,
    op: str,
    where: str = "",
) -> Pending:
    """Copy items from their owners to the ranks that the schedule names.

    Args:
        schedule: the gather schedule, the same on every rank.
        owned: this rank's items that the schedule sends; read until the wait returns.
        copies: where each item that this rank receives is written; also read, where the schedule has this rank forward the item.
        op, where: the name under which bytes are counted, and the place that error messages quote.
    """
    assert not schedule.is_reduce
    endpoint = _GatherEndpoint(owned, copies)
    return launch(schedule, transport, endpoint, op=op, where=where, in_rounds=_is_on_cuda(owned, copies))


def sparse_reduce_scatter(
    schedule: Schedule,
    transport: Transport,
    contributions: Mapping[int, Item],
    totals: Mapping[int, Item],
    staging: Sequence[Item],
    *,
    op: str,
    where: str = "",
    wire: torch.dtype | None = None,
) -> Pending:
    """Add every rank's contribution to an item onto the owner's total: the transpose of `sparse_all_gather`.

    The sum has a fixed order, so it is bitwise repeatable. Each rank adds what it receives in rank order, in fp32 (fp64 for
    fp64), and its own part last: the contribution where it forwards the sum, the total where it owns the item. Direct and
    chained schedules therefore give the same bits, total + ((g0 + g1) + g2); others associate as their schedules say. In a
    dtype below fp32 a partial sum that is forwarded is rounded to it on each hop; only a direct schedule rounds once.

    Args:
        schedule: the transposed gather schedule, with its receives limited to the staging available; the same on every rank.
        contributions: this rank's addends for items it holds copies of. They are overwritten by partial sums.
        totals: the owned items, to which the sums are added.
        staging: receive buffers of one item each, at least `schedule.most_received(rank)`, in the dtype of contributions. A sum
            that needs another dtype, or has only one buffer, is made in a separate buffer of one chunk.
        wire: a narrower dtype in which contributions are sent; direct schedules only. Sums are computed as above.
    """
    assert schedule.is_reduce
    assert len(staging) >= schedule.most_received(transport.rank), "too little staging"
    mine = [m for m in schedule.messages_of(transport.rank) if m.dst == transport.rank]
    num_addends = Counter((m.item, m.chunk) for m in mine)
    endpoint = _ReduceEndpoint(num_addends, contributions, totals, staging, wire)
    return launch(schedule, transport, endpoint, op=op, where=where, in_rounds=_is_on_cuda(contributions, totals))


class _GatherEndpoint:
    """Sends owned items, receives copies in place, and forwards them from there."""

    def __init__(self, owned: Mapping[int, Item], copies: Mapping[int, Item]):
        self._owned, self._copies = owned, copies

    def outgoing(self, message: Message) -> list[Tensor]:
        item = self._owned[message.item] if message.item in self._owned else self._copies[message.item]
        return _part(item, _bounds(message, item))

    def incoming(self, message: Message) -> list[Tensor]:
        item = self._copies[message.item]
        return _part(item, _bounds(message, item))

    def received(self, message: Message) -> None:
        pass


class _ReduceEndpoint:
    """Receives contributions into staging, sums them there one chunk at a time, and adds each sum to its target.

    Messages of one chunk arrive consecutively (schedule order), so at most one sum is in progress.
    """

    def __init__(
        self,
        num_addends: Counter[tuple[int, int]],
        contributions: Mapping[int, Item],
        totals: Mapping[int, Item],
        staging: Sequence[Item],
        wire: torch.dtype | None,
    ):
        self._remaining = num_addends
        self._contributions, self._totals = contributions, totals
        self._staging = [[t.view(-1) for t in item] for item in staging]
        self._taken: list[list[tuple[int, int]]] = [[] for _ in staging]  # element ranges in use, by staging buffer
        self._landing: dict[Message, tuple[int, tuple[int, int]]] = {}
        self._wire = wire
        self._sum: list[Tensor] | None = None
        self._sum_place: tuple[int, tuple[int, int]] | None = None  # None while the sum is not in staging
        self._scratch: Tensor | None = None

    def outgoing(self, message: Message) -> list[Tensor]:
        item = self._contributions[message.item]
        parts = _part(item, _bounds(message, item))
        return parts if self._wire is None else [_narrowed(part, self._wire) for part in parts]

    def incoming(self, message: Message) -> list[Tensor] | None:
        bounds = _bounds(message, self._target(message))
        for i, taken in enumerate(self._taken):
            if all(bounds[1] <= first or end <= bounds[0] for first, end in taken):
                taken.append(bounds)
                self._landing[message] = i, bounds
                return self._landed(i, bounds)
        return None

    def received(self, message: Message) -> None:
        key = message.item, message.chunk
        place = self._landing.pop(message)
        parts = self._landed(*place)
        self._remaining[key] -= 1
        if self._sum is None and self._remaining[key]:
            self._begin_sum(place, parts)
            return
        if self._sum is not None:
            for total, part in zip(self._sum, parts, strict=True):
                total.add_(part)
            self._free(place)
            parts = self._sum
        if not self._remaining[key]:
            target = self._target(message)
            for total, part in zip(_part(target, _bounds(message, target)), parts, strict=True):
                total.add_(part)
            self._free(place if self._sum is None else self._sum_place)
            self._sum = self._sum_place = None

    def _begin_sum(self, place: tuple[int, tuple[int, int]], parts: list[Tensor]) -> None:
        like = self._staging[0][0]
        dtype = torch.promote_types(like.dtype, torch.float32)
        # Addends are received into the same elements of another staging buffer; with a single buffer the sum moves to scratch.
        if len(self._staging) > 1 and all(part.dtype == dtype for part in parts):
            self._sum, self._sum_place = parts, place
            return
        num_elements = place[1][1] - place[1][0]
        if self._scratch is None or self._scratch.numel() < num_elements:
            self._scratch = like.new_empty(num_elements, dtype=dtype)
        self._sum = list(self._scratch[:num_elements].split([part.numel() for part in parts]))
        for total, part in zip(self._sum, parts, strict=True):
            total.copy_(part)
        self._free(place)

    def _target(self, message: Message) -> Item:
        return self._totals[message.item] if message.item in self._totals else self._contributions[message.item]

    def _landed(self, index: int, bounds: tuple[int, int]) -> list[Tensor]:
        parts = _part(self._staging[index], bounds)
        return parts if self._wire is None else [_narrow_view(part, self._wire) for part in parts]

    def _free(self, place: tuple[int, tuple[int, int]] | None) -> None:
        if place is not None:
            self._taken[place[0]].remove(place[1])


def _bounds(message: Message, item: Item) -> tuple[int, int]:
    return message.bounds(sum(tensor.numel() for tensor in item))


def _part(item: Item, bounds: tuple[int, int]) -> list[Tensor]:
    """The elements `bounds` of an item's concatenated tensors, as flat views, one for each tensor they overlap."""
    parts, start = [], 0
    for tensor in item:
        first, end = max(bounds[0] - start, 0), min(bounds[1] - start, tensor.numel())
        if first < end:
            parts.append(tensor.view(-1)[first:end])
        start += tensor.numel()
    return parts


def _narrow_view(part: Tensor, dtype: torch.dtype) -> Tensor:
    """A view in a narrower dtype of the start of a tensor's memory, with as many elements as the tensor."""
    return part if part.dtype.itemsize <= dtype.itemsize else part.view(dtype)[: part.numel()]


def _narrowed(part: Tensor, dtype: torch.dtype) -> Tensor:
    """The tensor rounded to a narrower dtype, in place."""
    narrow = _narrow_view(part, dtype)
    return narrow if narrow is part else narrow.copy_(part.to(dtype))


def _is_on_cuda(*items: Mapping[int, Item]) -> bool:
    return any(tensor.is_cuda for mapping in items for item in mapping.values() for tensor in item)


def all_to_all_rows(
    transport: Transport, layout: RowLayout, outgoing: Tensor, incoming: Tensor, *, op: str, where: str = ""
) -> Pending:
    """Send rows of `outgoing` [P, ...] to other ranks and receive rows from them into `incoming` [Q, ...], as the layout says.

    The counts are known on both sides. Rows that stay on their rank are not copied: the caller reads and writes them in place.
    """
    launched_s = time.perf_counter()
    pending = transport.exchange_rows(layout, outgoing, incoming, op=op, where=where)
    return TimedWork(pending, launched_s, transport.traffic, op, where)
