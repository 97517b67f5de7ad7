"""Failure report: which collective failed, after which stage, and the status of every other rank.

Errors of the layers' own collectives contain all but the last. Errors of torch.distributed (dense parameters and gradients of
FSDP2, the loss, metrics) name a broken socket and no more; the report adds the rest.
"""

import os
import select
import threading
import time
import traceback
from pathlib import Path
from types import FrameType

import torch.distributed as dist
from torch import Tensor

from ...collectives import CollectiveError
from ...runtime._compat import default_store
from .process import Process, gather

# A rank that failed waits this long for the problems of the others; ranks that wait for it fail within their own time limit.
_LIMIT_S = 1.5
_POLL_S = 0.02
_KEY = "moesaic/failed"
_TORCH_DISTRIBUTED = str(Path(dist.__file__).parent) + os.sep


class Peers:
    """The other ranks of a run, whose status is reported when communication fails. Collective: all ranks construct it together.

    The kernel has the status of processes on this machine. Every rank that fails writes its problem into the process group's
    key-value store; a rank of another machine that cannot reach the store is reported as silent.
    """

    def __init__(self, process: Process):
        self._process = process
        self._others = [rank for rank in range(process.world_size) if rank != process.rank]
        here = _machine()
        found = gather(process, (here, os.getpid()))
        self._pids = {r: pid for r, (machine, pid) in enumerate(found) if here and machine == here and r != process.rank}
        self._pidfds = {rank: os.pidfd_open(pid) for rank, pid in self._pids.items()}

    def report(self, problem: str) -> str:
        """Publish this rank's problem, and return the status of every other rank."""
        problems: dict[int, str] = {}
        # The store may hang too; the thread is then left behind.
        exchange = threading.Thread(target=self._exchange_problems, args=(problem, problems), daemon=True)
        exchange.start()
        exchange.join(_LIMIT_S)
        ended, problems = self._ended(), problems.copy()
        return ", ".join(self._status(rank, ended, problems) for rank in self._others)

    def _status(self, rank: int, ended: set[int], problems: dict[int, str]) -> str:
        if rank in problems:
            return f"rank {rank} failed too ({problems[rank]})"
        if rank in ended:
            return f"rank {rank} is gone (its process {self._pids[rank]} has ended)"
        if rank in self._pids:
            return f"rank {rank} {'is stopped' if self._is_stopped(rank) else 'runs'} (process {self._pids[rank]})"
        return f"rank {rank} reported nothing within {_LIMIT_S:g} s"

    def _exchange_problems(self, problem: str, problems: dict[int, str]) -> None:
        """Write `problem` into the store, and read those of the others into `problems` until no running rank is missing."""
        until_s = time.monotonic() + _LIMIT_S
        try:
            store = default_store()
            store.set(f"{_KEY}/{self._process.rank}", problem)
            silent = self._others
            while silent and time.monotonic() < until_s:
                time.sleep(_POLL_S)
                problems |= {rank: store.get(f"{_KEY}/{rank}").decode() for rank in silent if store.check([f"{_KEY}/{rank}"])}
                ended = self._ended()
                silent = [rank for rank in silent if rank not in problems and rank not in ended and not self._is_stopped(rank)]
        except RuntimeError:
            pass  # the store ended with the rank that served it, and every unread problem with it

    def _ended(self) -> set[int]:
        """Ranks of this machine whose process has ended."""
        poll = select.poll()
        ranks = {}
        for rank, pidfd in self._pidfds.items():
            poll.register(pidfd, select.POLLIN)
            ranks[pidfd] = rank
        return {ranks[pidfd] for pidfd, _ in poll.poll(0)}

    def _is_stopped(self, rank: int) -> bool:
        try:
            stat = Path(f"/proc/{self._pids[rank]}/stat").read_text(encoding="utf-8", errors="replace")
        except (KeyError, OSError):
            return False
        return stat.rpartition(")")[2].split()[0] in ("T", "t")


def failure_report(error: BaseException, rank: int, step: int, last_stage: str, peers: Peers) -> str:
    """The error of a training step on one line; where communication failed, with the last stage and the status of all peers."""
    text = " ".join(str(error).split())
    where = f"rank {rank}, step {step}"
    if not isinstance(error, CollectiveError):
        collective = _collective_of(error)
        if collective is None:
            return f"{where}: {error}"
        where += f": outside the layers' collectives, in {collective}"
    last = f"last completed on this rank: {last_stage}"
    return f"{where}: {text}; {last}; {peers.report(f'{where}; {last}')}"


def _collective_of(error: BaseException) -> str | None:
    """The function of torch.distributed that raised, with the bytes of its largest tensor; None if none did.

    Example: `all_reduce of 64 B`.
    """
    frames = [frame for frame, _ in traceback.walk_tb(error.__traceback__) if _is_of_torch(frame)]
    if not frames:
        return None
    # Functions of torch wrap each other; the innermost one with a tensor names the collective.
    sizes = [(frame.f_code.co_name, _largest_bytes(frame)) for frame in frames]
    name, nbytes = next((pair for pair in reversed(sizes) if pair[1]), sizes[-1])
    return f"{name} of {nbytes} B" if nbytes else name


def _is_of_torch(frame: FrameType) -> bool:
    return frame.f_code.co_filename.startswith(_TORCH_DISTRIBUTED)


def _largest_bytes(frame: FrameType) -> int:
    return max((value.nbytes for value in frame.f_locals.values() if isinstance(value, Tensor)), default=0)


def _machine() -> tuple[str, int] | None:
    """An id of this machine and its process namespace, inside which processes can be watched; None where /proc has none."""
    try:
        boot_id = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
        return boot_id, os.stat("/proc/self/ns/pid").st_ino
    except OSError:
        return None
