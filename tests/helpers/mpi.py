"""Ranks that mpirun started: the same pools as in ranks.py, for tests of what needs an MPI job. Also the program of one rank."""

import multiprocessing
import os
import socket
import subprocess
import sys
from collections.abc import Callable, Collection, Sequence
from contextlib import suppress
from multiprocessing.connection import Client, Connection
from pathlib import Path
from typing import Any

import pytest

from moesaic.collectives.lifetime import start
from moesaic.collectives.transports.mpi import MPIRUN_ENVIRONMENT, NO_MPI, find_mpirun
from tests.helpers.ranks import LIMIT_S, RankPool, run_ranks, serve_rank

ROOT = Path(__file__).resolve().parents[2]


def mpirun(world_size: int) -> list[str]:
    """The words that start `world_size` ranks; the calling test is skipped where there is no MPI."""
    program = find_mpirun()
    if program is None:
        pytest.skip(NO_MPI)
    return [program, "-n", str(world_size)]


def mpi_environment() -> dict[str, str]:
    """This process's variables, and those that let Open MPI run as root and start more ranks than there are cores."""
    return os.environ | MPIRUN_ENVIRONMENT | {"OMP_NUM_THREADS": "1"}


def segments(of: Collection[int] = ()) -> set[Path]:
    """Open MPI's shared memory that has a name and that no process has mapped, apart from those with the process ids `of`.

    Other tests may run jobs at the same time.
    """
    names = {path for path in Path("/dev/shm").iterdir() if path.name.startswith("sm_segment")}
    for process in Path("/proc").glob("[0-9]*"):
        if int(process.name) not in of:
            with suppress(OSError):  # it has ended
                maps = (process / "maps").read_text(encoding="utf-8")
                names = {path for path in names if f"{path}\n" not in maps}
    return {path for path in names if path.exists()}


class MpiPool(RankPool):
    """`world_size` ranks of one MPI job, also in one Gloo process group."""

    def _start(self, prepare: Callable[[int], None] | None) -> None:
        assert prepare is None
        meeting = Path(self._folder.name) / "socket"
        with socket.socket(socket.AF_UNIX) as listener:
            listener.bind(str(meeting))
            listener.listen(self.world_size)
            listener.settimeout(LIMIT_S)
            # Tensors go through a pipe as handles, which only processes that share this key accept from each other.
            (Path(self._folder.name) / "key").write_bytes(multiprocessing.current_process().authkey)
            command = [*mpirun(self.world_size), sys.executable, "-m", "tests.helpers.mpi", self._folder.name]
            self._mpirun = start(command, env=mpi_environment(), cwd=ROOT)
            pipes: dict[int, Connection] = {}
            while len(pipes) < self.world_size:
                pipe = Connection(listener.accept()[0].detach())
                pipes[pipe.recv()] = pipe
        self._pipes = [pipes[rank] for rank in range(self.world_size)]

    def stop(self) -> None:
        for pipe in self._pipes:
            pipe.close()
        try:
            self._mpirun.wait(timeout=20)
        except subprocess.TimeoutExpired:
            self._mpirun.terminate()
            self._mpirun.wait()
        self._folder.cleanup()


def run_mpi_ranks(world_size: int, body: Callable[..., Any], *args: Any) -> list[Any]:
    """As `run_ranks`, on the ranks of one MPI job, which stays up between tests: each of its ranks imports torch itself."""
    return run_ranks(world_size, body, *args, kind=MpiPool)


def main(arguments: Sequence[str]) -> None:
    """One rank of a pool, by Open MPI's variables."""
    (folder,) = arguments
    rank, world_size = int(os.environ["OMPI_COMM_WORLD_RANK"]), int(os.environ["OMPI_COMM_WORLD_SIZE"])
    multiprocessing.current_process().authkey = Path(folder, "key").read_bytes()
    with Client(f"{folder}/socket", "AF_UNIX") as pipe:
        pipe.send(rank)
        serve_rank(pipe, rank, world_size, f"{folder}/store")


if __name__ == "__main__":
    main(sys.argv[1:])
