"""The exact split applied on one rank: which of its assignments go to which replica, and in which order.

The plan gives the number of this rank's assignments of expert e that go to rank r (`flow_ER`). The first `flow[e, 0]` assignments
of e, in token order, go to rank 0, the next `flow[e, 1]` to rank 1, and so on. Rows are sent sorted by (rank, expert, token), so
each receiver gets the rows of an expert contiguously. With anchors, (anchor, token) takes the place of token in both.

Shapes: T tokens, K top-k, E experts, R ranks, N = T * K assignments; assignment n is (token n // K, choice n % K). A of them are
sent: all, unless some have no expert.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from .checks import check_devices, check_ids, check_int32
from .histogram import histogram_torch


def split_tokens(
    topk_ids_TK: Tensor, flow_ER: Tensor, anchors_TK: Tensor | None = None, *, num_sent: int | None = None
) -> Tensor:
    """Return `order_A` (int64): the assignments in sending order, sorted by (destination rank, expert, token).

    `flow_ER` (integers) must sum over ranks to this rank's load of each expert; on the GPU this is not checked, because nothing
    is read back to the host. Example: `topk_ids = [[1], [0], [1]]`, `flow = [[0, 1], [1, 1]]` gives `order = [0, 1, 2]`: the
    first assignment of expert 1 goes to rank 0, then rank 1 gets expert 0's and the second.

    `anchors_TK` (integers in [0, R)) orders an expert's assignments by anchor first: with anchors [[1], [0], [0]] the order
    becomes [2, 1, 0]. With `num_sent`, A, assignments with id E have no expert and are left out.
    """
    if flow_ER.dim() != 2 or topk_ids_TK.dim() != 2:
        raise ValueError(
            f"split_tokens needs ids [T, K] and flow [E, R], got {tuple(topk_ids_TK.shape)} and {tuple(flow_ER.shape)}"
        )
    if anchors_TK is not None and anchors_TK.shape != topk_ids_TK.shape:
        raise ValueError(f"anchors are {tuple(anchors_TK.shape)}, must be like the ids {tuple(topk_ids_TK.shape)}")
    check_devices(topk_ids_TK.device, flow_ER=flow_ER, anchors_TK=anchors_TK)
    check_ids(topk_ids_TK=topk_ids_TK, flow_ER=flow_ER, **({} if anchors_TK is None else {"anchors_TK": anchors_TK}))
    check_int32("assignments", topk_ids_TK.numel(), "split the batch")
    check_int32("pieces of experts", flow_ER.numel(), "split over fewer ranks")
    if topk_ids_TK.device.type != "cuda":
        return split_tokens_torch(topk_ids_TK, flow_ER, anchors_TK, num_sent=num_sent)
    from .split_tokens_triton import split_tokens_triton

    return split_tokens_triton(topk_ids_TK, flow_ER, anchors_TK, num_sent=num_sent)


def split_tokens_torch(
    topk_ids_TK: Tensor, flow_ER: Tensor, anchors_TK: Tensor | None = None, *, num_sent: int | None = None
) -> Tensor:
    """Torch twin of `split_tokens`: one sort by expert, then contiguous runs are copied to their places."""
    E, R = flow_ER.shape
    ids_N = topk_ids_TK.flatten().long()
    load_E = histogram_torch(ids_N, E if num_sent is None else E + 1)[:E]
    if not torch.equal(load_E, flow_ER.sum(dim=1)):
        raise ValueError(f"flow sums to {flow_ER.sum(dim=1).tolist()} per expert, but the tokens chose {load_E.tolist()}")
    num_sent = ids_N.numel() if num_sent is None else num_sent
    if num_sent != int(load_E.sum()):
        raise ValueError(f"num_sent is {num_sent}, but {int(load_E.sum())} assignments name an expert")
    runs_N = ids_N if anchors_TK is None else ids_N * R + anchors_TK.flatten()
    keys = ((runs_N << 32) | torch.arange(ids_N.numel())).numpy()
    by_expert_N = torch.from_numpy(np.sort(keys)) & 0x7FFFFFFF
    # Run (r, e) of the result is piece (e, r) of the expert-major order.
    piece_start_ER = flow_ER.flatten().cumsum(0).view(E, R) - flow_ER
    sizes_RE = flow_ER.t().reshape(-1)
    run_start_RE = sizes_RE.cumsum(0) - sizes_RE
    shift_RE = piece_start_ER.t().reshape(-1) - run_start_RE
    return by_expert_N[torch.arange(num_sent) + shift_RE.repeat_interleave(sizes_RE, output_size=num_sent)]
