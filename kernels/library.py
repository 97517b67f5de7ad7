"""The ops as `torch.ops.moesaic.*`: differentiable, traceable by torch.compile, checked by torch.library.opcheck.

The runtime calls the plain functions beside this file from its own autograd functions; these wrappers are for models
that want single ops under autograd or torch.compile. Import this module to register them; nothing else does.

Shapes: M rows on the token side, N routed rows, D model dim, F ffn dim, T tokens, E experts, K top-k, G groups, O output
width, I input width, B bank rows.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor
from torch.library import custom_op

from .grouped_gemm import grouped_gemm as plain_grouped_gemm
from .grouped_gemm import grouped_gemm_backward as plain_grouped_gemm_backward
from .histogram import histogram as plain_histogram
from .pack_rows import accumulate_rows as plain_accumulate_rows
from .pack_rows import pack_rows as plain_pack_rows
from .permute import Bags
from .permute import bags_of as plain_bags_of
from .permute import gather_rows as plain_gather_rows
from .permute import sum_rows as plain_sum_rows
from .split_tokens import split_tokens as plain_split_tokens
from .swiglu import swiglu as plain_swiglu
from .swiglu import swiglu_backward as plain_swiglu_backward
from .topk_gate import Score
from .topk_gate import topk_gate as plain_topk_gate
from .topk_gate import topk_gate_backward as plain_topk_gate_backward


@custom_op("moesaic::bags_of", mutates_args=())
def bags_of(row_ids_N: Tensor, num_rows: int) -> tuple[Tensor, Tensor]:
    """(indices, offsets) of `permute.bags_of`."""
    bags = plain_bags_of(row_ids_N, num_rows)
    return bags.indices, bags.offsets


@bags_of.register_fake
def _(row_ids_N: Tensor, num_rows: int) -> tuple[Tensor, Tensor]:
    return row_ids_N.new_empty(row_ids_N.numel(), dtype=torch.int32), row_ids_N.new_empty(num_rows + 1, dtype=torch.int32)


@custom_op("moesaic::gather_rows", mutates_args=())
def gather_rows(x_MD: Tensor, row_ids_N: Tensor) -> Tensor:
    """`permute.gather_rows`; its backward sums each row's gradients in ascending order."""
    return plain_gather_rows(x_MD, row_ids_N)


@gather_rows.register_fake
def _(x_MD: Tensor, row_ids_N: Tensor) -> Tensor:
    return x_MD.new_empty(row_ids_N.numel(), x_MD.shape[1])


@custom_op("moesaic::sum_rows", mutates_args=())
def sum_rows(rows_ND: Tensor, indices_N: Tensor, offsets: Tensor) -> Tensor:
    """`permute.sum_rows` over bags given by their tensors; every row must be in exactly one bag."""
    return plain_sum_rows(rows_ND, Bags(indices_N, offsets))


@sum_rows.register_fake
def _(rows_ND: Tensor, indices_N: Tensor, offsets: Tensor) -> Tensor:
    return rows_ND.new_empty(offsets.numel() - 1, rows_ND.shape[1])


def _gather_rows_context(ctx: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
    ctx.num_rows = inputs[0].shape[0]
    ctx.save_for_backward(inputs[1])


def _gather_rows_backward(ctx: Any, drows_ND: Tensor) -> tuple[Tensor, None]:
    indices_N, offsets = bags_of(ctx.saved_tensors[0], ctx.num_rows)
    return sum_rows(drows_ND, indices_N, offsets), None


def _sum_rows_context(ctx: Any, inputs: tuple[Tensor, Tensor, Tensor], output: Tensor) -> None:
    ctx.save_for_backward(inputs[1], inputs[2])


def _sum_rows_backward(ctx: Any, dx_MD: Tensor) -> tuple[Tensor, None, None]:
    indices_N, offsets = ctx.saved_tensors
    bag_ids = torch.arange(offsets.numel() - 1, device=offsets.device)
    bag_of_place_N = torch.repeat_interleave(bag_ids, offsets.diff().long(), output_size=indices_N.numel())
    row_ids_N = torch.empty_like(bag_of_place_N).index_copy(0, indices_N.long(), bag_of_place_N)
    return gather_rows(dx_MD, row_ids_N), None, None


gather_rows.register_autograd(_gather_rows_backward, setup_context=_gather_rows_context)
sum_rows.register_autograd(_sum_rows_backward, setup_context=_sum_rows_context)


@custom_op("moesaic::swiglu", mutates_args=())
def swiglu(gate_up_N2F: Tensor, row_weights_N: Tensor) -> Tensor:
    """`swiglu.swiglu` with row weights."""
    return plain_swiglu(gate_up_N2F, row_weights_N)


@swiglu.register_fake
def _(gate_up_N2F: Tensor, row_weights_N: Tensor) -> Tensor:
    return gate_up_N2F.new_empty(gate_up_N2F.shape[0], gate_up_N2F.shape[1] // 2)


@custom_op("moesaic::swiglu_backward", mutates_args=())
def swiglu_backward(dh_NF: Tensor, gate_up_N2F: Tensor, row_weights_N: Tensor) -> tuple[Tensor, Tensor]:
    """(dgate_up_N2F, drow_weights_N) of `swiglu.swiglu_backward`."""
    grads = plain_swiglu_backward(dh_NF, gate_up_N2F, row_weights_N)
    assert grads.drow_weights_N is not None
    return grads.dgate_up_N2F, grads.drow_weights_N


@swiglu_backward.register_fake
def _(dh_NF: Tensor, gate_up_N2F: Tensor, row_weights_N: Tensor) -> tuple[Tensor, Tensor]:
    return torch.empty_like(gate_up_N2F, memory_format=torch.contiguous_format), torch.empty_like(row_weights_N)


def _swiglu_context(ctx: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _swiglu_backward(ctx: Any, dh_NF: Tensor) -> tuple[Tensor, Tensor]:
    return swiglu_backward(dh_NF, *ctx.saved_tensors)


swiglu.register_autograd(_swiglu_backward, setup_context=_swiglu_context)


@custom_op("moesaic::grouped_gemm", mutates_args=())
def grouped_gemm(x_NI: Tensor, weights: Sequence[Tensor], group_sizes: Sequence[int]) -> Tensor:
    """`grouped_gemm.grouped_gemm`; weights [O, I]."""
    return plain_grouped_gemm(x_NI, weights, group_sizes)


@grouped_gemm.register_fake
def _(x_NI: Tensor, weights: Sequence[Tensor], group_sizes: Sequence[int]) -> Tensor:
    return x_NI.new_empty(x_NI.shape[0], weights[0].shape[0])


@custom_op("moesaic::grouped_gemm_backward", mutates_args=())
def grouped_gemm_backward(
    dy_NO: Tensor, x_NI: Tensor, weights: Sequence[Tensor], group_sizes: Sequence[int]
) -> tuple[Tensor, Tensor]:
    """`dx_NI`, and the weight gradients as one fp32 tensor [G, O, I], zeros for groups without rows."""
    dweights_GOI = _empty_gradients(dy_NO, x_NI, group_sizes)
    fresh = [True] * len(group_sizes)
    dx_NI = dy_NO.new_empty(x_NI.shape)
    plain_grouped_gemm_backward(dy_NO, x_NI, weights, group_sizes, dweights_GOI, overwrite=fresh, out=dx_NI)
    return dx_NI, dweights_GOI


@grouped_gemm_backward.register_fake
def _(dy_NO: Tensor, x_NI: Tensor, weights: Sequence[Tensor], group_sizes: Sequence[int]) -> tuple[Tensor, Tensor]:
    return dy_NO.new_empty(x_NI.shape), _empty_gradients(dy_NO, x_NI, group_sizes)


def _empty_gradients(dy_NO: Tensor, x_NI: Tensor, group_sizes: Sequence[int]) -> Tensor:
    return dy_NO.new_empty(len(group_sizes), dy_NO.shape[1], x_NI.shape[1], dtype=torch.float32)


def _grouped_gemm_context(ctx: Any, inputs: tuple[Tensor, list[Tensor], list[int]], output: Tensor) -> None:
    x_NI, weights, ctx.group_sizes = inputs
    ctx.save_for_backward(x_NI, *weights)


def _grouped_gemm_backward(ctx: Any, dy_NO: Tensor) -> tuple[Tensor, list[Tensor], None]:
    x_NI, *weights = ctx.saved_tensors
    dx_NI, dweights_GOI = grouped_gemm_backward(dy_NO, x_NI, weights, ctx.group_sizes)
    return dx_NI, list(dweights_GOI.to(weights[0].dtype).unbind()), None


grouped_gemm.register_autograd(_grouped_gemm_backward, setup_context=_grouped_gemm_context)


@custom_op("moesaic::topk_gate", mutates_args=())
def topk_gate(
    logits_TE: Tensor, top_k: int, normalize: bool, score: str, bias_E: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(weights_TK, topk_ids_TK, lse_T, load_E) of `topk_gate.topk_gate`."""
    gate = plain_topk_gate(logits_TE, top_k, normalize=normalize, score=cast(Score, score), bias_E=bias_E)
    assert gate.lse_T is not None
    return gate.weights_TK, gate.topk_ids_TK, gate.lse_T, gate.load_E


@topk_gate.register_fake
def _(
    logits_TE: Tensor, top_k: int, normalize: bool, score: str, bias_E: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    T, E = logits_TE.shape
    ids_TK = logits_TE.new_empty(T, top_k, dtype=torch.int64)
    return logits_TE.new_empty(T, top_k), ids_TK, logits_TE.new_empty(T), logits_TE.new_empty(E, dtype=torch.int64)


@custom_op("moesaic::topk_gate_backward", mutates_args=())
def topk_gate_backward(
    dweights_TK: Tensor, dlse_T: Tensor, logits_TE: Tensor, topk_ids_TK: Tensor, normalize: bool, score: str
) -> Tensor:
    """`topk_gate.topk_gate_backward`."""
    return plain_topk_gate_backward(
        dweights_TK,
        dlse_T,
        logits_TE,
        topk_ids_TK,
        normalize=normalize,
        score=cast(Score, score),
    )


@topk_gate_backward.register_fake
def _(dweights_TK: Tensor, dlse_T: Tensor, logits_TE: Tensor, topk_ids_TK: Tensor, normalize: bool, score: str) -> Tensor:
    return torch.empty_like(logits_TE, memory_format=torch.contiguous_format)


def _topk_gate_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.normalize, ctx.score = inputs[2], inputs[3]
    ctx.mark_non_differentiable(output[1], output[3])
    ctx.save_for_backward(inputs[0], output[1])


def _topk_gate_backward(ctx: Any, dweights_TK: Tensor, dids: Tensor, dlse_T: Tensor, dload: Tensor) -> tuple[Any, ...]:
    logits_TE, topk_ids_TK = ctx.saved_tensors
    return topk_gate_backward(dweights_TK, dlse_T, logits_TE, topk_ids_TK, ctx.normalize, ctx.score), None, None, None, None


topk_gate.register_autograd(_topk_gate_backward, setup_context=_topk_gate_context)


@custom_op("moesaic::histogram", mutates_args=())
def histogram(ids: Tensor, num_bins: int) -> Tensor:
    """`histogram.histogram`."""
    return plain_histogram(ids, num_bins)


@histogram.register_fake
def _(ids: Tensor, num_bins: int) -> Tensor:
    return ids.new_empty(num_bins, dtype=torch.int64)


@custom_op("moesaic::split_tokens", mutates_args=())
def split_tokens(topk_ids_TK: Tensor, flow_ER: Tensor) -> Tensor:
    """`split_tokens.split_tokens`."""
    return plain_split_tokens(topk_ids_TK, flow_ER)


@split_tokens.register_fake
def _(topk_ids_TK: Tensor, flow_ER: Tensor) -> Tensor:
    return topk_ids_TK.new_empty(topk_ids_TK.numel(), dtype=torch.int64)


@custom_op("moesaic::pack_rows", mutates_args=())
def pack_rows(bank: Tensor, row_ids_N: Tensor, dtype: torch.dtype) -> Tensor:
    """`pack_rows.pack_rows`; no autograd, the way back is `accumulate_rows`."""
    return plain_pack_rows(bank, row_ids_N, dtype=dtype)


@pack_rows.register_fake
def _(bank: Tensor, row_ids_N: Tensor, dtype: torch.dtype) -> Tensor:
    return bank.new_empty(row_ids_N.numel(), *bank.shape[1:], dtype=dtype)


@custom_op("moesaic::accumulate_rows", mutates_args=("bank",))
def accumulate_rows(bank: Tensor, indices_N: Tensor, offsets: Tensor, buffer: Tensor, alpha: float) -> None:
    """`pack_rows.accumulate_rows` over bags given by their tensors; adds to `bank` in place."""
    plain_accumulate_rows(bank, Bags(indices_N, offsets), buffer, alpha=alpha)
