"""The Mixture-of-Experts layer."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from ..collectives import LocalTransport
from ..kernels import Clamp
from ..placement import OwnerMap, get_solver
from ._compat import outside_graphs
from .bank import Bank, ExpertShape, SlotPool
from .capacity import Capacity, DropPolicy
from .config import RouterConfig, RuntimeConfig
from .family import Family
from .group import single_rank_group
from .layer_runtime import LayerRuntime
from .reduces import PendingReduces
from .rematerialize import Rematerializer
from .router import Router, TopKRouter
from .stages import StageClock


class MoELayer(nn.Module):
    """An MoE feed-forward layer of SwiGLU experts, dropless by default: y = sum_k weight_k * expert_k(x) + shared(x).

    It runs as built on one process. `shard_experts` moves its experts into a bank that the ranks share; the forward below is
    the same then.

    Args:
        dim, ffn_dim: D and F; one expert is gate_up [2F, D] and down [D, F].
        num_experts, top_k: E, and K of them per token.
        router: how tokens choose, or a router module of your own.
        clamp: gives experts biases and the clamped activation of GPT-OSS, with these constants.
        shared: a module [T, D] to [T, D] that every token passes besides (shared experts).
        capacity_factor, drop_policy: how much experts take of each rank's micro-batch, and whom they turn away; see `Capacity`.
            inf: nobody.
        device, dtype: of the experts' weights. The router's weight is created with torch's defaults.
    """

    def __init__(
        self,
        dim: int,
        ffn_dim: int,
        num_experts: int,
        top_k: int,
        *,
        router: RouterConfig | Router | None = None,
        shared: nn.Module | None = None,
        clamp: Clamp | None = None,
        capacity_factor: float = math.inf,
        drop_policy: DropPolicy = "probs",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__()
        if not isinstance(router, Router):
            router = TopKRouter(dim, num_experts, top_k, router or RouterConfig())
        self.dim = dim
        self.ffn_dim = ffn_dim
        self.num_experts = num_experts
        self.top_k = top_k
        self.router = router
        self.shared = shared
        self.capacity = Capacity(capacity_factor, drop_policy)
        shape = ExpertShape(dim, ffn_dim, clamp)
        self.experts: Bank | None = Bank(shape, OwnerMap.contiguous(1, num_experts, 1), 0, device=device, dtype=dtype)
        self.experts.reset_parameters()
        self.family = Family()
        """How the layer's weights are called where the model comes from; an adapter sets it."""
        self.aux_loss: Tensor | None = None
        """The router's losses of the last forward, differentiable; `Handle.aux_loss` sums them over layers."""
        config = RuntimeConfig(policy="static", slots=0)
        self.runtime = LayerRuntime(
            "layer",
            self.experts,
            0,
            top_k,
            group=single_rank_group(),
            solver=get_solver(config.policy, keeps_owners=True),
            config=config,
            pool=SlotPool(shape, LocalTransport()),
            clock=StageClock(),
            reduces=PendingReduces(),
            rematerializer=Rematerializer(),
            capacity=self.capacity,
        )

    @outside_graphs
    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run hooks and `forward` as they are: a compiled model has one graph before the layer and one behind it."""
        return super().__call__(*args, **kwargs)

    def forward(self, x: Tensor) -> Tensor:
        """Apply the layer to every token of `x` [..., D]; the result has its dtype.

        Raises:
            ValueError: `x` has another width.
        """
        runtime = self.runtime
        if x.shape[-1:] != (self.dim,):
            name, shape = runtime.name, tuple(x.shape)
            raise ValueError(f"{name} takes tokens of width {self.dim}, but x is {shape}; project x, or build the layer for it")
        x_TD = x.reshape(-1, self.dim)
        this = runtime.begin(is_training=self.training)
        x_TD, token = runtime.enter(x_TD, this)
        routing = runtime.route(self.router, x_TD, this)
        load = runtime.measure(routing, this)
        runtime.plan(load, this)
        link, crossing = runtime.begin_dispatch(x_TD, routing, this)
        # The shared experts need none of the rows that are on their way.
        shared_TD = None if self.shared is None else self.shared(x_TD)
        # After the first rows have arrived, so that the gather also travels under them; unless experts at home are first, which
        # need their weights while rows travel.
        crossing.rows.arrived(0)
        token = runtime.materialize(token, this)
        link = runtime.experts(link, token, crossing)
        y_TD = runtime.combine(link, crossing).to(x.dtype)
        if shared_TD is not None:
            y_TD = y_TD + shared_TD
        # A recomputation must save what the forward saved, so it computes the loss too, but it is the forward's that counts.
        aux_loss = runtime.router_loss(self.router, routing, load, this)
        if not this.is_replay:
            self.aux_loss = aux_loss
        return y_TD.view_as(x)
