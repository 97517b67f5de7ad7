"""What a transport is: groups of point-to-point messages between ranks, and a gather of small integers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from torch import Tensor

from .traffic import Traffic

if TYPE_CHECKING:
    from .progress import CommunicationThread


class CollectiveError(RuntimeError):
    """A collective did not complete. The message names rank, operation, place in training, peers and byte counts."""


@dataclass(frozen=True, slots=True, eq=False)
class Buffer:
    """A contiguous tensor that goes to, or comes from, rank `peer`."""

    tensor: Tensor
    peer: int


class Pending(Protocol):
    """Messages in flight; whoever launched them owns this and waits once."""

    def wait(self, *, until_sent: bool = True) -> None:
        """Return when every message has arrived (on CUDA: when the current stream may use the buffers).

        And when what was sent may be overwritten; without `until_sent` perhaps earlier, for tensors that are only dropped.
        Raises `CollectiveError` when the time limit passes or a peer is gone.
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

    def all_gather_ints(self, values: Tensor, *, where: str = "") -> Tensor:
        """Gather an int64 [n] tensor of equal size from every rank: int64 [R, n], on the device of `values`."""
