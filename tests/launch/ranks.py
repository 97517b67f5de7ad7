"""Ranks as real processes of the training program: started with RANK and WORLD_SIZE, meeting over a file."""

import json
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

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


def start_ranks(
    world_size: int, args: Sequence[str], folder: Path, rank_folders: Sequence[Path] = ()
) -> list[subprocess.Popen[str]]:
    """Start `python -m moesaic.launch.train` on every rank; `rank_folders` are working folders, one per rank."""
    meeting = f"launch.init_method=file://{folder}/meeting-{time.monotonic_ns()}"
    processes = []
    for rank in range(world_size):
        ranks = {"RANK": str(rank), "WORLD_SIZE": str(world_size), "LOCAL_RANK": str(rank), "LOCAL_WORLD_SIZE": str(world_size)}
        processes.append(
            subprocess.Popen(
                [sys.executable, "-m", "moesaic.launch.train", *args, "--set", meeting],
                env=os.environ | ranks | {"OMP_NUM_THREADS": "1"},
                cwd=rank_folders[rank] if rank_folders else folder,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
            )
        )
    return processes


def wait_for(processes: Sequence[subprocess.Popen[str]]) -> list[Ended]:
    """Wait for every rank; a rank that hangs fails the test and leaves no process behind."""
    ended = []
    try:
        for process in processes:
            stdout, stderr = process.communicate(timeout=LIMIT_S)
            ended.append(Ended(process.returncode, stdout, stderr))
    finally:
        for process in processes:
            process.kill()
    return ended


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
