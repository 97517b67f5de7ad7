"""One forward of one layer, and the backward that belongs to it.

The pass carries what both must agree on: the routing decision, the plan, where the tokens went, and the slots. Backward
finds it on the autograd nodes of its own forward, so interleaved micro-batches cannot be confused, and a recomputation
(non-reentrant activation checkpointing) finds the passes it repeats with the checkpoint that it belongs to.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from torch import Tensor
from torch.autograd.graph import Node

from ...collectives import Pending
from ...placement import ExpertLoad
from .._compat import current_backward_node, running_checkpoints
from ..experts.expert import ExpertTensors
from .planning import Plan

if TYPE_CHECKING:
    from ..dispatch.handle import DispatchHandle
    from .layer_runtime import LayerRuntime


@dataclass(eq=False)
class LayerPass:
    """The state of one forward. Holds nothing that leads into the graph, so that no reference cycle keeps a graph alive."""

    where: str  # step, layer, plan and pass, for errors, profiles and the tags of messages: the same on every rank
    plan: Plan
    is_training: bool = True
    number: int = 0  # of the layer's passes in this step
    weights_version: tuple[int, ...] = ()  # of the bank when the copies were gathered
    copies: dict[int, ExpertTensors] = field(default_factory=dict)  # this rank's slots by expert; empty once released
    holds_copies: bool = False  # here or on their way; the same on every rank, also on one whose plan has none
    gather: Pending | None = None
    added_gather: Pending | None = None  # of the copies that calibration added
    copy_grads: dict[int, ExpertTensors] = field(default_factory=dict)
    reduce: Pending | None = None
    totals: dict[int, Sequence[Tensor]] = field(default_factory=dict)  # where the reduce adds the sums of owned experts
    staging: list[ExpertTensors] = field(default_factory=list)  # where the reduce receives others' gradients
    topk_ids_TK: Tensor | None = None
    load: ExpertLoad | None = None
    is_trained: bool = True  # a weight of an expert of the layer learns, on some rank; the same on every rank
    load_of_all: ExpertLoad | None = None  # with the ranks of the replicas' groups
    handle: DispatchHandle | None = None
    is_replay: bool = False
    anchor: Node | None = None  # of the graph: runs in those backward passes that add to `.grad`
    backward_id: int = -1  # the last backward pass that computed the experts' gradients
    after_backward: Callable[[], None] | None = None  # launches what the layer that is next in backward needs

    def op(self, name: str) -> str:
        """The name under which traffic is counted: that of evaluation is kept apart from that of training steps."""
        return name if self.is_training else f"eval_{name}"


class ReentrantCheckpointError(RuntimeError):
    """A forward ran inside a backward without a forward of its own to repeat."""


@dataclass
class _CheckpointedPasses:
    """The passes of one layer under one activation checkpoint, in the order of its calls, and how many were repeated."""

    passes: list[LayerPass] = field(default_factory=list)
    num_repeated: Counter[Any] = field(default_factory=Counter)  # by recomputation


def note_forward(layer: LayerRuntime, layer_pass: LayerPass) -> None:
    """Have the activation checkpoints that this forward runs under know it, for `pass_being_recomputed`."""
    for running in running_checkpoints():
        _checkpointed(running.frame, layer).passes.append(layer_pass)


def pass_being_recomputed(layer: LayerRuntime) -> LayerPass | None:
    """The pass of `layer` that the running recomputation repeats with this call, or None in an ordinary forward.

    A recomputation makes the same calls as its checkpoint's forward, checkpoints within it included: the n-th call of the layer
    here repeats the n-th one there. It need not make all of them.
    """
    recomputed = next((running for running in running_checkpoints() if running.recomputation is not None), None)
    if recomputed is None:
        if current_backward_node() is None:
            return None
        raise ReentrantCheckpointError(
            f"{layer.name} ran forward inside a backward pass, but not as an activation checkpoint's recomputation: "
            "call torch.utils.checkpoint with use_reentrant=False"
        )
    known = _checkpointed(recomputed.frame, layer)
    index = known.num_repeated[recomputed.recomputation]
    if index == len(known.passes):
        raise RuntimeError(
            f"{layer.name} was called {index} times under an activation checkpoint, but more often when it was recomputed; "
            "the checkpointed function must do the same both times"
        )
    known.num_repeated[recomputed.recomputation] += 1
    found = known.passes[index]
    found.is_replay = True
    return found


def _checkpointed(frame: Any, layer: LayerRuntime) -> _CheckpointedPasses:
    """Kept with the frame itself, so that passes live no longer than the graph that may have them recomputed."""
    by_layer: dict[LayerRuntime, _CheckpointedPasses] = frame.__dict__.setdefault("moesaic_passes", {})
    return by_layer.setdefault(layer, _CheckpointedPasses())


def is_recomputing() -> bool:
    """Whether the code that asks runs inside a backward pass, as the forward that activation checkpointing repeats does."""
    return current_backward_node() is not None
