"""Sparse collectives: a collective is a schedule, a schedule is data, and one executor runs it over any transport.

messages.py    What travels between ranks: buffers and rows with their peers, a group of messages in flight, the error of one that
               fails.
schedule.py    Schedules: the point-to-point messages of a sparse collective, as plain data.
traffic.py     What this rank sent, by operation and peer, and how long it waited.
hops_numba.py  Compiled loops over the hops of schedules.
lifetime.py    Ranks that end with the process that started them: nobody is left to end one that waits for its peers, or trains
               on.
hops.py        Schedules as arrays: what the making, the prediction and the account of a schedule compute with.
reference.py   What each collective means, on plain lists of per-rank values.
progress.py    Collectives that go on while the main thread computes, and what waiting for them cost.
account.py     What a schedule costs: bytes and messages by link class, predicted seconds, and what no schedule can go below.
transport.py   What a transport is: groups of point-to-point messages between ranks, and a gather of small integers.
schedules/     Pure functions from a placement and a topology to a schedule, one kind a file.
average.py     The mean of tensors over ranks that all hold them: what brings the gradients of replicated groups together.
executor.py    The executor: carries out one rank's part of any schedule over any transport.
transports/    How bytes travel between ranks, one transport a file.
verbs.py       The collective verbs: launched now, waited for later.
"""

from .account import Account, Bound, LinkCounts, account, predicted_s
from .average import average
from .messages import Buffer, CollectiveError, Pending, RowLayout, RowPart
from .schedule import Message, Route, Schedule
from .schedules.choose import SCHEDULES, ScheduleChoice, choose_schedule, make_schedule
from .schedules.direct import direct_gather
from .schedules.element_sharded import element_sharded_gather
from .schedules.hierarchical import hierarchical_gather
from .schedules.relay import relay_gather
from .traffic import Span, Traffic
from .transport import RowsAsMessages, Transport
from .transports.c10d import C10dTransport
from .transports.choose import TRANSPORTS, TransportChoice, choose_transport, make_transports, nodes_of_group
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
    "element_sharded_gather",
    "hierarchical_gather",
    "make_schedule",
    "make_transports",
    "nodes_of_group",
    "predicted_s",
    "relay_gather",
    "sparse_all_gather",
    "sparse_reduce_scatter",
]
