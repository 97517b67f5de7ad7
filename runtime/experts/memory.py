"""How much memory slots take: the peak, predicted, and what fits into a budget.

A bank's layers share one pool of expert-sized buffers, for copies, their gradients, and staging for others' gradients. Slots are
counted for one forward in flight and its backward; every further one in flight (interleaved micro-batches) holds the copies
that its kept layers keep.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

from ..config import RuntimeConfig

AUTO_SLOTS = 4
"""The most slots that "auto" takes: on recorded routing 2 slots bring max/mean to 1.02, 4 to 1.01 and are no longer filled."""


@dataclass(frozen=True)
class BankSize:
    """The sizes of a bank: bytes of one expert's copy and gradient, ranks, its layers' places in the model."""

    copy_bytes: int
    gradient_bytes: int
    world_size: int
    layers: tuple[int, ...]


@dataclass(frozen=True)
class SlotPlan:
    """Slots per layer, and how many of the model's last layers keep their copies until backward."""

    slots: int
    num_kept: int
    num_layers: int

    def keeps(self, layer: int) -> bool:
        """Whether the model's MoE layer number `layer` keeps its copies until backward."""
        return layer >= self.num_layers - self.num_kept

    def peak_bytes(self, banks: Sequence[BankSize]) -> int:
        """Bytes of all banks' pools at their peaks; see `peak_slot_bytes`."""
        return sum(peak_slot_bytes(bank, sum(map(self.keeps, bank.layers)), self.slots) for bank in banks)


def peak_slot_bytes(bank: BankSize, num_kept: int, slots: int) -> int:
    """Bytes that one forward and its backward take at most, when the last `num_kept` layers of a bank keep their copies.

    The worst moment is the reduce of a layer: the gradients of its copies are being sent and as many received in staging,
    while other kept layers' copies wait, or the copies of the layer that is next in backward come in again.

        keep all of L layers       (L - 1) * slots + slots + staging
        re-materialize             slots + slots + staging, and that much leaves room for two layers to keep theirs

    Copies that are narrower than gradients do not make room for them: every kept layer's count beside those of gradients.
    """
    if not slots or bank.world_size == 1:
        return 0
    num_layers = len(bank.layers)
    num_others = max(num_kept - 1, 1 if num_kept < num_layers > 1 else 0)
    if bank.copy_bytes != bank.gradient_bytes:
        num_others = max(num_kept, 1)
    return num_others * slots * bank.copy_bytes + (slots + staging_limit(slots)) * bank.gradient_bytes


def plan_slots(config: RuntimeConfig, banks: Sequence[BankSize]) -> SlotPlan:
    """Slots and kept layers by the configuration's rule; integers in, so every rank reaches the same.

    "rematerialize" keeps the last layer's copies alone, whose backward comes at once. "auto" keeps as many as fit into
    `slot_bytes`, counted from the last. Slots that are "auto" come first: as many as fit with the fewest layers kept.

    Raises:
        ValueError: what was asked for does not fit into `slot_bytes`.
    """
    num_layers, budget = sum(len(bank.layers) for bank in banks), config.slot_bytes
    fewest = num_layers if config.materialize == "keep" else 1
    choices = range(AUTO_SLOTS, 0, -1) if config.slots == "auto" else (config.slots,)
    plans = [SlotPlan(slots, fewest, num_layers) for slots in choices]
    plan = next((plan for plan in plans if not budget or plan.peak_bytes(banks) <= budget), None)
    if plan is None:
        cure = "lower runtime.slots" if fewest == 1 else "lower runtime.slots, or set runtime.materialize='auto'"
        raise ValueError(
            f"runtime.slot_bytes is {budget}, but runtime.slots {plans[-1].slots} in {num_layers} MoE layers takes up to "
            f"{plans[-1].peak_bytes(banks)} bytes with runtime.materialize {config.materialize!r}; raise it, {cure}"
        )
    if config.materialize == "auto":
        kept = (replace(plan, num_kept=num_kept) for num_kept in range(num_layers, 0, -1))
        plan = next((p for p in kept if p.peak_bytes(banks) <= budget), plan)
    return plan


def staging_limit(slots: int) -> int:
    """Buffers that a reduce may receive in: as many as slots, and two where there is one, for the sum and what is added to it.

    That stays within `peak_slot_bytes`, since a layer's own copies have been given back before its reduce.
    """
    return max(slots, 2)
