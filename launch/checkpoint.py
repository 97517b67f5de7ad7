"""Checkpoints by torch.distributed.checkpoint: experts under logical names, so any world size loads what any other wrote.

A checkpoint is written into `step-N.partial` and renamed to `step-N` when every rank is done: a folder without the suffix
is whole. Beside the tensors lies progress.json, plain text, which says how far the run was and what it ran on.
"""

import json
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp

from ..runtime import Handle
from .config import Config
from .data import Text

SCHEMA = 1


@dataclass(frozen=True, kw_only=True)
class Progress:
    """How far a run was, and what must not change for it to go on."""

    step: int
    """Optimizer steps done."""
    position: int
    """Windows of the training text that were consumed."""
    seed: int
    seq_len: int
    text_digest: str
    model: dict[str, int | float | bool]
    """The [model] section."""
    schema: int = SCHEMA


def progress_of(config: Config, text: Text, *, step: int, position: int) -> Progress:
    """The progress to write beside a checkpoint."""
    return Progress(
        step=step,
        position=position,
        seed=config.run.seed,
        seq_len=config.data.seq_len,
        text_digest=text.digest,
        model=_architecture(config),
    )


def read_progress(folder: Path, config: Config, text: Text) -> Progress:
    """The progress of the checkpoint in `folder`. Raises `ValueError` unless this run can go on from it."""
    path = folder / "progress.json"
    if not path.is_file():
        raise ValueError(f"checkpoint.resume {str(folder)!r} is no checkpoint: give a folder runs/NAME/checkpoints/step-N")
    record = json.loads(path.read_text(encoding="utf-8"))
    if record.get("schema") != SCHEMA:
        raise ValueError(f"{path} has schema {record.get('schema')}, this version reads {SCHEMA}")
    progress = Progress(**record)
    wanted = progress_of(config, text, step=progress.step, position=progress.position)
    for key, value in wanted.model.items():
        if progress.model.get(key) != value:
            raise ValueError(
                f"the checkpoint has model.{key} = {progress.model.get(key)}, this run {value}: set the checkpoint's"
            )
    for key, name in (("seed", "run.seed"), ("seq_len", "data.seq_len"), ("text_digest", "the text (data.path)")):
        if getattr(progress, key) != getattr(wanted, key):
            raise ValueError(
                f"the checkpoint has another value of {name}: {getattr(progress, key)}, this run {getattr(wanted, key)}; "
                f"a run goes on with the data it was on"
            )
    if progress.step >= config.train.steps:
        raise ValueError(
            f"the checkpoint is at step {progress.step} of train.steps {config.train.steps}: raise train.steps to go on"
        )
    return progress


def save_checkpoint(parent: Path, handle: Handle, optimizer: torch.optim.Optimizer, progress: Progress) -> Path:
    """Write `parent`/step-N and return it. Collective."""
    folder = parent / f"step-{progress.step:06d}"
    partial = folder.with_name(f"{folder.name}.partial")
    is_first = dist.get_rank() == 0
    if is_first and partial.exists():
        shutil.rmtree(partial)
    dcp.save(handle.state_dict(optimizer), checkpoint_id=partial)
    # dcp.save returns on rank 0 after every rank's files and the index are on disk.
    if is_first:
        (partial / "progress.json").write_text(json.dumps(asdict(progress), indent=2) + "\n", encoding="utf-8")
        partial.rename(folder)
    dist.barrier()
    return folder


def load_checkpoint(folder: Path, handle: Handle, optimizer: torch.optim.Optimizer) -> None:
    """Load model and optimizer state in place. Collective; `read_progress` must have accepted the folder."""
    handle.prepare_optimizer(optimizer, dcp.FileSystemReader(folder).read_metadata().state_dict_metadata)
    state = handle.state_dict(optimizer)
    dcp.load(state, checkpoint_id=folder)
    handle.load_state_dict(state, optimizer)


def _architecture(config: Config) -> dict[str, int | float | bool]:
    """The [model] section without what may change between runs of one model."""
    values = asdict(config.model)
    del values["activation_checkpoint"]
    return values
