"""Have a Trainer or an Accelerator train a model whose experts are shared."""

from __future__ import annotations

from typing import Any, TypeVar

from accelerate import Accelerator
from transformers import Trainer

from moesaic.runtime import Handle

from .accelerator import ShardedAccelerator, check_accelerator
from .trainer import ShardedTrainer, check_trainer

Loop = TypeVar("Loop", Trainer, Accelerator)


def attach(loop: Loop, handle: Handle) -> Loop:
    """Have a Trainer or an Accelerator train the model that `shard_experts` returned `handle` for, and return it.

    Call it before `train()` or `prepare(...)`, on every rank. From then on the model is not wrapped again, gradients are clipped by
    the norm over all ranks, every optimizer step ends with `handle.step(optimizer)`, and what is saved holds every rank's experts:
    models as `from_pretrained` reads them, checkpoints that any world size resumes from. All ranks must call what saves or loads.

    Args:
        loop: a `transformers.Trainer`, one of a subclass (TRL's `SFTTrainer`), or an `accelerate.Accelerator`. It is changed in
            place: its class becomes a subclass of its own.
        handle: of the model that the Trainer was given, or that `accelerator.prepare` will be.

    Raises:
        ValueError: an option that experts which are shared cannot serve, or the Trainer's model is another one; nothing has changed
            then. docs/huggingface.md lists what is refused.
    """
    accelerator = loop.accelerator if isinstance(loop, Trainer) else loop
    if isinstance(loop, Trainer):
        check_trainer(loop, handle)
    check_accelerator(accelerator, handle)
    _become(accelerator, ShardedAccelerator)
    accelerator.attach(handle)
    if isinstance(loop, Trainer):
        _become(loop, ShardedTrainer)
    return loop


def _become(loop: Any, mixin: type) -> None:
    """Put the methods of `mixin` before those of the object's class, whichever subclass that is."""
    kind = type(loop)
    loop.__class__ = type(f"Sharded{kind.__name__}", (mixin, kind), {"__module__": kind.__module__})
