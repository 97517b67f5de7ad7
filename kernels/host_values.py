"""Numbers that the host knows, on the device, without waiting for it."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor


def on_device(values: np.ndarray | Sequence[int], device: torch.device) -> Tensor:
    """`values` as a tensor; on a GPU through pinned memory, in one copy that the host doesn't wait for."""
    tensor = torch.from_numpy(np.ascontiguousarray(values))
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor
