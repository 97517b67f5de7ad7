"""Collectives that go on while the main thread computes, and what waiting for them cost.

Between nodes a message takes long, and a rank that passes chunks on must do so while its main thread is in a matrix product. So
a transport between nodes has one communication thread, which carries out its collectives from launch to end, in the order in
which they were launched. It sleeps while bytes travel. Inside a node receivers copy for themselves, at their wait.
"""

from __future__ import annotations

import threading
import time
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from queue import SimpleQueue

import torch

from .traffic import GivesWay, Traffic
from .transport import Pending


class CommunicationThread:
    """A thread that does what it is given, one after the other. It starts with the first piece of work.

    It ends with this object, or with the process, which never waits for it.
    """

    def __init__(self) -> None:
        self._queue: SimpleQueue[_Carried | None] | None = None

    def carry_out(self, work: Callable[[], None]) -> _Carried:
        """Have `work` done; what it raises is raised by the wait."""
        if self._queue is None:
            self._queue = SimpleQueue()
            threading.Thread(target=_serve, args=(self._queue,), name="moesaic communication", daemon=True).start()
            weakref.finalize(self, self._queue.put, None)
        carried = _Carried(work)
        self._queue.put(carried)
        return carried


class _Carried:
    """One piece of work of the communication thread."""

    def __init__(self, work: Callable[[], None]):
        self._work: Callable[[], None] | None = work
        self._done = threading.Event()
        self._error: BaseException | None = None
        self.arrived_s: float | None = None

    def carry_out(self) -> None:
        assert self._work is not None
        try:
            self._work()
        except BaseException as error:
            self._error = error
        self.arrived_s = time.perf_counter()
        self._work = None  # and with it every buffer
        self._done.set()

    def wait(self, *, until_sent: bool = True) -> None:
        """Return when the work is done, sends included."""
        self._done.wait()
        if self._error is not None:
            raise self._error


def _serve(queue: SimpleQueue[_Carried | None]) -> None:
    with torch.no_grad():
        while (carried := queue.get()) is not None:
            carried.carry_out()
            del carried  # a thread that waits keeps no buffer alive


class RightOfWay:
    """Lets token rows overtake copies and gradients on the links that they share.

    Everybody waits for token rows at once, for the others only later. So while this rank waits for rows, it asks for no further
    piece of the others; but not for longer than some pieces take, so that what is asked for, and perhaps passed on, goes on
    arriving while the rows are not even sent.

    Args:
        first_s: how long the first piece gives way, when nothing is known of the link.
    """

    def __init__(self, first_s: float = 0.005):
        self.first_s = first_s
        self._is_free = threading.Event()
        self._is_free.set()

    @contextmanager
    def taken(self) -> Iterator[None]:
        """The body waits for rows."""
        self._is_free.clear()
        try:
            yield
        finally:
            self._is_free.set()

    def give(self, limit_s: float) -> None:
        """Return when nobody waits for rows, or after the limit."""
        self._is_free.wait(limit_s)


class Watched:
    """A collective whose waits are counted and, while `Traffic.spans` is a list, recorded with its launch and its end.

    With a `right_of_way` others give way while it is waited for.
    """

    __slots__ = ("_launched_s", "_op", "_pending", "_right_of_way", "_traffic", "_where")

    def __init__(
        self,
        pending: Pending,
        launched_s: float,
        traffic: Traffic,
        op: str,
        where: str,
        right_of_way: GivesWay | None = None,
    ):
        self._pending = pending
        self._launched_s = launched_s
        self._traffic = traffic
        self._op = op
        self._where = where
        self._right_of_way = right_of_way

    def wait(self, *, until_sent: bool = True) -> None:
        """Wait for the collective; see `Pending.wait`."""
        start_s = time.perf_counter()
        if self._right_of_way is None:
            self._pending.wait(until_sent=until_sent)
        else:
            with self._right_of_way.taken():
                self._pending.wait(until_sent=until_sent)
        end_s = time.perf_counter()
        arrived_s = self._pending.arrived_s if isinstance(self._pending, _Carried) else None
        self._traffic.add_wait(self._op, self._where, self._launched_s, arrived_s or end_s, start_s, end_s)
