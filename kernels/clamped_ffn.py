"""The expert FFN of GPT-OSS over ragged groups, with biases and a clamped activation: forward and backward.

    gate, up = x Wg + bg, x Wu + bu
    gate, up = min(gate, limit), clamp(up, -limit, limit)
    y = ((gate * sigmoid(alpha * gate) * (up + 1)) Wd + bd) * row_weight

Example with D = F = 1, all weights 1, biases 0, alpha 1.702, limit 7 and row weight 1: x = 1 gives gate = up = 1, then
1 * sigmoid(1.702) * 2 = 1.692. At x = 9 both are clamped to 7, and no gradient passes through them.

Plain torch on every device, group by group: the op is its own torch twin.

Shapes: N rows, D model dim, F expert ffn dim.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .groups import add_wgrad, check_groups, group_slices
from .types import FFNWeights, GroupedFFNGrads, GroupedFFNOutput


@dataclass(frozen=True, slots=True)
class Clamp:
    """The activation's constants: the slope of its sigmoid, and the limit to which its inputs are clamped."""

    alpha: float
    limit: float


def clamped_ffn(
    x_ND: Tensor,
    row_weights_N: Tensor,
    weights: FFNWeights,
    group_sizes: Sequence[int],
    clamp: Clamp,
    *,
    out: GroupedFFNOutput | None = None,
) -> GroupedFFNOutput:
    """Run each group's rows through its expert; rows are sorted by group. No autograd. `out` names buffers to fill."""
    check_groups(x_ND.shape[0], weights.gate_up, group_sizes)
    N, D = x_ND.shape
    F = weights.down[0].shape[1] if weights.down else 0
    if out is None:
        out = GroupedFFNOutput(y_ND=x_ND.new_empty(N, D), gate_up_N2F=x_ND.new_empty(N, 2 * F))
    for group, rows in group_slices(group_sizes):
        gate_up = torch.addmm(weights.gate_up_bias[group], x_ND[rows], weights.gate_up[group].t(), out=out.gate_up_N2F[rows])
        h = _activate(gate_up, clamp).h
        y = torch.addmm(weights.down_bias[group], h, weights.down[group].t(), out=out.y_ND[rows])
        y.mul_(row_weights_N[rows, None])
    return out


def clamped_ffn_backward(
    dy_ND: Tensor,
    x_ND: Tensor,
    gate_up_N2F: Tensor,
    row_weights_N: Tensor,
    weights: FFNWeights,
    grads: FFNWeights | None,
    group_sizes: Sequence[int],
    clamp: Clamp,
    *,
    alpha: float = 1.0,
    overwrite: Sequence[bool] | None = None,
    out: GroupedFFNGrads | None = None,
) -> GroupedFFNGrads:
    """Backward of `clamped_ffn`: returns the row gradients and adds `alpha` times the weight gradients to `grads`.

    `grads` is None when the experts are frozen. The gradients of groups marked in `overwrite` are uninitialised: they are set,
    not added to, and set to zero where the group has no rows.
    """
    check_groups(x_ND.shape[0], weights.gate_up, group_sizes)
    if out is None:
        out = GroupedFFNGrads(torch.empty_like(x_ND), torch.empty_like(row_weights_N))
    if grads is not None and overwrite is not None:
        for group, is_fresh in enumerate(overwrite):
            if is_fresh:
                for tensors in (grads.gate_up, grads.down, grads.gate_up_bias, grads.down_bias):
                    tensors[group].zero_()
    for group, rows in group_slices(group_sizes):
        row_weights_n1, dy_nD = row_weights_N[rows, None].to(x_ND.dtype), dy_ND[rows]
        state = _activate(gate_up_N2F[rows], clamp)
        dh_nF = dy_nD @ weights.down[group]
        out.drow_weights_N[rows] = (dh_nF * state.h).sum(1) + dy_nD @ weights.down_bias[group]
        dy_nD = dy_nD * row_weights_n1
        dgate_up = _activate_backward(dh_nF * row_weights_n1, gate_up_N2F[rows], state, clamp)
        torch.mm(dgate_up, weights.gate_up[group], out=out.dx_ND[rows])
        if grads is not None:
            add_wgrad(grads.down[group], dy_nD, state.h, alpha=alpha)
            add_wgrad(grads.gate_up[group], dgate_up, x_ND[rows], alpha=alpha)
            grads.down_bias[group].add_(dy_nD.sum(0, dtype=torch.float32), alpha=alpha)
            grads.gate_up_bias[group].add_(dgate_up.sum(0, dtype=torch.float32), alpha=alpha)
    return out


@dataclass(frozen=True)
class _Activation:
    """h, and its factors."""

    h: Tensor
    gate: Tensor  # clamped
    sigmoid: Tensor
    up_plus_one: Tensor


def _activate(gate_up_n2F: Tensor, clamp: Clamp) -> _Activation:
    gate, up = gate_up_n2F.chunk(2, dim=1)
    gate = gate.clamp(max=clamp.limit)
    up_plus_one = up.clamp(-clamp.limit, clamp.limit).add_(1)
    sigmoid = (gate * clamp.alpha).sigmoid_()
    return _Activation(gate * sigmoid * up_plus_one, gate, sigmoid, up_plus_one)


def _activate_backward(dh_nF: Tensor, gate_up_n2F: Tensor, state: _Activation, clamp: Clamp) -> Tensor:
    gate, up = gate_up_n2F.chunk(2, dim=1)
    slope = state.sigmoid * (1 + clamp.alpha * state.gate * (1 - state.sigmoid))
    dgate = (dh_nF * state.up_plus_one * slope).masked_fill_(gate > clamp.limit, 0)
    dup = (dh_nF * state.gate * state.sigmoid).masked_fill_(up.abs() > clamp.limit, 0)
    return torch.cat([dgate, dup], dim=1)
