"""The exact split put to work on one rank: which of its assignments go to which replica, and in which row order.

The plan says how many of this rank's assignments of expert e go to rank r (`flow_ER`). The first `flow[e, 0]` assignments
of e, in token order, go to rank 0, the next `flow[e, 1]` to rank 1, and so on. Rows are sent sorted by (rank, expert,
token), so each receiver finds its experts' rows together.

Shapes: T tokens, K top-k, E experts, R ranks, N = T * K assignments; assignment n is (token n // K, choice n % K).
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from .checks import check_devices, check_ids, check_int32
from .histogram import histogram_torch


def split_tokens(topk_ids_TK: Tensor, flow_ER: Tensor) -> Tensor:
    """Return `order_N` (int64): the assignments in sending order, sorted by (destination rank, expert, token).

    `flow_ER` (integers) must sum over ranks to this rank's load of each expert; on the GPU that is the caller's word,
    since nothing is read back to the host. Example: `topk_ids = [[1], [0], [1]]`, `flow = [[0, 1], [1, 1]]` gives
    `order = [0, 1, 2]`: the first assignment of expert 1 goes to rank 0, then rank 1 gets expert 0's and the second.
    """
    if flow_ER.dim() != 2 or topk_ids_TK.dim() != 2:
        raise ValueError(
            f"split_tokens needs ids [T, K] and flow [E, R], got {tuple(topk_ids_TK.shape)} and {tuple(flow_ER.shape)}"
        )
    check_devices(topk_ids_TK.device, flow_ER=flow_ER)
    check_ids(topk_ids_TK=topk_ids_TK, flow_ER=flow_ER)
    check_int32("assignments", topk_ids_TK.numel(), "split the batch")
    check_int32("pieces of experts", flow_ER.numel(), "split over fewer ranks")
    if topk_ids_TK.device.type != "cuda":
        return split_tokens_torch(topk_ids_TK, flow_ER)
    from .split_tokens_triton import split_tokens_triton

    return split_tokens_triton(topk_ids_TK, flow_ER)


def split_tokens_torch(topk_ids_TK: Tensor, flow_ER: Tensor) -> Tensor:
    """Torch twin of `split_tokens`: one sort by expert, then whole runs are copied to their places."""
    E, R = flow_ER.shape
    ids_N = topk_ids_TK.flatten()
    load_E = histogram_torch(ids_N, E)
    if not torch.equal(load_E, flow_ER.sum(dim=1)):
        raise ValueError(f"flow sums to {flow_ER.sum(dim=1).tolist()} per expert, but the tokens chose {load_E.tolist()}")
    keys = ((ids_N.long() << 32) | torch.arange(ids_N.numel())).numpy()
    by_expert_N = torch.from_numpy(np.sort(keys)) & 0x7FFFFFFF
    # Run (r, e) of the result is piece (e, r) of the expert-major order.
    piece_start_ER = flow_ER.flatten().cumsum(0).view(E, R) - flow_ER
    sizes_RE = flow_ER.t().reshape(-1)
    run_start_RE = sizes_RE.cumsum(0) - sizes_RE
    shift_RE = piece_start_ER.t().reshape(-1) - run_start_RE
    return by_expert_N[torch.arange(ids_N.numel()) + shift_RE.repeat_interleave(sizes_RE)]
