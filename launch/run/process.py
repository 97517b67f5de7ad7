"""One process of a run: rank, device, process group, agreement between ranks, and stop signals.

Rank and world size come from the variables of torchrun, an MPI launcher or Slurm (launcher.py); without them the process group
has one rank and opens no port.
"""

import ctypes
import datetime
import os
import platform
import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import zip_longest
from types import FrameType
from typing import Any, TypeVar, cast

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from ...collectives.lifetime import end_with_parent
from ..config import LaunchConfig
from ..entry import RunError
from ..launcher import TORCHRUN, RankInfo, read_rank_info
from .rendezvous import rendezvous

T = TypeVar("T")

# mallopt parameters of glibc's malloc.h.
_M_TRIM_THRESHOLD = -1
_M_MMAP_THRESHOLD = -3

# Terminal and launcher may both deliver one Ctrl-C: a second signal within this time counts as the same one.
_ECHO_S = 0.5


@dataclass(frozen=True)
class Process(RankInfo):
    """This process: its rank in the run, and its device."""

    device: torch.device

    @property
    def is_first(self) -> bool:
        """Whether this is rank 0, the only rank that prints and writes."""
        return self.rank == 0


def find_process(config: LaunchConfig, env: Mapping[str, str]) -> Process:
    """Read rank and world size from `env` and choose the device. Raises `ValueError` if either is wrong."""
    info = read_rank_info(env)
    device = _choose_device(config.device, info, env)
    return Process(**vars(info), device=device)


def stop_with_launcher(process: Process, env: Mapping[str, str]) -> None:
    """Let the kernel send this rank SIGTERM when its launcher ends, even by SIGKILL.

    Where RANK and WORLD_SIZE come from a shell instead, its background processes may outlive it.
    """
    by_hand = process.launcher is TORCHRUN and "TORCHELASTIC_RUN_ID" not in env
    if process.launcher is not None and not by_hand:
        end_with_parent(signum=signal.SIGTERM)


def _choose_device(wanted: str, info: RankInfo, env: Mapping[str, str]) -> torch.device:
    if wanted == "cpu" or (wanted == "auto" and not torch.cuda.is_available()):
        return torch.device("cpu")
    num_devices, launcher = torch.cuda.device_count(), info.launcher
    if info.local_world_size > num_devices:
        cure = "start at most one rank per device"
        if launcher is not None and launcher.local_rank not in env:
            cure = f"where they are on several, set {launcher.local_rank} and {launcher.local_world_size}; otherwise {cure}"
        raise ValueError(
            f"{info.local_world_size} rank(s) on this machine, {num_devices} CUDA device(s) that torch sees: "
            f"{cure}, or give --set launch.device=cpu"
        )
    return torch.device("cuda", info.local_rank)


@contextmanager
def process_group(process: Process, config: LaunchConfig, *, timeout_s: float) -> Iterator[DeviceMesh]:
    """A process group over all ranks, as a mesh: (ranks), or with replicas (replicate, shard); destroyed at the end.

    All ranks must join within `launch.init_timeout_s`; `timeout_s` limits the group's collectives.
    A `ValueError` of the body is raised on all ranks, and becomes a `RunError`. After any other exception the group is not
    destroyed: waiting for ranks that may be stuck would hide the error.
    """
    on_cuda = process.device.type == "cuda"
    if on_cuda:
        torch.cuda.set_device(process.device)
    backend, timeout = "nccl" if on_cuda else "gloo", datetime.timedelta(seconds=timeout_s)
    store = rendezvous(process, config.init_method, config.init_timeout_s, os.environ)
    store.set_timeout(timeout)
    dist.init_process_group(backend, store=store, rank=process.rank, world_size=process.world_size, timeout=timeout)
    try:
        degree = config.data_parallel_replicate_degree
        shape = (process.world_size,) if degree == 1 else (degree, process.world_size // degree)
        names = ("ranks",) if degree == 1 else ("replicate", "shard")
        yield init_device_mesh(process.device.type, shape, mesh_dim_names=names)
    except ValueError as error:
        dist.destroy_process_group()
        raise RunError(*error.args) from error
    # The rank that serves the key-value store must not end while others still use it.
    dist.barrier()
    dist.destroy_process_group()


def agreed(process: Process, action: Callable[[], T]) -> T:
    """Run `action` on this rank; return its result if it succeeded on every rank, else raise the same `ValueError` on all.

    For errors that may occur on some ranks only, such as a text that is missing on one machine. Collective; `action` must not
    communicate.
    """
    result, problem = None, ""
    try:
        result = action()
    except (ValueError, OSError) as error:
        problem = str(error)
    problems = gather(process, problem)
    ranks = [rank for rank, text in enumerate(problems) if text]
    if ranks:
        where = "" if len(ranks) == process.world_size else f" (rank {', '.join(map(str, ranks))} of {process.world_size})"
        raise ValueError(problems[ranks[0]] + where)
    return cast(T, result)


def check_same(process: Process, values: Mapping[str, str]) -> None:
    """Raise `ValueError`, the same on every rank, unless each value, named by its key, is equal on all ranks. Collective."""
    per_rank = gather(process, values)
    for rank, theirs in enumerate(per_rank):
        for what, first in per_rank[0].items():
            if theirs[what] != first:
                lines = zip_longest(first.splitlines(), theirs[what].splitlines(), fillvalue="nothing")
                here, there = next((a, b) for a, b in lines if a != b)
                raise ValueError(f"{what} differs between ranks: {here} on rank 0, {there} on rank {rank}")


def from_first(process: Process, value: T) -> T:
    """The value of rank 0, on every rank. Collective."""
    return gather(process, value)[0]


def gather(process: Process, value: T) -> list[T]:
    """The values of all ranks, in rank order. Collective."""
    values: list[Any] = [None] * process.world_size
    dist.all_gather_object(values, value)
    return values


def set_threads(process: Process, config: LaunchConfig, env: Mapping[str, str]) -> int:
    """Set and return the CPU threads of this rank.

    torchrun sets OMP_NUM_THREADS to 1 where the user did not; that 1 counts as unset, so `launch.num_threads = 1` is the
    way to ask for one thread under torchrun.
    """
    by_torchrun = "TORCHELASTIC_RUN_ID" in env and env.get("OMP_NUM_THREADS") == "1" and process.local_world_size > 1
    if config.num_threads:
        torch.set_num_threads(config.num_threads)
    elif "OMP_NUM_THREADS" not in env or by_torchrun:
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        torch.set_num_threads(max(1, cores // process.local_world_size))
    return torch.get_num_threads()


def reuse_memory(process: Process, config: LaunchConfig) -> bool:
    """Let glibc's malloc keep freed blocks of up to 1 GiB for the next step; return whether that was done.

    By default each block above 32 MiB is a mapping of its own: the kernel zeroes its pages at every allocation, which
    doubles to triples the time of an elementwise operation on such a tensor. Below 32 MiB malloc adapts by itself.
    """
    if not config.reuse_memory or process.device.type != "cpu" or platform.libc_ver()[0] != "glibc":
        return False
    libc = ctypes.CDLL(None)
    return bool(libc.mallopt(_M_MMAP_THRESHOLD, 1 << 30) and libc.mallopt(_M_TRIM_THRESHOLD, (1 << 31) - 1))


class StopSignal:
    """A signal as a request to stop at the next step boundary, while the `with` block runs.

    The signals are Ctrl-C, a launcher's SIGTERM, SIGHUP of a lost terminal (unless ignored, as under nohup), and SIGUSR1, Slurm's
    warning before a job ends. `signum` is the first signal received, or 0. A second one ends the process at once, even where the
    main thread waits inside a collective: Python writes every signal's number to a pipe, and a thread here reads it.
    """

    signals = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1)

    def __init__(self) -> None:
        self.signum = 0
        self._received_s = 0.0

    def __enter__(self) -> "StopSignal":
        self._read_fd, self._write_fd = os.pipe()
        os.set_blocking(self._write_fd, False)
        handled = [n for n in self.signals if n != signal.SIGHUP or signal.getsignal(n) is not signal.SIG_IGN]
        self._old_handlers = {number: signal.signal(number, _ignore) for number in handled}
        self._old_wakeup_fd = signal.set_wakeup_fd(self._write_fd)
        self._watcher = threading.Thread(target=self._watch, daemon=True)
        self._watcher.start()
        return self

    def __exit__(self, *exc: object) -> None:
        signal.set_wakeup_fd(self._old_wakeup_fd)
        for number, handler in self._old_handlers.items():
            signal.signal(number, handler)
        os.close(self._write_fd)
        self._watcher.join()
        os.close(self._read_fd)

    def _watch(self) -> None:
        while received := os.read(self._read_fd, 1):
            signum, now_s = received[0], time.monotonic()
            if signum not in self.signals:
                continue
            if not self.signum:
                self.signum, self._received_s = signum, now_s
            elif now_s - self._received_s > _ECHO_S:
                os._exit(128 + signum)


def _ignore(signum: int, frame: FrameType | None) -> None:
    """Do nothing: Python writes the wake-up pipe only for signals with a handler, and the watching thread does the rest."""
