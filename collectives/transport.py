"""What a transport is: groups of point-to-point messages between ranks, and a gather of small integers."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from typing import TYPE_CHECKING, NamedTuple, Protocol

import numpy as np
from torch import Tensor

from .traffic import Traffic

if TYPE_CHECKING:
    from .progress import CommunicationThread


class CollectiveError(RuntimeError):
    """A collective did not complete. The message names rank, operation, place in training, peers and byte counts."""


class Buffer(NamedTuple):
    """A contiguous tensor that goes to, or comes from, rank `peer`."""

    tensor: Tensor
    peer: int


class RowPart(NamedTuple):
    """Consecutive rows of a tensor that go to, or come from, rank `peer`."""

    peer: int
    first: int
    num_rows: int


class RowLayout:
    """Which rows of one tensor go to other ranks, and into which rows of another theirs come: at most one part each per rank.

    A value: made once, it serves any number of exchanges of tensors with these rows, of any shape and dtype. Empty parts are
    left out.
    """

    def __init__(self, sent: Sequence[RowPart], received: Sequence[RowPart]):
        self.sent = tuple(part for part in sent if part.num_rows)
        self.received = tuple(part for part in received if part.num_rows)
        self.num_sent_rows, self.num_received_rows = (
            max((first + num_rows for _, first, num_rows in parts), default=0) for parts in (self.sent, self.received)
        )
        """Rows that the tensors must have at least."""

    @classmethod
    def consecutive(cls, sent_R: Sequence[int], received_R: Sequence[int]) -> RowLayout:
        """So many rows to, and from, each rank, those of rank 0 first; none of this rank's own."""
        return cls(_consecutive(sent_R), _consecutive(received_R))

    @cached_property
    def transpose(self) -> RowLayout:
        """The way back: rows go where they came from."""
        return RowLayout(self.received, self.sent)

    @cached_property
    def parts_M3(self) -> np.ndarray:
        """All parts, those sent first, int64."""
        return np.array([*self.sent, *self.received], np.int64).reshape(-1, 3)

    def sends(self, outgoing: Tensor) -> list[Buffer]:
        """What is sent, as messages."""
        return _buffers(outgoing, self.sent)

    def receives(self, incoming: Tensor) -> list[Buffer]:
        """What is received, as messages."""
        return _buffers(incoming, self.received)


def _consecutive(count_R: Sequence[int]) -> list[RowPart]:
    parts, first = [], 0
    for peer, count in enumerate(count_R):
        parts.append(RowPart(peer, first, count))
        first += count
    return parts


def _buffers(tensor: Tensor, parts: Sequence[RowPart]) -> list[Buffer]:
    return [Buffer(tensor[first : first + count], peer) for peer, first, count in parts]


class Pending(Protocol):
    """Messages in flight; whoever launched them owns this and waits once."""

    def wait(self, *, until_sent: bool = True) -> None:
        """Return when every message has arrived (on CUDA: when the current stream may use the buffers).

        And when what was sent may be overwritten; without `until_sent` perhaps earlier, for tensors that are only dropped.
        Raises `CollectiveError` when the time limit passes or a peer is gone. On CUDA the host does not wait: there the library
        below has the limit.
        """


class Done:
    """The `Pending` of messages that there are none of."""

    def wait(self, *, until_sent: bool = True) -> None:
        """Return at once."""


class Transport(Protocol):
    """The ranks of one group and how bytes travel between them.

    Messages between the same two ranks are matched in the order in which both sides post them, so every rank
    must enter the exchanges of a transport in the same order. Empty tensors are not sent.

    `thread` carries out the collectives of transports whose messages take long; None: they advance when they are waited for.
    """

    name: str
    rank: int
    world_size: int
    traffic: Traffic
    thread: CommunicationThread | None

    def empty(self, shape: Sequence[int], like: Tensor) -> Tensor:
        """A tensor of undefined content, dtype and device as `like`, in memory from which sending is cheapest."""

    def exchange(self, sends: Sequence[Buffer], recvs: Sequence[Buffer], *, op: str, where: str = "") -> Pending:
        """Launch a group of messages. `op` is the name it is counted under; `where` (step, layer) goes into errors."""

    def exchange_rows(self, layout: RowLayout, outgoing: Tensor, incoming: Tensor, *, op: str, where: str = "") -> Pending:
        """Launch the messages `layout.sends(outgoing)` and `layout.receives(incoming)`; see `exchange`. Contiguous tensors."""

    def all_gather_ints(self, values: Tensor, *, where: str = "") -> Tensor:
        """Gather an int64 [n] tensor of equal size from every rank: int64 [R, n], on the device of `values`."""


class RowsAsMessages:
    """`exchange_rows` of transports to which rows are messages like any other."""

    def exchange_rows(
        self: Transport, layout: RowLayout, outgoing: Tensor, incoming: Tensor, *, op: str, where: str = ""
    ) -> Pending:
        """See `Transport.exchange_rows`."""
        return self.exchange(layout.sends(outgoing), layout.receives(incoming), op=op, where=where)
