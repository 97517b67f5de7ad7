"""The private names of torch that the runtime stands on, all of them here."""

import torch


def current_backward_node() -> torch.autograd.graph.Node | None:
    """The autograd node whose backward runs on this thread now, or None outside a backward pass."""
    return torch._C._current_autograd_node()
