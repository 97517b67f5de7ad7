from __future__ import annotations

import importlib
import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from moesaic.kernels import SwigluGrads, swiglu, swiglu_backward
from moesaic.kernels.swiglu import swiglu_backward_torch, swiglu_torch

swiglu_module = importlib.import_module("moesaic.kernels.swiglu")

SIZES = [(1, 1), (7, 63), (63, 7), (129, 1), (65, 129), (3, 1025), (1025, 3)]  # N, F
IMPLEMENTATIONS = [(swiglu, swiglu_backward), (swiglu_torch, swiglu_backward_torch)]
# One rounding to the storage type, over an fp32 computation.
TOLERANCE = {torch.float64: 1e-12, torch.float32: 2e-6, torch.bfloat16: 2**-8, torch.float16: 2**-10}

Forward = Callable[..., Tensor]
Backward = Callable[..., SwigluGrads]


def naive_swiglu(gate: float, up: float, weight: float) -> float:
    return gate / (1.0 + math.exp(-gate)) * up * weight


def naive_grads(dh: float, gate: float, up: float, weight: float) -> tuple[float, float, float]:
    sigmoid = 1.0 / (1.0 + math.exp(-gate))
    return (
        dh * up * weight * sigmoid * (1.0 + gate * (1.0 - sigmoid)),
        dh * weight * gate * sigmoid,
        dh * up * gate * sigmoid,
    )


def naive_backward(dh_NF: Tensor, gate_up_N2F: Tensor, weights_N: Tensor) -> SwigluGrads:
    """Element by element, in Python floats."""
    N, F = dh_NF.shape
    h_NF = torch.zeros(N, F, dtype=torch.float64)
    dgate_up_N2F = torch.zeros(N, 2 * F, dtype=torch.float64)
    dweights_N = torch.zeros(N, dtype=torch.float64)
    for n in range(N):
        dh, gate_up, weight = dh_NF[n].tolist(), gate_up_N2F[n].tolist(), weights_N[n].item()
        grads = [naive_grads(dh[f], gate_up[f], gate_up[F + f], weight) for f in range(F)]
        h_NF[n] = torch.tensor([naive_swiglu(gate_up[f], gate_up[F + f], weight) for f in range(F)], dtype=torch.float64)
        dgate_up_N2F[n] = torch.tensor([g[0] for g in grads] + [g[1] for g in grads], dtype=torch.float64)
        dweights_N[n] = sum(g[2] for g in grads)
    return SwigluGrads(dgate_up_N2F, dweights_N, h_NF)


def assert_close(name: str, actual: Tensor, expected: Tensor, tolerance: float) -> None:
    """Largest error relative to the largest value."""
    assert actual.shape == expected.shape, name
    error = (actual.double() - expected).abs().max() / expected.abs().max().clamp_min(1e-6)
    assert error <= tolerance, f"{name}: {error:.3e} > {tolerance:.1e}"


@pytest.mark.parametrize("forward,backward", IMPLEMENTATIONS, ids=["public", "twin"])
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("N,F", SIZES)
def test_output_and_every_gradient(
    N: int, F: int, dtype: torch.dtype, forward: Forward, backward: Backward, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(swiglu_module, "_BLOCK_ELEMENTS", 1000)  # so that small cases cross the twin's blocks of rows
    gate_up_N2F, dh_NF = torch.randn(N, 2 * F, dtype=dtype) * 2, torch.randn(N, F, dtype=dtype)
    weights_N = torch.rand(N, dtype=torch.float64 if dtype == torch.float64 else torch.float32)
    expected = naive_backward(dh_NF, gate_up_N2F, weights_N)
    tolerance = TOLERANCE[dtype]
    assert_close("h", forward(gate_up_N2F, weights_N), expected.h_NF, tolerance)
    grads = backward(dh_NF, gate_up_N2F, weights_N)
    assert_close("h recomputed", grads.h_NF, expected.h_NF, tolerance)
    assert_close("dgate_up", grads.dgate_up_N2F, expected.dgate_up_N2F, tolerance)
    assert grads.drow_weights_N is not None
    # fp32 rounding of a sum of F terms, whatever the storage type.
    assert_close("drow_weights", grads.drow_weights_N, expected.drow_weights_N, 1e-12 if dtype == torch.float64 else 1e-5)


@pytest.mark.parametrize("forward,backward", IMPLEMENTATIONS, ids=["public", "twin"])
def test_without_weights_equals_weights_of_one(forward: Forward, backward: Backward) -> None:
    gate_up_N2F, dh_NF, ones_N = torch.randn(9, 14), torch.randn(9, 7), torch.ones(9)
    assert torch.equal(forward(gate_up_N2F), forward(gate_up_N2F, ones_N))
    grads, expected = backward(dh_NF, gate_up_N2F), backward(dh_NF, gate_up_N2F, ones_N)
    assert grads.drow_weights_N is None
    assert torch.equal(grads.dgate_up_N2F, expected.dgate_up_N2F)
    assert torch.equal(grads.h_NF, expected.h_NF)


@pytest.mark.parametrize("forward,backward", IMPLEMENTATIONS, ids=["public", "twin"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_out_buffers_and_strided_inputs(dtype: torch.dtype, forward: Forward, backward: Backward) -> None:
    """Columns of a wider matrix, a transposed dh, h written over dh: all give the bits of the plain call."""
    wide, dh_NF, weights_N = torch.randn(33, 30).to(dtype), torch.randn(33, 10).to(dtype), torch.rand(66)[::2]
    gate_up_N2F = wide[:, 5:25]
    plain_h = forward(gate_up_N2F.contiguous(), weights_N.contiguous())
    plain = backward(dh_NF, gate_up_N2F.contiguous(), weights_N.contiguous())
    out = torch.empty(33, 10, dtype=dtype)
    assert forward(gate_up_N2F.contiguous(), weights_N, out=out) is out
    torch.testing.assert_close(out, plain_h)
    torch.testing.assert_close(forward(gate_up_N2F, weights_N), plain_h)
    strided = backward(dh_NF.t().contiguous().t(), gate_up_N2F, weights_N)
    buffers = SwigluGrads(torch.empty(33, 20, dtype=dtype), torch.empty(33), dh_NF.clone())
    aliased = backward(buffers.h_NF, gate_up_N2F.contiguous(), weights_N.contiguous(), out=buffers)
    assert aliased is buffers
    for grads in (strided, aliased):
        for name in ("dgate_up_N2F", "drow_weights_N", "h_NF"):
            torch.testing.assert_close(getattr(grads, name), getattr(plain, name), msg=name)


@pytest.mark.parametrize("forward,backward", IMPLEMENTATIONS, ids=["public", "twin"])
def test_large_and_broken_values(forward: Forward, backward: Backward) -> None:
    """Far tails saturate without overflow; a NaN or an infinity is passed on, not swallowed."""
    gate = torch.tensor([[-1e4, -100.0, -30.0, 0.0, 30.0, 100.0, 1e4]])
    h = forward(torch.cat([gate, torch.ones_like(gate)], dim=1))
    torch.testing.assert_close(
        h, torch.tensor([[0.0, 0.0, -30.0 * math.exp(-30.0), 0.0, 30.0, 100.0, 1e4]]), rtol=1e-5, atol=1e-30
    )
    grads = backward(torch.ones(1, 7), torch.cat([gate, torch.ones_like(gate)], dim=1))
    assert torch.isfinite(grads.dgate_up_N2F).all()
    for dtype in (torch.float32, torch.bfloat16):
        broken = torch.tensor([[math.nan, 1.0, 1.0, math.nan], [math.inf, 1.0, 1.0, math.inf]], dtype=dtype)
        assert forward(broken).isfinite().logical_not().tolist() == [[True, True], [True, True]]


@pytest.mark.parametrize("forward,backward", IMPLEMENTATIONS, ids=["public", "twin"])
def test_no_rows(forward: Forward, backward: Backward) -> None:
    assert forward(torch.randn(0, 6), torch.rand(0)).shape == (0, 3)
    grads = backward(torch.randn(0, 3), torch.randn(0, 6), torch.rand(0))
    assert grads.dgate_up_N2F.shape == (0, 6)


@pytest.mark.parametrize("forward,backward", IMPLEMENTATIONS, ids=["public", "twin"])
def test_twice_is_bitwise_equal(forward: Forward, backward: Backward) -> None:
    gate_up_N2F, dh_NF, weights_N = torch.randn(200, 258), torch.randn(200, 129), torch.rand(200)
    assert torch.equal(forward(gate_up_N2F, weights_N), forward(gate_up_N2F, weights_N))
    first, second = (backward(dh_NF, gate_up_N2F, weights_N) for _ in range(2))
    assert first.drow_weights_N is not None
    assert second.drow_weights_N is not None
    assert torch.equal(first.dgate_up_N2F, second.dgate_up_N2F)
    assert torch.equal(first.drow_weights_N, second.drow_weights_N)


def test_wrong_shapes_are_named() -> None:
    with pytest.raises(ValueError, match=r"must be \[N, 2F\], got \(3, 5\)"):
        swiglu(torch.randn(3, 5))
    with pytest.raises(ValueError, match=r"dh_NF is torch.float32 \(3, 3\), but gate_up_N2F asks for torch.float32 \(3, 2\)"):
        swiglu_backward(torch.randn(3, 3), torch.randn(3, 4))
    with pytest.raises(ValueError, match=r"h_NF is \(3, 3\), but gate_up_N2F \(3, 4\) asks for \(3, 2\)"):
        swiglu(torch.randn(3, 4), out=torch.empty(3, 3))
    with pytest.raises(ValueError, match=r"row_weights_N is \(2,\), but gate_up_N2F \(3, 4\) asks for \(3,\)"):
        swiglu(torch.randn(3, 4), torch.rand(2))
    buffers = SwigluGrads(torch.empty(3, 4), torch.empty(1), torch.empty(3, 2))
    with pytest.raises(ValueError, match=r"drow_weights_N is \(1,\), but gate_up_N2F \(3, 4\) asks for \(3,\)"):
        swiglu_backward(torch.randn(3, 2), torch.randn(3, 4), torch.rand(3), out=buffers)


def test_torch_defaults_do_not_matter() -> None:
    """Weights that nobody gave are ones in fp32, whatever torch makes by default; meta tensors have no addresses."""
    gate_up, dh = torch.randn(5, 8), torch.randn(5, 4)
    expected = [swiglu(gate_up), swiglu_backward(dh, gate_up).dgate_up_N2F]
    torch.set_default_dtype(torch.float64)
    try:
        actual = [swiglu(gate_up), swiglu_backward(dh, gate_up).dgate_up_N2F]
    finally:
        torch.set_default_dtype(torch.float32)
    for mine, theirs in zip(actual, expected, strict=True):
        assert torch.equal(mine, theirs)
    assert swiglu(gate_up.to("meta")).shape == (5, 4)
