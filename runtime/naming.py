"""How other models name and lay out the weights of a MoE layer: in their modules, and in their checkpoints."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor


@dataclass(frozen=True)
class ExpertNames:
    """Names of one expert's matrices in a checkpoint, inside the block; `{expert}` stands for the expert's number.

    `gate` is None where one matrix, called `up`, is all of gate_up.
    """

    gate: str | None
    up: str
    down: str


@dataclass(frozen=True)
class WeightNaming:
    """The names and the layout of a layer's weights in the model that the layer comes from, which is called the original.

    Args:
        fused: (ours, theirs) for every weight of the experts: a bank's parameter, and the tensor [E, ...] inside the block.
        state_experts: where the model itself keeps experts apart, the name of one's weight inside the block; `{expert}` and
            `{weight}` stand for the expert's number and for ours. `fused` are names of older checkpoints then.
        renames: (ours, theirs) for submodules of the layer and of the block.
        checkpoint_experts: where checkpoints keep experts apart, an expert's names; None where they hold the fused tensors.
    """

    fused: tuple[tuple[str, str], ...]
    state_experts: str | None = None
    renames: tuple[tuple[str, str], ...] = ()
    checkpoint_experts: ExpertNames | None = None

    def name_of(self, inner: str) -> str:
        """The original's name for a parameter or buffer of the layer, both without the layer's own name."""
        for ours, theirs in self.renames:
            if inner.startswith(ours + "."):
                return theirs + inner.removeprefix(ours)
        return inner

    def to_original(self, weight: str, tensor: Tensor) -> Tensor:
        """A bank's `weight` of one expert, or of several stacked, in the original's layout. May be a view."""
        return tensor

    def from_original(self, weight: str, tensor: Tensor) -> Tensor:
        """The inverse of `to_original`."""
        return tensor

    def fuse(self, weight: str, tensor_E: Tensor) -> Tensor:
        """A bank's `weight` of all experts, stacked, as the original's one tensor. May be a view."""
        return self.to_original(weight, tensor_E)

    def place(self, weight: str, expert: int, num_experts: int) -> Any:
        """The index of one expert's part, in the original's layout, in that tensor."""
        return expert


# moesaic's own layer; earlier checkpoints of it have one tensor for each weight of all experts.
OWN_LAYER = WeightNaming(
    fused=(("gate_up", "experts.gate_up"), ("down", "experts.down")), state_experts="experts.{expert}.{weight}"
)
