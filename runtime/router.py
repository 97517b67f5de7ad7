"""Routers: which experts a token goes to, with which weight, and the losses that keep the choice healthy.

Shape letters: T tokens of this rank's micro-batch, D model dim, E experts, K choices per token, R ranks.
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..placement import ExpertLoad
from .config import RouterConfig


@dataclass(frozen=True, slots=True, eq=False)
class Routing:
    """The decision for every token of a micro-batch."""

    topk_ids_TK: Tensor  # int64, K different experts a token
    weights_TK: Tensor  # fp32, differentiable
    logits_TE: Tensor | None = None  # fp32, differentiable; None for a router without scores

    def counts_E(self, num_experts: int) -> Tensor:
        """Assignments to every expert, int64 [E]."""
        return torch.bincount(self.topk_ids_TK.flatten(), minlength=num_experts)


class Router(nn.Module, ABC):
    """What a layer asks of a router. Subclass it to bring your own."""

    @abstractmethod
    def forward(self, x_TD: Tensor, topk_ids_TK: Tensor | None = None) -> Routing:
        """Route `x_TD`. Under activation checkpointing the recomputation passes the ids that were decided before."""

    def loss(self, routing: Routing, load: ExpertLoad, rank: int) -> Tensor:
        """The router's own losses on this rank, a scalar; the mean over ranks is what is minimised."""
        return routing.weights_TK.new_zeros(())


class TopKRouter(Router):
    """Softmax scores, the K best experts per token. Logits, softmax and weights are fp32 whatever the model's dtype.

    Args:
        dim: width D of a token.
        num_experts: E.
        top_k: K, from 1 to E.
        config: weights, losses, forced balance.
    """

    def __init__(self, dim: int, num_experts: int, top_k: int, config: RouterConfig):
        super().__init__()
        if not 1 <= top_k <= num_experts:
            raise ValueError(f"top_k is {top_k} with {num_experts} experts; it must be from 1 to {num_experts}")
        self.num_experts = num_experts
        self.top_k = top_k
        self.config = config
        self.weight = nn.Parameter(torch.empty(num_experts, dim))
        nn.init.normal_(self.weight, std=dim**-0.5)

    def forward(self, x_TD: Tensor, topk_ids_TK: Tensor | None = None) -> Routing:
        """Score, choose, weigh. Ties go where `torch.topk` sends them, the same way every time."""
        logits_TE = F.linear(x_TD.float(), self.weight.float())
        if topk_ids_TK is None:
            if self.config.force_balance:
                topk_ids_TK = balanced_ids(x_TD.shape[0], self.num_experts, self.top_k).to(x_TD.device)
            else:
                topk_ids_TK = logits_TE.detach().topk(self.top_k, dim=-1).indices
        if self.config.normalize_weights:
            # The softmax over the chosen experts equals the softmax over all, renormalised.
            weights_TK = logits_TE.gather(1, topk_ids_TK).softmax(dim=-1)
        else:
            weights_TK = logits_TE.softmax(dim=-1).gather(1, topk_ids_TK)
        return Routing(topk_ids_TK, weights_TK, logits_TE)

    def loss(self, routing: Routing, load: ExpertLoad, rank: int) -> Tensor:
        """Balancing loss E * sum_e f_e p_e, plus z-loss mean(logsumexp(logits)^2), each times its coefficient.

        f_e is the share of assignments that expert e got and p_e the mean of its softmax score, over this rank's
        micro-batch or over the micro-batches of all ranks (`aux_loss_scope`). In the global scope a rank returns R times
        its part, so that the mean over ranks, which data parallelism takes, is exactly the loss of the whole batch: the
        frequencies carry no gradient, so one process and R processes minimise the same number. The z-loss is weighted alike.
        """
        assert routing.logits_TE is not None
        config, logits_TE = self.config, routing.logits_TE
        loss = logits_TE.new_zeros(())
        is_global = config.aux_loss_scope == "global_batch"
        counts_E = load.totals_E if is_global else load.load_RE[rank]
        num_assignments = int(counts_E.sum())
        if num_assignments == 0:
            return loss + 0.0 * logits_TE.sum()
        num_tokens = num_assignments / self.top_k / (load.num_ranks if is_global else 1)
        if config.aux_loss_coef:
            frequency_E = torch.as_tensor(counts_E / num_assignments, dtype=torch.float32, device=logits_TE.device)
            score_E = logits_TE.softmax(dim=-1).sum(dim=0) / num_tokens
            loss = loss + config.aux_loss_coef * self.num_experts * (frequency_E * score_E).sum()
        if config.z_loss_coef:
            loss = loss + config.z_loss_coef * logits_TE.logsumexp(dim=-1).square().sum() / num_tokens
        return loss


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
