from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from moesaic.kernels import library


def leaf(*shape: int) -> Tensor:
    return torch.randn(*shape).requires_grad_()


def example_calls() -> dict[str, tuple[Any, tuple[Any, ...]]]:
    """Each op with arguments that reach its backward where it has one."""
    row_ids_N = torch.tensor([2, 0, 2, 4])
    indices_N, offsets = library.bags_of(row_ids_N, 5)
    weights = [leaf(6, 3), leaf(6, 3), leaf(6, 3)]
    return {
        "bags_of": (library.bags_of, (row_ids_N, 5)),
        "gather_rows": (library.gather_rows, (leaf(5, 3), row_ids_N)),
        "sum_rows": (library.sum_rows, (leaf(4, 3), indices_N, offsets)),
        "swiglu": (library.swiglu, (leaf(4, 6), torch.rand(4).requires_grad_())),
        "swiglu_backward": (library.swiglu_backward, (torch.randn(4, 3), torch.randn(4, 6), torch.rand(4))),
        "grouped_gemm": (library.grouped_gemm, (leaf(4, 3), weights, [1, 0, 3])),
        "grouped_gemm_backward": (
            library.grouped_gemm_backward,
            (torch.randn(4, 6), torch.randn(4, 3), [w.detach() for w in weights], [1, 0, 3]),
        ),
        "topk_gate": (library.topk_gate, (leaf(4, 5), 2, True, "softmax", torch.randn(5))),
        "topk_gate_backward": (
            library.topk_gate_backward,
            (torch.randn(4, 2), torch.randn(4), torch.randn(4, 5), torch.tensor([[0, 3]] * 4), True, "sigmoid"),
        ),
        "histogram": (library.histogram, (row_ids_N, 5)),
        "split_tokens": (library.split_tokens, (row_ids_N[:, None], torch.tensor([[1, 0], [0, 0], [1, 1], [0, 0], [0, 1]]))),
        "pack_rows": (library.pack_rows, (torch.randn(5, 2, 3), row_ids_N, torch.bfloat16)),
        "accumulate_rows": (library.accumulate_rows, (torch.randn(5, 3), indices_N, offsets, torch.randn(4, 3), 0.5)),
    }


@pytest.mark.parametrize("name", list(example_calls()))
def test_opcheck_accepts(name: str) -> None:
    """Schema, fake kernel and autograd registration hold what torch.library asks of them."""
    op, arguments = example_calls()[name]
    torch.library.opcheck(op, arguments)


def expert_layer(x_TD: Tensor, logits_TE: Tensor, weights: list[Tensor], sizes: list[int], row_ids_N: Tensor) -> Tensor:
    """Gate, permute, product, activation and sum in one graph."""
    weights_TK, _, lse_T, _ = library.topk_gate(logits_TE, 2, True, "softmax")
    rows_ND = library.gather_rows(x_TD, row_ids_N)
    h_NF = library.swiglu(library.grouped_gemm(rows_ND, weights, sizes), weights_TK.flatten())
    indices_N, offsets = library.bags_of(row_ids_N, x_TD.shape[0])
    return library.sum_rows(h_NF, indices_N, offsets).sum(dim=1) + lse_T.square()


def test_compiles_in_one_graph_with_the_same_gradients() -> None:
    row_ids_N = torch.tensor([3, 0, 1, 2, 2, 1, 0, 3])
    inputs = [leaf(4, 6), leaf(4, 3), *(leaf(10, 6) for _ in range(3))]

    def run(layer: Callable[..., Tensor]) -> list[Tensor]:
        y = layer(inputs[0], inputs[1], inputs[2:], [5, 0, 3], row_ids_N)
        return [y, *torch.autograd.grad(y.sum(), inputs)]

    compiled = run(torch.compile(expert_layer, backend="aot_eager", fullgraph=True))
    for actual, expected in zip(compiled, run(expert_layer), strict=True):
        assert torch.equal(actual, expected)


def test_gradients_agree_with_finite_differences() -> None:
    row_ids_N = torch.tensor([1, 0, 1, 2, 2, 1])
    inputs = [torch.randn(3, 4, dtype=torch.float64, requires_grad=True)]
    inputs += [torch.randn(6, 4, dtype=torch.float64, requires_grad=True) for _ in range(2)]
    row_weights_N = torch.rand(6, dtype=torch.float64, requires_grad=True)
    indices_N, offsets = library.bags_of(row_ids_N, 3)

    def layer(x_MD: Tensor, row_weights_N: Tensor, *weights: Tensor) -> Tensor:
        rows_ND = library.gather_rows(x_MD, row_ids_N)
        return library.sum_rows(library.swiglu(library.grouped_gemm(rows_ND, weights, [2, 4]), row_weights_N), indices_N, offsets)

    # fp32 weight gradients bound the precision.
    assert torch.autograd.gradcheck(layer, (inputs[0], row_weights_N, *inputs[1:]), rtol=1e-4, atol=1e-5)


def test_without_groups_real_and_fake_agree() -> None:
    rows, none = (torch.empty(0, 2), torch.empty(0, 3)), ([], [])
    for tensor, fake in zip(
        library.grouped_gemm_backward(*rows, *none),
        library.grouped_gemm_backward(*(row.to("meta") for row in rows), *none),
        strict=True,
    ):
        assert tensor.shape == fake.shape
