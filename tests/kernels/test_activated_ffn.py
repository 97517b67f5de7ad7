"""The FFN with any activation, and with biases or none, against autograd through its definition, row by row."""

import pytest
import torch
from torch import Tensor

from moesaic.kernels import Activation, Clamp, FFNWeights, activated_ffn, activated_ffn_backward

D, F = 6, 5
CLAMP = Clamp(alpha=1.702, limit=1.5)  # low enough that many values are clamped


def squared_relu(pre: Tensor) -> Tensor:
    return pre.relu().square()


def definition(x_D: Tensor, weight: Tensor, gate_up: Tensor, down: Tensor, *biases: Tensor) -> Tensor:
    if not biases:
        return down @ (gate_up @ x_D).relu() ** 2 * weight
    gate, up = (gate_up @ x_D + biases[0]).chunk(2)
    gate, up = gate.clamp(max=CLAMP.limit), up.clamp(-CLAMP.limit, CLAMP.limit)
    return (down @ ((up + 1) * gate * torch.sigmoid(CLAMP.alpha * gate)) + biases[1]) * weight


@pytest.mark.parametrize("group_sizes", [(4, 0, 3), (0, 7), (0, 0), (7,), ()])
@pytest.mark.parametrize("is_fresh", [False, True])
@pytest.mark.parametrize("activation", [CLAMP, squared_relu], ids=["clamp", "no gate, no biases"])
def test_forward_and_every_gradient(activation: Activation, group_sizes: tuple[int, ...], is_fresh: bool) -> None:
    """Gradients are scaled, and added to what is there, or take the place of memory that holds nothing yet."""
    torch.manual_seed(0)
    G, N = len(group_sizes), sum(group_sizes)
    x_ND = torch.randn(N, D, dtype=torch.float64, requires_grad=True)
    row_weights_N = torch.rand(N, dtype=torch.float64, requires_grad=True)
    shapes = ((2 * F, D), (D, F), (2 * F,), (D,)) if activation is CLAMP else ((F, D), (D, F))
    parameters = [[torch.randn(shape, dtype=torch.float64, requires_grad=True) for _ in range(G)] for shape in shapes]
    experts = [g for g, size in enumerate(group_sizes) for _ in range(size)]
    rows = [definition(x_ND[n], row_weights_N[n], *(p[g] for p in parameters)) for n, g in enumerate(experts)]
    expected_ND = torch.stack(rows) if rows else x_ND * row_weights_N[:, None]
    dy_ND = torch.randn(N, D, dtype=torch.float64)
    expected_ND.backward(dy_ND)

    weights = FFNWeights(*([t.detach() for t in tensors] for tensors in parameters))
    output = activated_ffn(x_ND.detach(), row_weights_N.detach(), weights, group_sizes, activation)
    torch.testing.assert_close(output.y_ND, expected_ND.detach())
    start = torch.nan if is_fresh else 1.0
    grads = FFNWeights(*([torch.full_like(t, start) for t in tensors] for tensors in parameters))
    inputs = (dy_ND, x_ND.detach(), output.gate_up_N2F, row_weights_N.detach(), weights)
    actual = activated_ffn_backward(*inputs, grads, group_sizes, activation, alpha=0.5, overwrite=[is_fresh] * G)
    torch.testing.assert_close(actual.dx_ND, x_ND.grad)
    torch.testing.assert_close(actual.drow_weights_N, row_weights_N.grad)
    fields = (grads.gate_up, grads.down, grads.gate_up_bias, grads.down_bias)
    for tensors, found in zip(parameters, fields, strict=False):
        for tensor, grad in zip(tensors, found, strict=True):
            expected = torch.zeros_like(tensor) if tensor.grad is None else 0.5 * tensor.grad
            torch.testing.assert_close(grad, expected if is_fresh else expected + 1.0, rtol=1e-6, atol=1e-6)
    frozen = activated_ffn_backward(*inputs, None, group_sizes, activation)
    assert torch.equal(frozen.dx_ND, actual.dx_ND)


def test_clamped_values_pass_no_gradient() -> None:
    """The docstring's example: x = 1 and, clamped, x = 9."""
    ones = FFNWeights([torch.ones(2, 1)], [torch.ones(1, 1)], [torch.zeros(2)], [torch.zeros(1)])
    x_ND, row_weights_N, clamp = torch.tensor([[1.0], [9.0]]), torch.ones(2), Clamp(1.702, 7.0)
    output = activated_ffn(x_ND, row_weights_N, ones, [2], clamp)
    torch.testing.assert_close(output.y_ND, torch.tensor([[1.692], [56.0]]), rtol=1e-3, atol=0)
    grads = activated_ffn_backward(torch.ones(2, 1), x_ND, output.gate_up_N2F, row_weights_N, ones, None, [2], clamp)
    assert grads.dx_ND[0] > 0 == grads.dx_ND[1]


def test_parts_must_belong_together() -> None:
    with pytest.raises(ValueError, match="0 gate_up and 1 down biases for 1 groups"):
        FFNWeights([torch.ones(2, 1)], [torch.ones(1, 1)], [], [torch.zeros(1)])
