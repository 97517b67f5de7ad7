"""Have a Trainer or an Accelerator train a sharded model."""

from __future__ import annotations

from typing import Any, TypeVar

from accelerate import Accelerator
from transformers import Trainer

from moesaic.runtime import Handle

from .accelerator import ShardedAccelerator
from .refusals import check_accelerator, check_trainer
from .trainer import ShardedTrainer

Loop = TypeVar("Loop", Trainer, Accelerator)


def attach(loop: Loop, handle: Handle) -> Loop:
    """Have a Trainer or an Accelerator train the model for which `shard_experts` returned `handle`; return it.

    Call it on every rank, before `train()` or `prepare(...)`. The model is not wrapped once more; gradients are clipped by the
    norm over all ranks; every step of the optimizer ends with `handle.step(optimizer)`; what is saved holds the experts of all
    ranks, and any world size loads it. All ranks call together what saves or loads.

    Args:
        loop: a `transformers.Trainer`, also of a subclass such as TRL's `SFTTrainer`, or an `accelerate.Accelerator`. It is
            changed in place: its class becomes a subclass of what it was.
        handle: of the model that the Trainer was given, or that `loop.prepare` will be.

    Raises:
        ValueError: `loop` is something else, has a handle already or another model, or was given an option that does not go with
            sharded experts (docs/huggingface.md lists them). Nothing has changed then.
    """
    if not isinstance(loop, (Trainer, Accelerator)):
        raise ValueError(f"attach got a {type(loop).__name__}; give it a Trainer or an Accelerator")
    accelerator = loop.accelerator if isinstance(loop, Trainer) else loop
    if isinstance(accelerator, ShardedAccelerator):
        raise ValueError(f"attach was called for this {type(loop).__name__} before; call it once")
    check_accelerator(accelerator, handle)
    if isinstance(loop, Trainer):
        check_trainer(loop, handle)
        _become(loop, ShardedTrainer)
    _become(accelerator, ShardedAccelerator)
    accelerator.attach(handle)
    return loop


def _become(loop: Any, mixin: type) -> None:
    """Put the methods of `mixin` before those of the object's class, whichever subclass that is."""
    kind = type(loop)
    loop.__class__ = type(f"Sharded{kind.__name__}", (mixin, kind), {"__module__": kind.__module__})
