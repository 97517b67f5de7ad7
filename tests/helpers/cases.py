"""Generated cases: shapes, owners, placements and tokens of a small MoE model on R ranks."""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from hypothesis import strategies as st
from torch import Tensor

from moesaic import MoELayer, RouterConfig, Routing, RuntimeConfig
from moesaic.kernels import Clamp
from moesaic.placement import OwnerMap, Placement, Problem, Solver, Topology, get_solver
from moesaic.runtime.adapters import FoundLayer
from moesaic.runtime.experts.bank import Bank
from moesaic.runtime.group import RankGroup
from moesaic.runtime.routing.capacity import DropPolicy
from moesaic.runtime.routing.router import TopKRouter
from moesaic.runtime.stages import StageClock
from moesaic.runtime.wrap.shard import build_runtimes, share_layers

PLACEMENTS = ("static", "everywhere", "random", "hecate", "quota")


class BiasedRouter(TopKRouter):
    """Chooses by score plus a bias and weighs by score alone, so that a hot expert does not saturate the softmax."""

    def __init__(self, dim: int, num_experts: int, top_k: int, config: RouterConfig):
        super().__init__(dim, num_experts, top_k, config)
        self.bias_E = torch.zeros(num_experts)

    def forward(self, x_TD: Tensor, topk_ids_TK: Tensor | None = None) -> Routing:
        if topk_ids_TK is None:
            topk_ids_TK = (x_TD.detach() @ self.weight.detach().T + self.bias_E).topk(self.top_k, dim=-1).indices
        return super().forward(x_TD, topk_ids_TK)


@dataclass(frozen=True)
class Case:
    """One model on R ranks. Ranks have different numbers of tokens, zero included."""

    world_size: int
    num_experts: int
    top_k: int
    num_layers: int
    tokens_R: tuple[int, ...]
    placement: str
    hot_expert: bool  # every token prefers one expert
    any_owner: bool  # a random owner map, so that a rank may own nothing; else contiguous
    normalize: bool
    seed: int
    capacity_factor: float = math.inf
    drop_policy: DropPolicy = "probs"
    has_shared: bool = False
    clamp: Clamp | None = None
    dim: int = 8
    ffn_dim: int = 12

    @property
    def slots(self) -> int:
        """The budget: two copies a rank for the solvers, as many as they like for the placements that ignore it."""
        return 2 if self.placement in ("static", "hecate", "quota") else self.num_experts

    def layers(self) -> list[MoELayer]:
        """The unsharded layers, the same wherever they are made."""
        generator = torch.Generator().manual_seed(self.seed)
        config = RouterConfig(normalize_weights=self.normalize, aux_loss_coef=0.0)
        layers = []
        for _ in range(self.num_layers):
            router = BiasedRouter(self.dim, self.num_experts, self.top_k, config)
            if self.hot_expert:
                router.bias_E[self.num_experts // 2] = 100.0
            layers.append(
                MoELayer(
                    self.dim,
                    self.ffn_dim,
                    self.num_experts,
                    self.top_k,
                    router=router,
                    shared=torch.nn.Linear(self.dim, self.dim) if self.has_shared else None,
                    clamp=self.clamp,
                    capacity_factor=self.capacity_factor,
                    drop_policy=self.drop_policy,
                )
            )
        with torch.no_grad():
            for layer in layers:
                for parameter in layer.parameters():
                    parameter.copy_(torch.randn(parameter.shape, generator=generator) * parameter.shape[-1] ** -0.5)
        return layers

    def owners(self) -> OwnerMap:
        if not self.any_owner:
            return OwnerMap.contiguous(self.num_layers, self.num_experts, self.world_size)
        random = np.random.default_rng(self.seed)
        return OwnerMap(random.integers(0, self.world_size, (self.num_layers, self.num_experts)), self.world_size)

    def tokens(self, rank: int, batch: int = 0) -> Tensor:
        """Inputs of one rank and micro-batch, [T, D]."""
        generator = torch.Generator().manual_seed(1000 * self.seed + 10 * rank + batch)
        return torch.randn(self.tokens_R[rank], self.dim, generator=generator)

    def solver(self) -> Callable[[Problem], Any]:
        """The placement policy; 'random' draws new copies at every call. Each rank must make its own."""
        random = np.random.default_rng(self.seed)

        def solve(problem: Problem) -> Any:
            owners_E, num_ranks = problem.expert_to_owner_E, problem.num_ranks
            placement = Placement.everywhere(owners_E, num_ranks)
            if self.placement == "random":
                chosen_RE = random.random((num_ranks, problem.num_experts)) < 0.4
                placement = Placement(owners_E, chosen_RE | Placement.owners_only(owners_E, num_ranks).replicas_RE)
            return SimpleNamespace(placement=placement)

        return solve if self.placement in ("random", "everywhere") else get_solver(self.placement)

    def topology(self) -> Topology:
        """Links so fast that copies pay at this size; ranks of different speed where the seed is even."""
        costs = np.random.default_rng(self.seed).integers(50, 300, self.world_size).tolist()
        return Topology(
            num_nodes=1,
            ranks_per_node=self.world_size,
            device_bytes_per_s=1e15,
            node_bytes_per_s=1e15,
            latency_s=0.0,
            flops_per_s=1e6,
            half_rate_rows=0,
            rank_costs=() if self.seed % 2 else tuple(costs),
        )


@st.composite
def cases(draw: st.DrawFn, max_world_size: int = 4, min_world_size: int = 1) -> Case:
    """Any small model on `min_world_size` to `max_world_size` ranks."""
    world_size = draw(st.integers(min_world_size, max_world_size))
    num_experts = draw(st.integers(1, 7))
    return Case(
        world_size=world_size,
        num_experts=num_experts,
        top_k=draw(st.integers(1, num_experts)),
        num_layers=draw(st.integers(1, 2)),
        tokens_R=tuple(draw(st.lists(st.integers(0, 9), min_size=world_size, max_size=world_size))),
        placement=draw(st.sampled_from(PLACEMENTS)),
        hot_expert=draw(st.booleans()),
        any_owner=draw(st.booleans()),
        normalize=draw(st.booleans()),
        seed=draw(st.integers(0, 1000)),
        capacity_factor=draw(st.sampled_from((math.inf, 0.3, 1.0))),
        drop_policy=draw(st.sampled_from(("probs", "position"))),
        has_shared=draw(st.booleans()),
    )


def share_experts(
    layers: Mapping[str, MoELayer],
    group: RankGroup,
    *,
    config: RuntimeConfig,
    solver: Solver | None = None,
    clock: StageClock | None = None,
    **given: Any,
) -> list[Bank]:
    """Share the experts of layers, without a model around them and by static placement if no solver is given; their banks."""
    found = [FoundLayer(name, layer.experts, layer.experts.source()) for name, layer in layers.items()]
    solvers = {"given": solver or get_solver("static")}
    runtimes = build_runtimes(found, group, config=config, solvers=solvers, clock=clock or StageClock(), **given)
    share_layers(found, runtimes)
    return list(dict.fromkeys(runtime.bank for runtime in runtimes.values()))
