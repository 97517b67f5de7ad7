"""Capacity: the most assignments that an expert takes from one rank's micro-batch; what is above is dropped.

As in GShard (arXiv 2006.16668, section 2.2) and Megatron-Core (`moe_expert_capacity_factor`) a capacity is local: each rank's
micro-batch has its own, factor * T * K / E rounded up, so what a rank drops depends on its own tokens alone, and a token's fate
on which tokens share its micro-batch. One process with a whole batch therefore drops other tokens than several that share it.

Shape letters: T tokens of this rank's micro-batch, K choices per token, E experts, R ranks, A assignments (T * K).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from ...placement import ExpertLoad

DropPolicy = Literal["probs", "position"]


@dataclass(frozen=True)
class Capacity:
    """Expert capacity and drop policy.

    A dropped assignment adds nothing to its token's output; the gate weights of the token's other experts stay as they are, as in
    Megatron-Core. A token whose assignments are all dropped keeps what passes beside the experts: the residual, shared experts.
    The router's losses count what it chose, dropped or not.

    factor: times the mean load of an expert; inf: nothing is dropped.
    drop_policy: an expert that is asked for more keeps the assignments with the largest gate weights ("probs"), among equals
        the first tokens; or the first tokens ("position").
    """

    factor: float = math.inf
    drop_policy: DropPolicy = "probs"

    def __post_init__(self) -> None:
        if not self.factor > 0:
            raise ValueError(f"capacity_factor is {self.factor}; it must be more than 0, or inf to drop nothing")
        if self.drop_policy not in ("probs", "position"):
            raise ValueError(f"drop_policy is {self.drop_policy!r}; choose 'probs' or 'position'")

    def of(self, num_assignments: int, num_experts: int) -> int:
        """The most assignments of a micro-batch of so many that one expert takes.

        Example: 4 tokens of 2 choices on 3 experts at factor 1.25 are ceil(3.33) = 4.
        """
        share = num_assignments / num_experts
        return num_assignments if self.factor >= num_experts else math.ceil(share * self.factor)

    def limit(self, load: ExpertLoad) -> ExpertLoad:
        """What is left of a load that the routers chose."""
        most_R = [self.of(int(count), load.num_experts) for count in load.load_RE.sum(axis=1)]
        return ExpertLoad(np.minimum(load.load_RE, np.array(most_R, dtype=np.int64)[:, None]))

    def kept_ids(self, topk_ids_TK: Tensor, weights_TK: Tensor, num_experts: int) -> Tensor:
        """The choices of this rank's tokens with E, an expert that is none, in the place of those that are dropped."""
        ids_A, most = topk_ids_TK.flatten(), self.of(topk_ids_TK.numel(), num_experts)
        if most >= topk_ids_TK.shape[0]:
            return topk_ids_TK
        queue_A = torch.arange(ids_A.numel(), device=ids_A.device)
        if self.drop_policy == "probs":
            queue_A = weights_TK.detach().flatten().argsort(descending=True, stable=True)
        queue_A = queue_A[ids_A[queue_A].argsort(stable=True)]
        # Assignments by expert, the first of each first: its place in the queue is how far it is from its expert's first.
        counts_E = ids_A.bincount(minlength=num_experts)
        first_A = (counts_E.cumsum(0) - counts_E)[ids_A[queue_A]]
        is_dropped_A = torch.arange(ids_A.numel(), device=ids_A.device) - first_A >= most
        return ids_A.index_fill(0, queue_A[is_dropped_A], num_experts).view_as(topk_ids_TK)
