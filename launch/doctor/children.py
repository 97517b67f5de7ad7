"""Child processes of a command: started and ended together, with exit status and last error line of each."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from subprocess import DEVNULL
from typing import IO

from ...collectives.lifetime import start

# After one process has failed, the others may run this long before they are killed.
_GRACE_S = 10.0
_POLL_S = 0.02


@dataclass(frozen=True)
class Child:
    """The end of one process."""

    status: int | None
    """Exit status, negative for a signal; None if it was killed here, after the time limit or another process's failure."""
    last_line: str
    """The last line of its standard error."""


def run_children(
    commands: Sequence[Sequence[str]], environments: Sequence[Mapping[str, str]], *, limit_s: float | None = None
) -> list[Child]:
    """Start every command in its environment, and wait for all; none outlives the call or this process."""
    with ExitStack() as stack:
        errors = [stack.enter_context(tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace")) for _ in commands]
        processes = []
        for command, environment, error in zip(commands, environments, errors, strict=True):
            process = start(command, env=environment, stdout=DEVNULL, stderr=error)
            stack.callback(process.wait)
            stack.callback(process.kill)
            processes.append(process)
        deadline_s = None if limit_s is None else time.monotonic() + limit_s
        while any(process.poll() is None for process in processes):
            now_s = time.monotonic()
            if any(process.poll() for process in processes):
                deadline_s = min(deadline_s or now_s + _GRACE_S, now_s + _GRACE_S)
            if deadline_s is not None and now_s >= deadline_s:
                break
            time.sleep(_POLL_S)
        return [Child(process.poll(), _last_line(error)) for process, error in zip(processes, errors, strict=True)]


def problem_of(children: Sequence[Child]) -> str:
    """The most informative problem: of a process that failed rather than of one that was killed; empty if all succeeded."""
    failed = [child for child in children if child.status != 0]
    if not failed:
        return ""
    first = next((child for child in failed if child.status is not None and child.last_line), failed[0])
    if first.last_line:
        return first.last_line
    return "no answer in time" if first.status is None else f"ended with status {first.status}"


def _last_line(error: IO[str]) -> str:
    error.seek(0)
    lines = error.read().strip().splitlines()
    return lines[-1].strip() if lines else ""
