"""Byte and message accounting: what this rank sent, by operation and peer."""

from collections import defaultdict
from typing import Protocol

import numpy as np


class Unposted(Protocol):
    """A collective whose messages are not all posted."""

    def wait(self) -> None:
        """Return when the collective is complete."""


class Traffic:
    """Bytes and messages that one rank has sent, by operation name and destination rank.

    Only what leaves the rank counts: a copy inside a rank is not traffic.

    `unposted` is the collective on this transport, if any, that has messages still to post; the next one lets it finish first,
    since messages between two ranks are matched in the order in which they are posted.
    """

    def __init__(self, world_size: int):
        self.world_size = world_size
        self.unposted: Unposted | None = None
        self._bytes: dict[str, np.ndarray] = defaultdict(lambda: np.zeros(world_size, np.int64))
        self._messages: dict[str, np.ndarray] = defaultdict(lambda: np.zeros(world_size, np.int64))

    def add(self, op: str, peer: int, num_bytes: int) -> None:
        """Count one message of `num_bytes` to rank `peer`."""
        self._bytes[op][peer] += num_bytes
        self._messages[op][peer] += 1

    def bytes_R(self, op: str) -> np.ndarray:
        """Bytes sent to every rank by `op`, int64 [R]."""
        return self._bytes[op].copy() if op in self._bytes else np.zeros(self.world_size, np.int64)

    def messages_R(self, op: str) -> np.ndarray:
        """Messages sent to every rank by `op`, int64 [R]."""
        return self._messages[op].copy() if op in self._messages else np.zeros(self.world_size, np.int64)

    def total_bytes(self) -> dict[str, int]:
        """Bytes sent so far, by operation."""
        return {op: int(counts.sum()) for op, counts in self._bytes.items()}

    def reset(self) -> None:
        """Start counting again from zero."""
        self._bytes.clear()
        self._messages.clear()
