"""The interface of a transport: groups of point-to-point messages between ranks, and an all-gather of small integer tensors."""

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

    `thread` runs the collectives of transports whose messages take long; None: collectives advance only inside their wait.
    """

    name: str
    rank: int
    world_size: int
    traffic: Traffic
    thread: CommunicationThread | None

    def empty(self, shape: Sequence[int], like: Tensor) -> Tensor:
        """An uninitialised tensor of the dtype and device of `like`, in the memory from which sending is cheapest."""

    def exchange(self, sends: Sequence[Buffer], recvs: Sequence[Buffer], *, op: str, where: str = "") -> Pending:
        """Launch a group of messages. Traffic is counted under `op`; error messages quote `where` (step, layer)."""

    def exchange_rows(self, layout: RowLayout, outgoing: Tensor, incoming: Tensor, *, op: str, where: str = "") -> Pending:
        """Launch the messages `layout.sends(outgoing)` and `layout.receives(incoming)`, see `exchange`.

        Both tensors are contiguous.
        """

    def all_gather_ints(self, values: Tensor, *, where: str = "") -> Tensor:
        """Gather an int64 [n] tensor of equal size from every rank: int64 [R, n], on the device of `values`."""


class RowsAsMessages:
    """Mixin for transports that send from any memory: `empty`, and `exchange_rows` as one `exchange`."""

    def empty(self, shape: Sequence[int], like: Tensor) -> Tensor:
        """An ordinary tensor."""
        return like.new_empty(tuple(shape))

    def exchange_rows(
        self: Transport, layout: RowLayout, outgoing: Tensor, incoming: Tensor, *, op: str, where: str = ""
    ) -> Pending:
        """See `Transport.exchange_rows`."""
        return self.exchange(layout.sends(outgoing), layout.receives(incoming), op=op, where=where)
