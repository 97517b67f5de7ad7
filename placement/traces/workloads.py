"""The workloads of a public imbalance benchmark, W0 to W7: which experts the tokens of a rank choose in a step.

They are those of NVIDIA/Megatron-LM's benchmarks/moe/token_imbalance (pull request 7488), a variable each:

| name | varies | the experts of a token t in step s | tokens of the ranks |
|---|---|---|---|
| w0 | nothing: the control | round-robin, in an order drawn for every E tokens | equal |
| w1 | heat of experts | hot: of H experts that the seed draws | equal |
| w2 | heat of a rank | hot: of the first H experts, all on rank 0 while owners are contiguous | equal |
| w3 | where the heat is | hot: of H experts at equal distances, thus on all ranks | equal |
| w4 | sources | as w0 | as 1 to 2 to ... to R |
| w5 | zero load | all: of the last E - E // 2 experts (of K, if they are fewer) | rank 0 none, the others equal |
| w6 | the hot place | hot: of the H experts from (s // 3) H on, modulo E: it moves every 3 steps | equal |
| w7 | bursts | in the last step of every 4, each second token: of the first H experts | equal |

Where the table says hot, these are 3 of 4 tokens (t % 4 > 0). A token takes K different experts of those named, each set as
likely as any other; tokens of which the table says nothing take them of all E. H = max(K, E // max(4, R)).

The shares 3 of 4 and 1 of 2, E // 4, the half of w5, the 3 steps of w6 and the 4 of w7 are the pull request's. There w1 draws
from the same first block as w2, and w3 from every second expert; here the three are equally hot, in different places. There w0
has one order, so that neighbours are always chosen together, w4 does not say how ragged it is, and all ranks of w5 have tokens.

Shape letters: T tokens of a rank, K experts per token, E experts, R ranks, H hot experts, B blocks of E tokens.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from .dealing import apportion

WORKLOADS = ("w0", "w1", "w2", "w3", "w4", "w5", "w6", "w7")


@dataclass(frozen=True, kw_only=True)
class Workload:
    """A workload of `WORKLOADS` in one layer. A function of these fields and the step, so that every rank makes its own part.

    tokens_per_rank: the mean over ranks.
    """

    name: str
    num_ranks: int
    num_experts: int
    top_k: int
    tokens_per_rank: int
    seed: int = 0
    layer: int = 0

    @property
    def tokens_R(self) -> np.ndarray:
        """Tokens of every rank, the same in every step, int64 [R]."""
        shares_R = np.ones(self.num_ranks)
        if self.name == "w4":
            shares_R += np.arange(self.num_ranks)
        elif self.name == "w5" and self.num_ranks > 1:
            shares_R[0] = 0.0
        return apportion(shares_R[None], self.tokens_per_rank * self.num_ranks)[0]

    def topk_ids(self, rank: int, step: int) -> np.ndarray:
        """The experts of a rank's tokens in a step, K different ones a token: int64 [T, K]."""
        rng = np.random.default_rng([WORKLOADS.index(self.name), self.seed, self.layer, step, rank])
        token_T, expert_E = np.arange(self.tokens_R[rank]), np.arange(self.num_experts)
        if self.name in ("w0", "w4"):
            orders_BE = rng.permuted(np.tile(expert_E, (token_T.size // expert_E.size + 1, 1)), axis=1)
            place_TK = token_T[:, None] * self.top_k + np.arange(self.top_k)
            return orders_BE[token_T[:, None] // expert_E.size, place_TK % expert_E.size]
        is_hot_T = token_T % 4 > 0
        if self.name == "w5":
            is_hot_T[:] = True
        elif self.name == "w7":
            is_hot_T = (token_T % 2 == 0) & (step % 4 == 3)
        ids_TK = self._choose(expert_E, token_T.size, rng)
        ids_TK[is_hot_T] = self._choose(self._hot_experts(step), int(is_hot_T.sum()), rng)
        return ids_TK

    def load_RE(self, step: int) -> np.ndarray:
        """Assignments by source rank and expert in a step, int64 [R, E]."""
        ids = (self.topk_ids(rank, step).ravel() for rank in range(self.num_ranks))
        return np.stack([np.bincount(ids_N, minlength=self.num_experts) for ids_N in ids])

    def _hot_experts(self, step: int) -> np.ndarray:
        """The experts that hot tokens choose from, all different."""
        E, K = self.num_experts, self.top_k
        hot_H = np.arange(max(K, E // max(4, self.num_ranks)))
        match self.name:
            case "w1":
                return np.random.default_rng([self.seed, self.layer]).permutation(E)[: hot_H.size]
            case "w3":
                return hot_H * E // hot_H.size
            case "w5":
                return np.arange(E - max(K, E - E // 2), E)
            case "w6":
                return (step // 3 * hot_H.size + hot_H) % E
        return hot_H

    def _choose(self, experts_P: np.ndarray, num_tokens: int, rng: np.random.Generator) -> np.ndarray:
        """K different experts of P for every token, each set as likely: those of the K smallest of P random numbers."""
        random_TP = rng.random((num_tokens, experts_P.size), dtype=np.float32)
        return experts_P[np.argpartition(random_TP, self.top_k - 1, axis=1)[:, : self.top_k]]
