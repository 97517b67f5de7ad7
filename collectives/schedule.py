"""Schedules: the point-to-point messages of a sparse collective, as plain data.

The byte accounting, the predicted time, the tests and the executor all read the same schedule. A schedule moves *items*; the
caller decides what an item is (the weight matrices of one expert). The pure functions of `schedules/` make schedules.
"""

from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np


@dataclass(frozen=True, slots=True, order=True)
class Message:
    """Chunk `chunk` of the `num_chunks` of `item` goes from rank `src` to rank `dst`.

    Ordered by round, item, chunk and `position`: every rank posts its messages, and sums what it receives, in this order. Two
    ranks therefore match their messages without negotiation.
    """

    round: int
    item: int
    chunk: int
    position: int
    src: int
    dst: int
    num_chunks: int

    def bounds(self, num_elements: int) -> tuple[int, int]:
        """The first element of the chunk and the one after its last, in an item of `num_elements`."""
        return chunk_bounds(self.chunk, self.num_chunks, num_elements)


def chunk_bounds(chunk: int, num_chunks: int, num_elements: int) -> tuple[int, int]:
    """The range of elements of a chunk. Example: 10 elements in 4 chunks are [0, 2), [2, 5), [5, 7), [7, 10)."""
    return num_elements * chunk // num_chunks, num_elements * (chunk + 1) // num_chunks


@dataclass(frozen=True, slots=True)
class Route:
    """How chunks `first_chunk` to `end_chunk` of an item, cut into `num_chunks`, reach ranks: a tree of hops from its owner.

    `hops` are (src, dst), every src the owner or an earlier dst: only ranks that need the item forward it. The children of a rank
    are in descending rank order, so that the reverse collective sums in ascending order.
    """

    item: int
    hops: tuple[tuple[int, int], ...]
    first_chunk: int = 0
    end_chunk: int = 1
    num_chunks: int = 1

    def __post_init__(self) -> None:
        assert 0 <= self.first_chunk < self.end_chunk <= self.num_chunks
        reached = {self.owner}
        for src, dst in self.hops:
            assert src in reached and dst not in reached, f"item {self.item}: the hops {self.hops} are not a tree from its owner"
            reached.add(dst)

    @property
    def owner(self) -> int:
        """The rank that owns the item."""
        return self.hops[0][0]

    def depths(self) -> list[int]:
        """For every hop, the number of hops that precede it on the path from the owner."""
        depth_of = {self.owner: 0}
        for src, dst in self.hops:
            depth_of[dst] = depth_of[src] + 1
        return [depth_of[src] for src, _ in self.hops]

    def cut(self, pieces: int) -> "Route":
        """The same route with every chunk cut into `pieces`."""
        return replace(
            self, first_chunk=self.first_chunk * pieces, end_chunk=self.end_chunk * pieces, num_chunks=self.num_chunks * pieces
        )

    def num_elements(self, num_elements: int) -> int:
        """How many of the item's elements travel on this route."""
        first, _ = chunk_bounds(self.first_chunk, self.num_chunks, num_elements)
        _, end = chunk_bounds(self.end_chunk - 1, self.num_chunks, num_elements)
        return end - first


@dataclass(frozen=True)
class Schedule:
    """The messages of one collective. With `is_reduce` every route is reversed: from the copies to the owner, summing on the way.

    A message's round is the earliest step at which its chunk can be there when every hop takes one step. Rounds order messages;
    they are barriers only where a transport needs its messages in groups (`rounds`). `limit`: the most item-sized buffers in
    which a rank receives; None where messages are received in place (a gather).
    """

    num_ranks: int
    routes: tuple[Route, ...] = ()
    is_reduce: bool = False
    limit: int | None = None

    def __post_init__(self) -> None:
        assert self.limit is None or self.limit > 0

    def transpose(self) -> "Schedule":
        """The reverse collective: every message in the opposite direction, the last round first."""
        return Schedule(self.num_ranks, self.routes, not self.is_reduce)

    def limit_receives(self, limit: int) -> "Schedule":
        """The same messages for ranks that have `limit` item-sized buffers to receive in."""
        return replace(self, limit=limit)

    def most_received(self, rank: int) -> int:
        """Item-sized receive buffers that `rank` can use, at most `limit`."""
        dst = 0 if self.is_reduce else 1
        received = sum(hop[dst] == rank for route in self.routes for hop in route.hops)
        return received if self.limit is None else min(received, self.limit)

    def involves(self, rank: int) -> bool:
        """Whether `rank` sends or receives anything."""
        return any(rank in hop for route in self.routes for hop in route.hops)

    def messages_of(self, rank: int) -> list[Message]:
        """The messages that `rank` sends or receives, in order."""
        return sorted(self._messages([route for route in self.routes if any(rank in hop for hop in route.hops)], rank))

    def messages(self) -> list[Message]:
        """Every message, in order."""
        return sorted(self._messages(self.routes))

    def rounds(self) -> list[list[Message]]:
        """All messages in consecutive groups; the messages that a message depends on are in earlier groups.

        In one group a rank receives at most `limit` items less one for the sum in progress; with a single buffer the sum is held
        elsewhere.
        """
        rounds: list[list[Message]] = []
        by_round: dict[int, list[Message]] = defaultdict(list)
        for message in self.messages():
            by_round[message.round].append(message)
        most = max(self.limit - 1, 1) if self.limit else 1 << 62
        for number in sorted(by_round):
            received: dict[int, int] = defaultdict(int)
            parts: dict[int, list[Message]] = defaultdict(list)
            for message in by_round[number]:
                parts[received[message.dst] // most].append(message)
                received[message.dst] += 1
            rounds += [parts[i] for i in sorted(parts)]
        return rounds

    def num_messages_RR(self) -> np.ndarray:
        """Messages from each rank (row) to each rank (column), int64 [R, R]."""
        return self._sum_over_hops([route.end_chunk - route.first_chunk for route in self.routes])

    def num_elements_RR(self, num_elements: int) -> np.ndarray:
        """Elements from each rank (row) to each rank (column) when an item has `num_elements`, int64 [R, R]."""
        return self._sum_over_hops([route.num_elements(num_elements) for route in self.routes])

    def _sum_over_hops(self, counts: list[int]) -> np.ndarray:
        """Add every route's count to the pair of ranks of each of its hops."""
        hops_H2 = np.array([hop for route in self.routes for hop in route.hops], np.int64).reshape(-1, 2)
        counts_H = np.repeat(np.array(counts, np.int64), [len(route.hops) for route in self.routes])
        counts_RR = np.zeros((self.num_ranks, self.num_ranks), np.int64)
        np.add.at(counts_RR, (hops_H2[:, 0], hops_H2[:, 1]), counts_H)
        return counts_RR.T if self.is_reduce else counts_RR

    def _messages(self, routes: "tuple[Route, ...] | list[Route]", rank: int | None = None) -> Iterator[Message]:
        last = self._last_round()
        for route in routes:
            for position, ((src, dst), depth) in enumerate(zip(route.hops, route.depths(), strict=True)):
                if rank is not None and rank != src and rank != dst:
                    continue
                for chunk in range(route.first_chunk, route.end_chunk):
                    step = depth + chunk - route.first_chunk
                    if self.is_reduce:
                        yield Message(last - step, route.item, chunk, -position, dst, src, route.num_chunks)
                    else:
                        yield Message(step, route.item, chunk, position, src, dst, route.num_chunks)

    def _last_round(self) -> int:
        if not self.is_reduce:
            return 0
        return max((max(route.depths()) + route.end_chunk - route.first_chunk - 1 for route in self.routes), default=0)
