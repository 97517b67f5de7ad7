"""The router's gate: scores, top-k choice, weights, log-sum-exp and load histogram from the logits, and its backward.

Shapes: T tokens, E experts, K top-k.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from .checks import check_devices, check_ids
from .types import Gate, Score

# Lower limit of the sum of a token's scores, so that scores that are all zero give weights of zero.
_MIN_TOTAL = 1e-20


def topk_gate(
    logits_TE: Tensor,
    top_k: int,
    *,
    normalize: bool = True,
    score: Score = "softmax",
    bias_E: Tensor | None = None,
    topk_ids_TK: Tensor | None = None,
    with_lse: bool = True,
) -> Gate:
    """Choose `top_k` experts per token by score and weigh them by score; equal scores go to the lower expert id.

    `score` is the softmax over all experts or the sigmoid of each logit. `normalize` makes a token's weights sum to one. `bias_E`
    is added to the scores for the choice only (balancing without an auxiliary loss). With `topk_ids_TK`, from another rule or an
    earlier call, no choice is made. Weights and log-sum-exp are differentiable.
    """
    _check(logits_TE, top_k, score, bias_E)
    check_devices(logits_TE.device, bias_E=bias_E, topk_ids_TK=topk_ids_TK)
    if topk_ids_TK is not None:
        check_ids(topk_ids_TK=topk_ids_TK)
        if topk_ids_TK.shape != (len(logits_TE), top_k):
            raise ValueError(f"ids are {tuple(topk_ids_TK.shape)}, must be {(len(logits_TE), top_k)}, [T, K] of logits and top_k")
    if logits_TE.device.type != "cuda":
        return topk_gate_torch(
            logits_TE, top_k, normalize=normalize, score=score, bias_E=bias_E, topk_ids_TK=topk_ids_TK, with_lse=with_lse
        )
    weights_TK, lse_T, topk_ids_TK, load_E = _TopkGate.apply(logits_TE, top_k, normalize, score, bias_E, topk_ids_TK, with_lse)
    return Gate(topk_ids_TK, weights_TK, lse_T, load_E)


def topk_gate_backward(
    dweights_TK: Tensor,
    dlse_T: Tensor | None,
    logits_TE: Tensor,
    topk_ids_TK: Tensor,
    *,
    normalize: bool = True,
    score: Score = "softmax",
) -> Tensor:
    """Return `dlogits_TE` from the gradients of weights and log-sum-exp; the choice itself has no gradient."""
    check_devices(logits_TE.device, dweights_TK=dweights_TK, dlse_T=dlse_T, topk_ids_TK=topk_ids_TK)
    check_ids(topk_ids_TK=topk_ids_TK)
    if topk_ids_TK.dim() != 2 or dweights_TK.shape != topk_ids_TK.shape or len(topk_ids_TK) != len(logits_TE):
        raise ValueError(
            f"ids {tuple(topk_ids_TK.shape)} and weight gradients {tuple(dweights_TK.shape)} must be [T, K] "
            f"for the {len(logits_TE)} tokens of the logits"
        )
    if dlse_T is not None and dlse_T.shape != logits_TE.shape[:1]:
        raise ValueError(f"dlse_T is {tuple(dlse_T.shape)}, must hold one value for each of {len(logits_TE)} tokens")
    _check(logits_TE, topk_ids_TK.shape[1], score, None)
    if logits_TE.device.type != "cuda":
        return topk_gate_backward_torch(dweights_TK, dlse_T, logits_TE, topk_ids_TK, normalize=normalize, score=score)
    from .topk_gate_triton import topk_gate_backward_triton

    return topk_gate_backward_triton(dweights_TK, dlse_T, logits_TE, topk_ids_TK, normalize=normalize, score=score)


def topk_gate_torch(
    logits_TE: Tensor,
    top_k: int,
    *,
    normalize: bool = True,
    score: Score = "softmax",
    bias_E: Tensor | None = None,
    topk_ids_TK: Tensor | None = None,
    with_lse: bool = True,
) -> Gate:
    """Torch twin of `topk_gate`."""
    if topk_ids_TK is None:
        topk_ids_TK = _choose(logits_TE.detach(), top_k, score, bias_E)
    if score == "softmax" and normalize:
        # The softmax over the chosen experts equals the softmax over all, renormalised.
        weights_TK = _Softmax.apply(logits_TE.gather(1, topk_ids_TK))
    else:
        weights_TK = gate_scores(logits_TE, score).gather(1, topk_ids_TK)
        if normalize:
            weights_TK = weights_TK / weights_TK.sum(dim=1, keepdim=True).clamp(min=_MIN_TOTAL)
    load_E = torch.bincount(topk_ids_TK.flatten(), minlength=logits_TE.shape[1])
    return Gate(topk_ids_TK, weights_TK, logits_TE.logsumexp(dim=1) if with_lse else None, load_E)


def gate_scores(logits_TE: Tensor, score: Score) -> Tensor:
    """Every expert's score, [T, E]."""
    return _Softmax.apply(logits_TE) if score == "softmax" else logits_TE.sigmoid()


class _Softmax(torch.autograd.Function):
    """Softmax over the last dim whose gradient stays precise where one weight is nearly 1; see `_relative`."""

    @staticmethod
    def forward(ctx: Any, logits_TE: Tensor) -> Tensor:
        weights_TE = logits_TE.softmax(dim=1)
        ctx.save_for_backward(weights_TE)
        return weights_TE

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dweights_TE: Tensor) -> Tensor:
        (weights_TE,) = ctx.saved_tensors
        dweights_TE = _relative(dweights_TE, weights_TE)
        return weights_TE * (dweights_TE - (dweights_TE * weights_TE).sum(dim=1, keepdim=True))


def _relative(dweights_TK: Tensor, weights_TK: Tensor) -> Tensor:
    """The gradients of weights that sum to 1, minus the gradient of the largest weight.

    A component common to all of them has no effect. If it is kept, it cancels where one weight is nearly 1, and rounding destroys
    the remaining difference.
    """
    return dweights_TK - dweights_TK.gather(1, weights_TK.argmax(dim=1, keepdim=True))


def _choose(logits_TE: Tensor, top_k: int, score: Score, bias_E: Tensor | None) -> Tensor:
    """`top_k` rounds of max, which returns the first of equal values, as torch.topk does not."""
    # Without a bias the logits order the experts as the scores do, without ties where scores round to the same value.
    choice_TE = logits_TE if bias_E is None else gate_scores(logits_TE, score) + bias_E
    # Only experts already chosen are below every number, so no expert is chosen twice.
    choice_TE = choice_TE.clamp(min=torch.finfo(torch.float32).min)
    topk_ids_TK = torch.empty(len(logits_TE), top_k, dtype=torch.int64, device=logits_TE.device)
    for k in range(top_k):
        best_T1 = choice_TE.max(dim=1, keepdim=True).indices
        topk_ids_TK[:, k : k + 1] = best_T1
        choice_TE.scatter_(1, best_T1, -torch.inf)
    return topk_ids_TK


def topk_gate_backward_torch(
    dweights_TK: Tensor,
    dlse_T: Tensor | None,
    logits_TE: Tensor,
    topk_ids_TK: Tensor,
    *,
    normalize: bool = True,
    score: Score = "softmax",
) -> Tensor:
    """Torch twin of `topk_gate_backward`."""
    scores_TE = gate_scores(logits_TE, score)
    chosen_TK = scores_TE.gather(1, topk_ids_TK)
    dchosen_TK = dweights_TK
    if normalize:
        total_T1 = chosen_TK.sum(dim=1, keepdim=True).clamp(min=_MIN_TOTAL)
        weights_TK = chosen_TK / total_T1
        dweights_TK = _relative(dweights_TK, weights_TK)
        dchosen_TK = (dweights_TK - (dweights_TK * weights_TK).sum(dim=1, keepdim=True)) / total_T1
    if score == "sigmoid":
        dlogits_TE = torch.zeros_like(logits_TE).scatter_(1, topk_ids_TK, dchosen_TK * chosen_TK * (1.0 - chosen_TK))
    elif normalize:
        # The softmax over the chosen experts does not depend on the other logits.
        dlogits_TE = torch.zeros_like(logits_TE).scatter_(1, topk_ids_TK, dchosen_TK * chosen_TK)
    else:
        dscores_TE = _relative(torch.zeros_like(logits_TE).scatter_(1, topk_ids_TK, dweights_TK), scores_TE)
        dlogits_TE = scores_TE * (dscores_TE - (dscores_TE * scores_TE).sum(dim=1, keepdim=True))
    if dlse_T is not None:
        probs_TE = scores_TE if score == "softmax" else logits_TE.softmax(dim=1)
        dlogits_TE.addcmul_(probs_TE, dlse_T[:, None])
    return dlogits_TE


def _check(logits_TE: Tensor, top_k: int, score: str, bias_E: Tensor | None) -> None:
    """Raise ValueError for unsupported arguments."""
    if logits_TE.dim() != 2 or logits_TE.dtype != torch.float32:
        raise ValueError(f"logits must be float32 [T, E], got {logits_TE.dtype} {tuple(logits_TE.shape)}; cast them first")
    if not 1 <= top_k <= logits_TE.shape[1]:
        raise ValueError(f"top_k is {top_k}, but there are {logits_TE.shape[1]} experts; it must be between 1 and that")
    if score not in ("softmax", "sigmoid"):
        raise ValueError(f"score is {score!r}, must be 'softmax' or 'sigmoid'")
    if bias_E is not None and (bias_E.shape != logits_TE.shape[1:] or bias_E.dtype != torch.float32):
        raise ValueError(f"bias_E must be float32 [{logits_TE.shape[1]}], got {bias_E.dtype} {tuple(bias_E.shape)}")


class _TopkGate(torch.autograd.Function):
    """The gate on a GPU: fused forward and backward; only logits and ids are saved."""

    @staticmethod
    def forward(
        ctx: Any,
        logits_TE: Tensor,
        top_k: int,
        normalize: bool,
        score: Score,
        bias_E: Tensor | None,
        topk_ids_TK: Tensor | None,
        with_lse: bool,
    ) -> tuple[Tensor, Tensor | None, Tensor, Tensor]:
        from .topk_gate_triton import topk_gate_triton

        gate = topk_gate_triton(
            logits_TE, top_k, normalize=normalize, score=score, bias_E=bias_E, topk_ids_TK=topk_ids_TK, with_lse=with_lse
        )
        ctx.normalize, ctx.score = normalize, score
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(logits_TE, gate.topk_ids_TK)
        ctx.mark_non_differentiable(gate.topk_ids_TK, gate.load_E)
        return gate.weights_TK, gate.lse_T, gate.topk_ids_TK, gate.load_E

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        logits_TE, topk_ids_TK = ctx.saved_tensors
        dweights_TK, dlse_T, *_ = grads
        if dweights_TK is None:
            dweights_TK = logits_TE.new_zeros(topk_ids_TK.shape)
        dlogits_TE = topk_gate_backward(dweights_TK, dlse_T, logits_TE, topk_ids_TK, normalize=ctx.normalize, score=ctx.score)
        return dlogits_TE, None, None, None, None, None, None
