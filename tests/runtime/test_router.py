"""The router: choice, weights, losses over any number of ranks, and the forced balance."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from moesaic import MoELayer, RouterConfig
from moesaic.kernels import Clamp
from moesaic.placement import ExpertLoad
from moesaic.runtime.routing.router import TopKRouter, balanced_ids
from tests.helpers.compare import assert_bitwise

D, E, K = 6, 5, 2


def make_router(**options: object) -> TopKRouter:
    torch.manual_seed(0)
    return TopKRouter(D, E, K, RouterConfig(**options))  # type: ignore[arg-type]


def load_of(router: TopKRouter, parts: list[Tensor]) -> ExpertLoad:
    return ExpertLoad(torch.stack([router(x).counts_E(E) for x in parts]).numpy())


@pytest.mark.parametrize("normalize", [True, False])
def test_weights_are_those_of_the_best_experts(normalize: bool) -> None:
    router = make_router(normalize_weights=normalize)
    x_TD = torch.randn(7, D)
    routing = router(x_TD)
    for t in range(7):
        scores_E = (router.weight @ x_TD[t]).softmax(0)
        best = sorted(range(E), key=lambda e: -scores_E[e])[:K]
        assert routing.topk_ids_TK[t].tolist() == best
        weights_K = scores_E[best] / (scores_E[best].sum() if normalize else 1.0)
        torch.testing.assert_close(routing.weights_TK[t], weights_K)


class BiasedRouter(TopKRouter):
    """Six experts whose choice is biased towards the later ones."""

    def choice_bias(self) -> Tensor:
        return torch.linspace(0.0, 0.3, self.num_experts)


@pytest.mark.parametrize("score", ["softmax", "sigmoid"])
@pytest.mark.parametrize("group_score", ["max", "top2"])
@pytest.mark.parametrize("normalize,scale", [(True, 2.5), (False, 1.0)])
def test_group_limited_choice_with_a_bias(score: str, group_score: str, normalize: bool, scale: float) -> None:
    """Token by token, group by group: the bias decides who is chosen and never how much they weigh."""
    torch.manual_seed(0)
    config = dict(score=score, normalize_weights=normalize, weight_scale=scale, group_score=group_score)
    router = BiasedRouter(D, 6, 3, RouterConfig(num_groups=3, groups_per_token=2, **config))  # type: ignore[arg-type]
    x_TD = 3 * torch.randn(40, D)
    routing = router(x_TD)
    for t in range(40):
        logits_E = router.weight @ x_TD[t]
        scores_E = logits_E.softmax(0) if score == "softmax" else logits_E.sigmoid()
        biased_E = (scores_E + router.choice_bias()).tolist()
        pairs = [biased_E[2 * g : 2 * g + 2] for g in range(3)]
        groups = sorted(range(3), key=lambda g: -(max(pairs[g]) if group_score == "max" else sum(pairs[g])))[:2]
        best = sorted((e for e in range(6) if e // 2 in groups), key=lambda e: -biased_E[e])[:3]
        assert routing.topk_ids_TK[t].tolist() == best
        weights_K = scores_E[best] * scale / (scores_E[best].sum() if normalize else 1.0)
        torch.testing.assert_close(routing.weights_TK[t], weights_K)


def test_replay_keeps_the_choice() -> None:
    """Given ids are used as they are, whatever the scores say."""
    router = make_router()
    ids_TK = torch.tensor([[0, 1], [4, 2]])
    routing = router(torch.randn(2, D), ids_TK)
    assert torch.equal(routing.topk_ids_TK, ids_TK)
    torch.testing.assert_close(routing.weights_TK.sum(1), torch.ones(2))


def test_logits_are_fp32_for_a_half_precision_model() -> None:
    router = make_router().bfloat16()
    routing = router(torch.randn(3, D).bfloat16())
    assert routing.logits_TE is not None
    assert routing.logits_TE.dtype == routing.weights_TK.dtype == torch.float32


@pytest.mark.parametrize("clamp", [None, Clamp(alpha=1.7, limit=7.0)], ids=["swiglu", "clamped"])
def test_a_layer_computes_under_autocast_what_it_does_without(clamp: Clamp | None) -> None:
    """Bit for bit: fp32 logits choose the same experts, which compute in their own dtype. Gradients and losses too."""
    torch.manual_seed(0)
    layer = MoELayer(D, 4, E, K, router=RouterConfig(aux_loss_coef=0.1, z_loss_coef=0.1), clamp=clamp)
    x_TD = torch.randn(64, D, requires_grad=True)

    def run(is_autocast: bool) -> dict[str, Tensor]:
        with torch.autocast("cpu", torch.bfloat16, enabled=is_autocast):
            y_TD, aux_loss = layer(x_TD), layer.aux_loss
        assert aux_loss is not None
        inputs = {"x": x_TD, **dict(layer.named_parameters())}
        for tensor in inputs.values():
            tensor.grad = None
        (y_TD.square().sum() + aux_loss).backward()
        return {"y": y_TD.detach(), "aux": aux_loss.detach()} | {name: tensor.grad for name, tensor in inputs.items()}

    assert_bitwise(run(True), run(False))


@settings(deadline=None)
@given(sizes=st.lists(st.integers(0, 6), min_size=1, max_size=4), scope=st.sampled_from(["micro_batch", "global_batch"]))
def test_losses_of_the_ranks_average_to_the_definition(sizes: list[int], scope: str) -> None:
    """Balancing loss and z-loss, value and gradient: the mean over ranks is the loss of the whole batch (global scope), or
    the mean of the ranks' own losses (micro-batch scope)."""
    router = make_router(aux_loss_coef=0.3, z_loss_coef=0.2, aux_loss_scope=scope)
    generator = torch.Generator().manual_seed(sum(sizes))
    parts = [torch.randn(n, D, generator=generator) for n in sizes]
    load = load_of(router, parts)
    actual = torch.stack([router.loss(router(x), load, r) for r, x in enumerate(parts)]).mean()

    def definition(x_TD: Tensor) -> Tensor:
        logits_TE = x_TD @ router.weight.T
        if not len(x_TD):
            return logits_TE.sum()
        counts_E = router(x_TD).counts_E(E).double()
        balance = E * (counts_E / counts_E.sum() * logits_TE.double().softmax(1).mean(0)).sum()
        return 0.3 * balance + 0.2 * logits_TE.double().logsumexp(1).square().mean()

    batches = [torch.cat(parts)] if scope == "global_batch" else parts
    expected = torch.stack([definition(x).double() for x in batches]).mean()
    assert actual.detach().item() == pytest.approx(expected.detach().item(), rel=1e-5, abs=1e-7)
    (actual_grad,) = torch.autograd.grad(actual, router.weight)
    (expected_grad,) = torch.autograd.grad(expected, router.weight)
    torch.testing.assert_close(actual_grad, expected_grad.float(), rtol=1e-4, atol=1e-6)


def test_balanced_routing_has_the_smallest_balancing_loss() -> None:
    """It equals its coefficient when every expert gets the same."""
    router = make_router(aux_loss_coef=0.5, force_balance=True)
    with torch.no_grad():
        router.weight.zero_()
    x_TD = torch.randn(10, D)
    assert router.loss(router(x_TD), load_of(router, [x_TD]), 0).item() == pytest.approx(0.5)


@settings(deadline=None)
@given(num_tokens=st.integers(0, 100), num_experts=st.integers(1, 12), data=st.data())
def test_balanced_ids_are_balanced(num_tokens: int, num_experts: int, data: st.DataObject) -> None:
    """Different experts for each token; counts as even as whole blocks of E tokens allow."""
    top_k = data.draw(st.integers(1, num_experts))
    ids_TK = balanced_ids(num_tokens, num_experts, top_k, seed=data.draw(st.integers(0, 99)))
    assert ids_TK.shape == (num_tokens, top_k)
    assert all(len(set(row)) == top_k for row in ids_TK.tolist())
    counts_E = torch.bincount(ids_TK.flatten(), minlength=num_experts)
    assert counts_E.max() - counts_E.min() <= top_k
    if num_tokens % num_experts == 0:
        assert counts_E.max() == counts_E.min()


def test_balanced_ids_pair_experts_evenly() -> None:
    """Neighbours are chosen together no more often than others: otherwise fewer rows would cross than in real routing."""
    ids_TK = balanced_ids(20_000, 8, 2)
    together = torch.zeros(8, 8).index_put_((ids_TK[:, 0], ids_TK[:, 1]), torch.ones(20_000), accumulate=True)
    pairs = (together + together.T)[~torch.eye(8, dtype=torch.bool)]
    assert pairs.max() / pairs.mean() < 1.25


@pytest.mark.parametrize(
    "options,message",
    [
        (dict(aux_loss_coef=-1.0), "aux_loss_coef is -1.0"),
        (dict(z_loss_coef=-0.5), "z_loss_coef is -0.5"),
        (dict(aux_loss_scope="world"), "aux_loss_scope is 'world'"),
        (dict(score="tanh"), "score is 'tanh'; choose 'softmax' or 'sigmoid'"),
        (dict(weight_scale=0.0), "weight_scale is 0.0"),
        (dict(num_groups=2, groups_per_token=3), "groups_per_token is 3 of 2 groups"),
    ],
)
def test_wrong_options_are_refused(options: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        RouterConfig(**options)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "num_experts,top_k,options,message",
    [
        (5, 6, {}, "top_k is 6 with 5 experts"),
        (5, 2, dict(num_groups=2), "5 experts in 2 groups"),
        (6, 4, dict(num_groups=2), "1 groups of 3 experts hold only 3"),
        (4, 1, dict(num_groups=4, group_score="top2"), "no second best"),
    ],
)
def test_choices_must_fit(num_experts: int, top_k: int, options: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        TopKRouter(D, num_experts, top_k, RouterConfig(**options))  # type: ignore[arg-type]
