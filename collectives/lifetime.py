"""Ranks that end with the process that started them: nobody is left to end one that waits for its peers, or trains on.

On Linux the kernel sees to it, however that process ended (`PR_SET_PDEATHSIG`, prctl(2)). Elsewhere nothing does.
"""

from __future__ import annotations

import ctypes
import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from functools import partial
from typing import Any

_PR_SET_PDEATHSIG = 1
# Loaded before any fork: what runs between a fork and its exec must not wait for a lock that no thread is left to release.
_prctl = ctypes.CDLL(None, use_errno=True).prctl if sys.platform == "linux" else None


def end_with_parent(parent_pid: int | None = None, signum: int = signal.SIGKILL) -> None:
    """Have the kernel send this process `signum` when its parent ends; at once if that was `parent_pid` and has ended.

    To the kernel the parent is the thread that started this process. It remembers when this process becomes another program,
    and does not for the processes that this one starts.
    """
    if _prctl is None:
        return
    if _prctl(_PR_SET_PDEATHSIG, int(signum), 0, 0, 0):
        raise OSError(ctypes.get_errno(), "prctl(PR_SET_PDEATHSIG)")
    if parent_pid is not None and os.getppid() != parent_pid:
        os.kill(os.getpid(), signum)


def start(command: Sequence[str], **options: Any) -> subprocess.Popen[bytes]:
    """`subprocess.Popen(command, **options)` of a process that ends with this one; call it on a thread that lives as long.

    It is asked to end (SIGTERM), so that mpirun ends its ranks too.
    """
    before_exec = None if _prctl is None else partial(end_with_parent, os.getpid(), signal.SIGTERM)
    return subprocess.Popen(command, preexec_fn=before_exec, **options)
