"""How many chunks: small ones fill a pipeline quickly, and each one costs a latency."""

from dataclasses import replace
from math import sqrt

from ...placement import Topology
from ..account import Loads
from ..schedule import Schedule

# Below this a chunk costs more to post than to send, on any fabric.
MIN_CHUNK_BYTES = 16 * 1024
MAX_CHUNKS = 128


def with_best_chunks(schedule: Schedule, topology: Topology, item_bytes: int) -> Schedule:
    """The same routes in as many chunks as are predicted to be fastest.

    With c chunks the busiest rank spends m * c latencies on its m streams, and the pipeline takes fill / c seconds to fill: the
    least sum is at c = sqrt(fill / (m * latency)).
    """
    loads = Loads.of(schedule, topology, item_bytes)
    if loads.fill_bytes_s == 0.0:
        return schedule
    pieces_in = max(route.num_chunks for route in schedule.routes)
    most = min(MAX_CHUNKS, item_bytes // MIN_CHUNK_BYTES) // pieces_in
    per_chunk_s = loads.most_messages * topology.latency_s
    wanted = sqrt(loads.fill_bytes_s / per_chunk_s) if per_chunk_s > 0.0 else most
    pieces = max(1, min(most, round(wanted)))
    return replace(schedule, routes=tuple(route.cut(pieces) for route in schedule.routes)) if pieces > 1 else schedule
