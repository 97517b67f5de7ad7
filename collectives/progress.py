"""Collectives that make progress while the main thread computes, and the time spent waiting for them.

Between nodes a message takes long, and a rank that forwards chunks must do so while its main thread runs a matrix product. A
transport between nodes therefore has one communication thread, which runs its collectives from launch to completion, in launch
order, and sleeps while bytes travel. Inside a node each receiver copies for itself, during its wait.
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
    """A thread that runs submitted work in order. It starts with the first submission.

    It ends with this object, or with the process: it is a daemon thread, and process exit does not wait for it.
    """

    def __init__(self) -> None:
        self._queue: SimpleQueue[Future | None] | None = None

    def submit(self, work: Callable[[], None]) -> Future:
        """Enqueue `work`; an exception it raises is raised again by the future's wait."""
        if self._queue is None:
            self._queue = SimpleQueue()
            threading.Thread(target=_serve, args=(self._queue,), name="moesaic communication", daemon=True).start()
            weakref.finalize(self, self._queue.put, None)
        future = Future(work)
        self._queue.put(future)
        return future


class Future:
    """One unit of work of the communication thread."""

    def __init__(self, work: Callable[[], None]):
        self._work: Callable[[], None] | None = work
        self._done = threading.Event()
        self._error: BaseException | None = None
        self.arrived_s: float | None = None

    def run(self) -> None:
        """Run the work and record its exception; called once, by the communication thread."""
        assert self._work is not None
        try:
            self._work()
        except BaseException as error:
            self._error = error
        self.arrived_s = time.perf_counter()
        self._work = None  # releases the buffers that the work refers to
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
            del future  # so that no buffer stays alive while the thread waits for work


class TimedWork:
    """A collective whose waiting time is counted and, while `Traffic.spans` is a list, recorded with its launch and its end."""

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
