"""What travels between ranks: buffers and rows with their peers, a group of messages in flight, the error of one that fails."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from typing import NamedTuple, Protocol

import numpy as np
from torch import Tensor


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
