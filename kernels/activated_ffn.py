"""The expert FFN over ragged groups with any activation, optional biases and low-rank pairs: forward and backward.

    y = (activation(x W1 + b1) W2 + b2) * row_weight

A pair (LoRA) adds `scale * B A` to its matrix; see low_rank.py. The activation is a function of torch, [N, W] to [N, F], where W
is 2F for a gate above up, and F for one matrix without a gate. The forward keeps its input only; the backward runs it again,
under autograd. The products around it are those of grouped_gemm.py, so the op is its own torch twin.

Example with D = F = 1, all weights 1, biases 0, row weight 1 and `Clamp(alpha=1.702, limit=7)`: x = 1 gives gate = up = 1, then
1 * sigmoid(1.702) * 2 = 1.692. At x = 9 both are clamped to 7, and no gradient passes through them.

Shapes: N rows, D model dim, F expert ffn dim, W width of the activation's input.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from torch import Tensor
from torch.nn.functional import silu

from .grouped_gemm import grouped_gemm_backward, grouped_gemm_wgrad
from .groups import check_groups, group_slices
from .low_rank import adapted_gemm, adapted_gemm_dgrad, low_rank_wgrad
from .types import FFNWeights, GroupedFFNGrads, GroupedFFNOutput

Activation: TypeAlias = Callable[[Tensor], Tensor]
"""Row by row, [N, W] to [N, F]: of gate and up, gate first, or of the one product of experts without a gate."""


@dataclass(frozen=True, slots=True)
class Clamp:
    """The activation of GPT-OSS: `min(gate, limit) * sigmoid(alpha * min(gate, limit)) * (clamp(up, -limit, limit) + 1)`."""

    alpha: float
    limit: float

    def __call__(self, gate_up_N2F: Tensor) -> Tensor:
        """Gate and up [N, 2F] to [N, F]."""
        gate, up = gate_up_N2F.chunk(2, dim=-1)
        gate = gate.clamp(max=self.limit)
        return gate * (gate * self.alpha).sigmoid() * (up.clamp(-self.limit, self.limit) + 1)


def gated_silu(gate_up_N2F: Tensor) -> Tensor:
    """SwiGLU as an activation: `silu(gate) * up`, [N, 2F] to [N, F]."""
    gate, up = gate_up_N2F.chunk(2, dim=-1)
    return silu(gate) * up


def activated_ffn(
    x_ND: Tensor,
    row_weights_N: Tensor,
    weights: FFNWeights,
    group_sizes: Sequence[int],
    activation: Activation,
    *,
    out: GroupedFFNOutput | None = None,
) -> GroupedFFNOutput:
    """Run each group's rows through its expert; rows are sorted by group. No autograd. `out` names buffers to fill."""
    check_groups(x_ND.shape[0], weights.gate_up, group_sizes)
    out = GroupedFFNOutput.empty(x_ND, weights) if out is None else out
    if not x_ND.shape[0]:
        return out
    adapted_gemm(x_ND, weights.gate_up, weights.gate_up_low_rank, group_sizes, out=out.gate_up_N2F)
    _add_biases(out.gate_up_N2F, weights.gate_up_bias, group_sizes)
    h_NF = activation(out.gate_up_N2F).to(x_ND.dtype)
    adapted_gemm(h_NF, weights.down, weights.down_low_rank, group_sizes, out=out.y_ND)
    _add_biases(out.y_ND, weights.down_bias, group_sizes)
    out.y_ND.mul_(row_weights_N[:, None])
    return out


def activated_ffn_backward(
    dy_ND: Tensor,
    x_ND: Tensor,
    gate_up_N2F: Tensor,
    row_weights_N: Tensor,
    weights: FFNWeights,
    grads: FFNWeights | None,
    group_sizes: Sequence[int],
    activation: Activation,
    *,
    alpha: float = 1.0,
    overwrite: Sequence[bool] | None = None,
    out: GroupedFFNGrads | None = None,
) -> GroupedFFNGrads:
    """Backward of `activated_ffn`: returns the row gradients and adds `alpha` times the weight gradients to `grads`.

    `grads` is None when the experts are frozen, and holds those of pairs alone when their matrices are. The gradients of groups
    marked in `overwrite` are uninitialised: they are set, not added to, and set to zero where the group has no rows.
    """
    check_groups(x_ND.shape[0], weights.gate_up, group_sizes)
    out = GroupedFFNGrads.empty(x_ND, row_weights_N) if out is None else out
    if not len(group_sizes):
        return out
    pre_NW = gate_up_N2F.detach().requires_grad_()
    with torch.enable_grad():
        activated_NF = activation(pre_NW)
    h_NF = activated_NF.detach().to(x_ND.dtype)
    dh_NF = adapted_gemm_dgrad(dy_ND, weights.down, weights.down_low_rank, group_sizes)
    out.drow_weights_N.copy_((dh_NF * h_NF).sum(1))
    for group, rows in group_slices(group_sizes) if len(weights.down_bias) else ():
        out.drow_weights_N[rows] += dy_ND[rows] @ weights.down_bias[group]
    row_weights_N1 = row_weights_N[:, None].to(x_ND.dtype)
    dy_ND, dh_NF = dy_ND * row_weights_N1, dh_NF * row_weights_N1
    (dpre_NW,) = torch.autograd.grad(activated_NF, pre_NW, dh_NF.to(activated_NF.dtype))
    how: dict[str, Any] = {"alpha": alpha, "overwrite": overwrite}
    if grads is None or not grads.gate_up:
        adapted_gemm_dgrad(dpre_NW, weights.gate_up, weights.gate_up_low_rank, group_sizes, out=out.dx_ND)
    else:
        grouped_gemm_backward(dpre_NW, x_ND, weights.gate_up, group_sizes, grads.gate_up, **how, out=out.dx_ND)
        grouped_gemm_wgrad(dy_ND, h_NF, group_sizes, grads.down, **how)
        _add_bias_grads(grads.gate_up_bias, dpre_NW, group_sizes, **how)
        _add_bias_grads(grads.down_bias, dy_ND, group_sizes, **how)
    if grads is not None:
        low_rank_wgrad(dpre_NW, x_ND, weights.gate_up_low_rank, group_sizes, grads.gate_up_low_rank, **how)
        low_rank_wgrad(dy_ND, h_NF, weights.down_low_rank, group_sizes, grads.down_low_rank, **how)
    return out


def _add_biases(rows: Tensor, biases: Sequence[Tensor], group_sizes: Sequence[int]) -> None:
    for group, part in group_slices(group_sizes) if len(biases) else ():
        rows[part].add_(biases[group])


def _add_bias_grads(
    grads: Sequence[Tensor], drows: Tensor, group_sizes: Sequence[int], *, alpha: float, overwrite: Sequence[bool] | None
) -> None:
    for grad, is_fresh in zip(grads, overwrite or (), strict=False):
        if is_fresh:
            grad.zero_()
    for group, part in group_slices(group_sizes) if len(grads) else ():
        grads[group].add_(drows[part].sum(0, dtype=torch.float32), alpha=alpha)
