"""One process of a machine at a time compiles what is written in a source file.

The lock is on a file, and the system gives it back when its holder ends, however it ends: the next one to wait then compiles
instead. Processes wait for a limited time, as the holder may be stopped; then they compile for themselves.
"""

from __future__ import annotations

import fcntl
import os
import threading
import time
from contextlib import ExitStack, suppress
from functools import cache
from pathlib import Path

# A source file takes some seconds, and a minute on a slow machine that is busy.
WAIT_S = 300.0
_POLL_S = 0.02


class FolderLock:
    """Of a folder, held by one process, and in it by one thread, any number of times; a context manager."""

    def __init__(self, folder: Path) -> None:
        self._path = folder / "lock"
        self._thread_lock = threading.RLock()
        self._depth = 0
        self._file: int | None = None

    def __enter__(self) -> FolderLock:
        self._thread_lock.acquire()
        if not self._depth:
            try:
                self._file = self._lock_file()
            except BaseException:  # Ctrl-C among others
                self._thread_lock.release()
                raise
        self._depth += 1
        return self

    def __exit__(self, *exc: object) -> None:
        self._depth -= 1
        if not self._depth and self._file is not None:
            os.close(self._file)
            self._file = None
        self._thread_lock.release()

    def _lock_file(self) -> int | None:
        """Wait for the lock of the file; None if that took too long, or where none can be had, as in a folder to read only."""
        deadline_s = time.monotonic() + WAIT_S
        with suppress(OSError), ExitStack() as closing:
            file = os.open(self._path, os.O_RDWR | os.O_CREAT, 0o600)
            closing.callback(os.close, file)
            while not try_lock(file):
                if time.monotonic() > deadline_s:
                    return None
                time.sleep(_POLL_S)
            closing.pop_all()
            return file
        return None


@cache
def lock_of(folder: Path) -> FolderLock:
    """This process's lock of a folder."""
    return FolderLock(folder)


def try_lock(file: int) -> bool:
    """Lock an open file unless another process has it; OSError where the file system has no locks."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True
