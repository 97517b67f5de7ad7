"""What lasts of one MoE layer from pass to pass: its planner, its counters, and the passes under way."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Self
from weakref import ref

from ...kernels import Activation
from ...placement import LayerShape, Solver, Topology, get_solver
from ..agreement import Agreement, PassId
from ..config import DebugConfig, RuntimeConfig
from ..dispatch.by_node import by_node_handle
from ..dispatch.direct import direct_handle
from ..dispatch.handle import DispatchHandle
from ..experts.bank import Bank
from ..experts.expert import num_elements
from ..experts.grads import PendingReduces
from ..experts.replicas import ReplicaState
from ..experts.slots import SlotPool
from ..group import RankGroup
from ..routing.capacity import Capacity
from ..stages import StageClock
from .contexts import LayerContext, ModelContext
from .layer_pass import LayerPass
from .metrics import LayerCounters
from .planning import LayerPlanner
from .replay import note_forward, pass_being_recomputed
from .work_ahead import WorkAhead


class LayerRuntime:
    """Begins the passes of a layer, and launches their copies ahead.

    Args:
        name: the layer's name in its model, for errors and profiles.
        layer: the layer's index in the bank.
        top_k: experts per token.
        model: what the model's layers share.
        bank, pool: the owned experts, and the slots, which the layers of the bank share.
        solvers: place the copies, by name; of several the one that suits the layer.
        config: slots, and what `debug` says of plans and routes.
        activation: of the experts; SwiGLU by default.
        keeps_copies: whether copies stay until backward, or are released after forward and gathered again.
        capacity: how many tokens experts take; all by default.
    """

    def __init__(
        self,
        name: str,
        layer: int,
        top_k: int,
        model: ModelContext,
        bank: Bank,
        pool: SlotPool,
        *,
        solvers: Mapping[str, Solver],
        config: RuntimeConfig,
        activation: Activation | None = None,
        keeps_copies: bool = True,
        capacity: Capacity | None = None,
    ):
        topology = model.group.topology
        self.name = name
        self.layer = layer
        self.bank = bank
        self.pool = pool
        self.group = model.group
        self.agreement = model.agreement
        self.counters = LayerCounters(topology)
        owners_E = bank.owners.expert_to_owner_LE[layer]
        shape = _shape(bank, model, owners_E.size, top_k)
        timed = {solver: self.counters.timed(solve) for solver, solve in solvers.items()}
        self.planner = LayerPlanner(owners_E, topology, shape, timed, config)
        self.context = LayerContext(
            name=name,
            index=layer,
            num_experts=int(owners_E.size),
            model=model,
            bank=bank,
            pool=pool,
            activation=activation,
            planner=self.planner,
            work_ahead=WorkAhead(is_observed=_wants_work_ahead(bank, model, config), hides=model.gather_hides),
            counters=self.counters,
            capacity=capacity or Capacity(),
            make_handle=_handle_maker(model.debug, topology),
            keeps_copies=keeps_copies,
            gradient_divisor=lambda: model.group.world_size,
        )
        self.step = 0
        self._prefetched: LayerPass | None = None
        self._latest: ref[LayerPass] | None = None

    @classmethod
    def on_one_process(
        cls, bank: Bank, top_k: int, capacity: Capacity, group: RankGroup, activation: Activation | None = None
    ) -> Self:
        """A layer that is not sharded, on a bank of its own that holds every expert."""
        config, name, solvers = RuntimeConfig(policy="static", slots=0), "layer", {"static": get_solver("static")}
        agreement = Agreement(group, {name: bank.owners.num_experts})
        model = ModelContext(group, StageClock(), agreement, PendingReduces(), config.debug)
        pool = SlotPool(bank.shape, group.experts)
        return cls(name, 0, top_k, model, bank, pool, solvers=solvers, config=config, capacity=capacity, activation=activation)

    def follow_bank(self) -> None:
        """Plan by the bank's owner map, which has changed. No pass may be under way."""
        self.drop_prefetched()
        self.planner.change_owners(self.bank.owners.expert_to_owner_LE[self.layer])

    def begin(self, *, is_training: bool) -> LayerPass:
        """The pass of the forward that starts now: the prefetched one, a new one, or the one that is being recomputed."""
        replayed: LayerPass | None = pass_being_recomputed(self, self.name)
        if replayed is not None:
            replayed.is_replay = True
            if replayed.replicas.state is ReplicaState.RELEASED:
                # Not launched ahead, so another layer's backward may be first: there are slots for the reduce or for both.
                self.context.model.reduces.finish()
            replayed.gather_again()
            return replayed
        if self.context.under_way is not None:
            self.drop_prefetched()
        this, self._prefetched = self._prefetched or self._launch(is_training), None
        self.context.under_way = this
        self._latest = ref(this)
        note_forward(self, this)
        return this

    def prefetch(self, *, is_training: bool) -> LayerPass:
        """Place the next forward's copies and launch their gather. Every rank must call it at the same point."""
        self.drop_prefetched()
        self._prefetched = self._launch(is_training)
        return self._prefetched

    def drop_prefetched(self) -> None:
        """Before weights change: release copies whose forward never came, or broke off, and finish reduces whose backward did."""
        self.context.model.reduces.finish()
        for left in (self._prefetched, self.context.under_way):
            if left is not None:
                left.release()
        self._prefetched = self.context.under_way = None

    @property
    def num_experts(self) -> int:
        """E, over all ranks."""
        return self.context.num_experts

    @property
    def owned_experts(self) -> tuple[int, ...]:
        """The experts of the layer that this rank owns, ascending."""
        return tuple(self.bank.owned(self.layer))

    @property
    def latest_pass(self) -> LayerPass | None:
        """The pass of the last forward, as long as a backward of it may come."""
        return None if self._latest is None else self._latest()

    def _launch(self, is_training: bool) -> LayerPass:
        with self.context.model.clock.stage("plan", self.name), self.counters.planning():
            plan = self.planner.place(is_training=is_training)
            number = self.agreement.next_pass(self.name, self.step)
            self.bank.claim(self.layer)
            this = LayerPass(self.context, PassId(self.name, number, self.step, plan.number, is_training), plan)
        this.gather()
        return this


def _shape(bank: Bank, model: ModelContext, num_experts: int, top_k: int) -> LayerShape:
    gradient_bytes, shape = bank.gradient_like.element_size(), bank.shape
    # A token is sent to a rank once, however many of its experts are there. So where its K experts are on any ranks alike, one
    # more of them adds a row to a rank if none of the K - 1 others is there: of two experts on two ranks, in one case of two.
    num_ranks = model.group.world_size
    row_share = (1 - 1 / num_ranks) ** (top_k - 1) if num_ranks > 1 else 1.0
    return LayerShape(
        num_experts=num_experts,
        top_k=top_k,
        dim=shape.dim,
        ffn_dim=shape.ffn_dim,
        num_matrices=3 if shape.has_gate else 2,
        bytes_per_element=bank.compute_dtype.itemsize,
        gradient_bytes_per_element=gradient_bytes if model.wire is None else min(gradient_bytes, model.wire.itemsize),
        row_share=row_share,
        trained_share=num_elements(shape.gradient_sizes()) / num_elements(shape.base_sizes()),
    )


def _wants_work_ahead(bank: Bank, model: ModelContext, config: RuntimeConfig) -> bool:
    """Whether copies are priced by the work ahead, and travel beside it: on a device, or by a communication thread."""
    experts = model.group.experts
    is_beside = model.debug.overlap and (experts.thread is not None or bank.device.type != "cpu")
    return model.debug.overlap_s == "auto" and is_beside and bool(config.slots) and experts.world_size > 1


def _handle_maker(debug: DebugConfig, topology: Topology) -> Callable[..., DispatchHandle]:
    """The route of tokens: by node where there are several nodes of several ranks, otherwise straight to every rank."""
    by_node = (
        min(topology.num_nodes, topology.ranks_per_node) > 1 if debug.token_route == "auto" else debug.token_route == "by_node"
    )
    return partial(by_node_handle, ranks_per_node=topology.ranks_per_node) if by_node else direct_handle
