"""Routers: which experts a token goes to, with which weight, and the losses that keep the choice healthy.

Shape letters: T tokens of this rank's micro-batch, D model dim, E experts, K choices per token, R ranks.
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...kernels import gate_scores, histogram, on_device, topk_gate
from ...placement import ExpertLoad
from ..config import RouterConfig


@dataclass(frozen=True, slots=True, eq=False)
class Routing:
    """The decision for every token of a micro-batch."""

    topk_ids_TK: Tensor  # int64, K different experts a token
    weights_TK: Tensor  # fp32, differentiable
    logits_TE: Tensor | None = None  # fp32, differentiable; None for a router without scores
    lse_T: Tensor | None = None  # log-sum-exp of the logits, differentiable; None if the router has no use for it
    load_E: Tensor | None = None  # int64, assignments to every expert, where the router has counted them

    def counts_E(self, num_experts: int) -> Tensor:
        """Assignments to every expert, int64 [E]."""
        return histogram(self.topk_ids_TK, num_experts) if self.load_E is None else self.load_E


class Router(nn.Module, ABC):
    """What a layer asks of a router. Subclass it to bring your own."""

    @abstractmethod
    def forward(self, x_TD: Tensor, topk_ids_TK: Tensor | None = None) -> Routing:
        """Route `x_TD`. Under activation checkpointing the recomputation passes the ids that were decided before."""

    def loss(self, routing: Routing, load: ExpertLoad, rank: int) -> Tensor:
        """The router's own losses on this rank, a scalar; the mean over ranks is what is minimised."""
        return routing.weights_TK.new_zeros(())


class ScoringRouter(Router):
    """Scores from logits, the K best experts per token. Scores, softmax and weights are fp32 whatever the model's dtype.

    Subclasses say where the logits come from, fp32 under `torch.autocast` too.

    Args:
        num_experts: E.
        top_k: K, from 1 to E.
        config: scores, weights, groups, losses, forced balance.
    """

    def __init__(self, num_experts: int, top_k: int, config: RouterConfig):
        super().__init__()
        if not 1 <= top_k <= num_experts:
            raise ValueError(f"top_k is {top_k} with {num_experts} experts; it must be from 1 to {num_experts}")
        if num_experts % config.num_groups:
            raise ValueError(f"{num_experts} experts in {config.num_groups} groups; give a number of groups that divides them")
        group_size = num_experts // config.num_groups
        if config.num_groups > 1 and config.group_score == "top2" and group_size < 2:
            raise ValueError(f"{num_experts} experts in {config.num_groups} groups have no second best; set group_score to 'max'")
        if top_k > config.groups_per_token * group_size:
            raise ValueError(
                f"top_k is {top_k}, but {config.groups_per_token} groups of {group_size} experts hold only "
                f"{config.groups_per_token * group_size}; raise groups_per_token"
            )
        self.num_experts = num_experts
        self.top_k = top_k
        self.config = config

    @abstractmethod
    def logits(self, x_TD: Tensor) -> Tensor:
        """The router's logits, fp32 [T, E], differentiable."""

    def choice_bias(self) -> Tensor | None:
        """What is added to the scores when experts are chosen, and only then, [E]; None for nothing."""
        return None

    def forward(self, x_TD: Tensor, topk_ids_TK: Tensor | None = None) -> Routing:
        """Score, choose, weigh. Equal scores go to the lower expert id; in a choice by groups, where `torch.topk` sends them."""
        config, logits_TE = self.config, self.logits(x_TD)
        bias_E = None
        if topk_ids_TK is None:
            if config.force_balance:
                topk_ids_TK = balanced_ids(x_TD.shape[0], self.num_experts, self.top_k).to(x_TD.device)
            elif config.num_groups > 1:
                topk_ids_TK = self.choice_scores(logits_TE.detach()).topk(self.top_k, dim=-1).indices
            else:
                bias_E = self.choice_bias()
        gate = topk_gate(
            logits_TE,
            self.top_k,
            normalize=config.normalize_weights,
            score=config.score,
            bias_E=None if bias_E is None else bias_E.detach().float(),
            topk_ids_TK=topk_ids_TK,
            with_lse=config.z_loss_coef > 0,
        )
        weights_TK = gate.weights_TK if config.weight_scale == 1.0 else gate.weights_TK * config.weight_scale
        return Routing(gate.topk_ids_TK, weights_TK, logits_TE, gate.lse_T, gate.load_E)

    def choice_scores(self, logits_TE: Tensor) -> Tensor:
        """What the K best are chosen by, [T, E]: aux-loss-free bias and group-limited choice (arXiv 2412.19437, section 2.1.2).

        Experts of closed groups have -inf.
        """
        config, bias_E = self.config, self.choice_bias()
        if bias_E is None and config.num_groups == 1:
            return logits_TE  # scores rise with logits
        scores_TE = gate_scores(logits_TE, config.score)
        if bias_E is not None:
            scores_TE = scores_TE + bias_E
        if config.num_groups > 1:
            grouped_TGN = scores_TE.unflatten(1, (config.num_groups, -1))
            best = grouped_TGN.topk(2 if config.group_score == "top2" else 1, dim=-1).values.sum(dim=-1)
            is_open_TG = torch.zeros_like(best, dtype=torch.bool)
            is_open_TG.scatter_(1, best.topk(config.groups_per_token, dim=-1).indices, True)
            scores_TE = grouped_TGN.masked_fill(~is_open_TG[:, :, None], -torch.inf).flatten(1)
        return scores_TE

    def loss(self, routing: Routing, load: ExpertLoad, rank: int) -> Tensor:
        """Balancing loss E * sum_e f_e p_e, plus z-loss mean(logsumexp(logits)^2), each times its coefficient.

        f_e is the share of assignments that expert e got and p_e the mean of its score, as a share of its token's, over this
        rank's micro-batch or over the micro-batches of all ranks (`aux_loss_scope`). In the global scope a rank returns R times
        its part, so that the mean over ranks, which data parallelism takes, is exactly the loss of the whole batch: the
        frequencies carry no gradient, so one process and R processes minimise the same number. The z-loss is weighted alike.
        """
        assert routing.logits_TE is not None
        config, logits_TE = self.config, routing.logits_TE
        loss = logits_TE.new_zeros(())
        is_global = config.aux_loss_scope == "global_batch"
        counts_E = load.totals_E if is_global else load.load_RE[rank]
        # Also without any: what is saved for backward, and with it where a recomputation ends, is the same on every rank.
        num_assignments = max(int(counts_E.sum()), 1)
        num_tokens = num_assignments / self.top_k / (load.num_ranks if is_global else 1)
        if config.aux_loss_coef:
            frequency_E = on_device((counts_E / num_assignments).astype(np.float32), logits_TE.device)
            scores_TE = gate_scores(logits_TE, config.score)
            if config.score == "sigmoid":
                scores_TE = scores_TE / scores_TE.sum(dim=-1, keepdim=True)
            score_E = scores_TE.sum(dim=0) / num_tokens
            loss = loss + config.aux_loss_coef * self.num_experts * (frequency_E * score_E).sum()
        if config.z_loss_coef:
            assert routing.lse_T is not None
            loss = loss + config.z_loss_coef * routing.lse_T.square().sum() / num_tokens
        return loss


class TopKRouter(ScoringRouter):
    """The router of `MoELayer`: one weight vector per expert.

    Args:
        dim: width D of a token.
        num_experts, top_k, config: see `ScoringRouter`.
    """

    def __init__(self, dim: int, num_experts: int, top_k: int, config: RouterConfig):
        super().__init__(num_experts, top_k, config)
        self.weight = nn.Parameter(torch.empty(num_experts, dim))
        nn.init.normal_(self.weight, std=dim**-0.5)

    def logits(self, x_TD: Tensor) -> Tensor:
        """See `ScoringRouter.logits`."""
        with torch.autocast(x_TD.device.type, enabled=False):
            return F.linear(x_TD.float(), self.weight.float())


def balanced_ids(num_tokens: int, num_experts: int, top_k: int, *, seed: int = 0) -> Tensor:
    """Ids of a perfectly balanced routing, int64 [T, K]: every expert as often as any other, K different ones a token.

    In blocks of E tokens, token i takes the experts (i + offset_k) mod E with K different offsets drawn per block, and the
    tokens are shuffled, so that neighbours in expert order are no more often chosen together than others are.
    """
    generator = torch.Generator().manual_seed(seed)
    num_blocks = -(-num_tokens // num_experts)
    offsets_BK = torch.rand(num_blocks, num_experts, generator=generator).argsort(dim=1)[:, :top_k]
    ids_TK = (torch.arange(num_experts)[None, :, None] + offsets_BK[:, None, :]) % num_experts
    ids_TK = ids_TK.reshape(-1, top_k)[:num_tokens]
    return ids_TK[torch.randperm(num_tokens, generator=generator)]
