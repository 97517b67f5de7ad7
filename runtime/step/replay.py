"""Recomputation by activation checkpointing: which pass a repeated forward repeats.

[Note: what a recomputation repeats] A recomputation (non-reentrant activation checkpointing) runs a layer's forward again with
the pass of its forward: the same routing decision, plan, split and routes, so that its tokens go where the forward's went. It
gathers the copies again if they were released, sends the tokens again, and computes again. It gathers no counts, plans nothing,
and its router loss is not the one that counts. torch ends it where the last tensor was saved, which may be behind the experts:
outputs are therefore not sent back before combine asks for them.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import Any

from .._compat import current_backward_node, running_checkpoints


class ReentrantCheckpointError(RuntimeError):
    """A forward ran inside a backward without a forward of its own to repeat."""


@dataclass
class _CheckpointedPasses:
    """The passes of one layer under one activation checkpoint, in the order of its calls, and how many were repeated."""

    passes: list[Any] = field(default_factory=list)
    num_repeated: Counter[Any] = field(default_factory=Counter)  # by recomputation


def note_forward(layer: object, layer_pass: Any) -> None:
    """Register a forward with the activation checkpoints that it runs under, for `pass_being_recomputed`."""
    for running in running_checkpoints():
        _checkpointed(running.frame, layer).passes.append(layer_pass)


def pass_being_recomputed(layer: object, name: str) -> Any:
    """The pass of `layer` that the running recomputation repeats with this call, or None in an ordinary forward.

    A recomputation makes the same calls as its checkpoint's forward, checkpoints within it included: the n-th call of the layer
    here repeats the n-th one there. It need not make all of them.

    Raises:
        ReentrantCheckpointError: a forward inside a backward that is no recomputation.
        RuntimeError: more calls than the checkpoint's forward made.
    """
    recomputed = next((running for running in running_checkpoints() if running.recomputation is not None), None)
    if recomputed is None:
        if not is_recomputing():
            return None
        raise ReentrantCheckpointError(
            f"{name} ran forward inside a backward pass, but not as an activation checkpoint's recomputation: "
            "call torch.utils.checkpoint with use_reentrant=False"
        )
    known = _checkpointed(recomputed.frame, layer)
    index = known.num_repeated[recomputed.recomputation]
    if index == len(known.passes):
        raise RuntimeError(
            f"{name} was called {index} times under an activation checkpoint, but more often when it was recomputed; "
            "the checkpointed function must do the same both times"
        )
    known.num_repeated[recomputed.recomputation] += 1
    return known.passes[index]


def _checkpointed(frame: Any, layer: object) -> _CheckpointedPasses:
    """Kept with the frame itself, so that passes live no longer than the graph that may have them recomputed."""
    by_layer: dict[object, _CheckpointedPasses] = frame.__dict__.setdefault("moesaic_passes", {})
    return by_layer.setdefault(layer, _CheckpointedPasses())


def is_recomputing() -> bool:
    """Whether this code runs inside a backward pass, as the forward that activation checkpointing repeats does."""
    return current_backward_node() is not None
