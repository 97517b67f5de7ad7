"""How assignments that were counted without ranks are dealt to ranks, and shares turned into whole assignments.

Shape letters: N groups (layers, or a layer's source ranks), R ranks, E experts.
"""

from __future__ import annotations

import numpy as np


def split_tokens(num_tokens_N: np.ndarray, num_ranks: int) -> np.ndarray:
    """Split tokens over ranks as evenly as whole tokens can be, the first ranks one more: int64 [N, R].

    Example: 5 tokens on 3 ranks: [2, 2, 1].
    """
    base_N, rest_N = np.divmod(num_tokens_N, num_ranks)
    return base_N[:, None] + (np.arange(num_ranks) < rest_N[:, None])


def deal(counts_NE: np.ndarray, num_ranks: int, num_tokens_N: np.ndarray | None = None, top_k: int = 1) -> np.ndarray:
    """Deal every expert's assignments to ranks one by one: int64 [N, R, E] with rows and columns as even as can be.

    Assignment j of a group, counted expert by expert, goes to rank j % R. Example: counts [3, 1] on 2 ranks: [[2, 0], [1, 1]].
    With num_tokens_N and top_k no rank gets more than the assignments of its tokens (`split_tokens`): where R does not divide
    the tokens, the `extra` assignments, which only the first ranks have tokens for, are taken from the sequence at even
    distances and dealt to those ranks alone. Example: counts [2, 1], 3 tokens of top-1 on 2 ranks: [[2, 0], [0, 1]].
    """
    total_N1 = counts_NE.sum(axis=1, keepdims=True)
    if num_tokens_N is None:
        rest_N1, extra_N1 = np.zeros_like(total_N1), np.zeros_like(total_N1)
    else:
        base_N, rest_N = np.divmod(num_tokens_N, num_ranks)
        rest_N1 = rest_N[:, None]
        extra_N1 = np.maximum(total_N1 - base_N[:, None] * top_k * num_ranks, 0)
    distance_N1 = total_N1 // np.maximum(extra_N1, 1)
    rank_R1 = np.arange(num_ranks)[:, None]

    def dealt_before(position_NE: np.ndarray) -> np.ndarray:
        """Count what each rank has been dealt before a position of the sequence: int64 [N, R, E]."""
        extra_NE = np.minimum(-(-position_NE // np.maximum(distance_N1, 1)), extra_N1)
        common_NE = position_NE - extra_NE
        common_NRE = (common_NE[:, None, :] - rank_R1 + num_ranks - 1) // num_ranks
        rest_N11 = np.maximum(rest_N1, 1)[:, None, :]
        extra_NRE = (extra_NE[:, None, :] - rank_R1 + rest_N11 - 1) // rest_N11
        return common_NRE + np.where(rank_R1 < rest_N1[:, None, :], extra_NRE, 0)

    end_NE = np.cumsum(counts_NE, axis=1)
    return dealt_before(end_NE) - dealt_before(end_NE - counts_NE)


def apportion(shares_LE: np.ndarray, total: int) -> np.ndarray:
    """Turn shares into whole counts that sum to `total` in every layer, int64 [L, E]: largest remainders, ties to the first."""
    exact_LE = shares_LE / shares_LE.sum(axis=1, keepdims=True) * total
    counts_LE = np.floor(exact_LE).astype(np.int64)
    for layer, left in enumerate(total - counts_LE.sum(axis=1)):
        counts_LE[layer, np.argsort(counts_LE[layer] - exact_LE[layer], kind="stable")[:left]] += 1
    return counts_LE
