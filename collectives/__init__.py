"""Sparse collectives: a collective is a schedule, a schedule is data, and one executor runs it over any transport.

traffic.py     bytes and messages counted by operation and peer
messages.py    what travels: buffers, rows, a group of messages in flight
transport.py   what a transport is: `exchange` and `all_gather_ints`
transports/    c10d (Gloo or NCCL), shm (ranks of one host), mpi, hierarchical (shm inside nodes, c10d between), local (one rank)
schedule.py    the values: messages, routes, schedules; the reduce is the gather transposed
schedules/     direct, relay, hierarchical, element_sharded: from a placement to a schedule; and the choice among them
hops.py        schedules as arrays, which the making and the prediction of a schedule compute with
hops_numba.py  their compiled loops
account.py     bytes and messages by link class, predicted seconds, lower bounds: read from the schedule that runs
progress.py    the communication thread, and waits that are counted
executor.py    the executor: chunks go on as soon as they have arrived
verbs.py       sparse_all_gather, sparse_reduce_scatter, all_to_all_rows
lifetime.py    ranks end with the process that started them
average.py     the mean of tensors that all ranks hold
reference.py   the same verbs on plain lists of per-rank tensors: what each of them means
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
