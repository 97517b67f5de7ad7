"""Triton kernels of `topk_gate` and its backward. Import this module lazily: it imports triton.

Shapes: T tokens, E experts, K top-k.
"""

# Triton infers the types of kernels; Python annotations cannot express them.
# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .checks import unit_stride
from .types import Gate, Score

_TILE_ELEMENTS = 1024
_MIN_TOTAL = tl.constexpr(1e-20)  # as in topk_gate.py
_LOWEST = tl.constexpr(torch.finfo(torch.float32).min)
_MAX_EXPERTS = 8192


@triton.jit
def _scores(logits, is_expert, IS_SOFTMAX: tl.constexpr):
    """Scores and log-sum-exp of a [tokens, experts] tile whose padding holds -inf; padding scores 0."""
    peak = tl.max(logits, axis=1)
    exps = tl.exp(logits - peak[:, None])
    total = tl.sum(exps, axis=1)
    if IS_SOFTMAX:
        scores = exps / total[:, None]
    else:
        scores = tl.where(is_expert, 1.0 / (1.0 + tl.exp(-logits)), 0.0)
    return scores, exps / total[:, None], peak + tl.log(total)


@triton.jit
def _topk_gate_kernel(
    logits_ptr,
    bias_ptr,
    given_ptr,
    ids_ptr,
    weights_ptr,
    lse_ptr,
    load_ptr,
    num_tokens,
    num_experts,
    stride_logits,
    TOP_K: tl.constexpr,
    IS_SOFTMAX: tl.constexpr,
    NORMALIZE: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_IDS: tl.constexpr,
    HAS_LSE: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_E: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """Gate BLOCK_T tokens. With logits = [[0, 1, 1]], TOP_K = 2, softmax, normalised:

    ids = [[1, 2]], weights = [[0.5, 0.5]], lse = [log(1 + 2e)], load = [0, 1, 1].
    """
    t = tl.program_id(0).to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T)
    e = tl.arange(0, BLOCK_E)
    is_token = t < num_tokens
    is_expert = (e < num_experts)[None, :]
    # Tokens past the end read zeros, so that -inf is never subtracted from -inf.
    logits = tl.load(logits_ptr + t[:, None] * stride_logits + e[None, :], mask=is_token[:, None] & is_expert, other=0.0)
    logits = tl.where(is_expert, logits, -float("inf"))
    scores, _, lse = _scores(logits, is_expert, IS_SOFTMAX)
    if HAS_LSE:
        tl.store(lse_ptr + t, lse, mask=is_token)

    choice = logits
    if HAS_BIAS:
        choice = scores + tl.load(bias_ptr + e, mask=e < num_experts, other=0.0)[None, :]
    # Only experts already chosen are below every number, so no expert is chosen twice.
    choice = tl.where(is_expert, tl.maximum(choice, _LOWEST), -float("inf"))
    place = tl.arange(0, BLOCK_K)[None, :]
    weights = tl.zeros((BLOCK_T, BLOCK_K), dtype=tl.float32)
    ids = tl.zeros((BLOCK_T, BLOCK_K), dtype=tl.int64)
    for k in tl.static_range(TOP_K):
        if HAS_IDS:
            best = tl.load(given_ptr + t * TOP_K + k, mask=is_token, other=0).to(tl.int32)
        else:
            best = tl.argmax(choice, axis=1, tie_break_left=True)
        is_best = e[None, :] == best[:, None]
        weights = tl.where(place == k, tl.sum(tl.where(is_best, scores, 0.0), axis=1)[:, None], weights)
        ids = tl.where(place == k, best[:, None], ids)
        # Integer counts do not depend on the order of the atomic additions.
        tl.atomic_add(load_ptr + best, tl.full((BLOCK_T,), 1, dtype=tl.int64), mask=is_token, sem="relaxed")
        choice = tl.where(is_best, -float("inf"), choice)
    if NORMALIZE:
        weights /= tl.maximum(tl.sum(weights, axis=1), _MIN_TOTAL)[:, None]
    mask = is_token[:, None] & (place < TOP_K)
    tl.store(ids_ptr + t[:, None] * TOP_K + place, ids, mask=mask)
    tl.store(weights_ptr + t[:, None] * TOP_K + place, weights, mask=mask)


@triton.jit
def _topk_gate_backward_kernel(
    dweights_ptr,
    dlse_ptr,
    logits_ptr,
    ids_ptr,
    dlogits_ptr,
    num_tokens,
    num_experts,
    stride_logits,
    TOP_K: tl.constexpr,
    IS_SOFTMAX: tl.constexpr,
    NORMALIZE: tl.constexpr,
    HAS_DLSE: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_E: tl.constexpr,
):
    """Gradient of BLOCK_T tokens' logits. With logits = [[0, 0]], ids = [[1]], dweights = [[4]], softmax, not normalised:

    dlogits = [[-1, 1]], since 4 * p * (1 - p) = 1 at p = 0.5.
    """
    t = tl.program_id(0).to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T)
    e = tl.arange(0, BLOCK_E)
    is_token = t < num_tokens
    is_expert = (e < num_experts)[None, :]
    mask = is_token[:, None] & is_expert
    logits = tl.load(logits_ptr + t[:, None] * stride_logits + e[None, :], mask=mask, other=0.0)
    logits = tl.where(is_expert, logits, -float("inf"))
    scores, probs, _ = _scores(logits, is_expert, IS_SOFTMAX)

    dscores = tl.zeros((BLOCK_T, BLOCK_E), dtype=tl.float32)
    is_chosen = tl.zeros((BLOCK_T, BLOCK_E), dtype=tl.int1)
    for k in tl.static_range(TOP_K):
        chosen = tl.load(ids_ptr + t * TOP_K + k, mask=is_token, other=0)
        dweight = tl.load(dweights_ptr + t * TOP_K + k, mask=is_token, other=0.0)
        is_this = e[None, :] == chosen[:, None]
        dscores = tl.where(is_this, dweight[:, None], dscores)
        is_chosen = is_chosen | is_this
    if NORMALIZE or IS_SOFTMAX:
        # Relative to the gradient of the largest weight; see topk_gate._relative.
        is_summed = is_chosen if NORMALIZE else is_expert
        heaviest = tl.argmax(tl.where(is_summed, scores, -1.0), axis=1)
        is_heaviest = e[None, :] == heaviest[:, None]
        dscores = tl.where(is_summed, dscores - tl.sum(tl.where(is_heaviest, dscores, 0.0), axis=1)[:, None], 0.0)
    if NORMALIZE:
        total = tl.maximum(tl.sum(tl.where(is_chosen, scores, 0.0), axis=1), _MIN_TOTAL)[:, None]
        inner = tl.sum(dscores * scores, axis=1)[:, None] / total
        dscores = tl.where(is_chosen, (dscores - inner) / total, 0.0)
    if not IS_SOFTMAX:
        dlogits = dscores * scores * (1.0 - scores)
    elif NORMALIZE:
        # The softmax over the chosen experts does not depend on the other logits.
        dlogits = dscores * scores
    else:
        dlogits = scores * (dscores - tl.sum(dscores * scores, axis=1)[:, None])
    if HAS_DLSE:
        dlogits += tl.load(dlse_ptr + t, mask=is_token, other=0.0)[:, None] * probs
    tl.store(dlogits_ptr + t[:, None] * num_experts + e[None, :], dlogits, mask=mask)


def topk_gate_triton(
    logits_TE: Tensor,
    top_k: int,
    *,
    normalize: bool,
    score: Score,
    bias_E: Tensor | None,
    topk_ids_TK: Tensor | None = None,
    with_lse: bool = True,
) -> Gate:
    """Launch `_topk_gate_kernel`."""
    logits_TE = unit_stride(logits_TE)
    T, E = logits_TE.shape
    gate = Gate(
        topk_ids_TK=torch.empty(T, top_k, dtype=torch.int64, device=logits_TE.device),
        weights_TK=logits_TE.new_empty(T, top_k),
        lse_T=logits_TE.new_empty(T) if with_lse else None,
        load_E=torch.zeros(E, dtype=torch.int64, device=logits_TE.device),
    )
    if T == 0:
        return gate
    block_t, block_e = _tile(E)
    _topk_gate_kernel[(triton.cdiv(T, block_t),)](
        logits_TE,
        None if bias_E is None else bias_E.contiguous(),
        None if topk_ids_TK is None else topk_ids_TK.contiguous(),
        gate.topk_ids_TK,
        gate.weights_TK,
        gate.lse_T,
        gate.load_E,
        T,
        E,
        logits_TE.stride(0),
        TOP_K=top_k,
        IS_SOFTMAX=score == "softmax",
        NORMALIZE=normalize,
        HAS_BIAS=bias_E is not None,
        HAS_IDS=topk_ids_TK is not None,
        HAS_LSE=with_lse,
        BLOCK_T=block_t,
        BLOCK_E=block_e,
        BLOCK_K=triton.next_power_of_2(top_k),
        num_warps=4,
    )
    return gate


def topk_gate_backward_triton(
    dweights_TK: Tensor, dlse_T: Tensor | None, logits_TE: Tensor, topk_ids_TK: Tensor, *, normalize: bool, score: Score
) -> Tensor:
    """Launch `_topk_gate_backward_kernel`."""
    logits_TE = unit_stride(logits_TE)
    T, E = logits_TE.shape
    dlogits_TE = logits_TE.new_empty(T, E)
    if T == 0:
        return dlogits_TE
    block_t, block_e = _tile(E)
    _topk_gate_backward_kernel[(triton.cdiv(T, block_t),)](
        dweights_TK.contiguous(),
        None if dlse_T is None else dlse_T.contiguous(),
        logits_TE,
        topk_ids_TK.contiguous(),
        dlogits_TE,
        T,
        E,
        logits_TE.stride(0),
        TOP_K=topk_ids_TK.shape[1],
        IS_SOFTMAX=score == "softmax",
        NORMALIZE=normalize,
        HAS_DLSE=dlse_T is not None,
        BLOCK_T=block_t,
        BLOCK_E=block_e,
        num_warps=4,
    )
    return dlogits_TE


def _tile(num_experts: int) -> tuple[int, int]:
    """(tokens, experts) of one program's tile; all experts of a token are in one tile."""
    if num_experts > _MAX_EXPERTS:
        raise ValueError(
            f"topk_gate keeps a token's scores in registers and takes up to {_MAX_EXPERTS} experts, got {num_experts}"
        )
    block_e = triton.next_power_of_2(num_experts)
    return max(1, _TILE_ELEMENTS // block_e), block_e
