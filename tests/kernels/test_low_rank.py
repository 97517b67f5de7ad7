"""The FFN with low-rank pairs beside frozen matrices, against autograd through the sums of matrices and pairs."""

import pytest
import torch
from torch import Tensor

from moesaic.kernels import Activation, Clamp, FFNWeights, LowRank, activated_ffn, activated_ffn_backward, gated_silu

D, F, SIZES = 6, 5, (4, 0, 3)
RANKS = {"gate_up": 2, "down": 3}


def draw(*size: int) -> list[Tensor]:
    return [torch.randn(size, dtype=torch.float64, requires_grad=True) for _ in SIZES]


def detached(tensors: list[Tensor]) -> list[Tensor]:
    return [tensor.detach() for tensor in tensors]


@pytest.mark.parametrize("is_fresh", [False, True])
@pytest.mark.parametrize("adapted", [("gate_up", "down"), ("down",), ("gate_up",)])
@pytest.mark.parametrize("activation", [gated_silu, Clamp(1.702, 1.5)], ids=["swiglu", "clamp and biases"])
def test_forward_and_every_gradient(activation: Activation, adapted: tuple[str, ...], is_fresh: bool) -> None:
    torch.manual_seed(0)
    N, sizes = sum(SIZES), {"gate_up": (2 * F, D), "down": (D, F)}
    x_ND, row_weights_N = draw(N, D)[0], draw(N)[0]
    matrices = {name: detached(draw(*size)) for name, size in sizes.items()}
    biases = [] if activation is gated_silu else [detached(draw(2 * F)), detached(draw(D))]
    factors = {name: (draw(RANKS[name], sizes[name][1]), draw(sizes[name][0], RANKS[name])) for name in adapted}
    sums = {
        name: [w + 0.5 * factors[name][1][g] @ factors[name][0][g] if name in adapted else w for g, w in enumerate(of)]
        for name, of in matrices.items()
    }
    rows = []
    for n, g in enumerate(g for g, size in enumerate(SIZES) for _ in range(size)):
        pre = sums["gate_up"][g] @ x_ND[n] + (biases[0][g] if biases else 0.0)
        rows.append((sums["down"][g] @ activation(pre) + (biases[1][g] if biases else 0.0)) * row_weights_N[n])
    expected_ND, dy_ND = torch.stack(rows), draw(N, D)[0].detach()
    expected_ND.backward(dy_ND)

    pairs = {f"{name}_low_rank": LowRank(detached(a), detached(b), 0.5) for name, (a, b) in factors.items()}
    weights = FFNWeights(matrices["gate_up"], matrices["down"], *biases, **pairs)
    start = torch.nan if is_fresh else 1.0
    filled = {f"{n}_low_rank": LowRank(*([torch.full_like(t, start) for t in of] for of in ab), 0.5) for n, ab in factors.items()}
    output = activated_ffn(x_ND.detach(), row_weights_N.detach(), weights, SIZES, activation)
    torch.testing.assert_close(output.y_ND, expected_ND.detach())
    inputs = (dy_ND, x_ND.detach(), output.gate_up_N2F, row_weights_N.detach(), weights)
    grads = FFNWeights((), (), **filled)
    actual = activated_ffn_backward(*inputs, grads, SIZES, activation, alpha=0.5, overwrite=[is_fresh] * len(SIZES))
    torch.testing.assert_close(actual.dx_ND, x_ND.grad)
    torch.testing.assert_close(actual.drow_weights_N, row_weights_N.grad)
    for name, (a, b) in factors.items():
        found = filled[f"{name}_low_rank"]
        for tensor, grad in zip((*a, *b), (*found.a, *found.b), strict=True):
            expected = torch.zeros_like(tensor) if tensor.grad is None else 0.5 * tensor.grad
            torch.testing.assert_close(grad, expected if is_fresh else expected + 1.0)
    frozen = activated_ffn_backward(*inputs, None, SIZES, activation)
    assert torch.equal(frozen.dx_ND, actual.dx_ND)
