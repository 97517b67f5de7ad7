"""Tests of each transport between two processes of this machine, for `moesaic doctor`. Also the program of both processes."""

from __future__ import annotations

import datetime
import json
import os
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist

from ...collectives import Buffer, CollectiveError, Transport, make_transports
from ...collectives.transports.mpi import MPIRUN_ENVIRONMENT, NO_MPI, find_mpirun
from .children import problem_of, run_children

_LIMIT_S = 120.0
_WITHOUT_MPI = ("c10d", "shm", "hierarchical")


@dataclass(frozen=True)
class TransportTest:
    """The result for one transport."""

    name: str
    status: str
    """works, or the reason for the failure."""
    works: bool


def two_process_tests() -> list[TransportTest]:
    """Test every transport for CPU tensors, MPI through its own launcher."""
    results = _try(list(_WITHOUT_MPI), [[], []])
    mpirun = find_mpirun()
    results |= {"mpi": NO_MPI} if mpirun is None else _try(["mpi"], [[mpirun, "-n", "2"]])
    names = {"c10d": "c10d gloo"}
    return [TransportTest(names.get(name, name), status, status == "works") for name, status in results.items()]


def _try(names: list[str], launchers: Sequence[list[str]]) -> dict[str, str]:
    """The statuses that rank 0 reports, by transport; each of `launchers` begins the command line of one process."""
    with tempfile.TemporaryDirectory() as folder:
        env = os.environ | MPIRUN_ENVIRONMENT | {"OMP_NUM_THREADS": "1"}
        program = [sys.executable, "-m", "moesaic.launch.doctor.self_test", folder, ",".join(names)]
        children = run_children(
            [[*launcher, *program] for launcher in launchers],
            [env | {"RANK": str(rank)} for rank in range(len(launchers))],
            limit_s=_LIMIT_S,
        )
        report = Path(folder) / "report.json"
        found: dict[str, str] = json.loads(report.read_text(encoding="utf-8")) if report.exists() else {}
        return {name: found.get(name, problem_of(children) or "nothing was reported") for name in names}


def _problem_of(transport: Transport) -> str:
    """Send a message each way and gather integers; empty if all values are right."""
    rank, peer = transport.rank, 1 - transport.rank
    received = torch.full((1000,), torch.nan)
    transport.exchange(
        [Buffer(torch.full((1000,), float(rank)), peer)], [Buffer(received, peer)], op="self-test", where="doctor"
    ).wait()
    gathered = transport.all_gather_ints(torch.tensor([rank, 7]))
    if not (received == peer).all() or gathered.tolist() != [[0, 7], [1, 7]]:
        return "received other values than were sent"
    return ""


def main(folder: Path, names: Sequence[str]) -> None:
    """Test the transports as one of the two processes; rank 0 writes the report."""
    rank = int(os.environ.get("OMPI_COMM_WORLD_RANK") or os.environ["RANK"])
    store = dist.FileStore(str(folder / "store"), 2)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=2, timeout=datetime.timedelta(seconds=_LIMIT_S / 2))
    group = dist.group.WORLD
    assert group is not None
    report = {}
    for name in names:
        try:
            (transport,) = make_transports(name, group, num_transports=1, timeout_s=_LIMIT_S / 4)
            report[name] = _problem_of(transport) or "works"
        except (ValueError, OSError, CollectiveError) as error:
            report[name] = " ".join(str(error).split())
    if rank == 0:
        (folder / "report.json").write_text(json.dumps(report), encoding="utf-8")
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2].split(","))
