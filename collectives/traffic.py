"""What this rank sent, by operation and peer, and how long it waited."""

from collections import defaultdict
from dataclasses import dataclass
from typing import Protocol

import numpy as np


class Unfinished(Protocol):
    """A collective that somebody else may have to finish."""

    def take_in(self) -> None:
        """Wait for all that comes, and pass on all that others wait for.

        Not for others to take what was sent: they may be waiting for this rank elsewhere.
        """


@dataclass(frozen=True, slots=True)
class Span:
    """One collective on this rank's clock, `time.perf_counter` in seconds: in flight from launch to arrival, waited for from, to.

    Without a communication thread nobody looks before the wait: the arrival is then the end of the wait.
    """

    op: str
    where: str
    launched_s: float
    arrived_s: float
    wait_from_s: float
    wait_to_s: float


class Traffic:
    """Bytes and messages that one rank has sent, by operation name and destination rank, and the seconds it waited for others.

    Only what leaves the rank counts: a copy inside a rank is not traffic.

    `waited_s` is host time since the transport was made: on CUDA, where waits are left to the stream, next to nothing. `spans`
    collects every collective while it is a list.

    `unfinished` is the collective on this transport, if any, that the next of its kind takes in first. Either it has messages
    still to post, and messages between two ranks are matched in the order in which they are posted; or other work runs before
    its wait, which never comes if that work fails.
    """

    def __init__(self, world_size: int):
        self.world_size = world_size
        self.unfinished: Unfinished | None = None
        self.waited_s = 0.0
        self.spans: list[Span] | None = None
        self._counts: dict[str, np.ndarray] = defaultdict(lambda: np.zeros((2, world_size), np.int64))

    def finished(self, collective: Unfinished) -> None:
        """Note that this collective is over, the one that was `unfinished` or another."""
        if self.unfinished is collective:
            self.unfinished = None

    def counts_2R(self, op: str) -> np.ndarray:
        """Bytes and messages sent to every rank by `op`, int64 [2, R]: for those who add to them, until the next `reset`."""
        return self._counts[op]

    def add(self, op: str, peer: int, num_bytes: int) -> None:
        """Count one message of `num_bytes` to rank `peer`."""
        counts_2R = self._counts[op]
        counts_2R[0, peer] += num_bytes
        counts_2R[1, peer] += 1

    def add_wait(self, op: str, where: str, launched_s: float, arrived_s: float, wait_from_s: float, wait_to_s: float) -> None:
        """Count the wait for one collective, which is over; see `Span`."""
        self.waited_s += wait_to_s - wait_from_s
        if self.spans is not None:
            self.spans.append(Span(op, where, launched_s, arrived_s, wait_from_s, wait_to_s))

    def bytes_R(self, op: str) -> np.ndarray:
        """Bytes sent to every rank by `op`, int64 [R]."""
        return self._sent_2R(op)[0]

    def messages_R(self, op: str) -> np.ndarray:
        """Messages sent to every rank by `op`, int64 [R]."""
        return self._sent_2R(op)[1]

    def _sent_2R(self, op: str) -> np.ndarray:
        return self._counts[op].copy() if op in self._counts else np.zeros((2, self.world_size), np.int64)

    def total_bytes(self) -> dict[str, int]:
        """Bytes sent so far, by operation."""
        return {op: int(counts_2R[0].sum()) for op, counts_2R in self._counts.items()}

    def reset(self) -> None:
        """Start counting bytes and messages again from zero."""
        self._counts.clear()
