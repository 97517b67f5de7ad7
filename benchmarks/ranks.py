"""A function called by every rank of a benchmark, each rank a process of its own; its results come back as files."""

from __future__ import annotations

import os
import pickle
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import TypeVar

import torch
import torch.distributed as dist

T = TypeVar("T")


@dataclass(frozen=True)
class Rank:
    """This rank of a benchmark, and the store that all ranks share."""

    rank: int
    store: dist.Store

    @contextmanager
    def process_group(
        self, world_size: int, *, name: str = "all", device: str = "cpu", timeout_s: float = 300.0
    ) -> Iterator[dist.ProcessGroup]:
        """The default process group of the ranks below `world_size`, while the block runs."""
        dist.init_process_group(
            "nccl" if device == "cuda" else "gloo",
            store=dist.PrefixStore(name, self.store),
            rank=self.rank,
            world_size=world_size,
            timeout=timedelta(seconds=timeout_s),
        )
        group = dist.group.WORLD
        assert group is not None
        try:
            yield group
            if device == "cpu":
                dist.barrier()  # no rank leaves while another still receives from it
        finally:
            dist.destroy_process_group()


def run_on_ranks(measure: Callable[[Rank], T], num_ranks: int, launch: Callable[[Sequence[str]], None]) -> list[T]:
    """The results of `measure` on every rank, in rank order. `launch` runs a command once per rank, and waits for all."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "measure").write_bytes(pickle.dumps(measure))
        launch([sys.executable, "-m", "moesaic.benchmarks.ranks", name])
        return [pickle.loads((folder / f"rank-{rank}").read_bytes()) for rank in range(num_ranks)]


def main(folder: Path) -> None:
    """Call the function of `folder` as one rank, on one thread, and leave its result there."""
    torch.set_num_threads(1)
    rank = int(os.environ.get("OMPI_COMM_WORLD_RANK") or os.environ["RANK"])
    measure = pickle.loads((folder / "measure").read_bytes())
    measured = measure(Rank(rank, dist.FileStore(str(folder / "store"), -1)))
    (folder / f"rank-{rank}").write_bytes(pickle.dumps(measured))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
