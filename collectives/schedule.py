"""Schedules: the point-to-point messages of a sparse collective, as plain data made by pure functions.

The byte accounting, the tests and the executor all read the same schedule. A schedule moves *items*; what an item
is made of (the weight matrices of one expert) is the caller's business.
"""

from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from ..placement import Placement


@dataclass(frozen=True, slots=True, order=True)
class Message:
    """`item` goes from rank `src` to rank `dst`."""

    item: int
    src: int
    dst: int


@dataclass(frozen=True)
class Schedule:
    """Rounds of messages. The messages of a round run together; a round starts when the one before has arrived here.

    Within a round messages are in ascending order, so that two ranks post what they exchange in the same order.
    """

    num_ranks: int
    rounds: tuple[tuple[Message, ...], ...]

    def __post_init__(self) -> None:
        for messages in self.rounds:
            assert list(messages) == sorted(messages), "the messages of a round must be sorted"
            assert all(m.src != m.dst for m in messages), "a message to oneself"

    def transpose(self) -> "Schedule":
        """The reverse collective: every message the other way, the last round first."""
        rounds = tuple(tuple(sorted(Message(m.item, m.dst, m.src) for m in messages)) for messages in reversed(self.rounds))
        return Schedule(self.num_ranks, rounds)

    def limit_receives(self, limit: int) -> "Schedule":
        """The same messages in order, in rounds in which no rank receives more than `limit`: so much staging is enough."""
        assert limit > 0 or not self.rounds
        rounds: list[tuple[Message, ...]] = []
        for messages in self.rounds:
            received: dict[int, int] = defaultdict(int)
            parts: dict[int, list[Message]] = defaultdict(list)
            for message in messages:
                parts[received[message.dst] // limit].append(message)
                received[message.dst] += 1
            rounds += [tuple(parts[i]) for i in sorted(parts)]
        return Schedule(self.num_ranks, tuple(rounds))

    def most_received(self, rank: int) -> int:
        """The most messages that `rank` receives in one round."""
        return max((sum(m.dst == rank for m in messages) for messages in self.rounds), default=0)

    def messages(self) -> Iterator[Message]:
        """Every message, in order."""
        for messages in self.rounds:
            yield from messages

    def num_messages_RR(self) -> np.ndarray:
        """Messages from each rank (row) to each rank (column), int64 [R, R]."""
        counts_RR = np.zeros((self.num_ranks, self.num_ranks), np.int64)
        for message in self.messages():
            counts_RR[message.src, message.dst] += 1
        return counts_RR


def direct_gather(placement: Placement) -> Schedule:
    """One round: every copy comes straight from the expert's owner.

    Example: with owners [0, 1] and a copy of expert 0 on rank 1, the one message is item 0 from rank 0 to rank 1.
    """
    dsts, experts = np.nonzero(placement.copies_RE)
    owners_E = placement.expert_to_owner_E
    messages = sorted(Message(int(e), int(owners_E[e]), int(dst)) for dst, e in zip(dsts, experts, strict=True))
    return Schedule(placement.replicas_RE.shape[0], (tuple(messages),) if messages else ())
