"""The training program as it runs: real processes, a tiny model on a small text."""

import errno
import json
import signal
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from moesaic.launch.config import OptimConfig, load_config
from moesaic.launch.entry import run_command
from moesaic.launch.train import build_optimizer, command, learning_rate
from moesaic.placement import Trace
from tests.launch.ranks import LIMIT_S, metrics_of, set_options, start_launcher, start_ranks, tiny_values, train_tiny, wait_for


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder with a text that a model can learn something from."""
    words = np.random.default_rng(0).choice(["router ", "expert ", "slot ", "bank ", "owner\n"], size=3000)
    (tmp_path / "text.txt").write_text("".join(words))
    return tmp_path


def losses_of(run: Path) -> list[float]:
    return [row["loss"] for row in metrics_of(run) if "loss" in row]


def test_a_run_from_start_to_end(folder: Path) -> None:
    """Two ranks learn, leave every file behind, do the same again bitwise; one rank goes on from their checkpoint."""
    values = ["train.steps=8", "checkpoint.every=4", "train.eval_every=4", "train.micro_batches=3", "optim.lr=0.01"]
    first, second = train_tiny(2, values, folder)
    run = folder / "runs" / "demo"
    assert f"files in {run}" in first.stdout
    assert "validation loss" in first.stdout
    assert second.stdout == ""
    assert second.stderr == ""
    rows = metrics_of(run)
    assert [row["step"] for row in rows] == list(range(9))
    assert [row["step"] for row in rows if "val_loss" in row] == [0, 4, 8]
    assert rows[8]["val_loss"] < rows[0]["val_loss"] - 0.3
    assert {"lr", "grad_norm", "tokens_per_s", "bytes_sent", "max_over_mean", "copies_per_layer", "exposed_gather_s"} <= rows[
        1
    ].keys()
    trace = Trace(run / "trace.npz")
    assert (trace.num_steps, trace.meta.num_ranks) == (8, 2)
    for loads_LRE in trace.steps():
        assert (loads_LRE.sum(axis=(1, 2)) == 12 * 16 * 2).all()
    assert sorted(path.name for path in (run / "checkpoints").iterdir()) == ["step-000004", "step-000008"]
    assert load_config(run / "config.toml").train.steps == 8

    train_tiny(2, values, folder)
    assert losses_of(folder / "runs" / "demo-2") == losses_of(run)

    train_tiny(1, [*values, f"checkpoint.resume={run}/checkpoints/step-000004", "run.profile_steps=2"], folder)
    profile = json.loads((folder / "runs" / "demo-3" / "profile-rank-0.json").read_text())
    assert sum(event["name"] == "moesaic::experts(blocks.0.moe)" for event in profile["traceEvents"]) >= 2 * 3 * 2
    resumed = metrics_of(folder / "runs" / "demo-3")
    assert [row["step"] for row in resumed] == [4, 5, 6, 7, 8]
    np.testing.assert_allclose(losses_of(folder / "runs" / "demo-3"), losses_of(run)[4:], rtol=1e-4)
    assert resumed[0]["val_loss"] == pytest.approx(rows[4]["val_loss"], rel=1e-4)


def wait_for_steps(run: Path, num_steps: int, is_alive: Callable[[], bool]) -> None:
    deadline_s = time.monotonic() + LIMIT_S
    while not (run / "metrics.jsonl").exists() or (run / "metrics.jsonl").read_text().count("\n") < num_steps:
        assert time.monotonic() < deadline_s
        assert is_alive()
        time.sleep(0.05)


def check_stopped(run: Path, stdout: str, signum: signal.Signals) -> None:
    """Metrics, trace and a last checkpoint are whole and agree."""
    rows = metrics_of(run)
    last = int(rows[-1]["step"])
    assert f"stopped by {signum.name} after step {last}" in stdout
    assert "val_loss" in rows[-1]
    assert Trace(run / "trace.npz").num_steps == last
    assert (run / "checkpoints" / f"step-{last:06d}" / "progress.json").exists()


ENDLESS = ("train.steps=1000000", "train.eval_every=0", "checkpoint.every=1000000")


@pytest.mark.parametrize("signum, told", [(signal.SIGINT, 1), (signal.SIGHUP, 0)])
def test_a_signal_to_one_rank_ends_all_at_a_step(folder: Path, signum: signal.Signals, told: int) -> None:
    """Every rank ends with 128 + the signal."""
    processes = start_ranks(2, set_options([*tiny_values(folder), *ENDLESS]), folder)
    wait_for_steps(folder / "runs" / "demo", 4, lambda: all(process.poll() is None for process in processes))
    processes[told].send_signal(signum)
    ended = wait_for(processes)
    assert [end.status for end in ended] == [128 + signum] * 2, ended
    assert [end.stderr for end in ended] == ["", ""]
    check_stopped(folder / "runs" / "demo", ended[0].stdout, signum)


def test_a_launcher_that_is_killed_ends_its_ranks_at_a_step(folder: Path) -> None:
    launcher = start_launcher(2, set_options([*tiny_values(folder), *ENDLESS]), folder)
    wait_for_steps(folder / "runs" / "demo", 4, launcher.is_alive)
    launcher.kill()
    deadline_s = time.monotonic() + LIMIT_S
    while "stopped by" not in (folder / "stdout-0").read_text():
        assert time.monotonic() < deadline_s, (folder / "stderr-0").read_text()
        time.sleep(0.05)
    check_stopped(folder / "runs" / "demo", (folder / "stdout-0").read_text(), signal.SIGTERM)


def test_replicas_train_as_one_group(folder: Path) -> None:
    """Four ranks as 2 x 2, trained by Muon: the same curve as one group of four, and a trace of the first replica."""
    values = ["optim.name=muon", "train.steps=4", "train.micro_batches=3", "train.eval_every=0"]
    train_tiny(4, values, folder)
    first, *_ = train_tiny(4, [*values, "launch.data_parallel_replicate_degree=2"], folder)
    assert "4 rank(s) in 2 replicas on cpu" in first.stdout
    runs = [folder / "runs" / name for name in ("demo", "demo-2")]
    assert losses_of(runs[1]) == pytest.approx(losses_of(runs[0]), rel=1e-5)
    assert metrics_of(runs[1])[1]["bytes_replicate"] > 0
    assert [Trace(run / "trace.npz").meta.num_ranks for run in runs] == [4, 2]


def test_wrong_use_ends_every_rank_with_one_line(folder: Path) -> None:
    """Found by all ranks before the rendezvous: rank 0 prints, both end with 2, and nothing was written."""
    first, second = wait_for(start_ranks(2, set_options([*tiny_values(folder), "runtime.slots=-1"]), folder))
    assert (first.status, second.status) == (2, 2)
    assert first.stderr.count("\n") == 1
    assert "runtime.slots" in first.stderr
    assert (first.stdout, second.stdout, second.stderr) == ("", "", "")
    assert not (folder / "runs").exists()


def test_options_by_their_old_names_are_said_once(folder: Path) -> None:
    """By rank 0, in one line before anything else; the line after it is about a batch that does not divide."""
    values = [*tiny_values(folder), "runtime.overlap=false", "runtime.split=exact", "train.batch_size=3"]
    first, second = wait_for(start_ranks(2, set_options(values), folder))
    moved, wrong = first.stderr.splitlines()
    new = ", ".join(f"runtime.{name} is now runtime.debug.{name}" for name in ("split", "overlap"))
    assert moved == f"moesaic: {new}; old names work for one more release"
    assert wrong.startswith("moesaic: train.batch_size 3 does not divide over 2 ranks")
    assert (first.status, second.status) == (2, 2)
    assert (first.stdout, second.stdout, second.stderr) == ("", "", "")


def test_a_text_that_one_rank_cannot_see(folder: Path) -> None:
    """Ranks in different folders, one without the text: all end together with one line that names the rank."""
    other = folder / "other"
    other.mkdir()
    values = [*tiny_values(folder), "data.path=text.txt"]
    first, second = wait_for(start_ranks(2, set_options(values), folder, [folder, other]))
    assert (first.status, second.status) == (2, 2)
    assert first.stderr == (
        "moesaic: data.path 'text.txt' does not exist: give a text file or a folder of text files (rank 1 of 2)\n"
    )
    assert second.stderr == ""
    assert not (folder / "runs").exists()


@pytest.mark.parametrize(
    "values, env, message",
    [
        (["data.path=/nowhere"], {}, "data.path '/nowhere' does not exist"),
        (["data.seq_len=100000"], {}, "one window needs 100001"),
        (["launch.device=cuda"], {}, "CUDA device(s)"),
        (["train.batch_size=7"], {"RANK": "0", "WORLD_SIZE": "2"}, "train.batch_size 7 does not divide over 2 ranks"),
        ([], {"RANK": "0"}, "only one of RANK and WORLD_SIZE"),
        (["checkpoint.resume=/nowhere"], {}, "checkpoint.resume '/nowhere' is no checkpoint"),
        (["run.folder=/proc/nowhere"], {}, "/proc/nowhere"),
        (["train.replay=/nowhere.npz"], {}, "train.replay"),
        (
            ["optim.lr=1e30", "optim.warmup_steps=0", "train.steps=6"],
            {},
            "the gradient norm is nan after 1 steps: the run diverged, and this state is not taken; resume from an earlier",
        ),
    ],
)
def test_wrong_input_alone(
    folder: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    values: list[str],
    env: dict[str, str],
    message: str,
) -> None:
    """In this process: one line, status 2, and the process group is gone again."""
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    for name, value in env.items():
        monkeypatch.setenv(name, value)
    options = [value for value in tiny_values(folder) if not value.startswith("launch.num_threads")]
    assert run_command(command, set_options([*options, *values])) == 2
    captured = capsys.readouterr()
    assert captured.err.count("\n") == 1
    assert message in captured.err
    assert not torch.distributed.is_initialized()


def test_a_disk_that_is_full_at_the_start(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*args: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device", "metrics.jsonl")

    monkeypatch.setattr("moesaic.runtime.wrap.recorder.TraceWriter", fail)
    options = [value for value in tiny_values(folder) if not value.startswith("launch.num_threads")]
    assert run_command(command, set_options(options)) == 2
    assert capsys.readouterr().err == "moesaic: [Errno 28] No space left on device: 'metrics.jsonl'\n"


def test_a_checkpoint_of_another_run_or_a_damaged_one(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Another model, text or seed, or a finished run: one line that names the difference; or the file that is damaged."""
    train_tiny(1, ["train.steps=2", "checkpoint.every=2"], folder)
    resume = f"checkpoint.resume={folder}/runs/demo/checkpoints/step-000002"
    (folder / "other.txt").write_text("another text " * 100)

    def check_refused(values: list[str], message: str) -> None:
        options = [value for value in tiny_values(folder) if not value.startswith("launch.num_threads")]
        assert run_command(command, set_options([*options, "train.steps=4", resume, *values])) == 2
        captured = capsys.readouterr()
        assert captured.err.count("\n") == 1
        assert message in captured.err

    for values, message in (
        (["model.ffn_dim=24"], "the checkpoint has model.ffn_dim = 16, this run 24"),
        (["run.seed=9"], "run.seed: 1, this run 9"),
        (["data.seq_len=8"], "data.seq_len: 16, this run 8"),
        ([f"data.path={folder}/other.txt"], "the text (data.path)"),
        (["train.steps=2"], "the checkpoint is at step 2 of train.steps 2"),
    ):
        check_refused(values, message)
    checkpoint = folder / "runs" / "demo" / "checkpoints" / "step-000002"
    weights = next(path for path in checkpoint.iterdir() if path.suffix == ".distcp")
    whole = (checkpoint / "progress.json").read_text()
    for path, content, message in (
        (checkpoint / "progress.json", "", "progress.json is damaged (Expecting value: line 1"),
        (checkpoint / "progress.json", whole[:-9], "progress.json is damaged ("),
        (checkpoint / "progress.json", "[1]", "progress.json has schema None, this version reads 1"),
        (checkpoint / "progress.json", '{"schema": 1}', "progress.json is damaged (step: Field required): resume from"),
        (checkpoint / "progress.json", whole.replace(": 2,", ": null,", 1), "progress.json is damaged (step: Input should be a"),
        (checkpoint / ".metadata", "", ".metadata is damaged (EOFError"),
        (weights, "", f"cannot load the checkpoint {checkpoint}: rank 0: "),
    ):
        before = path.read_bytes()
        path.write_text(content)
        check_refused([], message)
        path.write_bytes(before)
    assert [path.name for path in (folder / "runs").iterdir()] == ["demo"]


def test_learning_rate() -> None:
    """Linear to the peak over the warm-up, then a half cosine to the last step's share."""
    config = OptimConfig(lr=1.0, warmup_steps=4, min_lr_share=0.1)
    rates = [learning_rate(config, step, 15) for step in range(15)]
    assert rates[:5] == pytest.approx([0.25, 0.5, 0.75, 1.0, 1.0])
    assert rates[9] == pytest.approx(0.55)
    assert rates[14] == pytest.approx(0.1)
    assert rates[4:] == sorted(rates[4:], reverse=True)
    no_warmup = OptimConfig(lr=1.0, warmup_steps=0, min_lr_share=0.0)
    assert [learning_rate(no_warmup, step, 1) for step in range(1)] == [1.0]


def test_vectors_do_not_decay() -> None:
    """With zero gradients a step shrinks matrices by lr * weight_decay and leaves vectors as they are."""
    model = nn.Sequential(nn.Linear(3, 2), nn.LayerNorm(2))
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    handle: Any = SimpleNamespace(parameter_groups=lambda: [{"params": list(model.parameters())}])
    optimizer = build_optimizer(handle, OptimConfig(lr=0.5, weight_decay=0.1))
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.detach(), before[name] * (0.95 if parameter.ndim > 1 else 1.0), msg=name)
