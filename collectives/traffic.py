"""Traffic counters of one rank: bytes and messages sent, by operation and peer, and the time spent waiting."""

from collections import defaultdict
from dataclasses import dataclass
from typing import Protocol

import numpy as np


class Unfinished(Protocol):
    """A collective with messages still to post, which may have to be completed before its own wait."""

    def drain(self) -> None:
        """Receive everything that is due and forward everything that other ranks wait for.

        Does not wait until peers have received what this rank sent: they may be blocked on this rank in another collective.
        """


@dataclass(frozen=True, slots=True)
class Span:
    """One collective on this rank's clock, in seconds of `time.perf_counter`: launch, arrival, start and end of the wait.

    Without a communication thread the arrival is not observed before the wait; it is then recorded as the end of the wait.
    """

    op: str
    where: str
    launched_s: float
    arrived_s: float
    wait_from_s: float
    wait_to_s: float


class Traffic:
    """Bytes and messages that one rank has sent, by operation and destination rank, and the seconds it waited for other ranks.

    Only what leaves the rank counts: a copy inside a rank is not traffic.

    `waited_s` is the host time spent waiting since the transport was created; on CUDA, where the stream waits, it stays near
    zero. While `spans` is a list, every collective is appended to it.

    `unfinished` is the collective on this transport, if any, that the next collective of its kind drains first (`drain`).
    Either it has messages still to post, and messages between two ranks are matched in the order in which they are posted; or
    other work runs before its wait, which is never reached if that work fails.
    """

    def __init__(self, world_size: int):
        self.world_size = world_size
        self.unfinished: Unfinished | None = None
        self.waited_s = 0.0
        self.spans: list[Span] | None = None
        self._counts: dict[str, np.ndarray] = defaultdict(lambda: np.zeros((2, world_size), np.int64))

    def finished(self, collective: Unfinished) -> None:
        """Record that a collective is complete, whether or not it was the `unfinished` one."""
        if self.unfinished is collective:
            self.unfinished = None

    def counts_2R(self, op: str) -> np.ndarray:
        """The counters of `op`, bytes and messages to every rank, int64 [2, R], for callers that add to them until `reset`."""
        return self._counts[op]

    def add(self, op: str, peer: int, num_bytes: int) -> None:
        """Count one message of `num_bytes` to rank `peer`."""
        counts_2R = self._counts[op]
        counts_2R[0, peer] += num_bytes
        counts_2R[1, peer] += 1

    def add_wait(self, op: str, where: str, launched_s: float, arrived_s: float, wait_from_s: float, wait_to_s: float) -> None:
        """Count the wait for one completed collective; see `Span`."""
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
