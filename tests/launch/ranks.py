"""Ranks as real processes of the training program: started with RANK and WORLD_SIZE, with a rendezvous in a file."""

import atexit
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from multiprocessing.process import BaseProcess
from pathlib import Path

from moesaic.benchmarks.network import Node
from moesaic.collectives.lifetime import end_with_parent
from tests.helpers.ranks import forking

LIMIT_S = 120.0

TINY = (
    "model.dim=16",
    "model.num_layers=2",
    "model.num_heads=2",
    "model.ffn_dim=16",
    "model.num_experts=4",
    "data.seq_len=16",
    "train.batch_size=12",
    "train.eval_batches=1",
    "optim.warmup_steps=2",
    "runtime.timeout_s=60",
    "launch.num_threads=1",
    "launch.device=cpu",
    "launch.progress=false",
)


@dataclass(frozen=True)
class Ended:
    """A rank that has ended."""

    status: int
    stdout: str
    stderr: str


def set_options(values: Sequence[str]) -> list[str]:
    return [part for value in values for part in ("--set", value)]


class Rank:
    """One process of the training program, with what it prints in files.

    It is forked from a process that has imported the program already, which saves most of the seconds that a rank takes to start.
    `node`: the emulated node that it runs on.
    """

    def __init__(
        self,
        args: Sequence[str],
        environment: Mapping[str, str],
        cwd: Path,
        stdout: Path,
        stderr: Path,
        node: Node | None = None,
    ):
        self.stdout, self.stderr = stdout, stderr
        for path in (stdout, stderr):
            path.write_text("")
        of_rank = (list(args), dict(environment), cwd, stdout, stderr, node)
        self._process = forking().Process(target=_train, args=of_rank, daemon=True)
        self._process.start()

    @property
    def pid(self) -> int:
        assert self._process.pid is not None
        return self._process.pid

    def poll(self) -> int | None:
        return self._process.exitcode

    def wait(self, timeout: float | None = None) -> int:
        self._process.join(timeout)
        if self._process.exitcode is None:
            raise subprocess.TimeoutExpired("a rank", timeout or 0.0)
        return self._process.exitcode

    def send_signal(self, signum: int) -> None:
        os.kill(self.pid, signum)

    def kill(self) -> None:
        self._process.kill()


def _train(args: list[str], environment: dict[str, str], cwd: Path, stdout: Path, stderr: Path, node: Node | None = None) -> None:
    """What `python -m moesaic.launch.train` does, from its arguments to its exit status."""
    end_with_parent()
    for path, number in ((stdout, 1), (stderr, 2)):
        file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(file, number)
        os.close(file)
    os.environ.clear()
    os.environ.update(environment)
    if node is not None:
        node.enter()
    signal.signal(signal.SIGHUP, signal.SIG_DFL)  # which tests under nohup would have ignored
    os.chdir(cwd)
    from moesaic.launch import entry
    from moesaic.launch.train import command

    entry._SILENT_S = 0.0  # no launcher ends the others here
    try:
        sys.exit(entry.run_command(command, args))
    finally:
        atexit._run_exitfuncs()  # which multiprocessing leaves out


def start_launcher(world_size: int, args: Sequence[str], folder: Path) -> BaseProcess:
    """Start the training program on every rank, all of them children of one process, as torchrun has them."""
    launcher = forking().Process(target=_launch, args=(world_size, list(args), folder), daemon=True)
    launcher.start()
    return launcher


def _launch(world_size: int, args: list[str], folder: Path) -> None:
    end_with_parent()
    args += ["--set", f"launch.init_method=file://{folder}/rendezvous"]
    for rank in range(world_size):
        if os.fork() == 0:
            environment = os.environ | _variables(rank, world_size) | {"TORCHELASTIC_RUN_ID": "none"}
            _train(args, environment, folder, folder / f"stdout-{rank}", folder / f"stderr-{rank}")
    os.wait()


def _variables(rank: int, world_size: int) -> dict[str, str]:
    ranks = {"RANK": str(rank), "WORLD_SIZE": str(world_size), "LOCAL_RANK": str(rank), "LOCAL_WORLD_SIZE": str(world_size)}
    return ranks | {"OMP_NUM_THREADS": "1"}


def start_ranks(
    world_size: int,
    args: Sequence[str],
    folder: Path,
    rank_folders: Sequence[Path] = (),
    starts_s: Sequence[float | None] = (),
) -> list[Rank]:
    """Start the training program on every rank.

    `rank_folders` are working folders, one per rank. `starts_s`: how many seconds each starts after the first has opened the
    rendezvous, not descending; 0: at once, None: never.
    """
    now = time.monotonic_ns()
    rendezvous = folder / f"rendezvous-{now}"
    processes = []
    for rank in range(world_size):
        if starts_s:
            start_s = starts_s[rank]
            if start_s is None:
                continue
            if start_s:
                while not rendezvous.exists():
                    assert time.monotonic() < now * 1e-9 + LIMIT_S, "no rank opened the rendezvous"
                    time.sleep(0.02)
                time.sleep(start_s)
        processes.append(
            Rank(
                [*args, "--set", f"launch.init_method=file://{rendezvous}"],
                os.environ | _variables(rank, world_size),
                rank_folders[rank] if rank_folders else folder,
                folder / f"stdout-{now}-{rank}",
                folder / f"stderr-{now}-{rank}",
            )
        )
    return processes


def wait_for(processes: Sequence[Rank]) -> list[Ended]:
    """Wait for every rank; a rank that hangs fails the test and leaves no process behind."""
    try:
        statuses = [process.wait(timeout=LIMIT_S) for process in processes]
    finally:
        for process in processes:
            process.kill()
    return [
        Ended(status, process.stdout.read_text(encoding="utf-8"), process.stderr.read_text(encoding="utf-8"))
        for status, process in zip(statuses, processes, strict=True)
    ]


def train_tiny(world_size: int, values: Sequence[str], folder: Path) -> list[Ended]:
    """Train the tiny model on the text in `folder`/text.txt to the end, and check that every rank ended well."""
    ended = wait_for(start_ranks(world_size, set_options([*tiny_values(folder), *values]), folder))
    for rank, end in enumerate(ended):
        assert end.status == 0, f"rank {rank}: {end.stderr}"
    return ended


def tiny_values(folder: Path) -> list[str]:
    return [*TINY, f"data.path={folder}/text.txt", f"data.cache_folder={folder}/cache", f"run.folder={folder}/runs"]


def metrics_of(run: Path) -> list[dict[str, float]]:
    """The lines of metrics.jsonl."""
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
