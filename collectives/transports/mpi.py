"""The transport over MPI, through mpi4py: every rank of one `mpirun` (or `srun --mpi=pmix`), CPU tensors.

Tensors of any dtype travel as bytes. Each transport has a communicator of its own, on which MPI keeps the messages between two
ranks in order. MPI is started by the first `MpiJob` of a process and left at its end; mpi4py is imported only then.
"""

from __future__ import annotations

import atexit
import os
import shutil
import sys
import time
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

import numpy as np
import torch
from torch import Tensor

from ..messages import Buffer, CollectiveError, Pending
from ..progress import CommunicationThread
from ..tags import DIFFERENT_PLACES, SAME_ORDER, Tags
from ..traffic import Traffic
from ..transport import RowsAsMessages
from .parts import Part, progress

if TYPE_CHECKING:
    from mpi4py import MPI

T = TypeVar("T")

# MPI counts elements in 32 bits: larger messages go in pieces.
_PIECE_BYTES = 1 << 30
# A message moves only while its ranks call MPI. Waits yield the core between calls; after this long they also sleep.
_YIELD_S = 0.005
_SLEEP_S = 0.0002
# After a failure, how long other ranks have to print their errors before the job is aborted.
_LAST_WORDS_S = 2.0

NO_MPI = "mpi4py and mpirun are not installed: pip install 'moesaic[mpi]'"
MPIRUN_ENVIRONMENT = {
    "OMPI_ALLOW_RUN_AS_ROOT": "1",
    "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1",
    "PRTE_MCA_rmaps_default_mapping_policy": ":oversubscribe",
    "PRTE_MCA_hwloc_default_binding_policy": "none",
}
"""Lets Open MPI's mpirun start any number of ranks on one machine, for any user."""


def find_mpirun() -> str | None:
    """The mpirun beside this Python, else the one on PATH; None where there is none, or no mpi4py."""
    beside = Path(sys.executable).with_name("mpirun")
    found = str(beside) if beside.exists() else shutil.which("mpirun")
    return found if find_spec("mpi4py") else None


class MpiJob:
    """This process's part of an MPI job. The first one starts MPI, which waits for all ranks that its launcher has started.

    At the end of the process MPI is left in order; after an exception, or a wait that did not succeed, where leaving would hang,
    the whole job is ended with status 1 instead, stopped ranks included.

    Raises:
        ValueError: mpi4py is not installed, or finds no MPI library.
    """

    def __init__(self) -> None:
        try:
            import mpi4py

            # Leaving MPI waits for every rank. Whether that is safe is known only at the end.
            mpi4py.rc.finalize = False
            from mpi4py import MPI
        except (ImportError, RuntimeError) as error:
            raise ValueError(f"the transport mpi needs mpi4py and an MPI library ({error}): pip install 'moesaic[mpi]'") from None
        self.mpi = MPI
        self.unfinished: set[_Requests] = set()
        """Waited for, and not complete: MPI may still write into their buffers."""
        atexit.register(self._leave)
        if self.world_size == 1:  # a process without a launcher, which would clean up behind it
            _unlink_segments()

    @property
    def world_size(self) -> int:
        """Ranks that the MPI launcher started."""
        return self.mpi.COMM_WORLD.Get_size()

    def broadcast(self, value: T, *, timeout_s: float) -> T:
        """Rank 0's value, on every rank. Collective; `CollectiveError` where a rank does not come."""
        self._rendezvous("broadcast", self.mpi.COMM_WORLD.Get_rank(), timeout_s)
        return self.mpi.COMM_WORLD.bcast(value)

    def transport(self, rank: int, world_size: int, *, timeout_s: float) -> MpiTransport:
        """A transport over all ranks of the job, of which this one is to be `rank`. Collective.

        Raises:
            ValueError: the launcher started another number of ranks.
            CollectiveError: a rank does not come.
        """
        self.check_world_size(world_size)
        self._rendezvous("making a transport", rank, timeout_s)
        communicator = self.mpi.COMM_WORLD.Split(0, rank)
        assert isinstance(communicator, self.mpi.Intracomm)
        return MpiTransport(self, communicator, timeout_s=timeout_s)

    def check_world_size(self, world_size: int) -> None:
        """Raise `ValueError` unless the MPI launcher started as many ranks."""
        if self.world_size != world_size:
            raise ValueError(
                f"MPI has {self.world_size} rank(s), the process group has {world_size}: start all ranks with one mpirun -n "
                f"{world_size}, or choose another transport"
            )

    def _rendezvous(self, what: str, rank: int, timeout_s: float) -> None:
        """Return when every rank is here, within the limit: MPI has what comes next only without one."""
        here = np.zeros(self.world_size, np.uint8)
        request = self.mpi.COMM_WORLD.Iallgather(here[:1].copy(), here)
        _Requests(self, [request], [Part(here.nbytes, None, True)], f"rank {rank}: {what}", timeout_s).wait()
        _unlink_segments()

    def _leave(self) -> None:
        if self.mpi.Is_finalized():
            return
        # Python keeps the exception that ended the program; other ranks may not have seen it.
        if self.unfinished or hasattr(sys, "last_value"):
            sys.stdout.flush()
            sys.stderr.flush()
            time.sleep(_LAST_WORDS_S)
            self.mpi.COMM_WORLD.Abort(1)
        self.mpi.Finalize()


class _Requests:
    """MPI requests under way, and what each of them moves."""

    def __init__(
        self,
        job: MpiJob,
        requests: list[MPI.Request],
        parts: list[Part],
        what: str,
        timeout_s: float,
        tags: Tags | None = None,
        tag: int = 0,
    ):
        self._job = job
        self._requests = requests
        self._parts = parts
        self._what = what
        self._timeout_s = timeout_s
        self._tags, self._tag = tags, tag  # of messages
        self._error: CollectiveError | None = None

    def wait(self, *, until_sent: bool = True) -> None:
        if self._error is not None:
            raise self._error
        mpi = self._job.mpi
        statuses: list[MPI.Status] = []
        self._job.unfinished.add(self)
        start_s = time.monotonic()
        try:
            while not mpi.Request.Testall(self._requests, statuses):
                waited_s = time.monotonic() - start_s
                if waited_s > self._timeout_s:
                    so_far = progress(self._parts, self._missing())
                    raise self._failed(f"did not complete within {self._timeout_s:g} s ({so_far})")
                if waited_s < _YIELD_S:
                    os.sched_yield()
                else:
                    time.sleep(_SLEEP_S)
        except mpi.Exception as error:
            cut = [part for part, s in zip(self._parts, statuses, strict=False) if s.Get_error() == mpi.ERR_TRUNCATE]
            raise self._failed(", ".join([f"failed: MPI says {error}", *(f"more than {part}" for part in cut)])) from error
        for part, status in zip(self._parts, statuses, strict=True):
            # Of collectives, and of what was sent, MPI reports no size.
            if not part.is_incoming or status.Get_source() != part.peer:
                continue
            if self._tags is not None and status.Get_tag() != self._tag:
                sent = self._tags.named(status.Get_tag())
                raise self._failed(f"failed: rank {part.peer} sent {sent}; {DIFFERENT_PLACES}: {SAME_ORDER}")
            if status.Get_count(mpi.BYTE) != part.num_bytes:
                raise self._failed(f"failed: {status.Get_count(mpi.BYTE)} B instead of {part}; {DIFFERENT_PLACES}")
        self._job.unfinished.discard(self)
        self._requests, self._parts = [], []

    def _missing(self) -> list[Part]:
        return [part for part, request in zip(self._parts, self._requests, strict=True) if not request.Test()]

    def _failed(self, ending: str) -> CollectiveError:
        self._error = CollectiveError(f"{self._what} {ending}")
        return self._error


class MpiTransport(RowsAsMessages):
    """Messages of one MPI communicator. Made by `MpiJob.transport`."""

    name = "mpi"

    def __init__(self, job: MpiJob, communicator: MPI.Intracomm, *, timeout_s: float):
        self.job = job
        self.rank = communicator.Get_rank()
        self.world_size = communicator.Get_size()
        self.timeout_s = timeout_s
        self.traffic = Traffic(self.world_size)
        self.thread: CommunicationThread | None = None  # MPI may not be callable from several
        self._communicator = communicator
        largest = job.mpi.COMM_WORLD.Get_attr(job.mpi.TAG_UB)
        assert isinstance(largest, int)
        self._tags = Tags(largest)

    def exchange(self, sends: Sequence[Buffer], recvs: Sequence[Buffer], *, op: str, where: str = "") -> Pending:
        """Launch every message; see `Transport.exchange`."""
        requests: list[MPI.Request] = []
        parts, tag = [], self._tags.of(op, where)
        for buffer in recvs:
            for piece in _pieces(buffer.tensor):
                # Of any tag: the next message of that rank is the one that this is for, or a mistake to be seen.
                requests.append(self._communicator.Irecv(piece, buffer.peer))
                parts.append(Part(piece.nbytes, buffer.peer, True))
        for buffer in sends:
            if buffer.tensor.numel():
                self.traffic.add(op, buffer.peer, buffer.tensor.nbytes)
            for piece in _pieces(buffer.tensor):
                requests.append(self._communicator.Isend(piece, buffer.peer, tag))
                parts.append(Part(piece.nbytes, buffer.peer, False))
        return self._requests(requests, parts, op, where, tag)

    def all_gather_ints(self, values: Tensor, *, where: str = "") -> Tensor:
        """Gather int64 [n] from every rank: [R, n]."""
        gathered = torch.empty(self.world_size, values.numel(), dtype=torch.int64)
        request = self._communicator.Iallgather(values.contiguous().numpy(), gathered.numpy())
        self._requests([request], [Part(gathered.nbytes, None, True)], f"gather of {values.numel()} integers", where).wait()
        return gathered

    def _requests(self, requests: list[MPI.Request], parts: list[Part], op: str, where: str, tag: int = 0) -> _Requests:
        what = f"rank {self.rank}: {op}{where and ' at ' + where}"
        return _Requests(self.job, requests, parts, what, self.timeout_s, self._tags, tag)


def _pieces(tensor: Tensor) -> list[np.ndarray]:
    """The bytes of a contiguous CPU tensor, as views that MPI can count."""
    if not tensor.numel():
        return []
    whole = tensor.detach().view(-1).view(torch.uint8).numpy()
    return [whole[start : start + _PIECE_BYTES] for start in range(0, whole.size, _PIECE_BYTES)]


def _unlink_segments() -> None:
    """Take the names of Open MPI's shared memory away, once every rank has mapped it: no end of a rank can leave it behind."""
    maps = Path("/proc/self/maps")
    if maps.exists():
        paths = {line.split(maxsplit=5)[-1] for line in maps.read_text(encoding="utf-8").splitlines()}
        for path in paths:
            if path.startswith("/dev/shm/sm_segment.") and not path.endswith(" (deleted)"):
                Path(path).unlink(missing_ok=True)
