"""The numbers of an optimizer as text, parameter by parameter: the settings it updates with, and its count of steps."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping
from numbers import Real
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer


def numbers_of(optimizers: Iterable[Optimizer]) -> tuple[dict[int, str], dict[int, str]]:
    """By a parameter's id: the settings of its group, "lr = 0.001" and the like, one a line; and its step count.

    Settings are numbers, flags and words, and lists of them; of a parameter's state only "step" is taken, torch's own name.
    """
    groups = [(optimizer, group) for optimizer in optimizers for group in optimizer.param_groups]
    counted = [
        (id(parameter), state["step"])
        for optimizer, group in groups
        for parameter in group["params"]
        if isinstance(state := optimizer.state.get(parameter), Mapping) and "step" in state
    ]
    wanted = [{key: value for key, value in group.items() if key not in ("params", "param_names")} for _, group in groups]
    read = _read([*(value for values in wanted for value in values.values()), *(step for _, step in counted)])
    settings: dict[int, set[str]] = defaultdict(set)
    for (_, group), values in zip(groups, wanted, strict=True):
        texts = {key: _in_words(value, read) for key, value in sorted(values.items())}
        text = "\n".join(f"{key} = {value}" for key, value in texts.items() if value is not None)
        for parameter in group["params"]:
            settings[id(parameter)].add(text)
    steps: dict[int, set[str]] = defaultdict(set)
    for key, step in counted:
        steps[key].add(_in_words(step, read) or "")
    return {key: "\n".join(sorted(texts)) for key, texts in settings.items()}, {
        key: ", ".join(sorted(texts)) for key, texts in steps.items()
    }


def _in_words(value: Any, read: Mapping[int, float]) -> str | None:
    """A number, a flag, a word, or several; None of anything else."""
    if isinstance(value, Tensor):
        return repr(read[id(value)]) if id(value) in read else None
    if isinstance(value, list | tuple):
        words = [_in_words(inner, read) for inner in value]
        return None if None in words else f"({', '.join(str(word) for word in words)})"
    if value is None or isinstance(value, bool | str):
        return repr(value)
    return repr(float(value)) if isinstance(value, Real) else None


def _read(values: Iterable[Any]) -> dict[int, float]:
    """The numbers in tensors with one element, by the tensor's id. The host waits once for each device and dtype."""
    alike: dict[tuple[torch.device, torch.dtype], list[Tensor]] = defaultdict(list)
    for leaf in (leaf for value in values for leaf in (value if isinstance(value, list | tuple) else (value,))):
        if isinstance(leaf, Tensor) and leaf.numel() == 1 and not leaf.is_meta and not leaf.is_complex():
            alike[leaf.device, leaf.dtype].append(leaf)
    read: dict[int, float] = {}
    for tensors in alike.values():
        local = [t.to_local() if isinstance(t, DTensor) else t for t in tensors]
        numbers = torch.stack([t.detach().reshape(()) for t in local]).double().tolist()
        read |= {id(t): number for t, number in zip(tensors, numbers, strict=True)}
    return read
