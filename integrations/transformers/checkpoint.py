"""Checkpoints of these loops: weights as transformers has them, optimizer state by the experts' names; any world size loads
them."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from accelerate.optimizer import AcceleratedOptimizer

from moesaic.runtime import Handle

Folder = str | os.PathLike[str]
_GROUPS = "groups"


def save_weights(handle: Handle, folder: Folder) -> None:
    """Write the model as `save_pretrained` lays it out, over an earlier save: of a model of peft the adapters. Collective; every
    rank writes its experts."""
    folder = Path(folder)
    if _has_adapters(handle):
        handle.weights.save_adapter(folder)
        return
    if dist.get_rank() == 0:
        for file in (*folder.glob("model*.safetensors"), *folder.glob("model*.safetensors.index.json")):
            file.unlink()
    dist.barrier()
    handle.weights.save_safetensors(folder)
    generation_config = getattr(handle.model, "generation_config", None)
    if dist.get_rank() == 0 and generation_config is not None:
        generation_config.save_pretrained(folder)


def load_weights(handle: Handle, folder: Folder) -> None:
    """Load what `save_weights` or `save_pretrained` wrote, at any world size."""
    load = handle.weights.load_adapter if _has_adapters(handle) else handle.weights.load_safetensors
    load(Path(folder))


def _has_adapters(handle: Handle) -> bool:
    return hasattr(handle.model, "peft_config")


def save_optimizer(handle: Handle, optimizer: torch.optim.Optimizer, folder: Folder) -> None:
    """Write the optimizer's state, and the settings of its parameter groups: schedules change them. Collective."""
    optimizer = _inner(optimizer)
    dcp.save(_state_of(handle.state_dict(optimizer)) | {_GROUPS: _settings_of(optimizer)}, checkpoint_id=folder)


def load_optimizer(handle: Handle, optimizer: torch.optim.Optimizer, folder: Folder) -> None:
    """Load what `save_optimizer` wrote at any world size. Collective.

    Raises:
        ValueError: there is nothing of it, or it is of an optimizer with other parameter groups.
    """
    if not (Path(folder) / ".metadata").is_file():
        raise ValueError(
            f"{folder} holds no state of an optimizer; resume from a checkpoint that was saved with a handle attached"
        )
    optimizer = _inner(optimizer)
    groups = {_GROUPS: _settings_of(optimizer)}
    dcp.load(groups, checkpoint_id=folder)
    here, there = len(optimizer.param_groups), len(groups[_GROUPS])
    if here != there:
        raise ValueError(f"the optimizer has {here} parameter groups, that of {folder} {there}; build it as for that checkpoint")
    handle.prepare_optimizer(optimizer, dcp.FileSystemReader(folder).read_metadata().state_dict_metadata)
    state = handle.state_dict(optimizer)
    saved = _state_of(state)
    dcp.load(saved, checkpoint_id=folder)
    handle.load_state_dict(state | saved, optimizer)
    for group, settings in zip(optimizer.param_groups, groups[_GROUPS], strict=True):
        group.update(settings)


def _state_of(state: dict[str, Any]) -> dict[str, Any]:
    """The optimizer's part of a handle's state."""
    return {name: value for name, value in state.items() if name.startswith("optimizer.")}


def _settings_of(optimizer: torch.optim.Optimizer) -> list[dict[str, Any]]:
    return [{name: value for name, value in group.items() if name != "params"} for group in optimizer.param_groups]


def _inner(optimizer: torch.optim.Optimizer) -> torch.optim.Optimizer:
    """The optimizer itself, which steps whenever it is called."""
    return optimizer.optimizer if isinstance(optimizer, AcceleratedOptimizer) else optimizer
