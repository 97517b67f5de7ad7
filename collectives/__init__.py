"""Sparse collectives: a collective is a schedule, a schedule is data, and one executor runs it over any transport.

messages.py    Point-to-point messages: buffers and row ranges with their peers, handles of messages in flight, the error of a
               failure.
schedule.py    Schedules: the point-to-point messages of a sparse collective, as plain data.
traffic.py     Traffic counters of one rank: bytes and messages sent, by operation and peer, and the time spent waiting.
hops_numba.py  Compiled loops over the hops of schedules.
lifetime.py    Processes that end with their parent, so that no rank is left waiting for its peers, or training, after its
               launcher has died.
tags.py        What a message is about, as a number that both of its ranks must have: operation, step, layer and pass.
hops.py        Schedules as arrays, the form in which schedules are built, predicted and counted.
reference.py   Reference implementations of the collectives on plain lists of per-rank values.
progress.py    Collectives that make progress while the main thread computes, and the time spent waiting for them.
account.py     The cost of a schedule: bytes and messages by link class, predicted seconds, and a lower bound over all schedules.
transport.py   The interface of a transport: groups of point-to-point messages between ranks, and an all-gather of small integer
               tensors.
schedules/     Pure functions from a placement and a topology to a schedule, one kind per file.
average.py     The mean of a tensor over all ranks, in place: the all-reduce of gradients over replicated groups.
executor.py    The executor: runs one rank's part of any schedule over any transport.
transports/    Transports: how bytes move between ranks, one kind per file.
verbs.py       The collective operations: each is launched by its call and completed by waiting on the handle that it returns.
"""

from .account import Account, Bound, LinkCounts, account, predicted_s
from .average import average
from .messages import Buffer, CollectiveError, Pending, RowLayout, RowPart
from .schedule import Message, Route, Schedule
from .schedules.choose import SCHEDULES, ScheduleChoice, choose_schedule, make_schedule
from .schedules.direct import direct_gather
from .traffic import Span, Traffic
from .transport import RowsAsMessages, Transport
from .transports.c10d import C10dTransport
from .transports.choose import (
    TRANSPORTS,
    TransportChoice,
    choose_transport,
    make_host_transport,
    make_transports,
    new_group,
    nodes_of_group,
)
from .transports.local import LocalTransport
from .transports.shm import ShmTransport
from .verbs import all_to_all_rows, sparse_all_gather, sparse_reduce_scatter

__all__ = [
    "SCHEDULES",
    "TRANSPORTS",
    "Account",
    "Bound",
    "Buffer",
    "C10dTransport",
    "CollectiveError",
    "LinkCounts",
    "LocalTransport",
    "Message",
    "Pending",
    "Route",
    "RowLayout",
    "RowPart",
    "RowsAsMessages",
    "Schedule",
    "ScheduleChoice",
    "ShmTransport",
    "Span",
    "Traffic",
    "Transport",
    "TransportChoice",
    "account",
    "all_to_all_rows",
    "average",
    "choose_schedule",
    "choose_transport",
    "direct_gather",
    "make_host_transport",
    "make_schedule",
    "make_transports",
    "new_group",
    "nodes_of_group",
    "predicted_s",
    "sparse_all_gather",
    "sparse_reduce_scatter",
]
