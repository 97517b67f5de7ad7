"""The private names of torch that the runtime stands on, all of them here."""

from collections.abc import Callable

import torch


def current_backward_node() -> torch.autograd.graph.Node | None:
    """The autograd node whose backward runs on this thread now, or None outside a backward pass."""
    return torch._C._current_autograd_node()


def call_after_backward(callback: Callable[[], None]) -> None:
    """Have `callback` called when the backward pass that runs on this thread now is complete."""
    torch.autograd.Variable._execution_engine.queue_callback(callback)
