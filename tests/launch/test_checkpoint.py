"""Writing checkpoints on real ranks: whole or not at all, and every rank learns what went wrong on one."""

import os
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from torch.distributed.checkpoint import save as dcp_save
from torch.distributed.device_mesh import init_device_mesh

from moesaic import RuntimeConfig, shard_experts
from moesaic.launch.run.checkpoint import Progress, save_checkpoint
from tests.helpers.model import make_model
from tests.helpers.ranks import run_ranks
from tests.launch.test_records import process_of

PROGRESS = Progress(step=3, position=36, seed=1, seq_len=16, text_digest="", model={})


def save_without_one_file(state: dict[str, Any], *, checkpoint_id: Path) -> None:
    """As if rank 1 had written into a folder of its own."""
    dcp_save(state, checkpoint_id=checkpoint_id)
    (checkpoint_id / "__1_0.distcp").unlink(missing_ok=True)
    dist.barrier()


def save(rank: int, folder: str) -> tuple[list[str], list[str]]:
    """What this rank did to disk in a save that went well, and the problems of two that did not."""
    handle = shard_experts(make_model(), mesh=init_device_mesh("cpu", (2,)), config=RuntimeConfig(slots=0, timeout_s=60))
    optimizer, parent = torch.optim.SGD(handle.parameter_groups()), Path(folder)
    done: list[str] = []
    with pytest.MonkeyPatch.context() as patch:
        fsync, rename = os.fsync, Path.rename
        patch.setattr(os, "fsync", lambda fd: done.append(f"fsync {Path(os.readlink(f'/proc/self/fd/{fd}')).name}") or fsync(fd))
        patch.setattr(Path, "rename", lambda path, target: done.append(f"rename {path.name}") or rename(path, target))
        save_checkpoint(process_of(rank), parent, handle, optimizer, PROGRESS)
    problems = []
    for place in (parent, parent / "step-000003" / "progress.json"):  # where it exists already, and in a file
        with pytest.raises(ValueError, match="step-000003") as refused:
            save_checkpoint(process_of(rank), place, handle, optimizer, PROGRESS)
        problems.append(str(refused.value))
    with (
        mock.patch("moesaic.launch.run.checkpoint.dcp.save", save_without_one_file),
        pytest.raises(ValueError, match="share") as refused,
    ):
        save_checkpoint(process_of(rank), parent / "not shared", handle, optimizer, PROGRESS)
    problems.append(str(refused.value))
    return done, problems


def test_a_checkpoint_is_on_disk_before_it_has_its_name(tmp_path: Path) -> None:
    partial = tmp_path / "step-000003.partial"
    partial.mkdir()
    (partial / "left over").write_text("from a run that was killed")
    (first, problems), (second, problems_elsewhere) = run_ranks(2, save, str(tmp_path))
    *files, progress, entries, renamed, parent = first
    assert "fsync __0_0.distcp" in files
    assert progress.startswith("fsync .progress.json")
    assert [entries, renamed, parent] == [f"fsync {partial.name}", f"rename {partial.name}", f"fsync {tmp_path.name}"]
    assert second == ["fsync __1_0.distcp"]
    assert not (tmp_path / "step-000003" / "left over").exists()
    assert problems == problems_elsewhere
    assert "Directory not empty" in problems[0]
    assert problems[1].startswith("cannot write the checkpoint ")
    assert "Not a directory" in problems[1]
    assert (
        "step-000003.partial has 1 of the checkpoint's 2 files, __1_0.distcp is not among them: set run.folder to" in problems[2]
    )
    assert not (tmp_path / "not shared" / "step-000003").exists()
