"""The number of chunks: small chunks fill a pipeline quickly, but each one costs a latency."""

from dataclasses import dataclass
from math import sqrt

from ...placement import Topology
from ..account import Loads
from ..hops import Hops

# Below this a chunk costs more to post than to send, on any fabric.
MIN_CHUNK_BYTES = 16 * 1024
MAX_CHUNKS = 128


@dataclass(frozen=True, eq=False)
class Candidate:
    """A schedule as arrays, and its predicted seconds."""

    hops: Hops
    seconds: float


def with_best_chunks(hops: Hops, topology: Topology, item_bytes: int) -> Candidate:
    """The same routes, cut into the number of chunks with the smallest predicted time.

    With c chunks the busiest rank spends m * c latencies on its m streams, and the pipeline takes fill / c seconds to fill: the
    sum is smallest at c = sqrt(fill / (m * latency)).
    """
    loads = Loads.of(hops, topology, item_bytes)
    if loads.fill_bytes_s > 0.0:
        most = min(MAX_CHUNKS, item_bytes // MIN_CHUNK_BYTES) // int(hops.num_chunks_G.max())
        per_chunk_s = loads.most_messages * topology.latency_s
        wanted = sqrt(loads.fill_bytes_s / per_chunk_s) if per_chunk_s > 0.0 else most
        pieces = max(1, min(most, round(wanted)))
        if pieces > 1:
            hops = hops.cut(pieces)
            loads = Loads.of(hops, topology, item_bytes)
    return Candidate(hops, loads.seconds(topology))
