"""One forward of one layer, and the backward that belongs to it.

The pass carries what both must agree on: the routing decision, the plan, where the tokens went, and the slots. Backward
finds it on the autograd nodes of its own forward, so interleaved micro-batches cannot be confused, and a recomputation
(non-reentrant activation checkpointing) finds the pass it repeats by walking back from the node that asked for it.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from torch import Tensor

from ..collectives import Pending
from ..placement import ExpertLoad
from ._compat import current_backward_node
from .bank import ExpertTensors
from .planning import Plan

if TYPE_CHECKING:
    from .dispatch_handle import DispatchHandle


@dataclass(eq=False)
class LayerPass:
    """The state of one forward. Holds no tensor that requires grad, so that no reference cycle keeps a graph alive."""

    where: str  # step and layer, for errors and profiles
    plan: Plan
    is_training: bool = True
    weights_version: tuple[int, ...] = ()  # of the bank when the copies were gathered
    copies: dict[int, ExpertTensors] = field(default_factory=dict)  # this rank's slots by expert; empty once released
    holds_copies: bool = False  # here or on their way; the same on every rank, also on one whose plan has none
    gather: Pending | None = None
    added_gather: Pending | None = None  # of the copies that calibration added
    copy_grads: dict[int, ExpertTensors] = field(default_factory=dict)
    reduce: Pending | None = None
    staging: list[ExpertTensors] = field(default_factory=list)  # where the reduce receives others' gradients
    topk_ids_TK: Tensor | None = None
    load: ExpertLoad | None = None
    load_of_all: ExpertLoad | None = None  # with the ranks of the replicas' groups
    handle: DispatchHandle | None = None
    is_replay: bool = False
    is_finished: bool = False
    after_backward: Callable[[], None] | None = None  # launches what the layer that is next in backward needs

    def op(self, name: str) -> str:
        """The name under which traffic is counted: that of evaluation is kept apart from that of training steps."""
        return name if self.is_training else f"eval_{name}"


class ReentrantCheckpointError(RuntimeError):
    """A forward ran inside a backward without a forward of its own to repeat."""


def pass_being_recomputed(layer: object) -> LayerPass | None:
    """The pass of `layer` that the running backward asks to recompute, or None in an ordinary forward.

    `layer` is the object that `mark_pass` was given. The search goes breadth first from the node whose saved tensors are
    being unpacked, so it meets the layer's nearest forward.
    """
    start = current_backward_node()
    if start is None:
        return None
    queue = deque([start])
    seen = {start}
    while queue:
        node = queue.popleft()
        mark = getattr(node, "moesaic_mark", None)
        if mark is not None and mark[0] is layer:
            found: LayerPass = mark[1]
            found.is_replay = True
            return found
        for following, _ in node.next_functions:
            if following is not None and following not in seen:
                seen.add(following)
                queue.append(following)
    raise ReentrantCheckpointError(
        "a MoE layer ran forward inside a backward pass that holds no forward of it: "
        "call torch.utils.checkpoint with use_reentrant=False"
    )


def is_recomputing() -> bool:
    """Whether the code that asks runs inside a backward pass, as the forward that activation checkpointing repeats does."""
    return current_backward_node() is not None
