"""Gradient rows: overwritten by the first backward that reaches them, added to by later ones, zero where none does."""

import copy
import gc
from io import BytesIO
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.optim.optimizer import register_optimizer_step_pre_hook

from moesaic import MoELayer, RouterConfig, RuntimeConfig
from moesaic.placement import OwnerMap
from moesaic.runtime.experts.bank import Bank
from moesaic.runtime.experts.expert import ExpertShape
from moesaic.runtime.group import single_rank_group
from tests.helpers.cases import share_experts


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
    share_experts(named, single_rank_group(), config=RuntimeConfig())
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


def test_an_expert_that_is_frozen_later_keeps_the_gradient_it_had() -> None:
    """Also where `zero_grad(set_to_none=False)` left zeros, which an optimizer would go on with; once it learns again it adds."""
    (layer, _), x = two_layers(), torch.randn(20, 8)
    expert = layer.experts[0]
    layer(x).sum().backward()
    assert expert.gate_up.grad is not None
    once = expert.gate_up.grad.clone()
    expert.gate_up.grad.zero_()
    calls: list[Tensor] = []
    expert.gate_up.register_post_accumulate_grad_hook(calls.append)
    expert.requires_grad_(False)
    layer(x).sum().backward()
    assert not expert.gate_up.grad.any() and not calls
    expert.requires_grad_(True)
    layer(x).sum().backward()
    assert torch.equal(expert.gate_up.grad, once) and len(calls) == 1


def test_gradients_that_got_other_memory_are_added_to_there() -> None:
    (layer, _), x = two_layers(), torch.randn(20, 8)
    layer(x).sum().backward()
    parameter = layer.experts[0].gate_up
    assert parameter.grad is not None
    once = parameter.grad.clone()
    parameter.grad.data = 2 * parameter.grad.data
    layer(x).sum().backward()
    torch.testing.assert_close(parameter.grad, 3 * once)


def test_a_gradient_is_copied_and_saved_as_a_plain_tensor() -> None:
    layer = two_layers()[0]
    layer(torch.randn(20, 8)).sum().backward()
    grads = [parameter.grad for parameter in layer.experts.parameters()]
    torch.save(grads, file := BytesIO())
    file.seek(0)
    for copies in (copy.deepcopy(grads), torch.load(file)):
        assert all(type(copied) is Tensor and torch.equal(copied, grad) for copied, grad in zip(copies, grads, strict=True))


def test_an_optimizer_takes_a_state_that_lacks_a_setting() -> None:
    """As one that another version of torch has written may; torch keeps its default. Without any it is refused."""
    layers = two_layers()
    layers[0](torch.randn(20, 8)).sum().backward()
    optimizer = torch.optim.Adam(layers[0].experts.parameters())
    optimizer.step()
    state = optimizer.state_dict()
    del state["param_groups"][0]["decoupled_weight_decay"]
    optimizer.load_state_dict(state)
    state["param_groups"] = [{"params": state["param_groups"][0]["params"]}]
    with pytest.raises(RuntimeError, match="saves the groups of one rank"):
        optimizer.load_state_dict(state)


def test_a_bank_may_end_during_a_step_of_an_optimizer() -> None:
    """Python may collect it at any time; torch goes through its hooks meanwhile."""
    banks = [Bank(ExpertShape(4, 3), OwnerMap.contiguous(1, 2, 1), 0)]

    def end(*_: Any) -> None:
        banks.clear()
        gc.collect()

    hooks = [register_optimizer_step_pre_hook(end), register_optimizer_step_pre_hook(lambda *_: None)]
    try:
        torch.optim.SGD([torch.zeros(1, requires_grad=True)]).step()
    finally:
        for hook in hooks:
            hook.remove()
    assert not banks


def test_a_bank_shows_its_rows_and_gradients() -> None:
    layer = MoELayer(4, 3, 2, 2)
    layer(torch.randn(5, 4)).sum().backward()
    bank, experts = layer.runtime.bank, list(layer.experts)
    for weight in ("gate_up", "down"):
        rows = getattr(bank, weight)
        assert rows.data_ptr() == experts[0].parameter(weight).data_ptr()
        for row, expert in enumerate(experts):
            grad = expert.parameter(weight).grad
            assert grad is not None
            assert torch.equal(rows[row], expert.parameter(weight))
            assert torch.equal(rows.grad[row], grad.as_subclass(Tensor))
