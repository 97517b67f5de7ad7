"""Copies of other ranks' experts: gathered into slots for a forward, released, and gathered again for its backward.

The SparseAllGather is launched ahead of the forward and waited for before the experts compute (Hecate, arXiv 2502.02581,
section 3). Copies that were released after forward come in again for backward, from the same weights by the same schedule, into
slots that layers share (Hecate-RM, the same paper).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from enum import Enum, auto

from ...collectives import Pending, Schedule, Transport, sparse_all_gather
from ...kernels import FFNWeights
from .bank import Bank
from .expert import ExpertTensors, group_weights
from .slots import SlotPool


class ReplicaState(Enum):
    """The state of a pass's copies; the same on every rank, also on one whose plan has no copy."""

    RELEASED = auto()
    """No slot is held: not gathered yet, or given back."""
    GATHERING = auto()
    """Slots are held, and messages may be writing to them."""
    READY = auto()
    """Every slot holds its expert's weights."""


@dataclass(frozen=True, eq=False)
class PassExperts:
    """The experts of one layer in one pass, as their copies and gradients need them."""

    bank: Bank
    layer: int
    """The layer's index in the bank."""
    pool: SlotPool
    """Lends slots for copies and gradients."""
    transport: Transport
    """Carries them."""
    where: str
    """Step, layer and pass, for errors and the tags of messages."""


class Replicas:
    """The copies of one layer's experts with which this rank computes one pass.

    Args:
        of: the layer and pass.
        clock: the clock of the stage "materialize".
        overlap: False waits right after every launch.
    """

    def __init__(self, of: PassExperts, clock: Callable[[], AbstractContextManager[None]], *, overlap: bool):
        self._of, self._clock, self._overlap = of, clock, overlap
        self._gathers: list[Pending] = []
        self._version = of.bank.version(of.layer)
        self.state = ReplicaState.RELEASED
        self.slots: dict[int, ExpertTensors] = {}
        """By expert."""

    def launch(self, experts: Sequence[int], schedule: Schedule, op: str) -> None:
        """Borrow slots for those of the experts that have none yet, and launch the gather that fills them."""
        bank, layer = self._of.bank, self._of.layer
        with self._clock():
            new = {e: self._of.pool.acquire(like=bank.compute_like) for e in experts if e not in self.slots}
            self.slots |= new
            self.state = ReplicaState.GATHERING
            gather = sparse_all_gather(
                schedule,
                self._of.transport,
                {e: bank.compute_weights(layer, e).tensors() for e in bank.owned(layer)},
                {e: slot.tensors() for e, slot in new.items()},
                op=op,
                where=self._of.where,
            )
            self._gathers.append(gather)
            if not self._overlap:
                self._wait()

    def launch_again(self, experts: Sequence[int], schedule: Schedule, op: str) -> None:
        """In backward: gather the copies again, unless they are here or on their way. All ranks at the same point."""
        self._of.pool.release_others(self)
        if self.state is ReplicaState.RELEASED:
            self._of.pool.hold_until_backward_ends(self)
            self.launch(experts, schedule, op)

    def wait(self) -> None:
        """Return when every slot is filled."""
        with self._clock():
            self._wait()

    def _wait(self) -> None:
        for gather in self._gathers:
            gather.wait()
        self._gathers = []
        if self.state is ReplicaState.GATHERING:
            self.state = ReplicaState.READY

    def release(self) -> None:
        """Give the slots back, once they are filled: a message may be writing to them before."""
        if self.state is ReplicaState.GATHERING:
            self.wait()
        for slot in self.slots.values():
            self._of.pool.release(slot)
        self.slots, self.state = {}, ReplicaState.RELEASED

    def weights(self, experts: Sequence[int]) -> FFNWeights:
        """The weights of this rank's experts, a group each: owned ones in place in the bank, copies in their slots."""
        bank, layer = self._of.bank, self._of.layer
        return group_weights([self.slots.get(e) or bank.compute_weights(layer, e) for e in experts], bank.shape)

    def check_weights_unchanged(self) -> None:
        """Refuse a backward that would compute with other weights than its forward.

        Raises:
            RuntimeError: the experts' weights changed since the copies were gathered.
        """
        if self._version != self._of.bank.version(self._of.layer):
            raise RuntimeError(
                f"{self._of.where}: the experts' weights changed between this forward and its backward; "
                "call backward before optimizer.step(), before handle.step() and before weights are loaded"
            )
