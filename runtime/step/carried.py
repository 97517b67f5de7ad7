"""Copies that stay in their slots between the micro-batches of a step: weights that did not change are not gathered again.

Which copies are here is known on every rank from the plans of the passes before. All ranks must therefore agree on when weights
change: with every optimizer step and everything else that calls `Bank.weights_changed`. Gradients go home with every
micro-batch, so a copy may leave whenever a plan does not want it any more.

Shape letters: R ranks, E experts.
"""

from __future__ import annotations

from ...collectives import Schedule
from ...placement import Placement, added_copies
from ..experts.bank import Bank
from ..experts.expert import ExpertTensors
from ..experts.slots import SlotPool
from .layer_pass import LayerPass
from .planning import LayerPlanner


class CarriedCopies:
    """The copies of a layer's last training pass, which passes in flight may share.

    Args:
        bank: whose weights they are.
        pool: the slots they lie in.
        layer: the layer's index in the bank.
        planner: makes the schedules of the gathers that are left.
    """

    def __init__(self, bank: Bank, layer: int, pool: SlotPool, planner: LayerPlanner):
        self._bank, self._layer, self._pool, self._planner = bank, layer, pool, planner
        self._placement: Placement | None = None
        self._slots: dict[int, ExpertTensors] = {}
        self._generation = -1
        self._version: tuple[int, ...] = ()

    def lend(self, layer_pass: LayerPass) -> Schedule:
        """Give a new pass the copies that it wants and that are here; return the gather of those that are not.

        Raises:
            RuntimeError: weights were written to in place, which other ranks may not know.
        """
        plan = layer_pass.plan
        if self._generation != self._bank.generation:
            self.drop()
        elif self._version != self._bank.version(self._layer):
            raise RuntimeError(
                f"{layer_pass.where}: experts' weights were changed in place between micro-batches, whose copies are reused; "
                "call handle.step() on every rank afterwards, or set runtime.reuse_copies=False"
            )
        if self._placement is None:
            return plan.gather
        wanted = plan.copies_of(self._bank.rank)
        for expert in self._slots.keys() - set(wanted):
            self._pool.release(self._slots.pop(expert))
        layer_pass.copies = {expert: self._pool.share(slot) for expert, slot in self._slots.items()}
        missing = added_copies(plan.placement, self._placement)
        return plan.gather if missing == plan.placement else self._planner.gather_of(missing)[1]

    def keep(self, layer_pass: LayerPass) -> None:
        """Carry the copies of this pass on, and no others."""
        shared = {expert: self._pool.share(slot) for expert, slot in layer_pass.copies.items()}
        self.drop()
        self._placement, self._slots = layer_pass.plan.placement, shared
        self._generation, self._version = self._bank.generation, self._bank.version(self._layer)

    def drop(self) -> None:
        """Carry nothing on."""
        for slot in self._slots.values():
            self._pool.release(slot)
        self._placement, self._slots = None, {}
