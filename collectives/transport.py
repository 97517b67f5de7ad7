"""What a transport is: groups of point-to-point messages between ranks, and a gather of small integers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from torch import Tensor

from .messages import Buffer, Pending, RowLayout
from .progress import CommunicationThread
from .traffic import Traffic


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
