"""The executor: runs one rank's part of any schedule over any transport.

Two executors post the same messages. `ScheduleExecutor` is for transports whose waits block the host: each receive is posted as
soon as there is buffer space, each message is sent as soon as its chunk is complete on this rank, and a rank waits only for ranks
that it receives from. `GroupedExecutor` is for transports that run in CUDA stream order, where messages must be posted in groups
that all ranks enter in the same order (NCCL deadlocks otherwise), and where a wait does not block the host.
"""

import time
from collections import Counter, deque
from collections.abc import Sequence
from typing import Protocol

from torch import Tensor

from .messages import Buffer, Done, Pending
from .progress import TimedWork
from .schedule import Message, Schedule
from .transport import Transport


class Endpoint(Protocol):
    """What a collective does with one rank's messages:

    the tensors to send, the buffers to receive into, the action on arrival.
    """

    def outgoing(self, message: Message) -> Sequence[Tensor]:
        """The tensors to send. Called once, after all chunks that the message depends on have arrived."""

    def incoming(self, message: Message) -> Sequence[Tensor] | None:
        """The tensors to receive into; None while no buffer is free."""

    def received(self, message: Message) -> None:
        """Called when the message has been received, in schedule order."""


class ScheduleExecutor:
    """A collective in progress that the host drives: launched by the constructor, finished by `wait`.

    Messages between two ranks are matched in the order in which both post them. A collective that still has messages to post when
    its launch returns is therefore drained before the next one on its transport begins; `traffic.unfinished` holds it until then.
    """

    def __init__(self, schedule: Schedule, transport: Transport, endpoint: Endpoint, *, op: str, where: str):
        self._transport, self._endpoint, self._op, self._where = transport, endpoint, op, where
        mine = schedule.messages_of(transport.rank)
        self._receives = deque(m for m in mine if m.dst == transport.rank)
        self._missing = Counter((m.item, m.chunk) for m in self._receives)
        self._arriving: deque[tuple[Message, Pending]] = deque()
        self._sending: deque[Pending] = deque()
        self._sends: dict[int, deque[Message]] = {}  # by destination: order matters only between the same two ranks
        for m in mine:
            if m.src == transport.rank:
                self._sends.setdefault(m.dst, deque()).append(m)
        self._post_receives()
        self._post_sends()
        if self._receives or self._sends:
            transport.traffic.unfinished = self

    def wait(self, *, until_sent: bool = True) -> None:
        """Run to completion; see `Pending.wait`. The transport's time limit applies to each message separately."""
        self.drain()
        while self._sending:
            self._sending[0].wait()
            self._sending.popleft()

    def drain(self) -> None:
        """See `Unfinished.drain`."""
        while self._arriving:
            message, pending = self._arriving[0]
            pending.wait()
            self._arriving.popleft()
            self._endpoint.received(message)
            self._missing[message.item, message.chunk] -= 1
            self._post_sends()
            self._post_receives()
        assert not self._receives and not self._sends, "messages that wait for nothing were not posted"
        self._transport.traffic.finished(self)

    def _post_receives(self) -> None:
        while self._receives:
            message = self._receives[0]
            tensors = self._endpoint.incoming(message)
            if tensors is None:
                assert self._arriving, "no room for a message, and nothing on its way that could make some"
                return
            recvs = [Buffer(tensor, message.src) for tensor in tensors]
            self._receives.popleft()
            self._arriving.append((message, self._transport.exchange([], recvs, op=self._op, where=self._where)))

    def _post_sends(self) -> None:
        sends: list[Buffer] = []
        for peer, queue in list(self._sends.items()):
            while queue and not self._missing[queue[0].item, queue[0].chunk]:
                sends += [Buffer(tensor, peer) for tensor in self._endpoint.outgoing(queue.popleft())]
            if not queue:
                del self._sends[peer]
        if sends:
            self._sending.append(self._transport.exchange(sends, [], op=self._op, where=self._where))


class GroupedExecutor:
    """A collective in progress, group by group:

    each group of messages is launched once this rank has received the previous one.
    """

    def __init__(self, schedule: Schedule, transport: Transport, endpoint: Endpoint, *, op: str, where: str):
        self._transport, self._endpoint, self._op, self._where = transport, endpoint, op, where
        rank = transport.rank
        groups = ([m for m in group if rank in (m.src, m.dst)] for group in schedule.rounds())
        self._waiting = deque(group for group in groups if group)
        self._current: tuple[list[Message], Pending] | None = None
        self._start_next()
        if self._waiting:
            transport.traffic.unfinished = self

    def wait(self, *, until_sent: bool = True) -> None:
        """Run to completion; see `Pending.wait`."""
        self.drain()

    def drain(self) -> None:
        """See `Unfinished.drain`."""
        while self._current is not None:
            messages, pending = self._current
            pending.wait()
            for message in messages:
                if message.dst == self._transport.rank:
                    self._endpoint.received(message)
            self._start_next()
        self._transport.traffic.finished(self)

    def _start_next(self) -> None:
        self._current = None
        if self._waiting:
            messages = self._waiting.popleft()
            rank = self._transport.rank
            sends = [Buffer(t, m.dst) for m in messages if m.src == rank for t in self._endpoint.outgoing(m)]
            recvs = [Buffer(t, m.src) for m in messages if m.dst == rank for t in self._room(m)]
            self._current = messages, self._transport.exchange(sends, recvs, op=self._op, where=self._where)

    def _room(self, message: Message) -> Sequence[Tensor]:
        tensors = self._endpoint.incoming(message)
        assert tensors is not None, "a group has more messages than there is room for"
        return tensors


def launch(schedule: Schedule, transport: Transport, endpoint: Endpoint, *, op: str, where: str, in_rounds: bool) -> Pending:
    """Launch this rank's part of a schedule, on the transport's communication thread where it has one.

    An unfinished collective is drained first, also by ranks that have no part in this schedule: participants may wait here for
    chunks that such a rank still has to forward, and would deadlock if it went on to wait for them in another collective.
    """
    thread, unfinished = transport.thread, transport.traffic.unfinished
    if (thread is None or in_rounds) and unfinished is not None:
        unfinished.drain()
    if not schedule.involves(transport.rank):
        return Done()

    def execute() -> Pending:
        return (GroupedExecutor if in_rounds else ScheduleExecutor)(schedule, transport, endpoint, op=op, where=where)

    launched_s = time.perf_counter()
    pending = execute() if thread is None or in_rounds else thread.submit(lambda: execute().wait())
    return TimedWork(pending, launched_s, transport.traffic, op, where)
