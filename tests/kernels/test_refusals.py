"""What no op can do, it says in one line: tensors on two devices, dtypes it can't serve, more than its counters hold."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from moesaic.kernels import (
    Bags,
    SwigluGrads,
    bags_of,
    gather_rows,
    grouped_gemm,
    grouped_gemm_backward,
    grouped_gemm_dgrad,
    grouped_gemm_wgrad,
    split_tokens,
    sum_rows,
    swiglu,
    swiglu_backward,
    topk_gate,
    topk_gate_backward,
)

X, HALF, INTS = torch.randn(2, 4), torch.randn(2, 4, dtype=torch.bfloat16), torch.ones(2, 4, dtype=torch.int64)
IDS, FLOAT_IDS = torch.tensor([1, 0]), torch.tensor([1.0, 0.0])
BAGS = Bags(torch.tensor([0, 1], dtype=torch.int32), torch.tensor([0, 1, 2], dtype=torch.int32))
MANY_IDS = torch.zeros(1, dtype=torch.int64).expand(2**31)  # takes no memory


def away(tensor: Tensor) -> Tensor:
    """The tensor on another device than the rest; no memory is read there."""
    return tensor.to("meta")


REFUSALS: dict[str, tuple[str, Callable[..., Any], tuple[Any, ...], dict[str, Any]]] = {
    "gather, ids elsewhere": ("row_ids_N is on meta, but the rows are on cpu; move", gather_rows, (X, away(IDS)), {}),
    "gather, out elsewhere": ("out is on meta, but", gather_rows, (X, IDS), {"out": away(X)}),
    "gather, float ids": ("row_ids_N must be int32 or int64, got torch.float32", gather_rows, (X, FLOAT_IDS), {}),
    "bags, float ids": ("row_ids_N must be int32 or int64, got torch.float32", bags_of, (FLOAT_IDS, 2), {}),
    "bags, too many": ("are counted in int32, got 2147483648, more than 2147483647; split", bags_of, (MANY_IDS, 1), {}),
    "sum, bags elsewhere": (
        "indices is on meta, but",
        sum_rows,
        (X, Bags(away(BAGS.indices), away(BAGS.offsets))),
        {},
    ),
    "sum, integers": ("rows_ND must be floating point, got torch.int64", sum_rows, (INTS, BAGS), {}),
    "product, a weight elsewhere": ("matrix 1 is on meta, but", grouped_gemm, (X, [X, away(X)], [1, 1]), {}),
    "product, two dtypes": ("matrix 0 is torch.bfloat16, but the rows are torch.float32", grouped_gemm, (X, [HALF], [2]), {}),
    "product, integers": ("rows must be floating point, got torch.int64", grouped_gemm, (INTS, [INTS], [2]), {}),
    "input gradient, two dtypes": ("matrix 0 is torch.bfloat16", grouped_gemm_dgrad, (X, [HALF], [2]), {}),
    "input gradient, out elsewhere": ("out is on meta", grouped_gemm_dgrad, (X, [X], [2]), {"out": away(X)}),
    "weight gradient, two dtypes": ("is torch.bfloat16, but the rows are", grouped_gemm_wgrad, (X, HALF, [2], [X]), {}),
    "both gradients, a weight elsewhere": ("matrix 0 is on meta", grouped_gemm_backward, (X, X, [away(X)], [2], [X]), {}),
    "both gradients, two dtypes": ("matrix 0 is torch.bfloat16", grouped_gemm_backward, (X, X, [HALF], [2], [X]), {}),
    "both gradients, a gradient elsewhere": (
        "gradient 0 is on meta",
        grouped_gemm_backward,
        (X, X, [X.T @ X], [2], [away(X)]),
        {},
    ),
    "weight gradient elsewhere": ("gradient 0 is on meta", grouped_gemm_wgrad, (X, X, [2], [away(X)]), {}),
    "swiglu, weights elsewhere": ("row_weights_N is on meta", swiglu, (X, away(torch.ones(2))), {}),
    "swiglu, integers": ("gate_up_N2F must be floating point, got torch.int64", swiglu, (INTS,), {}),
    "swiglu backward, dh elsewhere": ("dh_NF is on meta", swiglu_backward, (away(X[:, :2]), X), {}),
    "swiglu backward, out elsewhere": (
        "dgate_up_N2F is on meta",
        swiglu_backward,
        (X[:, :2], X),
        {"out": SwigluGrads(away(X), None, X[:, :2].clone())},
    ),
    "gate, bias elsewhere": ("bias_E is on meta", topk_gate, (X, 1), {"bias_E": away(torch.ones(4))}),
    "gate backward, ids elsewhere": ("topk_ids_TK is on meta", topk_gate_backward, (X, None, X, away(INTS)), {}),
    "gate backward, float ids": ("topk_ids_TK must be int32 or int64", topk_gate_backward, (X, None, X, X), {}),
    "gate backward, shapes": (r"ids \(2, 4\) and weight gradients \(2, 1\)", topk_gate_backward, (X[:, :1], None, X, INTS), {}),
    "gate backward, dlse": (r"dlse_T is \(3,\), must hold one", topk_gate_backward, (X, torch.ones(3), X, INTS), {}),
    "split, flow elsewhere": ("flow_ER is on meta", split_tokens, (INTS, away(INTS)), {}),
    "split, float flow": ("flow_ER must be int32 or int64", split_tokens, (INTS, X), {}),
    "split, too many": ("assignments are counted in int32, got 2147483648", split_tokens, (MANY_IDS[:, None], INTS), {}),
}


@pytest.mark.parametrize("message,op,arguments,options", REFUSALS.values(), ids=REFUSALS)
def test_says_what_it_cannot_do(
    message: str, op: Callable[..., Any], arguments: tuple[Any, ...], options: dict[str, Any]
) -> None:
    with pytest.raises(ValueError, match=message) as refusal:
        op(*arguments, **options)
    assert "\n" not in str(refusal.value)
