"""What one MoE layer has of the runtime: its place in the bank, its planner, its passes and its counters."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from weakref import ref

import numpy as np
import torch
from torch import Tensor

from ...placement import ExpertLoad, LayerShape, Solver, Topology
from ..agreement import Agreement
from ..config import DebugConfig, RuntimeConfig
from ..dispatch.by_node import build_node_handle
from ..dispatch.direct import build_handle
from ..dispatch.handle import DispatchHandle
from ..experts.bank import Bank
from ..experts.slots import SlotPool
from ..group import RankGroup
from ..routing.capacity import Capacity
from ..routing.router import Router, Routing
from ..stages import StageClock
from .carried import CarriedCopies
from .experts import experts
from .layer_pass import LayerPass, note_forward, pass_being_recomputed
from .materialize import begin_calibrated, begin_materialize, enter, materialize, release_copies, wait_for_copies
from .metrics import LayerCounters
from .planning import LayerPlanner
from .reduces import PendingReduces
from .rematerialize import Rematerializer
from .token_rows import Crossing, begin_dispatch, combine


class LayerRuntime:
    """Everything a layer needs to run its experts on the ranks of a group.

    Args:
        name: the layer's name in its model, for errors and profiles.
        bank, layer: the bank that holds the layer's experts, and the layer's index in its owner map.
        top_k: experts per token.
        group: the ranks.
        solver: places the copies.
        config: slots, split rule, predictor.
        pool: lends slots; one per bank.
        clock: times the stages; one per model.
        reduces: waits for the reduces in flight; one per model.
        rematerializer: holds copies that were gathered again for backward; one per bank.
        keeps_copies: whether copies stay until backward, or are released after forward and gathered again.
        capacity: how much experts take; everything by default.
        agreement: of the ranks on what they are doing; one per model, by default that of a model of this layer alone.
    """

    def __init__(
        self,
        name: str,
        bank: Bank,
        layer: int,
        top_k: int,
        *,
        group: RankGroup,
        solver: Solver,
        config: RuntimeConfig,
        pool: SlotPool,
        clock: StageClock,
        reduces: PendingReduces,
        rematerializer: Rematerializer,
        keeps_copies: bool = True,
        capacity: Capacity | None = None,
        agreement: Agreement | None = None,
    ):
        self.name = name
        self.bank = bank
        self.layer = layer
        self.group = group
        self.pool = pool
        self.clock = clock
        self.reduces = reduces
        self.overlap = config.debug.overlap
        self.rematerializer = rematerializer
        self.keeps_copies = keeps_copies
        self.capacity = capacity or Capacity()
        self.counters = LayerCounters()
        owners_E = bank.owners.expert_to_owner_LE[layer]
        self.num_experts = int(owners_E.size)
        self.agreement = agreement or Agreement(group, {name: self.num_experts})
        self.owned_experts = _owned(owners_E, group.rank)
        gradient_bytes = bank.storage["gate_up"].element_size()
        self.reduce_wire = torch.bfloat16 if config.debug.reduce_wire == "bf16" else None
        shape = LayerShape(
            num_experts=self.num_experts,
            top_k=top_k,
            dim=bank.shape.dim,
            ffn_dim=bank.shape.ffn_dim,
            bytes_per_element=bank.compute_dtype.itemsize,
            gradient_bytes_per_element=gradient_bytes if self.reduce_wire is None else min(gradient_bytes, 2),
        )
        self.build_handle = _handle_builder(config.debug, group.topology)
        """Describes where rows travel; see `dispatch.build_handle`."""
        self.planner = LayerPlanner(owners_E, group.topology, shape, self.counters.timed(solver), config)
        self.carried = CarriedCopies(bank, layer, pool, self.planner) if config.reuse_copies and keeps_copies else None
        self.gradient_divisor: Callable[[], float] = lambda: group.world_size
        """What this rank's gradients are divided by before all ranks' are added up; the mean of the ranks' losses by default."""
        self.step = 0
        self._prefetched: LayerPass | None = None
        self._under_way: LayerPass | None = None  # from `begin` to the end of `combine`
        self._latest: ref[LayerPass] | None = None

    def follow_bank(self) -> None:
        """Go by the bank's owner map, which has changed. No pass may be under way."""
        self.drop_prefetched()
        if self.carried is not None:
            self.carried.drop()
        owners_E = self.bank.owners.expert_to_owner_LE[self.layer]
        self.owned_experts = _owned(owners_E, self.group.rank)
        self.planner.change_owners(owners_E)

    @contextmanager
    def stage(self, name: str, layer_pass: LayerPass, *, is_complete: bool = True) -> Iterator[None]:
        """The clock and profiler range of one stage of this layer; in training, what it waits for others is counted.

        `is_complete`: the stage is over at the end, and not only launched.
        """
        tokens, experts = self.group.tokens.traffic, self.group.experts.traffic
        tokens_s, experts_s = tokens.waited_s, experts.waited_s
        with self.clock.stage(name, self.name):
            yield
        if is_complete:
            self.clock.completed = name, layer_pass.where
        if layer_pass.is_training:
            self.counters.exposed_s["tokens"] += tokens.waited_s - tokens_s
            self.counters.exposed_s["reduce" if name == "reduce" else "gather"] += experts.waited_s - experts_s

    def prefetch(self, *, is_training: bool) -> LayerPass:
        """Place the next forward's copies and launch their gather. Every rank must call it at the same point."""
        self.drop_prefetched()
        self._prefetched = self._launch(is_training)
        return self._prefetched

    def drop_prefetched(self) -> None:
        """Take back copies whose forward never came, or broke off, before weights change; likewise reduces whose backward did."""
        self.reduces.finish()
        for left in (self._prefetched, self._under_way):
            if left is not None:
                with self.stage("materialize", left):
                    release_copies(self, left)
        self._prefetched = self._under_way = None

    def begin(self, *, is_training: bool) -> LayerPass:
        """The pass of the forward that starts now: the prefetched one, a new one, or the one that is being recomputed."""
        replayed = pass_being_recomputed(self)
        if replayed is not None:
            if not replayed.holds_copies:
                # Not launched ahead, so another layer's backward may be first: there are slots for the reduce or for both.
                self.reduces.finish()
            self.rematerialize(replayed)
            return replayed
        if self._under_way is not None:
            self.drop_prefetched()
        layer_pass, self._prefetched = self._prefetched or self._launch(is_training), None
        self._under_way = layer_pass
        self._latest = ref(layer_pass)
        note_forward(self, layer_pass)
        return layer_pass

    @property
    def latest_pass(self) -> LayerPass | None:
        """The pass of the last forward, as long as a backward of it may come."""
        return None if self._latest is None else self._latest()

    def rematerialize(self, layer_pass: LayerPass) -> None:
        """In backward: launch the gather of a pass's copies again, if they were released; see `rematerialize`."""
        self.rematerializer.launch(self, layer_pass)

    def enter(self, x_TD: Tensor, layer_pass: LayerPass) -> tuple[Tensor, Tensor]:
        """Tie the pass into the autograd graph; see `materialize.enter`."""
        return enter(x_TD, self, layer_pass)

    def route(self, router: Router, x_TD: Tensor, layer_pass: LayerPass) -> Routing:
        """Choose experts; a recomputation repeats the choice that was made."""
        with self.stage("route", layer_pass):
            routing = router(x_TD, layer_pass.topk_ids_TK)
            layer_pass.topk_ids_TK = routing.topk_ids_TK
            return routing

    def measure(self, counts_E: Tensor, layer_pass: LayerPass) -> ExpertLoad:
        """The exact load of the layer on all ranks, from this rank's int64 counts, gathered."""
        if layer_pass.load is None:
            with self.stage("plan", layer_pass):
                layer_pass.load = ExpertLoad(self._gathered(counts_E, layer_pass))
        return layer_pass.load

    def router_loss(self, router: Router, routing: Routing, layer_pass: LayerPass) -> Tensor:
        """The router's losses on this rank. A global batch is that of all replicas, group after group."""
        load, replicas, rank = layer_pass.load, self.group.replicas, self.group.rank
        assert load is not None
        if replicas.world_size > 1:
            if layer_pass.load_of_all is None:
                counts = torch.from_numpy(load.load_RE.flatten()).to(self.bank.device)
                place = self.name, layer_pass.number, self.step
                loads = self.agreement.gather_loads(counts, *place, is_training=layer_pass.is_training, where=layer_pass.where)
                layer_pass.load_of_all = ExpertLoad(loads.host_Rn.reshape(-1, load.num_experts))
            load, rank = layer_pass.load_of_all, replicas.rank * load.num_ranks + rank
        return router.loss(routing, load, rank)

    def plan(self, load: ExpertLoad, layer_pass: LayerPass) -> None:
        """Split the exact load, as far as experts take it, over the pass's copies, and over those that calibration adds.

        In training the planner and the counters learn from it.
        """
        if layer_pass.plan.split is not None:
            return
        with self.stage("plan", layer_pass), self.counters.planning():
            kept = self.capacity.limit(load)
            layer_pass.plan = self.planner.split(layer_pass.plan, kept)
            if layer_pass.is_training:
                error = self.planner.observe(kept)
                self.counters.count(layer_pass.plan, load, kept, error)
        if layer_pass.plan.added is not None:
            with self.stage("materialize", layer_pass):
                begin_calibrated(self, layer_pass, layer_pass.plan.added)
                if not self.overlap:
                    wait_for_copies(layer_pass)

    def materialize(self, token: Tensor, layer_pass: LayerPass) -> Tensor:
        """Have the copies at hand; see `materialize.materialize`."""
        return materialize(token, self, layer_pass)

    def describe(self, weights_TK: Tensor, layer_pass: LayerPass) -> DispatchHandle:
        """Learn where the pass's rows go, and what comes here; see `dispatch.build_handle`."""
        transport, plan, topk_ids_TK = self.group.tokens, layer_pass.plan, layer_pass.topk_ids_TK
        assert plan.split is not None and topk_ids_TK is not None
        kept_ids_TK = self.capacity.kept_ids(topk_ids_TK, weights_TK, self.num_experts)
        here, op = plan.experts_of(transport.rank), layer_pass.op("describe")
        return self.build_handle(kept_ids_TK, weights_TK, plan.split, here, transport, op, layer_pass.where)

    def begin_dispatch(self, x_TD: Tensor, weights_TK: Tensor, layer_pass: LayerPass) -> tuple[Tensor, Crossing]:
        """Launch rows, in the compute dtype, to where they are computed; see `token_rows.begin_dispatch`."""
        crossing = Crossing(self, layer_pass)
        return begin_dispatch(x_TD.to(self.bank.compute_dtype), weights_TK, crossing), crossing

    def experts(self, link: Tensor, token: Tensor, crossing: Crossing) -> Tensor:
        """Run the local experts; see `experts.experts`."""
        return experts(link, token, crossing)

    def combine(self, link: Tensor, crossing: Crossing) -> Tensor:
        """Bring results home; see `token_rows.combine`. Copies that no backward needs, or only later, are released."""
        y_TD, layer_pass = combine(link, crossing), crossing.layer_pass
        if self._under_way is layer_pass:
            self._under_way = None
        # A recomputation keeps what was gathered for it, as its backward is next.
        if not torch.is_grad_enabled() or not (self.keeps_copies or layer_pass.is_replay):
            release_copies(self, layer_pass)
        return y_TD

    def _launch(self, is_training: bool) -> LayerPass:
        with self.clock.stage("plan", self.name), self.counters.planning():
            plan = self.planner.place()
            number = self.agreement.next_pass(self.name, self.step)
            where = f"step {self.step}, {self.name}, plan {plan.number}, pass {number}"
            self.bank.claim(self.layer)
            layer_pass = LayerPass(where, plan, is_training, number, weights_version=self.bank.version(self.layer))
        with self.stage("materialize", layer_pass):
            begin_materialize(self, layer_pass)
            if not self.overlap:
                wait_for_copies(layer_pass)
        return layer_pass

    def _gathered(self, counts_E: Tensor, layer_pass: LayerPass) -> np.ndarray:
        """Every rank's counts [R, E], and with them whether any rank has experts that learn."""
        start_s, place = time.perf_counter(), (self.name, layer_pass.number, self.step)
        gathered = self.agreement.gather_counts(
            counts_E,
            *place,
            is_training=layer_pass.is_training,
            flags=int(self.bank.is_trainable(self.layer)),
            where=layer_pass.where,
        )
        end_s = time.perf_counter()
        self.group.tokens.traffic.add_wait(layer_pass.op("measure"), layer_pass.where, start_s, end_s, start_s, end_s)
        layer_pass.is_trained = bool(gathered.flags_R.any())
        self.bank.expert_ranks.learning[self.name] = gathered.flags_R != 0
        return gathered.host_Rn


def _handle_builder(debug: DebugConfig, topology: Topology) -> Callable[..., DispatchHandle]:
    """What describes where rows travel: by node or straight to every rank, and then in one part or in two.

    Two where the way is long enough for experts to hide it: between nodes.
    """
    num_nodes, ranks_per_node = topology.num_nodes, topology.ranks_per_node
    by_node = min(num_nodes, ranks_per_node) > 1 if debug.token_route == "auto" else debug.token_route == "by_node"
    if by_node and debug.row_parts == 2:
        raise ValueError(
            f"runtime.debug.row_parts is 2, but on {num_nodes} nodes of {ranks_per_node} ranks token rows go by node, in one "
            "part; set runtime.debug.row_parts='auto', or runtime.debug.token_route='direct'"
        )
    if by_node:
        return partial(build_node_handle, ranks_per_node=ranks_per_node)
    auto_parts = 2 if debug.overlap and num_nodes > 1 else 1
    return partial(build_handle, num_parts=auto_parts if debug.row_parts == "auto" else debug.row_parts)


def _owned(owners_E: np.ndarray, rank: int) -> tuple[int, ...]:
    return tuple(int(e) for e in np.flatnonzero(owners_E == rank))
