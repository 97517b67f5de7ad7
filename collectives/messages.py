"""Point-to-point messages: buffers and row ranges with their peers, handles of messages in flight, the error of a failure."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from typing import NamedTuple, Protocol

import numpy as np
from torch import Tensor


class CollectiveError(RuntimeError):
    """A collective did not complete. The message names rank, operation, place in training, peers and byte counts."""


class Buffer(NamedTuple):
    """A contiguous tensor that is sent to, or received from, rank `peer`."""

    tensor: Tensor
    peer: int


class RowPart(NamedTuple):
    """Consecutive rows of a tensor that are sent to, or received from, rank `peer`."""

    peer: int
    first: int
    num_rows: int


class RowLayout:
    """Which rows of one tensor are sent to each rank, and which rows of another receive from it: at most one range each per rank.

    Immutable: one layout serves any number of exchanges of tensors with these rows, of any shape and dtype. Empty ranges are
    omitted.
    """

    def __init__(self, sent: Sequence[RowPart], received: Sequence[RowPart]):
        self.sent = tuple(part for part in sent if part.num_rows)
        self.received = tuple(part for part in received if part.num_rows)
        self.num_sent_rows, self.num_received_rows = (
            max((first + num_rows for _, first, num_rows in parts), default=0) for parts in (self.sent, self.received)
        )
        """Minimum number of rows of the two tensors."""

    @classmethod
    def consecutive(cls, sent_R: Sequence[int], received_R: Sequence[int]) -> RowLayout:
        """Given numbers of rows to and from each rank, in rank order from row 0 on; those of this rank itself must be 0."""
        return cls(_consecutive(sent_R), _consecutive(received_R))

    @cached_property
    def transpose(self) -> RowLayout:
        """The reverse exchange: every row is returned to the rank that sent it."""
        return RowLayout(self.received, self.sent)

    @cached_property
    def parts_M3(self) -> np.ndarray:
        """All ranges as (peer, first row, number of rows), those sent first, int64 [M, 3]."""
        return np.array([*self.sent, *self.received], np.int64).reshape(-1, 3)

    def sends(self, outgoing: Tensor) -> list[Buffer]:
        """The outgoing messages, as views of `outgoing`."""
        return _buffers(outgoing, self.sent)

    def receives(self, incoming: Tensor) -> list[Buffer]:
        """The incoming messages, as views of `incoming`."""
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
    """Handle of messages in flight; the caller that launched them owns it and waits once."""

    def wait(self, *, until_sent: bool = True) -> None:
        """Return when every message has arrived (on CUDA: when the current stream may use the buffers).

        Also when the buffers sent may be overwritten; without `until_sent` possibly earlier, which suffices for buffers that are
        freed, not written. Raises `CollectiveError` when the time limit passes or a peer has exited. On CUDA the host does not
        block: the time limit is then that of the communication library.
        """


class Done:
    """The `Pending` of an exchange without messages."""

    def wait(self, *, until_sent: bool = True) -> None:
        """Return at once."""
