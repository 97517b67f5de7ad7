"""The cost of a schedule: bytes and messages by link class, predicted seconds, and a lower bound over all schedules.

The time model. A rank sends and receives at `device_bytes_per_s`, a node's link carries `node_bytes_per_s` in each direction, and
each message costs both of its ranks `latency_s`; a rank's messages are posted one after the other. The predicted time is that of
the busiest rank or node link, plus the pipeline fill: at every hop after the first, the time and latency of one chunk, as often
as the forwarding rank sends it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

from ..placement import Topology
from .hops import Hops
from .schedule import Schedule


@dataclass(frozen=True)
class LinkCounts:
    """A count (bytes, messages) split by the links it went over."""

    same_rank: int
    same_node: int
    cross_node: int

    @classmethod
    def of(cls, counts_RR: np.ndarray, topology: Topology) -> LinkCounts:
        """Split counts from each rank (row) to each rank (column), int [R, R]."""
        nodes_R = topology.node_of_rank_R
        total, same_rank = int(counts_RR.sum()), int(np.trace(counts_RR))
        inside = int(counts_RR[nodes_R[:, None] == nodes_R].sum())
        return cls(same_rank, inside - same_rank, total - inside)

    @classmethod
    def sent_by(cls, rank: int, counts_R: np.ndarray, topology: Topology) -> LinkCounts:
        """Split what one rank sent to each rank, int [R]."""
        counts_RR = np.zeros((topology.num_ranks, topology.num_ranks), np.int64)
        counts_RR[rank] = counts_R
        return cls.of(counts_RR, topology)


@dataclass(frozen=True)
class Loads:
    """The inputs of a prediction. `fill_*`: seconds of the longest forwarding path, its bytes and its latencies separately."""

    most_bytes: float  # sent, or received, by the busiest rank
    most_node_bytes: float  # sent, or received, by the busiest node
    most_messages: int  # sent and received by the busiest rank
    fill_bytes_s: float
    fill_latency_s: float

    @classmethod
    def of(cls, hops: Hops, topology: Topology, item_bytes: int) -> Loads:
        """Count a schedule of items of `item_bytes`. A reduce loads the same links as its gather, in the opposite direction."""
        # Imported here so that importing the package compiles nothing.
        from .hops_numba import count_loads

        loads = count_loads(
            hops.start_G,
            hops.src_H,
            hops.dst_H,
            hops.end_chunk_G - hops.first_chunk_G,
            hops.num_chunks_G,
            hops.num_ranks,
            topology.ranks_per_node,
            float(item_bytes),
            topology.device_bytes_per_s,
            topology.node_bytes_per_s,
        )
        most_bytes, most_node_bytes, most_messages, fill_bytes_s, fill_hops = loads.tolist()
        return cls(most_bytes, most_node_bytes, int(most_messages), fill_bytes_s, fill_hops * topology.latency_s)

    def seconds(self, topology: Topology) -> float:
        """Turn the counts into seconds."""
        ranks_s = self.most_bytes / topology.device_bytes_per_s + self.most_messages * topology.latency_s
        nodes_s = self.most_node_bytes / topology.node_bytes_per_s
        return max(ranks_s, nodes_s) + self.fill_bytes_s + self.fill_latency_s


def predicted_s(schedule: Schedule, topology: Topology, item_bytes: int) -> float:
    """Seconds that a collective over items of `item_bytes` takes; see the module's docstring."""
    return Loads.of(Hops.of(schedule), topology, item_bytes).seconds(topology)


@dataclass(frozen=True)
class Bound:
    """Lower bound over all schedules: each rank receives its copies, each owner sends each copied expert at least once.

    Likewise each expert enters every node that needs it. `busiest_bytes`: sent or received by the busiest rank in this schedule;
    `rank_bytes`, `node_bytes`: the lower bounds for the busiest rank and node. `seconds`: the larger of the two divided by its
    link rate.
    """

    busiest_bytes: int
    rank_bytes: int
    node_bytes: int
    seconds: float


@dataclass(frozen=True)
class Account:
    """The totals of one collective over all ranks, for benchmark records and step metrics."""

    bytes: LinkCounts
    messages: LinkCounts
    predicted_s: float
    bound: Bound


def account(schedule: Schedule, topology: Topology, num_elements: int, element_bytes: int = 4) -> Account:
    """Count one collective over items of `num_elements` elements of `element_bytes` bytes."""
    bytes_RR = schedule.num_elements_RR(num_elements) * element_bytes
    item_bytes = num_elements * element_bytes
    busiest = int(max(bytes_RR.sum(axis=0).max(), bytes_RR.sum(axis=1).max()))
    return Account(
        bytes=LinkCounts.of(bytes_RR, topology),
        messages=LinkCounts.of(schedule.num_messages_RR(), topology),
        predicted_s=predicted_s(schedule, topology, item_bytes),
        bound=_bound(schedule, topology, item_bytes, busiest),
    )


def _bound(schedule: Schedule, topology: Topology, item_bytes: int, busiest_bytes: int) -> Bound:
    """The bound depends only on which rank needs which item, which is the same in every schedule of a placement."""
    per_node = topology.ranks_per_node
    copies = {(route.item, dst) for route in schedule.routes for _, dst in route.hops}
    owners = {route.item: route.owner for route in schedule.routes}
    received = _most(dst for _, dst in copies)
    sent = _most(owners.values())
    entries = {(item, dst // per_node) for item, dst in copies if dst // per_node != owners[item] // per_node}
    entered = _most(node for _, node in entries)
    left = _most(owners[item] // per_node for item in {item for item, _ in entries})
    rank_bytes, node_bytes = item_bytes * max(received, sent), item_bytes * max(entered, left)
    seconds = max(rank_bytes / topology.device_bytes_per_s, node_bytes / topology.node_bytes_per_s)
    return Bound(busiest_bytes, rank_bytes, node_bytes, seconds)


def _most(ids: Iterable[int]) -> int:
    """The number of occurrences of the most frequent id."""
    return max(Counter(ids).values(), default=0)
