"""Gradients of one layer's experts in one backward: where they are written, and the sparse reduce-scatter to the owners.

The SparseReduceScatter is the transpose of the gather, and adds straight into the gradient rows of the owners' banks (Hecate,
arXiv 2502.02581, section 3).
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.autograd.graph import Node, get_gradient_edge

from ...collectives import Pending, Schedule, sparse_reduce_scatter
from ...kernels import FFNWeights
from .._compat import call_after_backward, current_backward_id, will_run
from .expert import ExpertTensors, group_weights
from .replicas import PassExperts


@dataclass(frozen=True)
class GradTargets:
    """The buffers of this rank's expert gradients, a group each, and which of them hold nothing yet."""

    tensors: FFNWeights
    overwrite: tuple[bool, ...]


class ExpertGrads:
    """The gradients of one pass: one backward at a time.

    Args:
        of: the layer and pass.
        op: the name of the traffic.
        clock: the clock of the stage "reduce".
        wire: the dtype that gradients travel in; their own by default.
    """

    def __init__(self, of: PassExperts, op: str, clock: Callable[[], AbstractContextManager[None]], *, wire: torch.dtype | None):
        self._of, self._op, self._clock, self._wire = of, op, clock, wire
        self.backward_id = -1  # the last backward pass that reached the experts and adds to `.grad`
        self.is_trained = True  # some rank trains a weight of an expert of the layer; the same on every rank
        self._anchor: Node | None = None  # runs in those backward passes that add to `.grad`
        self._of_copies: dict[int, ExpertTensors] = {}
        self._staging: list[ExpertTensors] = []
        self._sums: dict[int, Sequence[Tensor]] = {}  # where the reduce adds those of owned experts
        self._reduce: Pending | None = None

    def anchor(self, device: torch.device) -> Tensor:
        """A scalar leaf for the graph of a forward. If it requires grad, so does all that depends on it.

        It makes the backward of every stage run on every rank, also where no input of the layer requires grad and where no token
        arrived: all ranks must enter every collective.
        """
        leaf = torch.zeros((), device=device, requires_grad=torch.is_grad_enabled())
        if leaf.requires_grad and self._anchor is None:  # not that of a recomputation, whose graph no backward runs through
            self._anchor = get_gradient_edge(leaf).node
        return leaf

    def targets(self, experts: Sequence[int], copies: Sequence[int]) -> GradTargets | None:
        """Owned experts: their rows of the bank's gradient. Copies: borrowed buffers, which the reduce sends to the owners.

        None when the experts are frozen, and in a backward that adds to no `.grad`: `torch.autograd.grad`, or one with `inputs`.
        """
        assert self._anchor is not None
        if not will_run(self._anchor):
            return None
        self.backward_id = current_backward_id()
        if not self.is_trained:
            return None
        bank = self._of.bank
        is_empty = bank.begin_grads(self._of.layer)
        self._of_copies = {e: self._buffer() for e in experts if e in copies}
        targets = [self._of_copies.get(e) or bank.grads(self._of.layer, e) for e in experts]
        return GradTargets(group_weights(targets, bank.shape), tuple(e in self._of_copies or is_empty[e] for e in experts))

    def _buffer(self) -> ExpertTensors:
        return self._of.pool.acquire(self._of.bank.gradient_like, of_gradients=True)

    @property
    def is_reached(self) -> bool:
        """Whether the running backward pass adds to `.grad` and has reached the experts."""
        return self.backward_id == current_backward_id()

    def launch(self, schedule: Schedule) -> None:
        """Launch the reduce. The copies' weights are not needed any more, and have given their slots back."""
        if not self.is_trained:
            return
        bank = self._of.bank
        with self._clock():
            self._staging = [self._buffer() for _ in range(schedule.most_received(bank.rank))]
            self._sums = {e: bank.grads(self._of.layer, e).tensors() for e in bank.owned(self._of.layer)}
            self._reduce = sparse_reduce_scatter(
                schedule,
                self._of.transport,
                {e: slot.tensors() for e, slot in self._of_copies.items()},
                self._sums,
                [slot.tensors() for slot in self._staging],
                op=self._op,
                where=self._of.where,
                wire=self._wire,
            )

    def finish(self, *, discard: bool = False) -> None:
        """Wait until the owners' gradient rows hold every contribution; with `discard`, see there."""
        with self._clock():
            if discard:
                self.discard()
            if self._reduce is not None:
                self._reduce.wait()
            for slot in (*self._of_copies.values(), *self._staging):
                self._of.pool.release(slot)
            self._reduce, self._of_copies, self._staging, self._sums = None, {}, [], {}

    def discard(self) -> None:
        """Redirect contributions still in flight to a scratch buffer. The reduce must still be finished: peers may depend on this
        rank to forward them."""
        if self._reduce is not None:
            scratch = self._buffer()
            self._staging.append(scratch)
            self._sums |= dict.fromkeys(self._sums, scratch.tensors())  # in place: the reduce reads it as sums complete


class PendingReduces:
    """The reduces in flight of one model; all its layers share it.

    Each is launched at the end of its layer's backward, and waited for as late as its buffers and its gradient rows allow: when
    the layer before it begins the backward of its experts, so that a reduce travels under the attention's backward; the last
    one when the backward pass is complete, so that `.grad` is. All ranks wait at the same point of the program, since a waiting
    rank may depend on another to forward sums. At most one layer's reduce is in flight, which `memory.peak_slot_bytes` has room
    for, and no layer adds to gradient rows that a reduce of its own still adds to.

    The reduces of a backward pass that breaks off add nothing from then on, as its gradients may be set to zero before all sums
    have arrived. They are finished with the next ones, or before the next forward.

    Args:
        overlap: False: wait right after the launch.
    """

    def __init__(self, *, overlap: bool = True):
        self._overlap = overlap
        self._grads: deque[ExpertGrads] = deque()

    def add(self, grads: ExpertGrads) -> None:
        """Queue a reduce that was just launched, in a backward pass; `make_room` was called before its layer's gradients."""
        self._grads.append(grads)
        if not self._overlap:
            self.finish()

    def make_room(self) -> None:
        """Before a layer begins its gradients: finish the reduces under way, and have its own finished at the end of the pass.

        Registered by every layer, since a backward pass that breaks off never calls back; and before the bank's callback, which
        needs complete gradients.
        """
        self.finish()
        call_after_backward(_EndOfBackward(self))

    def finish(self, backward_id: int | None = None) -> None:
        """Wait for every reduce under way. Then the owners' gradient rows hold all that backward pass `backward_id` has launched.

        That is the one that runs now, by default; outside of any, none.
        """
        backward_id = current_backward_id() if backward_id is None else backward_id
        while self._grads:
            grads = self._grads.popleft()
            grads.finish(discard=grads.backward_id != backward_id)

    def discard(self, backward_id: int) -> None:
        """Have the reduces of a backward pass that is over add nothing more, without waiting."""
        for grads in list(self._grads):
            if grads.backward_id == backward_id:
                grads.discard()


class _EndOfBackward:
    """Called when its backward pass is complete. One that breaks off drops it uncalled, before the exception leaves `backward`.

    That early, since a communication thread may add sums at any time, also to gradients that were set to zero meanwhile.
    """

    def __init__(self, reduces: PendingReduces):
        self._reduces, self._backward_id = reduces, current_backward_id()

    def __call__(self) -> None:
        self._reduces.finish(self._backward_id)

    def __del__(self) -> None:
        self._reduces.discard(self._backward_id)
