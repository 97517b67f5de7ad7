"""Seconds spent on compiling and loading, a clock that stands still meanwhile, and when the package was imported."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from time import perf_counter


class _CompileClock:
    """Adds up the seconds in which a block runs, or several, nested or of threads."""

    def __init__(self) -> None:
        self.seconds = 0.0
        self._lock = threading.Lock()
        self._num_running = 0
        self._start_s = 0.0

    @contextmanager
    def running(self) -> Iterator[None]:
        """The body's time counts."""
        with self._lock:
            if not self._num_running:
                self._start_s = perf_counter()
            self._num_running += 1
        try:
            yield
        finally:
            with self._lock:
                self._num_running -= 1
                if not self._num_running:
                    self.seconds += perf_counter() - self._start_s


# One for the process: so is what it compiles.
CLOCK = _CompileClock()


def compile_seconds() -> float:
    """Seconds that this process has compiled routines so far, waited for another that did, or loaded them."""
    return CLOCK.seconds


def run_seconds() -> float:
    """`perf_counter`, less `compile_seconds`: what lies between two readings would have taken as long with nothing to compile."""
    return perf_counter() - compile_seconds()


# When the package was imported, in the seconds of `time.time`: it imports this before anything else. Later forks have what their
# parent imported.
IMPORTED_S = time.time()
