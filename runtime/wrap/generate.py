"""`generate` of a wrapped model of transformers: ranks ask for as many tokens as they like, and all end together.

Every forward of the model has collectives, so a rank that has its tokens still takes part in the forwards of the others, with one
token of its own that goes nowhere. transformers' own way (`synced_gpus`) goes on with the finished sequences instead, which no
cache of a fixed size has room for, and which is wrong without a cache and where prompts are read in chunks.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Protocol

import torch
from torch import nn


class Forwards(Protocol):
    """Where ranks compare that they run a model's forwards together."""

    def take_part(self, model: nn.Module, forward: Callable[[], Any]) -> None:
        """Run `forward` whenever another rank begins one, until all ranks are here."""


def generate_together(model: nn.Module, forwards: Forwards, device: torch.device) -> None:
    """Have `model.generate`, if the model is a decoder of transformers, return when all ranks have what they asked for."""
    original: Callable[..., Any] | None = getattr(model, "generate", None)
    config = getattr(model, "config", None)
    if original is None or not hasattr(model, "prepare_inputs_for_generation") or getattr(config, "is_encoder_decoder", False):
        return
    is_inside = False  # assisted generation and its like call `generate` again

    @functools.wraps(original)
    def generate(*args: Any, **options: Any) -> Any:
        nonlocal is_inside
        if is_inside:
            return original(*args, **options)
        is_inside = True
        try:
            with _forwards_of_the_whole(model):
                generated = original(*args, **(options | {"synced_gpus": False}))
            token = torch.zeros(1, 1, dtype=torch.int64, device=device)
            with torch.no_grad():
                forwards.take_part(model, lambda: model(input_ids=token, use_cache=False))
        finally:
            is_inside = False
        return generated

    model.generate = generate  # type: ignore[assignment]


@contextmanager
def _forwards_of_the_whole(model: nn.Module) -> Iterator[None]:
    """Have forwards of the model inside one of peft, whose `generate` calls these by themselves, begin with the one around it."""
    inner: nn.Module = getattr(model, "get_base_model", lambda: model)()
    if inner is model:
        yield
        return
    forward, is_inside, before = inner.forward, False, dict(vars(inner))

    @functools.wraps(forward)
    def from_the_top(*args: Any, **options: Any) -> Any:
        nonlocal is_inside
        if is_inside:
            return forward(*args, **options)
        is_inside = True
        try:
            return model(*args, **options)
        finally:
            is_inside = False

    inner.forward = from_the_top
    try:
        yield
    finally:
        del inner.forward
        vars(inner).update({"forward": before["forward"]} if "forward" in before else {})
