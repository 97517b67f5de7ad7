"""The expert stage: every local expert's SwiGLU over its group of rows, owned experts and copies alike.

Weight gradients do not pass through autograd's accumulation: backward adds them in place to the bank's gradient rows,
or, for a copy, to the buffer that the reduce sends home.

Shape letters: N rows sorted by local expert, D model dim, F expert ffn dim.
"""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..kernels import clamped_ffn, clamped_ffn_backward, grouped_ffn, grouped_ffn_backward
from ._compat import version_of
from .layer_pass import LayerPass
from .materialize import gradient_targets, materialized_weights, wait_for_copies

if TYPE_CHECKING:
    from .layer_runtime import LayerRuntime


class _Experts(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x_ND: Tensor, row_weights_N: Tensor, token: Tensor, runtime: LayerRuntime, layer_pass: LayerPass
    ) -> Tensor:
        assert layer_pass.handle is not None
        ctx.runtime, ctx.layer_pass = runtime, layer_pass
        with runtime.stage("experts", layer_pass):
            weights = materialized_weights(runtime, layer_pass)
            clamp = runtime.bank.shape.clamp
            forward = grouped_ffn if clamp is None else partial(clamped_ffn, clamp=clamp)
            output = forward(x_ND, row_weights_N, weights, layer_pass.handle.group_sizes)
        ctx.save_for_backward(x_ND, row_weights_N, output.gate_up_N2F)
        return output.y_ND

    @staticmethod
    def backward(ctx: Any, dy_ND: Tensor) -> tuple[Tensor, Tensor, Tensor, None, None]:
        runtime, layer_pass = ctx.runtime, ctx.layer_pass
        x_ND, row_weights_N, gate_up_N2F = ctx.saved_tensors
        if layer_pass.is_finished:
            raise RuntimeError(
                f"{layer_pass.where}: backward ran a second time through one forward, whose expert copies are released; "
                "run the forward again"
            )
        if layer_pass.weights_version != version_of(runtime.bank.gate_up):
            raise RuntimeError(
                f"{layer_pass.where}: the experts' weights changed between this forward and its backward; "
                "call backward before optimizer.step() and before weights are loaded"
            )
        runtime.reduces.make_room()
        with runtime.stage("materialize", layer_pass):
            wait_for_copies(layer_pass)
        with runtime.stage("experts", layer_pass):
            targets = gradient_targets(runtime, layer_pass)
            clamp = runtime.bank.shape.clamp
            backward = grouped_ffn_backward if clamp is None else partial(clamped_ffn_backward, clamp=clamp)
            grads = backward(
                dy_ND,
                x_ND,
                gate_up_N2F,
                row_weights_N,
                materialized_weights(runtime, layer_pass),
                targets.tensors if targets else None,
                layer_pass.handle.group_sizes,
                # The loss of the group is the mean of its ranks' losses, as FSDP takes it for the dense parameters.
                alpha=1.0 / runtime.group.world_size,
                overwrite=targets.overwrite if targets else None,
            )
        return grads.dx_ND, grads.drow_weights_N, x_ND.new_zeros((), dtype=torch.float32), None, None


def experts(x_ND: Tensor, row_weights_N: Tensor, token: Tensor, runtime: LayerRuntime, layer_pass: LayerPass) -> Tensor:
    """Apply every local expert to its rows, times the rows' gate weights: [N, D] to [N, D]."""
    return _Experts.apply(x_ND, row_weights_N, token, runtime, layer_pass)
