"""The training program under mpirun: ranks find each other without MASTER_ADDR, and MPI may carry their messages."""

import subprocess
import sys
from pathlib import Path

import numpy as np

from tests.helpers.mpi import mpi_environment, mpirun
from tests.launch.ranks import metrics_of, set_options, tiny_values, train_tiny


def test_losses_are_those_of_any_other_launcher(tmp_path: Path) -> None:
    """Bitwise: neither the launcher nor the transport may change what is computed."""
    words = np.random.default_rng(0).choice(["router ", "expert ", "slot ", "bank ", "owner\n"], size=3000)
    (tmp_path / "text.txt").write_text("".join(words))
    values = [*tiny_values(tmp_path), "train.steps=3", "train.eval_every=0"]
    train = [sys.executable, "-m", "moesaic.launch.train", *set_options([*values, "runtime.transport=mpi"])]
    done = subprocess.run(
        [*mpirun(2), *train], env=mpi_environment(), cwd=tmp_path, capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("moesaic: 2 rank(s)") == 1
    train_tiny(2, values, tmp_path)
    over_mpi, over_shm = (metrics_of(tmp_path / "runs" / name) for name in ("demo", "demo-2"))
    assert [row.get("loss") for row in over_mpi] == [row.get("loss") for row in over_shm]
