"""Sparse collectives: a collective is a schedule, a schedule is data, and one executor runs it over any transport.

traffic.py     bytes and messages counted by operation and peer
transport.py   what a transport is: `exchange` and `all_gather_ints`
transports/    c10d (Gloo or NCCL), local (one rank, no process group)
schedule.py    rounds of point-to-point messages, made from a placement; the reduce is the gather transposed
verbs.py       sparse_all_gather, sparse_reduce_scatter, all_to_all_rows
reference.py   the same verbs on plain lists of per-rank tensors: what each of them means
"""

from .schedule import Message, Schedule, direct_gather
from .traffic import Traffic
from .transport import Buffer, CollectiveError, Pending, Transport
from .transports.c10d import C10dTransport
from .transports.local import LocalTransport
from .verbs import all_to_all_rows, sparse_all_gather, sparse_reduce_scatter

__all__ = [
    "Buffer",
    "C10dTransport",
    "CollectiveError",
    "LocalTransport",
    "Message",
    "Pending",
    "Schedule",
    "Traffic",
    "Transport",
    "all_to_all_rows",
    "direct_gather",
    "sparse_all_gather",
    "sparse_reduce_scatter",
]
