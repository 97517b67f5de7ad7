from __future__ import annotations

import importlib
from dataclasses import dataclass
from typing import Any
from unittest import mock

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional

from moesaic.kernels import FFNWeights, GroupedFFNGrads, GroupedFFNOutput, grouped_ffn, grouped_ffn_backward
from tests.helpers.layouts import PLAIN_MATRICES, PLAIN_ROWS, matrix_layouts, placed, placed_matrices, row_layouts
from tests.helpers.nan import poisoned_empty

grouped_ffn_module = importlib.import_module("moesaic.kernels.grouped_ffn")
GROUP_SIZES = {
    "one row": [1],
    "odd": [7, 1, 63],
    "empty groups": [0, 129, 0, 7, 0],
    "longer than a chunk": [0, 1025, 0, 1, 129],  # of as many rows as the fixture says
    "no rows": [0, 0],
}
SHAPES = [(1, 1), (7, 5), (33, 63)]  # D, F
# Of the sum of magnitudes behind a value; bfloat16 rounds three times on the longest path.
TOLERANCE = {torch.float32: 2e-6, torch.bfloat16: 2**-6}


@pytest.fixture(autouse=True)
def _small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """So that small groups come in several chunks."""
    monkeypatch.setattr(grouped_ffn_module, "_CHUNK_ROWS", 128)


@dataclass(frozen=True)
class Expected:
    """A value in fp64, and the largest sum of magnitudes that rounding errors of its elements are measured by."""

    value: Tensor
    magnitude: float


class Case:
    """Random rows, weights and gradient buffers, and the same computed in fp64, group by group, gradients by autograd."""

    def __init__(self, sizes: list[int], D: int, F: int, dtype: torch.dtype) -> None:
        N = sum(sizes)
        self.sizes = sizes
        self.x_ND, self.dy_ND, self.row_weights_N = torch.randn(N, D, dtype=dtype), torch.randn(N, D, dtype=dtype), torch.rand(N)
        self.weights = FFNWeights(
            [torch.randn(2 * F, D, dtype=dtype) for _ in sizes], [torch.randn(D, F, dtype=dtype) for _ in sizes]
        )
        self.start_grads = FFNWeights([torch.randn(2 * F, D) for _ in sizes], [torch.randn(D, F) for _ in sizes])

    def grads(self) -> FFNWeights:
        """A fresh copy of the gradient buffers, which start out filled."""
        return FFNWeights([g.clone() for g in self.start_grads.gate_up], [g.clone() for g in self.start_grads.down])

    def naive(self, alpha: float) -> dict[str, Expected]:
        """Every result by name, in fp64."""
        x, row_weights = self.x_ND.double().requires_grad_(), self.row_weights_N.double().requires_grad_()
        outputs, named = [], {}
        start = 0
        for group, size in enumerate(self.sizes):
            rows = slice(start, start + size)
            start += size
            gate_up_w, down_w = self.weights.gate_up[group].double(), self.weights.down[group].double()
            gate_up = (x[rows] @ gate_up_w.t()).requires_grad_()
            gate, up = gate_up.chunk(2, dim=1)
            h = functional.silu(gate) * up * row_weights[rows, None]
            outputs.append(h @ down_w.t())
            dy = self.dy_ND[rows].double()
            (dgate_up,) = torch.autograd.grad(outputs[-1], gate_up, dy, retain_graph=True)
            for name, left, right in ((f"gate_up {group}", dgate_up, x[rows]), (f"down {group}", dy, h)):
                start_grad = getattr(self.start_grads, name.split()[0])[group].double()
                named[name] = Expected(
                    (start_grad + alpha * left.t() @ right).detach(),
                    (start_grad.abs() + alpha * left.abs().t() @ right.abs()).max().item(),
                )
        y = torch.cat(outputs)
        dx, drow_weights = torch.autograd.grad(y, (x, row_weights), self.dy_ND.double())
        for name, value in (("y", y.detach()), ("dx", dx), ("drow_weights", drow_weights)):
            named[name] = Expected(value, value.abs().max().item() if value.numel() else 1.0)
        return named


def assert_close(name: str, actual: Tensor, expected: Expected, tolerance: float) -> None:
    assert actual.shape == expected.value.shape, name
    assert actual.isfinite().all(), name
    error = (actual.double() - expected.value).abs().max().item() if actual.numel() else 0.0
    assert error <= tolerance * expected.magnitude, f"{name}: {error:.3e} > {tolerance:.1e} x {expected.magnitude:.3e}"


@pytest.mark.parametrize("dtype,has_blas", [(torch.float32, True), (torch.float32, False), (torch.bfloat16, True)])
@pytest.mark.parametrize("D,F", SHAPES)
@pytest.mark.parametrize("sizes", GROUP_SIZES.values(), ids=GROUP_SIZES)
def test_output_and_every_gradient(
    sizes: list[int], D: int, F: int, dtype: torch.dtype, has_blas: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also over memory that holds NaN, and where compiled routines have no BLAS to call."""
    if not has_blas:
        monkeypatch.setattr(grouped_ffn_module, "compiled_ffn", lambda: None)
    case = Case(sizes, D, F, dtype)
    expected, grads = case.naive(alpha=0.5), case.grads()
    with poisoned_empty():
        output = grouped_ffn(case.x_ND, case.row_weights_N, case.weights, sizes)
        inner = grouped_ffn_backward(
            case.dy_ND, case.x_ND, output.gate_up_N2F, case.row_weights_N, case.weights, grads, sizes, alpha=0.5
        )
    actual = {"y": output.y_ND, "dx": inner.dx_ND, "drow_weights": inner.drow_weights_N}
    for group in range(len(sizes)):
        actual[f"gate_up {group}"], actual[f"down {group}"] = grads.gate_up[group], grads.down[group]
    assert actual.keys() == expected.keys()
    for name in actual:
        assert_close(name, actual[name], expected[name], TOLERANCE[dtype])


def test_out_buffers_frozen_experts_and_bank_views() -> None:
    """`out` is filled and returned; without `grads` rows get the same gradients; weights may be views of a bank."""
    case = Case([3, 0, 9], 6, 10, torch.float32)
    bank = FFNWeights(torch.stack(list(case.weights.gate_up)), torch.stack(list(case.weights.down)))  # type: ignore[arg-type]
    views = FFNWeights(list(bank.gate_up), list(bank.down))
    plain = grouped_ffn(case.x_ND, case.row_weights_N, case.weights, case.sizes)
    out = GroupedFFNOutput(torch.empty(12, 6), torch.empty(12, 20))
    assert grouped_ffn(case.x_ND, case.row_weights_N, views, case.sizes, out=out) is out
    assert torch.equal(out.y_ND, plain.y_ND)
    arguments = (case.dy_ND, case.x_ND, plain.gate_up_N2F, case.row_weights_N, views)
    trained = grouped_ffn_backward(*arguments, case.grads(), case.sizes)
    buffers = GroupedFFNGrads(torch.empty(12, 6), torch.empty(12))
    assert grouped_ffn_backward(*arguments, None, case.sizes, out=buffers) is buffers
    assert torch.equal(buffers.dx_ND, trained.dx_ND)
    assert torch.equal(buffers.drow_weights_N, trained.drow_weights_N)


@pytest.mark.parametrize("num_threads", [1, 2])
def test_the_compiled_call_does_what_the_twin_does(num_threads: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """On rows that are columns of wider ones, stacked weights, and gradients some of which are to be overwritten."""
    threads, sizes, D, F = torch.get_num_threads(), [300, 0, 5, 1], 40, 130
    wide_x, wide_dy, row_weights_N = torch.randn(306, 60), torch.randn(306, 50), torch.rand(306)
    weights = FFNWeights(torch.randn(4, 2 * F, D), torch.randn(4, D, F))  # type: ignore[arg-type]
    results, twins_run = [], []
    for name in ("grouped_ffn_torch", "grouped_ffn_backward_torch"):
        twin = getattr(grouped_ffn_module, name)
        monkeypatch.setattr(grouped_ffn_module, name, lambda *a, twin=twin, **k: twins_run.append(has_blas) or twin(*a, **k))
    torch.set_num_threads(num_threads)
    for has_blas in (True, False):
        if not has_blas:
            monkeypatch.setattr(grouped_ffn_module, "compiled_ffn", lambda: None)
        grads = FFNWeights([torch.full((2 * F, D), 2.0) for _ in sizes], [torch.full((D, F), 2.0) for _ in sizes])
        for group in (0, 1):
            grads.gate_up[group].fill_(torch.nan)
            grads.down[group].fill_(torch.nan)
        x_ND, dy_ND = wide_x[:, 3 : 3 + D], wide_dy[:, :D]
        output = grouped_ffn(x_ND, row_weights_N, weights, sizes)
        arguments = (dy_ND, x_ND, output.gate_up_N2F, row_weights_N, weights)
        inner = grouped_ffn_backward(*arguments, grads, sizes, alpha=0.5, overwrite=[True, True, False, False])
        frozen = grouped_ffn_backward(*arguments, None, sizes)
        assert torch.equal(frozen.dx_ND, inner.dx_ND)
        results.append([output.y_ND, output.gate_up_N2F, inner.dx_ND, inner.drow_weights_N, *grads.gate_up, *grads.down])
    torch.set_num_threads(threads)
    assert twins_run == [False] * 3
    for actual, expected in zip(*results, strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5 * float(expected.abs().max()))


@settings(max_examples=100, derandomize=True)
@given(
    sizes=st.lists(st.integers(0, 4), min_size=1, max_size=3),
    dims=st.tuples(*[st.integers(1, 3)] * 2),
    rows=row_layouts("x", "dy", "y", "dx"),
    dense_rows=row_layouts("gate_up", "weights", "dweights", plain=["dense"]),
    matrices=matrix_layouts("gate_up", "down", "gate_up grads", "down grads"),
)
def test_every_layout_is_read_and_written_where_it_lies(
    sizes: list[int],
    dims: tuple[int, int],
    rows: dict[str, str],
    dense_rows: dict[str, str],
    matrices: dict[str, tuple[str, bool]],
) -> None:
    """Nothing beside an operand is read, whose NaN would show, or written; plain layouts are the compiled routine's."""
    (D, F), N, runs = dims, sum(sizes), []
    case, run = Case(sizes, D, F, torch.float32), grouped_ffn_module.compiled_ffn()
    expected = case.naive(alpha=0.5)
    x_ND, dy_ND = placed(case.x_ND, rows["x"])[1], placed(case.dy_ND, rows["dy"])[1]
    row_weights_N = placed(case.row_weights_N[:, None], dense_rows["weights"])[1][:, 0]
    y, dx, gate_up, dweights = (
        placed(torch.full((N, width), torch.nan), layout)
        for width, layout in ((D, rows["y"]), (D, rows["dx"]), (2 * F, dense_rows["gate_up"]), (1, dense_rows["dweights"]))
    )
    stacks = {"gate_up": case.weights.gate_up, "down": case.weights.down}
    stacks |= {"gate_up grads": case.start_grads.gate_up, "down grads": case.start_grads.down}
    placements = {name: placed_matrices(torch.stack(list(stack)), *matrices[name]) for name, stack in stacks.items()}
    weights = FFNWeights(placements["gate_up"][1], placements["down"][1])  # type: ignore[arg-type]
    grads = FFNWeights(placements["gate_up grads"][1], placements["down grads"][1])  # type: ignore[arg-type]
    out, row_grads = GroupedFFNOutput(y[1], gate_up[1]), GroupedFFNGrads(dx[1], dweights[1][:, 0])
    recorded = mock.Mock(side_effect=lambda *words: runs.append(run(*words)) or runs[-1])
    with mock.patch.object(grouped_ffn_module, "compiled_ffn", return_value=recorded):
        grouped_ffn(x_ND, row_weights_N, weights, sizes, out=out)
        grouped_ffn_backward(dy_ND, x_ND, gate_up[1], row_weights_N, weights, grads, sizes, alpha=0.5, out=row_grads)
    actual = {"y": y[1], "dx": dx[1], "drow_weights": dweights[1][:, 0]}
    for group in range(len(sizes)):
        actual[f"gate_up {group}"], actual[f"down {group}"] = grads.gate_up[group], grads.down[group]
    for name in expected:
        assert_close(name, actual[name], expected[name], TOLERANCE[torch.float32])
    for memory, view in (y, dx, gate_up, dweights, placements["gate_up grads"], placements["down grads"]):
        assert memory.isnan().sum() == memory.numel() - (
            view.numel() if isinstance(view, Tensor) else sum(v.numel() for v in view)
        )
    if (
        all(layout in PLAIN_ROWS for layout in rows.values())
        and all(layout == "dense" for layout in dense_rows.values())
        and all(layout in PLAIN_MATRICES for layout in matrices.values())
    ):
        assert runs == [True, True]


@pytest.mark.parametrize("is_trained", [True, False], ids=["trained", "frozen"])
def test_op_by_op_as_on_a_gpu(is_trained: bool) -> None:
    case = Case([5, 0, 9], 6, 10, torch.float32)
    gate_up_N2F = grouped_ffn(case.x_ND, case.row_weights_N, case.weights, case.sizes).gate_up_N2F
    arguments = (case.dy_ND, case.x_ND, gate_up_N2F, case.row_weights_N, case.weights)
    grads, by_ops = (case.grads() if is_trained else None for _ in range(2))
    how: dict[str, Any] = {"alpha": 0.5, "overwrite": [False, True, True]}
    expected = grouped_ffn_backward(*arguments, grads, case.sizes, **how)
    out = GroupedFFNGrads(torch.empty(14, 6), torch.empty(14))
    grouped_ffn_module._backward_by_ops(*arguments, by_ops, case.sizes, **how, out=out)
    torch.testing.assert_close([out.dx_ND, out.drow_weights_N], [expected.dx_ND, expected.drow_weights_N], rtol=1e-5, atol=1e-5)
    if grads is not None and by_ops is not None:
        torch.testing.assert_close([*by_ops.gate_up, *by_ops.down], [*grads.gate_up, *grads.down], rtol=1e-5, atol=1e-5)


def test_what_does_not_fit_is_named() -> None:
    """Whichever routine would have served it."""
    case = Case([3, 4], 6, 10, torch.float32)
    with pytest.raises(ValueError, match="sum to 6, but there are 7 rows"):
        grouped_ffn(case.x_ND, case.row_weights_N, case.weights, [3, 3])
    with pytest.raises(ValueError, match="1 group sizes but 2 weights"):
        grouped_ffn_backward(
            case.dy_ND, case.x_ND, torch.randn(7, 20), case.row_weights_N, case.weights, case.grads(), [7], overwrite=[True]
        )


@pytest.mark.parametrize("sizes", GROUP_SIZES.values(), ids=GROUP_SIZES.keys())
def test_overwritten_buffers_start_from_nothing(sizes: list[int]) -> None:
    """Every other group's buffers hold NaN: the result is what zeros would have given, bit for bit, without rows too."""
    case = Case(sizes, 7, 5, torch.float32)
    forward = grouped_ffn(case.x_ND, case.row_weights_N, case.weights, sizes)
    overwrite = [group % 2 == 0 for group in range(len(sizes))]
    results = []
    for fill in (torch.nan, 0.0):
        grads = case.grads()
        for group in range(0, len(sizes), 2):
            grads.gate_up[group].fill_(fill)
            grads.down[group].fill_(fill)
        grouped_ffn_backward(
            case.dy_ND,
            case.x_ND,
            forward.gate_up_N2F,
            case.row_weights_N,
            case.weights,
            grads,
            sizes,
            alpha=0.5,
            overwrite=overwrite if fill != 0.0 else None,
        )
        results.append([*grads.gate_up, *grads.down])
    for actual, expected in zip(*results, strict=True):
        assert torch.equal(actual, expected)


def test_twice_is_bitwise_equal() -> None:
    case = Case([129, 0, 1100], 33, 64, torch.float32)
    runs = []
    for _ in range(2):
        grads = case.grads()
        output = grouped_ffn(case.x_ND, case.row_weights_N, case.weights, case.sizes)
        inner = grouped_ffn_backward(
            case.dy_ND, case.x_ND, output.gate_up_N2F, case.row_weights_N, case.weights, grads, case.sizes
        )
        runs.append([output.y_ND, inner.dx_ND, inner.drow_weights_N, *grads.gate_up, *grads.down])
    for first, second in zip(*runs, strict=True):
        assert torch.equal(first, second)


def test_group_sizes_and_weights_must_fit() -> None:
    case = Case([3, 2], 4, 6, torch.float32)
    with pytest.raises(ValueError, match="sum to 4, but there are 5 rows"):
        grouped_ffn(case.x_ND, case.row_weights_N, case.weights, [3, 1])
    with pytest.raises(ValueError, match="2 gate_up and 1 down"):
        FFNWeights(case.weights.gate_up, case.weights.down[:1])
