"""The three nodes of a pass in the autograd graph: Dispatch, Experts, Combine.

    forward     x_TD, gate weights -> Dispatch -> Experts -> Combine -> y_TD
    backward    Combine: send the gradients of outputs | Experts: compute, send back | Dispatch: add up, launch the reduce

Tokens in flight are no tensors of the graph: scalars link the nodes, and the pass holds the rest.
"""

from __future__ import annotations

from typing import Any, Protocol

import torch
from torch import Tensor


class Stages(Protocol):
    """What a pass does in the forward and backward of each node."""

    def send_tokens(self, x_TD: Tensor, weights_TK: Tensor) -> None:
        """Launch the tokens to their experts."""

    def compute(self) -> tuple[Tensor, ...]:
        """Run the experts and launch their outputs back; return what backward needs."""

    def combine_outputs(self) -> Tensor:
        """Wait for the outputs [T, D] of this rank's tokens."""

    def send_gradients(self, dy_TD: Tensor) -> None:
        """Launch the gradients of the outputs to the experts."""

    def compute_gradients(self, *saved: Tensor) -> None:
        """Run the experts' backward and launch the gradients of tokens back."""

    def combine_gradients(self) -> tuple[Tensor, Tensor]:
        """Wait for the gradients of this rank's tokens [T, D] and gate weights [T, K]; the last of the pass's backward."""


class Dispatch(torch.autograd.Function):
    """Tokens to their experts. `anchor` requires grad, and with it all that follows."""

    @staticmethod
    def forward(ctx: Any, x_TD: Tensor, weights_TK: Tensor, anchor: Tensor, stages: Stages) -> Tensor:
        """See `Stages.send_tokens`."""
        ctx.stages = stages
        # Detached: tokens in flight are held where no graph must be.
        stages.send_tokens(x_TD.detach(), weights_TK.detach())
        return _dep(x_TD)

    @staticmethod
    def backward(ctx: Any, d_dep: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
        """See `Stages.combine_gradients`."""
        return *ctx.stages.combine_gradients(), d_dep, None


class Experts(torch.autograd.Function):
    """The experts of this rank."""

    @staticmethod
    def forward(ctx: Any, dep: Tensor, stages: Stages) -> Tensor:
        """See `Stages.compute`."""
        ctx.stages = stages
        ctx.save_for_backward(*stages.compute())
        return _dep(dep)

    @staticmethod
    def backward(ctx: Any, d_dep: Tensor) -> tuple[Tensor, None]:
        """See `Stages.compute_gradients`."""
        ctx.stages.compute_gradients(*ctx.saved_tensors)
        return d_dep, None


class Combine(torch.autograd.Function):
    """Outputs to the ranks of their tokens."""

    @staticmethod
    def forward(ctx: Any, dep: Tensor, stages: Stages) -> Tensor:
        """See `Stages.combine_outputs`."""
        ctx.stages = stages
        return stages.combine_outputs()

    @staticmethod
    def backward(ctx: Any, dy_TD: Tensor) -> tuple[Tensor, None]:
        """See `Stages.send_gradients`."""
        ctx.stages.send_gradients(dy_TD)
        return _dep(dy_TD), None


def _dep(like: Tensor) -> Tensor:
    """A dependency: a scalar that ties two nodes together, or its gradient."""
    return torch.zeros((), device=like.device)
