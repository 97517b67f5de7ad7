"""Checkpoints by torch.distributed.checkpoint, with experts under logical names: any world size loads them.

A checkpoint is written into `step-N.partial` and renamed to `step-N` once every rank's files are on disk: a folder without the
suffix is complete, even after a power cut. Beside the tensors, progress.json holds the progress of the run and the configuration
that must not change.
"""

import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import torch.distributed.checkpoint as dcp
from pydantic import TypeAdapter, ValidationError

from ...placement.files import replace_text
from ...runtime import Handle
from ..config import Config
from .data import Text
from .process import Process, agreed

SCHEMA = 1


@dataclass(frozen=True, kw_only=True)
class Progress:
    """The progress of a run, and what must not change when it resumes."""

    step: int
    """Optimizer steps done."""
    position: int
    """Windows of the training text consumed."""
    seed: int
    seq_len: int
    text_digest: str
    model: dict[str, int | float | bool | str]
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
    """The progress of the checkpoint in `folder`. Raises `ValueError` unless this run can resume from it."""
    path = folder / "progress.json"
    if not path.is_file():
        raise ValueError(f"checkpoint.resume {str(folder)!r} is no checkpoint: give a folder runs/NAME/checkpoints/step-N")
    progress = _parse(path)
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
                "a resumed run needs the same data"
            )
    if progress.step >= config.train.steps:
        raise ValueError(
            f"the checkpoint is at step {progress.step} of train.steps {config.train.steps}: raise train.steps to resume"
        )
    return progress


def _parse(path: Path) -> Progress:
    try:
        text = path.read_text(encoding="utf-8")
        record = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise _damaged(path, str(error)) from None
    schema = record.get("schema") if isinstance(record, dict) else None
    if schema != SCHEMA:
        raise ValueError(f"{path} has schema {schema}, this version reads {SCHEMA}: resume from a checkpoint of this version")
    try:
        return TypeAdapter(Progress).validate_json(text, strict=True)
    except ValidationError as error:
        problem = error.errors()[0]
        raise _damaged(path, f"{'.'.join(map(str, problem['loc']))}: {problem['msg']}") from None


def _damaged(path: Path, problem: str) -> ValueError:
    return ValueError(f"{path} is damaged ({problem}): resume from another checkpoint")


def save_checkpoint(process: Process, parent: Path, handle: Handle, optimizer: torch.optim.Optimizer, progress: Progress) -> Path:
    """Write `parent`/step-N and return it. Collective. Raises `ValueError`, the same on every rank, if it cannot be written."""
    folder = parent / f"step-{progress.step:06d}"
    partial = folder.with_name(f"{folder.name}.partial")
    if process.is_first and partial.exists():
        shutil.rmtree(partial)
    with _as_value_error(f"cannot write the checkpoint {partial}"):
        dcp.save(handle.state_dict(optimizer), checkpoint_id=partial)
    # dcp.save returns on rank 0 after every rank's files and the index are on disk.
    agreed(process, lambda: _finish(partial, folder, progress) if process.is_first else None)
    return folder


def _finish(partial: Path, folder: Path, progress: Progress) -> None:
    """Rename a complete checkpoint to its final name, with its files and folder entries on disk."""
    files = {entry.relative_path for entry in dcp.FileSystemReader(partial).read_metadata().storage_data.values()}
    missing = sorted(file for file in files if not (partial / file).is_file())
    if missing:
        raise ValueError(
            f"{partial} has {len(files) - len(missing)} of the checkpoint's {len(files)} files, {missing[0]} is not among them: "
            "set run.folder to a folder that all machines share"
        )
    replace_text(partial / "progress.json", json.dumps(asdict(progress), indent=2) + "\n")
    _sync(partial)
    partial.rename(folder)
    _sync(folder.parent)


def _sync(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def load_checkpoint(process: Process, folder: Path, handle: Handle, optimizer: torch.optim.Optimizer) -> None:
    """Load model and optimizer state in place. Collective; `read_progress` must have accepted the folder.

    Raises `ValueError`, the same on every rank, if it cannot be read.
    """
    handle.prepare_optimizer(optimizer, agreed(process, lambda: _names_in(folder)))
    state = handle.state_dict(optimizer)
    with _as_value_error(f"cannot load the checkpoint {folder}"):
        dcp.load(state, checkpoint_id=folder)
    handle.load_state_dict(state, optimizer)


def _names_in(folder: Path) -> list[str]:
    """The names in a checkpoint."""
    try:
        return list(dcp.FileSystemReader(folder).read_metadata().state_dict_metadata)
    except Exception as error:  # whatever a damaged pickle raises
        raise _damaged(folder / ".metadata", repr(error)) from None


@contextmanager
def _as_value_error(what: str) -> Iterator[None]:
    """Turn torch's CheckpointException, which is no `Exception`, into a `ValueError` with the first failed rank's problem."""
    try:
        yield
    except dcp.CheckpointException as error:
        rank = min(error.failures)
        problem = error.failures[rank][0]
        raise ValueError(f"{what}: rank {rank}: {type(problem).__name__}: {problem}") from error


def _architecture(config: Config) -> dict[str, int | float | bool | str]:
    """The [model] section without the keys that may change between runs of one model."""
    values = asdict(config.model)
    del values["activation_checkpoint"]
    return values
