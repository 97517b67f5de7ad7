"""Collectives that go on while the main thread computes, and what waiting for them cost.

Between nodes a message takes long, and a rank that passes chunks on must do so while its main thread is in a matrix product. So
a transport between nodes has one communication thread, which carries out its collectives from launch to end, in the order in
which they were launched. It sleeps while bytes travel. Inside a node receivers copy for themselves, at their wait.
"""

from __future__ import annotations

import threading
import time
import weakref
from collections.abc import Callable
from queue import SimpleQueue

import torch

from .messages import Pending
from .traffic import Traffic


class CommunicationThread:
    """A thread that does what it is given, one after the other. It starts with the first piece of work.

    It ends with this object, or with the process, which never waits for it.
    """

    def __init__(self) -> None:
        self._queue: SimpleQueue[Future | None] | None = None

    def submit(self, work: Callable[[], None]) -> Future:
        """Have `work` done; what it raises is raised by the wait."""
        if self._queue is None:
            self._queue = SimpleQueue()
            threading.Thread(target=_serve, args=(self._queue,), name="moesaic communication", daemon=True).start()
            weakref.finalize(self, self._queue.put, None)
        future = Future(work)
        self._queue.put(future)
        return future


class Future:
    """One piece of work of the communication thread."""

    def __init__(self, work: Callable[[], None]):
        self._work: Callable[[], None] | None = work
        self._done = threading.Event()
        self._error: BaseException | None = None
        self.arrived_s: float | None = None

    def run(self) -> None:
        """Do the work; called by the communication thread, once."""
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


def _serve(queue: SimpleQueue[Future | None]) -> None:
    with torch.no_grad():
        while (future := queue.get()) is not None:
            future.run()
            del future  # a thread that waits keeps no buffer alive


class TimedWork:
    """A collective whose waits are counted and, while `Traffic.spans` is a list, recorded with its launch and its end."""

    __slots__ = ("_launched_s", "_op", "_pending", "_traffic", "_where")

    def __init__(self, pending: Pending, launched_s: float, traffic: Traffic, op: str, where: str):
        self._pending = pending
        self._launched_s = launched_s
        self._traffic = traffic
        self._op = op
        self._where = where

    def wait(self, *, until_sent: bool = True) -> None:
        """Wait for the collective; see `Pending.wait`."""
        start_s = time.perf_counter()
        self._pending.wait(until_sent=until_sent)
        end_s = time.perf_counter()
        arrived_s = self._pending.arrived_s if isinstance(self._pending, Future) else None
        self._traffic.add_wait(self._op, self._where, self._launched_s, arrived_s or end_s, start_s, end_s)
