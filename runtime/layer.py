"""The Mixture-of-Experts layer."""

from __future__ import annotations

import math
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ..kernels import Activation, Clamp
from ._compat import outside_graphs, reshaped
from .config import RouterConfig
from .experts.expert import ExpertShape
from .naming import WeightNaming
from .renamed_members import renamed_members
from .routing.capacity import Capacity, DropPolicy
from .routing.router import Router, TopKRouter
from .sharded_experts import ShardedExperts
from .step.layer_runtime import LayerRuntime


@renamed_members(family="naming")
class MoELayer(nn.Module):
    """An MoE feed-forward layer, of SwiGLU experts and dropless by default: y = sum_k weight_k * expert_k(x) + shared(x).

    It runs as built on one process. `shard_experts` shares its experts among ranks; the forward below is the same then.

    Args:
        dim, ffn_dim: D and F; one expert is gate_up [2F, D] and down [D, F]; without a gate, gate_up is [F, D].
        num_experts, top_k: E, and K of them per token.
        router: how tokens choose, or a router module of your own.
        activation: of the experts, a function [N, 2F] to [N, F] of gate and up, or [N, F] to [N, F] without a gate; SwiGLU by
            default.
        has_gate: experts have one; without it give an activation.
        clamp: gives experts biases and the clamped activation of GPT-OSS, with these constants.
        shared: a module [T, D] to [T, D] that every token passes besides (shared experts).
        capacity_factor, drop_policy: an expert takes at most so many times the mean load from each rank's micro-batch; "probs"
            drops the assignments with the smallest gate weights, "position" those of the last tokens. inf drops nothing.
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
        activation: Activation | None = None,
        has_gate: bool = True,
        clamp: Clamp | None = None,
        capacity_factor: float = math.inf,
        drop_policy: DropPolicy = "probs",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__()
        if clamp is not None and (activation is not None or not has_gate):
            raise ValueError("clamp is an activation of experts with a gate; leave out activation, and has_gate=False")
        if not isinstance(router, Router):
            router = TopKRouter(dim, num_experts, top_k, router or RouterConfig())
        self.dim = dim
        self.ffn_dim = ffn_dim
        self.num_experts = num_experts
        self.top_k = top_k
        self.router = router
        self.shared = shared
        self.capacity = Capacity(capacity_factor, drop_policy)
        self.experts = ShardedExperts(
            ExpertShape(dim, ffn_dim, has_gate=has_gate, has_bias=clamp is not None),
            num_experts,
            top_k,
            activation=clamp or activation,
            capacity=self.capacity,
            device=device,
            dtype=dtype,
        )
        self.experts.runtime.bank.reset_parameters()
        self.aux_loss: Tensor | None = None
        """The router's losses, differentiable: of the last call, or, in a model that `shard_experts` returned a handle for, of
        all calls since the model's forward began. `Handle.aux_loss` sums them over layers."""
        self.sums_aux_loss = False
        """Whether the losses of several calls add up; a hook then sets `aux_loss` to None where the model's forward begins."""

    @property
    def naming(self) -> WeightNaming:
        """The names of the layer's weights in the model that the layer comes from; an adapter sets it."""
        return self.experts.naming

    @naming.setter
    def naming(self, naming: WeightNaming) -> None:
        self.experts.naming = naming

    @property
    def runtime(self) -> LayerRuntime:
        """What the experts run on."""
        return self.experts.runtime

    @outside_graphs
    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run hooks and `forward` as they are: a compiled model has one graph before the layer and one behind it."""
        return super().__call__(*args, **kwargs)

    def forward(self, x: Tensor) -> Tensor:
        """Apply the layer to every token of `x` [..., D]; the result has its dtype.

        Raises:
            ValueError: `x` has another width.
        """
        if x.shape[-1:] != (self.dim,):
            name, shape = self.runtime.name, tuple(x.shape)
            raise ValueError(f"{name} takes tokens of width {self.dim}, but x is {shape}; project x, or build the layer for it")
        x_TD = x.reshape(-1, self.dim)
        this = self.experts.begin()
        routing = this.route(self.router, x_TD)
        y_TD = self.experts(
            x_TD,
            routing.topk_ids_TK,
            routing.weights_TK,
            counts_E=routing.load_E,
            meanwhile=None if self.shared is None else partial(self.shared, x_TD),
            layer_pass=this,
        )
        # A recomputation must save what the forward saved, so it computes the loss too, but it is the forward's that counts.
        aux_loss = this.router_loss(self.router, routing)
        if not this.is_replay:
            self._note_aux_loss(aux_loss)
        return reshaped(y_TD, x.shape)

    def _note_aux_loss(self, loss: Tensor) -> None:
        before = self.aux_loss
        if before is not None and before.requires_grad and not loss.requires_grad:
            return  # An evaluation between a training forward and its loss leaves that one's.
        self.aux_loss = loss if before is None or not self.sums_aux_loss else before + loss

    def __getstate__(self) -> dict[str, Any]:
        """For deepcopy and pickle: without the losses of the last forward, which hold its graph."""
        return super().__getstate__() | {"aux_loss": None}


def moe_layers(model: nn.Module) -> dict[str, MoELayer]:
    """The `MoELayer`s of a model by name."""
    return {name: module for name, module in model.named_modules() if isinstance(module, MoELayer)}
