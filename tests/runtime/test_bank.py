"""Gradient rows: overwritten by the first backward that reaches them, added to by later ones, zero where none does."""

import pytest
import torch
from torch import Tensor

from moesaic import MoELayer, RouterConfig, RuntimeConfig
from moesaic.placement import get_solver
from moesaic.runtime.group import single_rank_group
from moesaic.runtime.shard import share_experts
from moesaic.runtime.stages import StageClock


@pytest.fixture(autouse=True)
def poisoned(monkeypatch: pytest.MonkeyPatch) -> None:
    """A gradient that is only allocated holds NaN."""
    empty_like = torch.empty_like

    def nan_like(tensor: Tensor, **options: object) -> Tensor:
        fresh = empty_like(tensor, **options)  # type: ignore[call-overload]
        return fresh.fill_(torch.nan) if fresh.is_floating_point() else fresh

    monkeypatch.setattr(torch, "empty_like", nan_like)


def two_layers() -> list[MoELayer]:
    """Two layers over one bank, on one rank."""
    torch.manual_seed(0)
    layers = [MoELayer(8, 6, 3, 1, router=RouterConfig(aux_loss_coef=0.0)) for _ in range(2)]
    named = {str(i): layer for i, layer in enumerate(layers)}
    share_experts(named, single_rank_group(), config=RuntimeConfig(), solver=get_solver("static"), clock=StageClock())
    return layers


def grads(layers: list[MoELayer], i: int) -> Tensor:
    bank = layers[i].runtime.bank
    return torch.stack([bank.grads(i, e).gate_up for e in range(3)]).clone()


def test_a_layer_outside_the_loss_gets_no_gradients() -> None:
    """Both layers ran forward, one backward; as of any module, what the loss does not reach has none."""
    layers = two_layers()
    x = torch.randn(20, 8)
    used, unused = layers[0](x), layers[1](x)
    used.sum().backward()
    assert grads(layers, 0).abs().sum() > 0
    assert all(parameter.grad is None for parameter in layers[1].experts.parameters())
    assert unused.requires_grad


def test_an_expert_without_tokens_gets_zeros() -> None:
    layers = two_layers()
    x = torch.randn(1, 8)
    layers[1](layers[0](x)).sum().backward()
    for i in range(2):
        assert torch.isfinite(grads(layers, i)).all()
        assert (grads(layers, i).abs().sum((1, 2)) > 0).sum() == 1


def test_second_backward_adds_and_zero_grad_starts_again() -> None:
    layers = two_layers()
    x = torch.randn(20, 8)

    def backward() -> Tensor:
        layers[1](layers[0](x)).sum().backward()
        return torch.cat([grads(layers, 0), grads(layers, 1)])

    once = backward()
    torch.testing.assert_close(backward(), 2 * once)
    for parameter in layers[0].runtime.bank.parameters():
        parameter.grad = None
    assert torch.equal(backward(), once)


def test_frozen_experts_get_no_gradient() -> None:
    layers = two_layers()
    for layer in layers:
        layer.experts.requires_grad_(False)
    x = torch.randn(5, 8, requires_grad=True)
    layers[1](layers[0](x)).sum().backward()
    assert x.grad is not None
    assert all(parameter.grad is None for layer in layers for parameter in layer.experts.parameters())
