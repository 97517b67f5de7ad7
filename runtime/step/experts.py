"""The expert stage: every local expert's SwiGLU over its group of rows, owned experts and copies alike.

Weight gradients do not pass through autograd's accumulation: backward adds them in place to the bank's gradient rows,
or, for a copy, to the buffer that the reduce sends home.

It goes run by run (expert_order.py), as rows come and go in parts (token_rows.py); the buffers here hold the rows of all runs.

Shape letters: N rows sorted by local expert, D model dim, F expert ffn dim.
"""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ...kernels import (
    GroupedFFNGrads,
    GroupedFFNOutput,
    clamped_ffn,
    clamped_ffn_backward,
    grouped_ffn,
    grouped_ffn_backward,
)
from .layer_pass import LayerPass
from .materialize import gradient_targets, materialized_weights, wait_for_copies
from .token_rows import Crossing, new_link

if TYPE_CHECKING:
    from .layer_runtime import LayerRuntime


class _Experts(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, link: Tensor, token: Tensor, crossing: Crossing) -> Tensor:
        ctx.crossing = crossing
        runtime, layer_pass = crossing.runtime, crossing.layer_pass
        handle, shape = layer_pass.handle, runtime.bank.shape
        assert handle is not None
        x_ND = crossing.rows.arrived(0)
        with runtime.stage("experts", layer_pass, is_complete=False):
            compute = grouped_ffn if shape.clamp is None else partial(clamped_ffn, clamp=shape.clamp)
            weights = materialized_weights(runtime, layer_pass)
            output = GroupedFFNOutput(torch.empty_like(x_ND), x_ND.new_empty(x_ND.shape[0], 2 * shape.ffn_dim))
        for index, run in enumerate(handle.runs):
            crossing.rows.arrived(index)
            with runtime.stage("experts", layer_pass, is_complete=index + 1 == len(handle.runs)):
                if run.num_groups:
                    groups, rows = run.groups, run.rows
                    sizes, out = handle.group_sizes[groups], output.of_rows(rows)
                    compute(x_ND[rows], handle.row_weights_N[rows], weights.of_groups(groups), sizes, out=out)
            crossing.rows.set_home(index, output.y_ND)
        ctx.save_for_backward(x_ND, output.gate_up_N2F)
        return new_link(x_ND)

    @staticmethod
    def backward(ctx: Any, d_link: Tensor) -> tuple[Tensor, Tensor, None]:
        crossing = ctx.crossing
        runtime, layer_pass, handle = crossing.runtime, crossing.layer_pass, crossing.layer_pass.handle
        x_ND, gate_up_N2F = ctx.saved_tensors
        _check_backward(runtime, layer_pass)
        runtime.reduces.make_room()
        with runtime.stage("materialize", layer_pass):
            wait_for_copies(layer_pass)
        with runtime.stage("experts", layer_pass, is_complete=False):
            clamp = runtime.bank.shape.clamp
            compute = grouped_ffn_backward if clamp is None else partial(clamped_ffn_backward, clamp=clamp)
            weights, targets = materialized_weights(runtime, layer_pass), gradient_targets(runtime, layer_pass)
            grads = GroupedFFNGrads(torch.empty_like(x_ND), torch.empty_like(handle.row_weights_N))
        for index, run in enumerate(handle.runs):
            dy_ND = crossing.grads.arrived(index)
            with runtime.stage("experts", layer_pass, is_complete=index + 1 == len(handle.runs)):
                if run.num_groups:
                    groups, rows = run.groups, run.rows
                    compute(
                        dy_ND[rows],
                        x_ND[rows],
                        gate_up_N2F[rows],
                        handle.row_weights_N[rows],
                        weights.of_groups(groups),
                        targets.tensors.of_groups(groups) if targets else None,
                        handle.group_sizes[groups],
                        # The loss of the group is the mean of its ranks' losses, as FSDP takes it for the dense parameters.
                        alpha=1.0 / runtime.gradient_divisor(),
                        overwrite=targets.overwrite[groups] if targets else None,
                        out=grads.of_rows(rows),
                    )
            crossing.grads.set_home(index, grads.dx_ND, grads.drow_weights_N)
        return new_link(x_ND), new_link(x_ND), None


def _check_backward(runtime: LayerRuntime, layer_pass: LayerPass) -> None:
    """Refuse a backward that would compute with other weights than its forward."""
    if layer_pass.weights_version != runtime.bank.version(runtime.layer):
        raise RuntimeError(
            f"{layer_pass.where}: the experts' weights changed between this forward and its backward; "
            "call backward before optimizer.step(), before handle.step() and before weights are loaded"
        )


def experts(link: Tensor, token: Tensor, crossing: Crossing) -> Tensor:
    """Apply every local expert to its rows, times the rows' gate weights, as the rows of each part arrive, and send them home.

    `link`: from dispatch; returns the one to combine.
    """
    return _Experts.apply(link, token, crossing)
