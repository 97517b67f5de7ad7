from __future__ import annotations

import importlib
from typing import Any
from unittest import mock

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from moesaic.kernels import (
    FFNWeights,
    grouped_ffn,
    grouped_ffn_backward,
    grouped_gemm,
    grouped_gemm_backward,
    grouped_gemm_dgrad,
    grouped_gemm_wgrad,
)
from moesaic.kernels.cpu import blas
from tests.helpers.layouts import PLAIN_MATRICES, PLAIN_ROWS, matrix_layouts, placed, placed_matrices, row_layouts
from tests.helpers.nan import poisoned_empty

grouped_gemm_module = importlib.import_module("moesaic.kernels.grouped_gemm")
GROUP_SIZES = {
    "one row": [1],
    "odd": [7, 1, 63],
    "empty groups": [0, 129, 0, 0, 7, 0],
    "all in one": [0, 0, 1025, 0],
    "no rows": [0, 0],
}
SHAPES = [(1, 1), (7, 63), (65, 33)]  # I, O
# Relative to the largest value; half precision rounds its fp32 sum once.
TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 2**-8}


def naive_groups(group_sizes: list[int]) -> list[int]:
    """The group of each row."""
    return [group for group, size in enumerate(group_sizes) for _ in range(size)]


def naive_forward(x_NI: Tensor, weights: list[Tensor], group_sizes: list[int]) -> Tensor:
    y_NO = torch.zeros(len(x_NI), weights[0].shape[0], dtype=torch.float64)
    for n, group in enumerate(naive_groups(group_sizes)):
        y_NO[n] = (weights[group].double() * x_NI[n].double()).sum(dim=1)
    return y_NO


def naive_dgrad(dy_NO: Tensor, weights: list[Tensor], group_sizes: list[int]) -> Tensor:
    dx_NI = torch.zeros(len(dy_NO), weights[0].shape[1], dtype=torch.float64)
    for n, group in enumerate(naive_groups(group_sizes)):
        dx_NI[n] = (weights[group].double() * dy_NO[n].double()[:, None]).sum(dim=0)
    return dx_NI


def naive_wgrad(dy_NO: Tensor, x_NI: Tensor, group_sizes: list[int], grads: list[Tensor], alpha: float) -> list[Tensor]:
    sums = [grad.double() for grad in grads]
    for n, group in enumerate(naive_groups(group_sizes)):
        sums[group] = sums[group] + alpha * dy_NO[n].double()[:, None] * x_NI[n].double()[None, :]
    return sums


def assert_close(name: str, actual: Tensor, expected: Tensor, tolerance: float) -> None:
    assert actual.shape == expected.shape, name
    if actual.numel() == 0:
        return
    error = (actual.double() - expected).abs().max() / expected.abs().max().clamp_min(1e-6)
    assert error <= tolerance, f"{name}: {error:.3e} > {tolerance:.1e}"


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("in_dim,out_dim", SHAPES)
@pytest.mark.parametrize("sizes", GROUP_SIZES.values(), ids=GROUP_SIZES)
def test_forward_and_both_gradients(sizes: list[int], in_dim: int, out_dim: int, dtype: torch.dtype) -> None:
    num_rows, tolerance = sum(sizes), TOLERANCE[dtype]
    grad_dtype = torch.float64 if dtype == torch.float64 else torch.float32
    x_NI, dy_NO = torch.randn(num_rows, in_dim, dtype=dtype), torch.randn(num_rows, out_dim, dtype=dtype)
    weights = [torch.randn(out_dim, in_dim, dtype=dtype) for _ in sizes]
    grads = [torch.randn(out_dim, in_dim, dtype=grad_dtype) for _ in sizes]
    products = naive_wgrad(dy_NO, x_NI, sizes, [torch.zeros_like(grad) for grad in grads], alpha=0.5)
    expected_grads = [grad.double() + product for grad, product in zip(grads, products, strict=True)]
    assert_close("y", grouped_gemm(x_NI, weights, sizes), naive_forward(x_NI, weights, sizes), tolerance)
    assert_close("dx", grouped_gemm_dgrad(dy_NO, weights, sizes), naive_dgrad(dy_NO, weights, sizes), tolerance)
    grouped_gemm_wgrad(dy_NO, x_NI, sizes, grads, alpha=0.5)
    # The weight gradient is summed in fp32 from half-precision rows, so it is held to fp32's tolerance.
    for group, (grad, expected) in enumerate(zip(grads, expected_grads, strict=True)):
        assert_close(f"grad {group}", grad, expected, TOLERANCE[grad_dtype])
    # Every other group's buffer holds nothing yet.
    overwrite = [group % 2 == 0 for group in range(len(sizes))]
    fresh = [torch.full_like(grad, torch.nan if overwrite[group] else 0.0) for group, grad in enumerate(grads)]
    grouped_gemm_wgrad(dy_NO, x_NI, sizes, fresh, alpha=0.5, overwrite=overwrite)
    for group, (grad, expected) in enumerate(zip(fresh, products, strict=True)):
        assert_close(f"fresh grad {group}", grad, expected, TOLERANCE[grad_dtype])


@pytest.mark.parametrize("is_compiled", [True, False], ids=["compiled", "torch"])
@pytest.mark.parametrize("sizes", GROUP_SIZES.values(), ids=GROUP_SIZES)
def test_stacked_matrices_are_the_listed_ones(sizes: list[int], is_compiled: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where torch's library has no BLAS to call, and over memory that holds NaN."""
    num_rows, overwrite = sum(sizes), [group % 2 == 1 for group in range(len(sizes))]
    if not is_compiled:
        monkeypatch.setattr(grouped_gemm_module, "compiled_products", lambda: None)
    x_NI, dy_NO, bank = torch.randn(num_rows, 33), torch.randn(num_rows, 65), torch.randn(len(sizes), 65, 33)
    grads = torch.randn_like(bank)
    grads[1::2] = torch.nan
    expected = naive_wgrad(dy_NO, x_NI, sizes, [grad.nan_to_num(0.0) for grad in grads], 0.5)
    listed = [grad.clone() for grad in grads]
    with poisoned_empty():
        assert_close("y", grouped_gemm(x_NI, bank, sizes), naive_forward(x_NI, list(bank), sizes), 1e-5)
        assert_close("dx", grouped_gemm_dgrad(dy_NO, bank, sizes), naive_dgrad(dy_NO, list(bank), sizes), 1e-5)
        assert torch.equal(grouped_gemm(x_NI, bank, sizes), grouped_gemm(x_NI, list(bank), sizes))
    both = grads.clone()
    grouped_gemm_wgrad(dy_NO, x_NI, sizes, grads, alpha=0.5, overwrite=overwrite)
    grouped_gemm_wgrad(dy_NO, x_NI, sizes, listed, alpha=0.5, overwrite=overwrite)
    for group in range(len(sizes)):
        assert_close(f"grad {group}", grads[group], expected[group], 1e-5)
        assert torch.equal(grads[group], listed[group])
    # Both gradients in one call, from a list of weights and a stack of gradients.
    dx_NI = grouped_gemm_backward(dy_NO, x_NI, list(bank), sizes, both, alpha=0.5, overwrite=overwrite)
    assert torch.equal(dx_NI, grouped_gemm_dgrad(dy_NO, bank, sizes))
    assert torch.equal(both, grads)


def test_torch_has_a_product_to_call() -> None:
    """Otherwise the compiled routine would go untested; torch wheels for Linux have one."""
    assert blas.sgemm_address()


def test_strided_operands_and_out_buffers() -> None:
    """Weights and gradients as rows of a bank and transposed views, rows as columns of a wider matrix."""
    sizes = [5, 0, 8]
    bank, grad_bank = torch.randn(4, 6, 10), torch.zeros(4, 6, 10)
    wide_x, wide_dy = torch.randn(13, 14), torch.randn(13, 20)
    x_NI, dy_NO = wide_x[:, 2:12], wide_dy[:, ::2][:, :6]
    weights = [bank[3], bank[0], torch.randn(10, 6).t()]
    grads = [grad_bank[3], grad_bank[0], torch.zeros(10, 6).t()]
    y_NO, dx_NI = torch.empty(13, 6), torch.empty(13, 10)
    assert grouped_gemm(x_NI, weights, sizes, out=y_NO) is y_NO
    assert grouped_gemm_dgrad(dy_NO, weights, sizes, out=dx_NI) is dx_NI
    grouped_gemm_wgrad(dy_NO, x_NI, sizes, grads)
    assert_close("y", y_NO, naive_forward(x_NI, weights, sizes), 1e-5)
    assert_close("dx", dx_NI, naive_dgrad(dy_NO, weights, sizes), 1e-5)
    expected = naive_wgrad(dy_NO, x_NI, sizes, [torch.zeros(6, 10)] * 3, 1.0)
    for group in range(3):
        assert_close(f"grad {group}", grads[group], expected[group], 1e-5)
    assert torch.equal(grad_bank[1:3], torch.zeros(2, 6, 10))


@settings(max_examples=200, derandomize=True)
@given(
    sizes=st.lists(st.integers(0, 4), min_size=1, max_size=4),
    dims=st.tuples(*[st.integers(1, 4)] * 2),
    rows=row_layouts("x", "dy", "y", "dx"),
    matrices=matrix_layouts("weights", "grads"),
)
def test_every_layout_is_read_and_written_where_it_lies(
    sizes: list[int], dims: tuple[int, int], rows: dict[str, str], matrices: dict[str, tuple[str, bool]]
) -> None:
    """Nothing beside an operand is read, whose NaN would show, or written; plain layouts are the compiled routine's."""
    (in_dim, out_dim), N, G = dims, sum(sizes), len(sizes)
    x_NI, dy_NO, overwrite = torch.randn(N, in_dim), torch.randn(N, out_dim), [group % 2 == 1 for group in range(G)]
    bank = torch.randn(G, out_dim, in_dim)
    fresh_start = torch.randn_like(bank).masked_fill(torch.tensor(overwrite)[:, None, None], torch.nan)
    runs: list[bool] = []
    run = grouped_gemm_module.compiled_products()

    def recorded(*words: Any) -> bool:
        runs.append(run(*words))
        return runs[-1]

    x, dy = placed(x_NI, rows["x"])[1], placed(dy_NO, rows["dy"])[1]
    weights = placed_matrices(bank, *matrices["weights"])[1]
    y, dx, dx_of_both = (placed(torch.full((N, w), torch.nan), rows[name]) for name, w in (("y", out_dim), *[("dx", in_dim)] * 2))
    grads, grads_of_both = (placed_matrices(fresh_start, *matrices["grads"]) for _ in range(2))
    how: dict[str, Any] = {"alpha": 0.5, "overwrite": overwrite}
    with mock.patch.object(grouped_gemm_module, "compiled_products", return_value=recorded):
        grouped_gemm(x, weights, sizes, out=y[1])
        grouped_gemm_dgrad(dy, weights, sizes, out=dx[1])
        grouped_gemm_wgrad(dy, x, sizes, grads[1], **how)
        grouped_gemm_backward(dy, x, weights, sizes, grads_of_both[1], **how, out=dx_of_both[1])
    dx_NI, y_NO = naive_dgrad(dy_NO, list(bank), sizes), naive_forward(x_NI, list(bank), sizes)
    dweights = torch.stack(naive_wgrad(dy_NO, x_NI, sizes, list(fresh_start.nan_to_num(0.0)), 0.5))
    for (memory, view), expected in ((y, y_NO), (dx, dx_NI), (dx_of_both, dx_NI), (grads, dweights), (grads_of_both, dweights)):
        written = torch.stack(view) if isinstance(view, list) else view
        assert_close("result", written, expected, 1e-5)
        assert memory.isnan().sum() == memory.numel() - written.numel()
    if all(layout in PLAIN_ROWS for layout in rows.values()) and all(layout in PLAIN_MATRICES for layout in matrices.values()):
        assert runs == [True] * 4


def test_empty_groups_leave_their_gradients_untouched() -> None:
    grads = [torch.full((3, 2), float("nan")), torch.zeros(3, 2)]
    grouped_gemm_wgrad(torch.randn(4, 3), torch.randn(4, 2), [0, 4], grads)
    assert grads[0].isnan().all()
    assert grads[1].isfinite().all()


def test_twice_is_bitwise_equal() -> None:
    sizes = [129, 0, 63]
    x_NI, dy_NO = torch.randn(192, 65), torch.randn(192, 31)
    weights = [torch.randn(31, 65) for _ in sizes]
    grads = [[torch.zeros(31, 65) for _ in sizes] for _ in range(2)]
    assert torch.equal(grouped_gemm(x_NI, weights, sizes), grouped_gemm(x_NI, weights, sizes))
    assert torch.equal(grouped_gemm_dgrad(dy_NO, weights, sizes), grouped_gemm_dgrad(dy_NO, weights, sizes))
    for grad in grads:
        grouped_gemm_wgrad(dy_NO, x_NI, sizes, grad)
    for first, second in zip(*grads, strict=True):
        assert torch.equal(first, second)


def test_a_rank_without_experts_has_nothing_to_multiply() -> None:
    """Nor has a part of a rank's experts that is empty; on no device is a kernel launched."""
    for device in ("cpu", "meta"):
        rows, out = torch.empty(0, 3, device=device), torch.empty(0, 5, device=device)
        assert grouped_gemm(rows, [], [], out=out) is out
        assert grouped_gemm_dgrad(rows, [], []).shape == (0, 0)
        grouped_gemm_wgrad(rows, out, [], [])
        ffn = grouped_ffn(rows, rows[:, 0], FFNWeights([], []), [])
        arguments = (rows, rows, ffn.gate_up_N2F, rows[:, 0], FFNWeights([], []))
        assert grouped_ffn_backward(*arguments, FFNWeights([], []), []).dx_ND.shape == (0, 3)
    with pytest.raises(ValueError, match="1 group sizes but 0 weights"):
        grouped_gemm(torch.randn(4, 3), [], [4])


def test_sizes_that_do_not_fit_are_named() -> None:
    weights = [torch.randn(2, 3), torch.randn(2, 3)]
    with pytest.raises(ValueError, match="sum to 5, but there are 4 rows"):
        grouped_gemm(torch.randn(4, 3), weights, [2, 3])
    with pytest.raises(ValueError, match="1 group sizes but 2 weights"):
        grouped_gemm_dgrad(torch.randn(4, 2), weights, [4])
    with pytest.raises(ValueError, match="must be >= 0"):
        grouped_gemm_wgrad(torch.randn(4, 2), torch.randn(4, 3), [5, -1], weights)
    given = torch.randn(4, 2), torch.randn(4, 3), weights, [2, 2], [torch.zeros(2, 3), torch.zeros(2, 3)]
    with pytest.raises(ValueError, match="2 group sizes but 3 marks of what to overwrite"):
        grouped_gemm_backward(*given, overwrite=[True, False, True])
    rows, ffn = torch.randn(4, 3), FFNWeights([torch.randn(4, 3)] * 2, [torch.randn(3, 2)] * 2)
    with pytest.raises(ValueError, match="2 group sizes but 1 marks of what to overwrite"):
        grouped_ffn_backward(rows, rows, torch.randn(4, 4), torch.ones(4), ffn, ffn, [2, 2], overwrite=[True])


@pytest.mark.parametrize("stride", [2**31, 2**32 + 3])
def test_strides_that_blas_cannot_take_are_read_right(stride: int) -> None:
    """A single row may have any: BLAS would read half of the number."""
    x_NI, weight = torch.randn(1, 8).as_strided((1, 8), (stride, 1)), torch.randn(5, 8)
    torch.testing.assert_close(grouped_gemm(x_NI, [weight], [1]), x_NI @ weight.T)


def test_tensors_without_memory_have_no_address() -> None:
    with FakeTensorMode():
        x_NI, weight = torch.randn(4, 8), torch.randn(5, 8)
        y_NO = grouped_gemm(x_NI, [weight], [4])
        assert y_NO.shape == (4, 5)
        assert grouped_gemm_backward(y_NO, x_NI, [weight], [4], [torch.zeros(5, 8)]).shape == (4, 8)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_gradient_of_rows_may_take_their_place(dtype: torch.dtype) -> None:
    dy_NO, x_NI, weight = torch.randn(6, 5, dtype=dtype), torch.randn(6, 8, dtype=dtype), torch.randn(5, 8, dtype=dtype)
    grad, expected = torch.zeros_like(weight), dy_NO.T @ x_NI
    dx_NI = grouped_gemm_backward(dy_NO, x_NI, [weight], [6], [grad], out=x_NI)
    assert dx_NI is x_NI
    torch.testing.assert_close(x_NI, dy_NO @ weight)
    torch.testing.assert_close(grad, expected)
