"""Processes that end with their parent, so that no rank is left waiting for its peers, or training, after its launcher has died.

On Linux the kernel signals them however the parent ended (`PR_SET_PDEATHSIG`, prctl(2)). Other systems have no such signal.
"""

from __future__ import annotations

import ctypes
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

_PR_SET_PDEATHSIG = 1
_POLL_S = 0.05
# Loaded before any fork: code between fork and exec must not wait for a lock whose owner, another thread, was not forked.
_prctl = ctypes.CDLL(None, use_errno=True).prctl if sys.platform == "linux" else None


def end_with_parent(parent_pid: int | None = None, signum: int = signal.SIGKILL) -> None:
    """Have the kernel send this process `signum` when its parent ends; at once if `parent_pid` is given and has ended already.

    The kernel takes the thread that started this process as the parent. The setting survives exec, and is not inherited by child
    processes.
    """
    if _prctl is None:
        return
    if _prctl(_PR_SET_PDEATHSIG, int(signum), 0, 0, 0):
        raise OSError(ctypes.get_errno(), "prctl(PR_SET_PDEATHSIG)")
    if parent_pid is not None and os.getppid() != parent_pid:
        os.kill(os.getpid(), signum)


def first_failure(statuses: Sequence[Callable[[], int | None]]) -> int:
    """Wait until all processes have ended, or one has failed; return that one's exit status, or 0.

    `statuses` give each process's status, None while it runs, as `Popen.poll` does.
    """
    while True:
        now = [status() for status in statuses]
        if any(now) or None not in now:
            return next((status for status in now if status), 0)
        time.sleep(_POLL_S)


def start(command: Sequence[str], **options: Any) -> subprocess.Popen[bytes]:
    """`subprocess.Popen(command, **options)` of a process that ends with this one.

    Call it from a thread that lives as long as that process. The signal is SIGTERM, so that mpirun ends its ranks too.
    """
    before_exec = None if _prctl is None else partial(end_with_parent, os.getpid(), signal.SIGTERM)
    return subprocess.Popen(command, preexec_fn=before_exec, **options)
