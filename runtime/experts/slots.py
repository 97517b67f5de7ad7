"""Slots: expert-sized buffers that the layers of a bank share."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol
from weakref import WeakSet

import torch
from torch import Tensor

from ...collectives import Transport
from .._compat import call_after_backward
from .expert import ExpertShape, ExpertTensors


class Holder(Protocol):
    """What holds slots for a pass."""

    def release(self) -> None:
        """Give all of them back."""


class SlotPool:
    """Expert-sized buffers for copies of weights, and for their gradients.

    [Note: which object may release a slot] A slot is lent to one pass, by `Replicas` or by `ExpertGrads`, which alone gives it
    back: once no message writes to it any more and its last use has been enqueued on the device. Copies are given back where no
    backward follows the forward, after forward where backward gathers them again, and otherwise before the layer's reduce,
    which then finds free slots to receive in. A slot that is never given back, because its graph was dropped without a
    backward, is simply freed: the pool holds only the free ones.

    `peak_slots` is the largest number of buffers that ever existed at once, lent or free, `peak_bytes` the most memory they took,
    and `predicted_bytes` the most that one forward and its backward may take; see `memory.peak_slot_bytes`.
    """

    def __init__(self, shape: ExpertShape, transport: Transport, predicted_bytes: int = 0):
        self.predicted_bytes = predicted_bytes
        self._shape = shape
        self._transport = transport
        self._free: list[ExpertTensors] = []
        self._alive: WeakSet[ExpertTensors] = WeakSet()
        self._gathered_again: Holder | None = None
        self.peak_slots = 0
        self.peak_bytes = 0

    def acquire(self, like: Tensor, *, of_gradients: bool = False) -> ExpertTensors:
        """A buffer with undefined content on the device and with the dtype of `like`, for weights or for gradients."""
        sizes = self._shape.gradient_sizes() if of_gradients else self._shape.tensor_sizes()
        for i, buffer in enumerate(self._free):
            first = buffer.tensors()[0]
            if first.device == like.device and first.dtype == like.dtype and list(buffer) == list(sizes):
                return self._free.pop(i)
        buffer = ExpertTensors(**{name: lasting(self._transport, size, like) for name, size in sizes.items()})
        self._alive.add(buffer)
        self.peak_slots = max(self.peak_slots, len(self._alive))
        self.peak_bytes = max(self.peak_bytes, sum(tensor.nbytes for slot in self._alive for tensor in slot.tensors()))
        return buffer

    def release(self, buffer: ExpertTensors) -> None:
        """Give a buffer back."""
        self._free.append(buffer)

    def release_others(self, holder: Holder) -> None:
        """Release the copies that were gathered again for another pass: one pass at a time has such copies.

        They wait for a backward that may never come, or that comes after this one's: several layers under one activation
        checkpoint all run forward again first.
        """
        if self._gathered_again is not holder:
            self._release_gathered_again()

    def hold_until_backward_ends(self, holder: Holder) -> None:
        """Release the slots of a pass whose copies are gathered again in the running backward no later than at its end."""
        self._gathered_again = holder
        # For every pass, since a backward pass that breaks off never calls back.
        call_after_backward(self._release_gathered_again)

    def _release_gathered_again(self) -> None:
        if self._gathered_again is not None:
            self._gathered_again.release()
            self._gathered_again = None


def lasting(transport: Transport, size: Sequence[int], like: Tensor) -> Tensor:
    """Memory that outlives the forward that asks for it: one in inference mode must not forbid training to write to it."""
    with torch.inference_mode(False):
        return transport.empty(size, like)
