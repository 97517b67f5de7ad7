"""What a rank can say when communication fails: in which collective, after which stage, and what became of the others.

Errors of the layers' own collectives name all but the last. Those of torch.distributed (dense parameters and gradients of FSDP2,
the loss, metrics) say which socket broke, and no more: the rest is found here.
"""

import json
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

# How long a rank that has failed waits for what the others have to say. Those that wait for it fail within their own limit.
_WORDS_S = 1.5
_LOOK_S = 0.02
_KEY = "moesaic/failed"
_TORCH_DISTRIBUTED = str(Path(dist.__file__).parent) + os.sep


class Peers:
    """The other ranks of a run, watched for when communication with them breaks. Collective: all ranks construct it together.

    Processes of this machine are watched through the kernel. The others leave word, when they fail, in the process group's
    key-value store; that of a rank which cannot reach it stays unheard.
    """

    def __init__(self, process: Process):
        self._process = process
        self._others = [rank for rank in range(process.world_size) if rank != process.rank]
        here = _machine()
        found = [json.loads(text) for text in gather(process, json.dumps([here, os.getpid()]))]
        self._pids = {r: pid for r, (machine, pid) in enumerate(found) if here and machine == here and r != process.rank}
        self._pidfds = {rank: os.pidfd_open(pid) for rank, pid in self._pids.items()}

    def report(self, problem: str) -> str:
        """Tell the others of this rank's problem, and say what is known of each of them."""
        words: dict[int, str] = {}
        # The store may hang as everything else does: its thread is left behind then.
        talk = threading.Thread(target=self._exchange_words, args=(problem, words), daemon=True)
        talk.start()
        talk.join(_WORDS_S)
        ended, words = self._ended(), words.copy()
        return ", ".join(self._describe(rank, ended, words) for rank in self._others)

    def _describe(self, rank: int, ended: set[int], words: dict[int, str]) -> str:
        if rank in words:
            return f"rank {rank} failed too ({words[rank]})"
        if rank in ended:
            return f"rank {rank} is gone (its process {self._pids[rank]} has ended)"
        if rank in self._pids:
            return f"rank {rank} {'is stopped' if self._is_stopped(rank) else 'runs'} (process {self._pids[rank]})"
        return f"no word from rank {rank} within {_WORDS_S:g} s"

    def _exchange_words(self, problem: str, words: dict[int, str]) -> None:
        """Until each of the others has said something, or is known not to."""
        until_s = time.monotonic() + _WORDS_S
        try:
            store = default_store()
            store.set(f"{_KEY}/{self._process.rank}", problem)
            silent = self._others
            while silent and time.monotonic() < until_s:
                time.sleep(_LOOK_S)
                words |= {rank: store.get(f"{_KEY}/{rank}").decode() for rank in silent if store.check([f"{_KEY}/{rank}"])}
                ended = self._ended()
                silent = [rank for rank in silent if rank not in words and rank not in ended and not self._is_stopped(rank)]
        except RuntimeError:
            pass  # the store went with the rank that served it: nobody's word is to be had

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


def diagnosis(error: BaseException, rank: int, step: int, last_stage: str, peers: Peers) -> str:
    """The error of a training step on one line, with all that this rank knows where communication failed."""
    text = " ".join(str(error).split())
    if isinstance(error, CollectiveError):
        place = f"rank {rank}, step {step}"
    else:
        collective = _collective_of(error)
        if collective is None:
            return f"rank {rank}, step {step}: {error}"
        place = f"rank {rank}, step {step}: outside the layers' collectives, in {collective}"
    last = f"last completed on this rank: {last_stage}"
    return f"{place}: {text}; {last}; {peers.report(f'{place}; {last}')}"


def _collective_of(error: BaseException) -> str | None:
    """The function of torch.distributed that raised, with the bytes of its largest tensor; None if none did.

    Example: `all_reduce of 64 B`.
    """
    frames = [frame for frame, _ in traceback.walk_tb(error.__traceback__) if _is_of_torch(frame)]
    if not frames:
        return None
    # Of functions that wrap each other the innermost with a tensor names the collective.
    sizes = [(frame.f_code.co_name, _largest_bytes(frame)) for frame in frames]
    name, nbytes = next((pair for pair in reversed(sizes) if pair[1]), sizes[-1])
    return f"{name} of {nbytes} B" if nbytes else name


def _is_of_torch(frame: FrameType) -> bool:
    return frame.f_code.co_filename.startswith(_TORCH_DISTRIBUTED)


def _largest_bytes(frame: FrameType) -> int:
    return max((value.nbytes for value in frame.f_locals.values() if isinstance(value, Tensor)), default=0)


def _machine() -> list[str | int]:
    """What processes share that can watch each other; empty on systems that do not say."""
    try:
        return [Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip(), os.stat("/proc/self/ns/pid").st_ino]
    except OSError:
        return []
