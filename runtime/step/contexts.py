"""What passes read: of the model, and of the layer."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch

from ...kernels import Activation
from ..agreement import Agreement, PassId
from ..config import DebugConfig
from ..dispatch.handle import DispatchHandle
from ..experts.bank import Bank
from ..experts.grads import PendingReduces
from ..experts.slots import Holder, SlotPool
from ..group import RankGroup
from ..routing.capacity import Capacity
from ..stages import StageClock
from .metrics import LayerCounters
from .planning import LayerPlanner
from .work_ahead import WorkAhead


@dataclass(frozen=True, eq=False)
class ModelContext:
    """What all MoE layers of a model share: ranks, clock of the stages, agreement of the ranks, reduces in flight."""

    group: RankGroup
    clock: StageClock
    agreement: Agreement
    reduces: PendingReduces
    debug: DebugConfig
    gather_hides: float = 1.0
    """The share of a gather beside work that costs no time."""

    @property
    def wire(self) -> torch.dtype | None:
        """The dtype that gradients of copies travel in; None: their own."""
        return torch.bfloat16 if self.debug.reduce_wire == "bf16" else None


@dataclass(eq=False)
class LayerContext:
    """What the passes of one layer share.

    Args:
        name: the layer's name in its model.
        index: the layer's index in the bank.
        num_experts: E.
        model: what the model's layers share.
        bank, pool: the owned experts, and the slots, which the layers of the bank share.
        activation: of its experts; None: SwiGLU.
        planner, work_ahead, counters, capacity: the layer's own.
        make_handle: builds the routes of tokens; `direct_handle` or `by_node_handle`.
        keeps_copies: whether copies stay until backward, or are released after forward and gathered again.
        gradient_divisor: what this rank's gradients are divided by before those of all ranks are summed: the number of ranks, for
            the mean of the ranks' losses, until the dense part is sharded with another divisor.
        under_way: the pass whose forward runs, or broke off.
        adapts: whether forwards compute with the experts' adapters, where there are some.
    """

    name: str
    index: int
    num_experts: int
    model: ModelContext
    bank: Bank
    pool: SlotPool
    activation: Activation | None
    planner: LayerPlanner
    work_ahead: WorkAhead
    counters: LayerCounters
    capacity: Capacity
    make_handle: Callable[..., DispatchHandle]
    keeps_copies: bool
    gradient_divisor: Callable[[], float]
    under_way: Holder | None = None
    adapts: bool = True

    @contextmanager
    def stage(self, pass_id: PassId, name: str, is_complete: bool = True) -> Iterator[None]:
        """The clock and profiler range of one stage; in training, its waits for other ranks are counted.

        `is_complete`: the stage is over at the end, and not only launched.
        """
        clock, tokens, experts = self.model.clock, self.model.group.tokens.traffic, self.model.group.experts.traffic
        tokens_s, experts_s = tokens.waited_s, experts.waited_s
        with clock.stage(name, self.name):
            yield
        if is_complete:
            clock.completed = name, pass_id.where
        if pass_id.is_training:
            self.counters.exposed_s["tokens"] += tokens.waited_s - tokens_s
            self.counters.exposed_s["reduce" if name == "reduce" else "gather"] += experts.waited_s - experts_s
