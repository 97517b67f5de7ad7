"""The collective verbs: launched now, waited for later.

    sparse_all_gather      copy items along a schedule (SparseAllGather: Hecate, arXiv 2502.02581, section 3)
    sparse_reduce_scatter  its transpose: contributions flow back and are summed at the owner
    all_to_all_rows        a variable number of rows from every rank to every rank

Shape letters: M rows, D columns, R ranks.
"""

from collections.abc import Callable, Mapping, Sequence

from torch import Tensor

from .schedule import Message, Schedule
from .transport import Buffer, Pending, Transport

# The tensors one item is made of, in a fixed order (for an expert: gate_up, down).
Item = Sequence[Tensor]


class _Rounds:
    """A schedule on its way: each round is launched when the one before has arrived, and `after` runs on its messages."""

    def __init__(
        self,
        schedule: Schedule,
        launch: Callable[[Sequence[Message]], Pending],
        after: Callable[[Sequence[Message]], None] | None = None,
    ):
        self._waiting = list(schedule.rounds)
        self._launch = launch
        self._after = after
        self._current: tuple[Sequence[Message], Pending] | None = None
        self._start_next()

    def wait(self) -> None:
        while self._current is not None:
            messages, pending = self._current
            pending.wait()
            if self._after is not None:
                self._after(messages)
            self._start_next()

    def _start_next(self) -> None:
        self._current = None
        if self._waiting:
            messages = self._waiting.pop(0)
            self._current = messages, self._launch(messages)


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
        owned: this rank's items that others may ask for; read until the wait returns.
        copies: where each item that this rank receives is written.
        op, where: the name the bytes are counted under, and the place that errors name.
    """

    def launch(messages: Sequence[Message]) -> Pending:
        sends = [Buffer(t, m.dst) for m in messages if m.src == transport.rank for t in owned[m.item]]
        recvs = [Buffer(t, m.src) for m in messages if m.dst == transport.rank for t in copies[m.item]]
        return transport.exchange(sends, recvs, op=op, where=where)

    return _Rounds(schedule, launch)


def sparse_reduce_scatter(
    schedule: Schedule,
    transport: Transport,
    contributions: Mapping[int, Item],
    totals: Mapping[int, Item],
    staging: Sequence[Item],
    *,
    op: str,
    where: str = "",
) -> Pending:
    """Add every rank's contribution to an item onto the owner's total: the transpose of `sparse_all_gather`.

    The sum has a fixed order: the owner's total as it stands, then the contributions in rank order, in the total's dtype.

    Args:
        schedule: the transposed gather schedule, from copies to owners without relays, the same on every rank.
        contributions: this rank's addends for items it holds copies of; read until the wait returns.
        totals: the owned items that are added to, round by round.
        staging: items to receive into, at least `schedule.most_received(rank)` of them.
    """
    rank = transport.rank
    assert len(staging) >= schedule.most_received(rank), "too little staging"

    def launch(messages: Sequence[Message]) -> Pending:
        sends = [Buffer(t, m.dst) for m in messages if m.src == rank for t in contributions[m.item]]
        received = [m for m in messages if m.dst == rank]
        recvs = [Buffer(t, m.src) for m, item in zip(received, staging, strict=False) for t in item]
        return transport.exchange(sends, recvs, op=op, where=where)

    def add_up(messages: Sequence[Message]) -> None:
        # Messages are sorted by item, then by source rank: the order of the sum.
        received = [m for m in messages if m.dst == rank]
        for m, item in zip(received, staging, strict=False):
            for total, addend in zip(totals[m.item], item, strict=True):
                total.add_(addend)

    return _Rounds(schedule, launch, add_up)


def all_to_all_rows(
    transport: Transport,
    sends: Sequence[Sequence[Tensor]],
    recvs: Sequence[Sequence[Tensor]],
    *,
    op: str,
    where: str = "",
) -> Pending:
    """Send the tensors `sends[r]` to every rank r and receive `recvs[r]` from it, [rows, ...] each, rows >= 0.

    Both sides know the shapes. What stays on this rank is not sent: `sends[rank]` and `recvs[rank]` must be empty, since
    the caller can write its own rows in place.
    """
    assert not sends[transport.rank] and not recvs[transport.rank], "own rows do not travel"
    outgoing = [Buffer(tensor, peer) for peer, tensors in enumerate(sends) for tensor in tensors]
    incoming = [Buffer(tensor, peer) for peer, tensors in enumerate(recvs) for tensor in tensors]
    return transport.exchange(outgoing, incoming, op=op, where=where)
