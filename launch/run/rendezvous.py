"""The rendezvous: a key-value store that all ranks share, ready once every rank has joined within a time limit.

Ranks of a big job may start minutes apart, while a collective of running ranks ends within moments; so the start has a longer
time limit than a collective. Every rank adds itself to the store, and the last one releases the others. A rank whose time limit
expires writes the result for all: every rank then ends, and one prints which ranks joined and which did not.
"""

import json
import socket
import time
from collections.abc import Mapping, Sequence
from datetime import timedelta
from itertools import pairwise
from pathlib import Path
from urllib.parse import urlparse

import torch.distributed as dist

from ...collectives.transports.mpi import MpiJob
from ..entry import RankError, RunError
from ..launcher import RankInfo, first_host

_RUN, _JOINED, _NUM_JOINED, _RESULT = "moesaic/run", "moesaic/joined", "moesaic/num_joined", "moesaic/result"
# The interval between two polls of the result doubles from the first to the second.
_POLL_S = (0.005, 0.2)
# The store stays open this long after a failed rendezvous, so that the other ranks can read the result.
_RESULT_KEPT_S = 1.0


def rendezvous(info: RankInfo, init_method: str, limit_s: float, env: Mapping[str, str]) -> dist.Store:
    """Return the store that all ranks share, once all of them have joined.

    Raises:
        ValueError: a rank did not join within `limit_s`, or neither `init_method` nor `env` says where the store is.
    """
    if info.world_size == 1:
        return dist.HashStore()
    try:
        store = _open_store(info, init_method, timedelta(seconds=limit_s), env)
        problem = _join(info, store, limit_s, _run_id(info, env))
    except dist.DistError as error:
        raise RankError(
            f"rank {info.rank} of {info.world_size} lost the rendezvous store, or did not reach it within {limit_s:g} s; "
            f"rank 0 or the launcher serves it: see what they printed ({_first_line(error)})"
        ) from None
    if problem is not None:
        printing_rank, line = problem
        if info.rank in (0, printing_rank):
            time.sleep(_RESULT_KEPT_S)
        if info.rank == printing_rank and init_method.startswith("file:"):
            Path(urlparse(init_method).path).unlink(missing_ok=True)
        raise (RankError if info.rank == printing_rank else RunError)(line)
    return store


def _run_id(info: RankInfo, env: Mapping[str, str]) -> str:
    """An id equal on all ranks of this run, different for other runs that may open the same store."""
    is_step = info.launcher is not None and info.launcher.name == "srun"
    step = [env.get(name, "") for name in ("SLURM_JOB_ID", "SLURM_STEP_ID")] if is_step else []
    return " ".join([str(info.world_size), *step])


def _join(info: RankInfo, store: dist.Store, limit_s: float, run_id: str) -> tuple[int, str] | None:
    """Join, and wait for the other ranks of this run. Return None if all joined, else the rank that prints, and the line."""
    deadline_s, poll_s = time.monotonic() + limit_s, _POLL_S[0]
    if store.compare_set(_RUN, "", run_id) != run_id.encode() or store.check([f"{_JOINED}/{info.rank}"]):
        raise RankError(
            f"rank {info.rank} of {info.world_size}: another run has used this rendezvous; give a new file in "
            "launch.init_method, or another MASTER_PORT, or end the other run"
        )
    store.set(f"{_JOINED}/{info.rank}", "")
    if store.add(_NUM_JOINED, 1) == info.world_size:
        store.compare_set(_RESULT, "", json.dumps(None))
    while not store.check([_RESULT]):
        if time.monotonic() > deadline_s:
            joined = [rank for rank in range(info.world_size) if store.check([f"{_JOINED}/{rank}"])]
            # The first result written counts for all ranks: the last rank may join at this very moment.
            store.compare_set(_RESULT, "", json.dumps((joined[0], _absence(joined, info.world_size, limit_s))))
        time.sleep(poll_s)
        poll_s = min(2 * poll_s, _POLL_S[1])
    problem = json.loads(store.get(_RESULT))
    if problem is None:
        return None
    printing_rank, line = problem
    return printing_rank, line


def _absence(joined: Sequence[int], world_size: int, limit_s: float) -> str:
    absent = sorted(set(range(world_size)) - set(joined))
    return (
        f"{len(absent)} of {world_size} ranks did not join within {limit_s:g} s: {names(absent)}; joined: {names(joined)}; see "
        "what they printed, or give ranks that start further apart more time, --set launch.init_timeout_s=SECONDS"
    )


def names(ranks: Sequence[int]) -> str:
    """Ascending ranks as a short text. Example: 0, 1, 2, 5 gives "ranks 0-2, 5"."""
    starts = [ranks[0], *(b for a, b in pairwise(ranks) if b != a + 1)]
    ends = [*(a for a, b in pairwise(ranks) if b != a + 1), ranks[-1]]
    parts = [f"{first}-{last}" if last > first else str(first) for first, last in zip(starts, ends, strict=True)]
    return f"rank{'s' if len(ranks) > 1 else ''} {', '.join(parts)}"


def _open_store(info: RankInfo, init_method: str, limit: timedelta, env: Mapping[str, str]) -> dist.Store:
    """The store of `launch.init_method`, else that of torchrun, of MASTER_ADDR, of an MPI job or of a Slurm job."""
    has_address = "MASTER_ADDR" in env and "MASTER_PORT" in env
    if init_method == "env://" and has_address and env.get("TORCHELASTIC_USE_AGENT_STORE") != "True":
        port = env["MASTER_PORT"]
        if not port.isdecimal() or int(port) > 65535:
            raise ValueError(f"MASTER_PORT is {port!r}; give a number up to 65535")
        return _served_by_first(info, env["MASTER_ADDR"], int(port), limit)
    if init_method != "env://" and not (folder := Path(urlparse(init_method).path).parent).is_dir():
        raise ValueError(
            f"launch.init_method {init_method}: there is no folder {folder} on this machine; make it, or give another"
        )
    if init_method != "env://" or "MASTER_ADDR" in env:
        store, _, _ = next(dist.rendezvous(init_method, info.rank, info.world_size, timeout=limit))
        return store
    launcher = info.launcher
    if launcher is not None and launcher.is_mpi:
        return _open_over_mpi(info, limit)
    if launcher is not None and launcher.name == "srun" and "SLURM_JOB_ID" in env:
        host = first_host(env.get("SLURM_STEP_NODELIST") or env.get("SLURM_JOB_NODELIST") or "localhost")
        return _served_by_first(info, host, 20000 + int(env["SLURM_JOB_ID"]) % 20000, limit)
    raise ValueError(
        f"{info.world_size} ranks and no MASTER_ADDR: start with torchrun, mpirun or srun, set MASTER_ADDR and MASTER_PORT, "
        "or give --set launch.init_method=file:///PATH"
    )


def _open_over_mpi(info: RankInfo, limit: timedelta) -> dist.Store:
    """The store of an MPI job, which broadcasts the address of rank 0 itself."""
    job = MpiJob()
    job.check_world_size(info.world_size)
    # Ranks of one machine need no name that other machines can resolve.
    host = "127.0.0.1" if info.local_world_size == info.world_size else socket.gethostname()
    # Rank 0 takes any free port; the others receive it with the broadcast below.
    store = _served_by_first(info, host, 0, limit) if info.rank == 0 else None
    host, port = job.broadcast((host, store.port if store else 0), timeout_s=limit.total_seconds())
    return store or _served_by_first(info, host, port, limit)


def _served_by_first(info: RankInfo, host: str, port: int, limit: timedelta) -> dist.TCPStore:
    """A store in rank 0's process. It waits for no other rank: `_join` does, and can name the ranks that are missing."""
    try:
        return dist.TCPStore(host, port, info.world_size, is_master=info.rank == 0, timeout=limit, wait_for_workers=False)
    except dist.DistError as error:
        if info.rank != 0:
            raise
        raise RankError(
            f"rank 0 cannot serve the rendezvous store at {host}:{port}; choose another MASTER_PORT ({_first_line(error)})"
        ) from None


def _first_line(error: Exception) -> str:
    return str(error).splitlines()[0].rstrip(".")
