"""How ranks meet: a key-value store that all of them share, and in it a roll-call with a time limit of its own.

Ranks of a big job start minutes apart, while a wait between ranks that run is over in moments; so starting has a longer limit
than a collective has. Every rank signs in, and the last lets all of them go on. A rank that has waited for too long tells the
others, and all of them end; one prints the line that says who came and who did not.
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
from ..launcher import Place, first_host

_RUN, _CAME, _NUM_CAME, _RESULT = "moesaic/run", "moesaic/came", "moesaic/num_came", "moesaic/met"
# Between two looks whether all have come: from the first to the second, doubling.
_LOOK_S = (0.005, 0.2)
# How long the store is kept, for the others to read what came of the roll-call.
_LAST_WORDS_S = 1.0


def meet(place: Place, init_method: str, limit_s: float, env: Mapping[str, str]) -> dist.Store:
    """A key-value store that all ranks share, once all of them have come.

    Raises:
        ValueError: some did not within `limit_s`, or nobody has said how the ranks meet.
    """
    if place.world_size == 1:
        return dist.HashStore()
    try:
        store = _open_store(place, init_method, timedelta(seconds=limit_s), env)
        problem = _call_roll(place, store, limit_s, _run_of(place, env))
    except dist.DistError as error:
        raise RankError(
            f"rank {place.rank} of {place.world_size} lost, or did not find within {limit_s:g} s, the store in which the ranks "
            f"meet; rank 0 or the launcher serves it: see what they printed ({_first_line(error)})"
        ) from None
    if problem is not None:
        speaker, line = problem
        if place.rank in (0, speaker):
            time.sleep(_LAST_WORDS_S)
        if place.rank == speaker and init_method.startswith("file:"):
            Path(urlparse(init_method).path).unlink(missing_ok=True)
        raise (RankError if place.rank == speaker else RunError)(line)
    return store


def _run_of(place: Place, env: Mapping[str, str]) -> str:
    """What tells this run from others that may come to the same place; equal on all of its ranks."""
    is_step = place.launcher is not None and place.launcher.name == "srun"
    step = [env.get(name, "") for name in ("SLURM_JOB_ID", "SLURM_STEP_ID")] if is_step else []
    return " ".join([str(place.world_size), *step])


def _call_roll(place: Place, store: dist.Store, limit_s: float, run: str) -> tuple[int, str] | None:
    """Sign in and wait for the others of this run: None if all came, else the rank that is to print, and the line."""
    deadline_s, look_s = time.monotonic() + limit_s, _LOOK_S[0]
    if store.compare_set(_RUN, "", run) != run.encode() or store.check([f"{_CAME}/{place.rank}"]):
        raise RankError(
            f"rank {place.rank} of {place.world_size}: another run has come here before; give a new file in launch.init_method, "
            "or another MASTER_PORT, or end the other run"
        )
    store.set(f"{_CAME}/{place.rank}", "")
    if store.add(_NUM_CAME, 1) == place.world_size:
        store.compare_set(_RESULT, "", json.dumps(None))
    while not store.check([_RESULT]):
        if time.monotonic() > deadline_s:
            came = [rank for rank in range(place.world_size) if store.check([f"{_CAME}/{rank}"])]
            # The first to say anything is right for all: the last rank may come at this very moment.
            store.compare_set(_RESULT, "", json.dumps((came[0], _absence(came, place.world_size, limit_s))))
        time.sleep(look_s)
        look_s = min(2 * look_s, _LOOK_S[1])
    problem = json.loads(store.get(_RESULT))
    if problem is None:
        return None
    speaker, line = problem
    return speaker, line


def _absence(came: Sequence[int], world_size: int, limit_s: float) -> str:
    absent = sorted(set(range(world_size)) - set(came))
    return (
        f"{len(absent)} of {world_size} ranks did not come within {limit_s:g} s: {names(absent)}; came: {names(came)}; see what "
        "they printed, or give ranks that start further apart more time, --set launch.init_timeout_s=SECONDS"
    )


def names(ranks: Sequence[int]) -> str:
    """Ascending ranks as a short text. Example: 0, 1, 2, 5 are "ranks 0-2, 5"."""
    starts = [ranks[0], *(b for a, b in pairwise(ranks) if b != a + 1)]
    ends = [*(a for a, b in pairwise(ranks) if b != a + 1), ranks[-1]]
    parts = [f"{first}-{last}" if last > first else str(first) for first, last in zip(starts, ends, strict=True)]
    return f"rank{'s' if len(ranks) > 1 else ''} {', '.join(parts)}"


def _open_store(place: Place, init_method: str, limit: timedelta, env: Mapping[str, str]) -> dist.Store:
    """The store of `launch.init_method`, else that of torchrun, of MASTER_ADDR, of an MPI job or of a Slurm job."""
    has_address = "MASTER_ADDR" in env and "MASTER_PORT" in env
    if init_method == "env://" and has_address and env.get("TORCHELASTIC_USE_AGENT_STORE") != "True":
        port = env["MASTER_PORT"]
        if not port.isdecimal() or int(port) > 65535:
            raise ValueError(f"MASTER_PORT is {port!r}; give a number up to 65535")
        return _served_by_first(place, env["MASTER_ADDR"], int(port), limit)
    if init_method != "env://" and not (folder := Path(urlparse(init_method).path).parent).is_dir():
        raise ValueError(
            f"launch.init_method {init_method}: there is no folder {folder} on this machine; make it, or give another"
        )
    if init_method != "env://" or "MASTER_ADDR" in env:
        store, _, _ = next(dist.rendezvous(init_method, place.rank, place.world_size, timeout=limit))
        return store
    launcher = place.launcher
    if launcher is not None and launcher.is_mpi:
        return _open_over_mpi(place, limit)
    if launcher is not None and launcher.name == "srun" and "SLURM_JOB_ID" in env:
        host = first_host(env.get("SLURM_STEP_NODELIST") or env.get("SLURM_JOB_NODELIST") or "localhost")
        return _served_by_first(place, host, 20000 + int(env["SLURM_JOB_ID"]) % 20000, limit)
    raise ValueError(
        f"{place.world_size} ranks and no MASTER_ADDR: start with torchrun, mpirun or srun, set MASTER_ADDR and MASTER_PORT, "
        "or give --set launch.init_method=file:///PATH"
    )


def _open_over_mpi(place: Place, limit: timedelta) -> dist.Store:
    """An MPI job spreads the address of rank 0 itself."""
    job = MpiJob()
    job.check_world_size(place.world_size)
    # A machine on its own needs no name that others can find.
    host = "127.0.0.1" if place.local_world_size == place.world_size else socket.gethostname()
    # The others learn the port, which is any free one, only below.
    store = _served_by_first(place, host, 0, limit) if place.rank == 0 else None
    host, port = job.broadcast((host, store.port if store else 0), timeout_s=limit.total_seconds())
    return store or _served_by_first(place, host, port, limit)


def _served_by_first(place: Place, host: str, port: int, limit: timedelta) -> dist.TCPStore:
    """A store in rank 0's process. It waits for nobody: the roll-call does, and can tell who is missing."""
    try:
        return dist.TCPStore(host, port, place.world_size, is_master=place.rank == 0, timeout=limit, wait_for_workers=False)
    except dist.DistError as error:
        if place.rank != 0:
            raise
        raise RankError(
            f"rank 0 cannot serve the store in which the ranks meet at {host}:{port}; choose another MASTER_PORT "
            f"({_first_line(error)})"
        ) from None


def _first_line(error: Exception) -> str:
    return str(error).splitlines()[0].rstrip(".")
