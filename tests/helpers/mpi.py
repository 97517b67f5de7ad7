"""Ranks that mpirun started: the same pools as in ranks.py, for tests of what needs an MPI job. Also the program of one rank."""

import multiprocessing
import os
import shutil
import socket
import subprocess
import sys
from collections.abc import Callable, Sequence
from multiprocessing.connection import Client, Connection
from pathlib import Path

import pytest

from moesaic.collectives.lifetime import start
from tests.helpers.ranks import LIMIT_S, RankPool, serve_rank

ROOT = Path(__file__).resolve().parents[2]


def mpirun(world_size: int) -> list[str]:
    """The words that start `world_size` ranks; the calling test is skipped where there is no MPI."""
    pytest.importorskip("mpi4py", reason="mpi4py is not installed: pip install 'moesaic[mpi]'", exc_type=ImportError)
    beside = Path(sys.executable).with_name("mpirun")
    program = str(beside) if beside.exists() else shutil.which("mpirun")
    if program is None:
        pytest.skip("mpirun is not installed: pip install 'moesaic[mpi]'")
    return [program, "-n", str(world_size)]


def mpi_environment() -> dict[str, str]:
    """This process's variables, and those that let Open MPI run as root and start more ranks than there are cores."""
    return os.environ | {
        "OMPI_ALLOW_RUN_AS_ROOT": "1",
        "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1",
        "PRTE_MCA_rmaps_default_mapping_policy": ":oversubscribe",
        "OMP_NUM_THREADS": "1",
    }


class MpiPool(RankPool):
    """`world_size` ranks of one MPI job, also in one Gloo process group; a context manager."""

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

    def __enter__(self) -> "MpiPool":
        return self

    def __exit__(self, *exc: object) -> None:
        self.stop()


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
