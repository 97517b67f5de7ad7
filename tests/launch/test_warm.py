"""Compiling ahead: a run's routines are there before its first step, and `moesaic doctor --warm` makes those of all runs."""

import json
import multiprocessing
import os
import random
from collections.abc import Iterator, Sequence
from multiprocessing.connection import Connection
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner

from moesaic.collectives.lifetime import end_with_parent
from moesaic.jit import compile_seconds
from moesaic.launch import train
from moesaic.launch.doctor import command as doctor
from moesaic.launch.entry import run_command
from moesaic.launch.run import warm
from tests.launch.ranks import LIMIT_S, _variables, metrics_of, set_options, tiny_values


def train_watched(rank: int, world_size: int, args: Sequence[str], folder: Path) -> None:
    """One rank of a training run, which notes the seconds of compiling and loading when it is warm, and at the end."""
    end_with_parent()
    os.environ.update(_variables(rank, world_size))
    seconds, warm_run = [], train.warm_run

    def watched(*of_run: object) -> None:
        warm_run(*of_run)
        seconds.append(compile_seconds())

    train.warm_run = watched
    status = run_command(train.command, args)
    seconds.append(compile_seconds())
    (folder / f"seconds-{rank}").write_text(json.dumps([status, *seconds]))


def fork_ranks(pipe: Connection) -> None:
    """Fork two ranks for each run that the pipe asks for, and answer when they have ended."""
    end_with_parent()
    import torch._dynamo  # noqa: F401  # FSDP2 imports it when it is first used

    while True:
        args, folder = pipe.recv()
        pids = []
        for rank in range(2):
            if not (pid := os.fork()):
                train_watched(rank, 2, args, folder)
                os._exit(0)
            pids.append(pid)
        for pid in pids:
            os.waitpid(pid, 0)
        pipe.send(True)


@pytest.fixture(scope="module")
def launcher() -> Iterator[Connection]:
    """The pipe to a process that has imported what a run takes, but loaded no routine as the one of all other ranks has."""
    starting = multiprocessing.get_context("spawn")
    ours, theirs = starting.Pipe()
    process = starting.Process(target=fork_ranks, args=(theirs,), daemon=True)
    process.start()
    yield ours
    process.kill()
    process.join()


@pytest.mark.parametrize(
    "values",
    [
        (),
        (
            *("runtime.policy=balance", "runtime.compute_dtype=bf16", "runtime.debug.calibrate=always", "router.score=sigmoid"),
            *("runtime.debug.schedule=relay", "runtime.materialize=rematerialize", "train.micro_batches=3"),
        ),
    ],
    ids=["default", "other routines"],
)
def test_nothing_is_compiled_or_loaded_in_a_step(launcher: Connection, tmp_path: Path, values: Sequence[str]) -> None:
    """Nor in evaluations: all of that comes before the first step, on every rank, and the first record says how long it took."""
    (tmp_path / "text.txt").write_text("".join(random.Random(0).choices(["router ", "expert ", "slot "], k=3000)))
    args = set_options([*tiny_values(tmp_path), "train.steps=5", *values, f"launch.init_method=file://{tmp_path}/rendezvous"])
    launcher.send((args, tmp_path))
    assert launcher.poll(LIMIT_S) and launcher.recv()
    seconds = []
    for rank in range(2):
        status, when_warm_s, at_end_s = json.loads((tmp_path / f"seconds-{rank}").read_text())
        assert status == 0
        assert at_end_s == when_warm_s
        seconds.append(at_end_s)
    _, first, *others = metrics_of(tmp_path / "runs" / "demo")
    assert first["compile_s"] == seconds[0] > 0
    assert [row["compile_s"] for row in others] == [0.0] * 4


def test_warming_leaves_random_numbers_as_they_are() -> None:
    torch.manual_seed(7)
    expected = torch.randn(3)
    torch.manual_seed(7)
    warm.warm_kernels([torch.float32])
    assert torch.equal(torch.randn(3), expected)


def test_doctor_warms_what_runs_use(monkeypatch: pytest.MonkeyPatch) -> None:
    """After `moesaic doctor --warm` no configuration of a run has anything left to compile or to load."""
    done = CliRunner().invoke(doctor.command, ["--warm"])
    assert done.output.startswith("every routine is compiled; that took ")
    warm_s = compile_seconds()
    for dtype in (torch.float32, torch.bfloat16):
        warm.warm_kernels([dtype])
    for solver in warm.SOLVERS.values():
        warm.warm_planning([solver])
    assert compile_seconds() == warm_s


def test_warm_stands_alone() -> None:
    done = CliRunner().invoke(doctor.command, ["--warm", "--model", "mine.py:make"])
    assert isinstance(done.exception, ValueError)
    assert str(done.exception) == "--warm stands alone; leave out --model, --machine, --families and --json"
