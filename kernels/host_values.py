"""Asynchronous host-to-device copies of small integer arrays."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor


def on_device(values: np.ndarray | Sequence[int], device: torch.device) -> Tensor:
    """`values` as a tensor on the device; for a GPU by one asynchronous copy from pinned memory."""
    tensor = torch.from_numpy(np.ascontiguousarray(values))
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor
