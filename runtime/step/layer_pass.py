"""One forward of one layer, and the backward that belongs to it.

The pass holds what both must agree on: the routing decision, the plan, the routes of tokens, and the slots. Backward finds it
on the autograd nodes of its own forward, so interleaved micro-batches cannot be confused, and a recomputation finds the passes
that it repeats with its checkpoint (replay.py).

[Note: the order of collectives] Every rank enters the collectives of one transport in one order, which follows from the program,
never from what the rank holds: ranks without tokens, copies or experts enter them all the same. Two flags decide besides, and are
the same on all ranks: whether the plan has further copies, and whether any rank trains an expert of the layer.

    experts   gather (launched ahead) | further copies, after the counts || gather again, if released | reduce, at the very end
    tokens    counts | metadata | tokens out | outputs back              || gradients out | gradients back, with those of gates
    replicas  counts of all groups, for the router's losses, after the forward

A reduce is waited for by the layer that is next in backward, or at the end of the backward pass.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import replace
from functools import partial
from time import perf_counter

import torch
from torch import Tensor

from ...kernels import FFNWeights, activated_ffn, activated_ffn_backward, grouped_ffn, grouped_ffn_backward, histogram
from ...placement import ExpertLoad
from .._compat import keeps_graph
from ..agreement import PassId
from ..dispatch.exchange import Direction, TokenExchange, drain_unfinished
from ..dispatch.handle import DispatchHandle
from ..experts.grads import ExpertGrads
from ..experts.replicas import PassExperts, Replicas
from ..routing.router import Router, Routing
from .autograd import Combine, Dispatch, Experts
from .contexts import LayerContext
from .planning import Plan
from .work_ahead import Moment


class LayerPass:
    """One forward and its backward. Holds nothing that leads into the graph, so that no reference cycle keeps a graph alive."""

    def __init__(self, layer: LayerContext, pass_id: PassId, plan: Plan):
        gathering, reducing = (partial(layer.stage, pass_id, stage) for stage in ("materialize", "reduce"))
        of = PassExperts(layer.bank, layer.index, layer.pool, layer.model.group.experts, pass_id.where)
        self.layer, self.id, self.planned = layer, pass_id, plan
        self.replicas = Replicas(of, gathering, overlap=layer.model.debug.overlap)
        self.grads = ExpertGrads(of, pass_id.op("reduce"), reducing, wire=layer.model.wire)
        self._launched: Moment | None = None
        self.is_replay = False  # an activation checkpoint repeats the forward, for a backward that is next
        self.adapts = True  # computes with adapters, where there are some
        self.topk_ids_TK: Tensor | None = None
        self.load: ExpertLoad | None = None
        self.load_of_all: ExpertLoad | None = None  # with the ranks of the replicas' groups
        self.handle: DispatchHandle | None = None
        self.tokens: TokenExchange | None = None
        self.token_grads: TokenExchange | None = None
        self.after_backward: Callable[[], None] | None = None  # launches what the layer that is next in backward needs

    def stage(self, name: str, is_complete: bool = True) -> AbstractContextManager[None]:
        """The clock of one stage; see `LayerContext.stage`."""
        return self.layer.stage(self.id, name, is_complete)

    # The forward, in the order of its verbs

    def gather(self) -> None:
        """Borrow slots for this rank's copies and launch the gather that fills them. All ranks at the same point."""
        self._launched = self._moment()
        self.replicas.launch(self._copies, self.planned.gather, self.id.op("gather"))

    def gather_again(self) -> None:
        """In backward: the same for copies that were released. All ranks at the same point."""
        self.replicas.launch_again(self._copies, self.planned.gather, self.id.op("regather"))

    def _moment(self) -> Moment | None:
        """Now, where the work ahead of the layer is observed: in training."""
        return self.layer.work_ahead.moment(self.layer.bank.device) if self.id.is_training else None

    @property
    def _copies(self) -> tuple[int, ...]:
        return self.planned.copies_of(self.layer.model.group.rank)

    def route(self, router: Router, x_TD: Tensor) -> Routing:
        """Choose experts; a recomputation repeats the choice that was made."""
        with self.stage("route"):
            routing = router(x_TD, self.topk_ids_TK)
            self.topk_ids_TK = routing.topk_ids_TK
            return routing

    def plan(self, topk_ids_TK: Tensor, counts_E: Tensor | None = None) -> None:
        """Gather the exact load, and split it, as far as experts take it, over the copies and those that calibration adds.

        `counts_E`: assignments to every expert, where they were counted already. A recomputation keeps the forward's plan.
        """
        if self.planned.split is not None:
            return
        layer, self.adapts = self.layer, self.layer.adapts
        self.topk_ids_TK = topk_ids_TK
        self.load = self._measure(histogram(topk_ids_TK, layer.num_experts) if counts_E is None else counts_E)
        with self.stage("plan"), layer.counters.planning():
            kept = layer.capacity.limit(self.load)
            self.planned = layer.planner.split(self.planned, kept)
            if self.id.is_training:
                error = layer.planner.observe(kept)
                layer.counters.count(self.planned, self.load, kept, error)
        if self.planned.added is not None:
            self.replicas.launch(self._copies, self.planned.added, self.id.op("calibrate"))

    def _measure(self, counts_E: Tensor) -> ExpertLoad:
        """Every rank's counts [R, E], and with them whether any rank trains experts of the layer, and what it observed."""
        layer, pass_id = self.layer, self.id
        bank, traffic = layer.bank, layer.model.group.tokens.traffic
        with self.stage("plan"):
            start_s = perf_counter()
            routed = self._moment()
            flags = int(self.adapts and bank.is_trainable(layer.index)) | layer.work_ahead.own_ns << 1
            gathered = layer.model.agreement.gather_counts(counts_E, pass_id, flags=flags)
            end_s = perf_counter()
            traffic.add_wait(pass_id.op("measure"), pass_id.where, start_s, end_s, start_s, end_s)
        trains_R = gathered.flags_R & 1
        self.grads.is_trained = bool(trains_R.any())
        bank.expert_ranks.learning[pass_id.layer_name] = trains_R != 0
        if self._launched is not None and routed is not None:
            overlap_s = layer.work_ahead.observe(self._launched, routed, gathered.flags_R >> 1)
            if overlap_s is not None:
                layer.planner.set_overlap(overlap_s)
        return ExpertLoad(gathered.host_Rn)

    def dispatch(self, x_TD: Tensor, weights_TK: Tensor) -> Tensor:
        """Launch every token, in the compute dtype, to where its experts are computed. Returns the dependency of `experts`."""
        anchor = self.grads.anchor(x_TD.device)
        return Dispatch.apply(x_TD.to(self.layer.bank.compute_dtype), weights_TK, anchor, self)

    def experts(self, dep: Tensor) -> Tensor:
        """Run this rank's experts on the tokens that arrive, and launch the outputs back. Returns the dependency of `combine`."""
        assert self.tokens is not None
        self.tokens.wait()  # before the copies, so that their gather also travels under the tokens
        self.replicas.wait()
        return Experts.apply(dep, self)

    def combine(self, dep: Tensor) -> Tensor:
        """Add up the outputs of every token [T, D], and release copies that no backward needs, or only later."""
        y_TD = Combine.apply(dep, self)
        if self.layer.under_way is self:
            self.layer.under_way = None
        # A recomputation keeps what was gathered for it, as its backward is next.
        if not torch.is_grad_enabled() or not (self.layer.keeps_copies or self.is_replay):
            self.replicas.release()
        return y_TD

    def release(self) -> None:
        """Give back the slots of a pass whose forward never came, or broke off."""
        self.replicas.release()

    def router_loss(self, router: Router, routing: Routing) -> Tensor:
        """The router's losses on this rank. A global batch is that of all replicas, group after group."""
        model, pass_id, load = self.layer.model, self.id, self.load
        assert load is not None
        replicas, rank = model.group.replicas, model.group.rank
        if replicas.world_size > 1:
            if self.load_of_all is None:
                counts = torch.from_numpy(load.load_RE.flatten()).to(self.layer.bank.device)
                loads = model.agreement.gather_loads(counts, pass_id)
                self.load_of_all = ExpertLoad(loads.host_Rn.reshape(-1, load.num_experts))
            load, rank = self.load_of_all, replicas.rank * load.num_ranks + rank
        return router.loss(routing, load, rank)

    # The stages of the three autograd nodes, see autograd.py

    def send_tokens(self, x_TD: Tensor, weights_TK: Tensor) -> None:
        """Forward of `Dispatch`. The routes are described in the forward, and kept by a recomputation."""
        transport, plan = self.layer.model.group.tokens, self.planned
        with self.stage("dispatch", False):
            drain_unfinished(transport)
            if self.handle is None:
                assert plan.split is not None and self.topk_ids_TK is not None
                ids_TK = self.layer.capacity.kept_ids(self.topk_ids_TK, weights_TK, self.layer.num_experts)
                here, op = plan.experts_of(transport.rank), self.id.op("describe")
                self.handle = self.layer.make_handle(ids_TK, weights_TK, plan.split, here, transport, op, self.id.where)
        self.tokens = self._exchange(self.handle, ("dispatch", "dispatch"), ("combine", "combine"))
        self.tokens.send(x_TD)

    def compute(self) -> tuple[Tensor, ...]:
        """Forward of `Experts`."""
        assert self.tokens is not None and self.handle is not None
        x_ND, handle, activation = self.tokens.take(), self.handle, self.layer.activation
        with self.stage("experts"):
            run = grouped_ffn if activation is None else partial(activated_ffn, activation=activation)
            output = run(x_ND, handle.gate_weights_N, self._weights(handle), handle.group_sizes)
        self.tokens.send_back(output.y_ND, launch=not self.is_replay)
        return x_ND, output.gate_up_N2F

    def combine_outputs(self) -> Tensor:
        """Forward of `Combine`."""
        assert self.tokens is not None
        tokens, self.tokens = self.tokens, None
        return tokens.combine().x_TD

    def send_gradients(self, dy_TD: Tensor) -> None:
        """Backward of `Combine`.

        Raises:
            RuntimeError: the backward is to be differentiated itself, or follows one that let go of the graph.
        """
        if torch.is_grad_enabled():
            raise RuntimeError(
                f"{self.id.where}: backward ran with create_graph=True, but experts have no second derivatives; "
                "leave create_graph out, or keep the layer out of what is differentiated twice"
            )
        if self.handle is None:
            raise RuntimeError(
                f"{self.id.where}: backward ran a second time through one forward; "
                "give retain_graph=True to the first, or run the forward again"
            )
        self.gather_again()
        with self.stage("combine", False):
            drain_unfinished(self.layer.model.group.tokens)
        self.token_grads = self._exchange(self.handle, ("combine", "combine_backward"), ("dispatch", "dispatch_backward"))
        self.token_grads.send(dy_TD.contiguous())
        self.token_grads.wait()

    def compute_gradients(self, *saved: Tensor) -> None:
        """Backward of `Experts`. Weights' gradients are written where they belong: in the bank's rows, or in copies' buffers."""
        assert self.token_grads is not None and self.handle is not None
        self.tokens = None  # that of a recomputation which ended behind the experts
        (x_ND, gate_up_N2F), handle, activation = saved, self.handle, self.layer.activation
        self.replicas.check_weights_unchanged()
        self.layer.model.reduces.make_room()
        self.replicas.wait()
        dy_ND = self.token_grads.take()
        with self.stage("experts"):
            run = grouped_ffn_backward if activation is None else partial(activated_ffn_backward, activation=activation)
            targets = self.grads.targets(handle.experts, tuple(self.replicas.slots))
            grads = run(
                dy_ND,
                x_ND,
                gate_up_N2F,
                handle.gate_weights_N,
                self._weights(handle),
                targets.tensors if targets else None,
                handle.group_sizes,
                # The loss of the group is the mean of its ranks' losses, as FSDP takes it for the dense parameters.
                alpha=1.0 / self.layer.gradient_divisor(),
                overwrite=targets.overwrite if targets else None,
            )
        self.token_grads.send_back(grads.dx_ND, grads.drow_weights_N)

    def combine_gradients(self) -> tuple[Tensor, Tensor]:
        """Backward of `Dispatch`, the last of the pass. It launches the reduce.

        Not earlier: the next layer in backward waits for token gradients, and for no weight gradients yet. The reduce, and the
        copies of the next layer, travel under the work between the two.
        """
        assert self.token_grads is not None and self.handle is not None
        combined, handle = self.token_grads.combine(), self.handle
        self.token_grads = None
        if self.grads.is_reached:
            self.replicas.release()
            self.grads.launch(self.planned.reduce)
            self.layer.model.reduces.add(self.grads)
        if not keeps_graph():
            # No other backward comes. A reference to the loss, kept to print it later, keeps the graph, and with it the pass.
            self.replicas.release()
            self.handle = None
        if self.after_backward is not None:
            self.after_backward()
        assert combined.gate_grads_A is not None
        return combined.x_TD, combined.gate_grads_A.view(handle.num_tokens, handle.top_k)

    def _weights(self, handle: DispatchHandle) -> FFNWeights:
        """Of this rank's experts, without their adapters where these are switched off."""
        weights = self.replicas.weights(handle.experts)
        return weights if self.adapts else replace(weights, gate_up_low_rank=None, down_low_rank=None)

    def _exchange(self, handle: DispatchHandle, out: tuple[str, str], back: tuple[str, str]) -> TokenExchange:
        """A round trip whose ways are stages, and traffic of these names."""
        model, pass_id = self.layer.model, self.id
        out_way, back_way = (Direction(stage, pass_id.op(op)) for stage, op in (out, back))
        clock = partial(self.layer.stage, pass_id)
        return TokenExchange(handle, model.group.tokens, out_way, back_way, pass_id.where, clock, overlap=model.debug.overlap)
