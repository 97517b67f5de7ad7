from __future__ import annotations

import pytest
import torch
from torch import Tensor

from moesaic.kernels import topk_gate, topk_gate_backward

CASES = [(1, 1, 1), (7, 5, 1), (63, 16, 2), (65, 7, 7), (129, 63, 8), (1025, 3, 2)]  # T, E, K
SCORES = ["softmax", "sigmoid"]


def naive_gate(logits_TE: Tensor, top_k: int, normalize: bool, score: str, bias_E: Tensor | None) -> tuple[Tensor, Tensor]:
    """Ids by a sort of Python tuples, weights differentiable in fp64."""
    scores = logits_TE.softmax(dim=1) if score == "softmax" else logits_TE.sigmoid()
    rows, ids = [], []
    for t in range(len(logits_TE)):
        choice = logits_TE[t] if bias_E is None else scores[t] + bias_E
        best = sorted(range(logits_TE.shape[1]), key=lambda e: (-choice[e].item(), e))[:top_k]
        chosen = torch.stack([scores[t, e] for e in best])
        rows.append(chosen / chosen.sum() if normalize else chosen)
        ids.append(best)
    return torch.tensor(ids), torch.stack(rows)


@pytest.mark.parametrize("normalize", [True, False], ids=["normalized", "raw"])
@pytest.mark.parametrize("score", SCORES)
@pytest.mark.parametrize("T,E,K", CASES)
def test_choice_weights_load_and_gradients(T: int, E: int, K: int, score: str, normalize: bool) -> None:
    logits_TE, dweights_TK, dlse_T = torch.randn(T, E), torch.randn(T, K), torch.randn(T)
    gate = topk_gate(logits_TE, K, normalize=normalize, score=score)
    exact = logits_TE.double().requires_grad_()
    ids, weights = naive_gate(exact, K, normalize, score, None)
    assert torch.equal(gate.topk_ids_TK, ids)
    torch.testing.assert_close(gate.weights_TK.double(), weights, rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(gate.lse_T.double(), exact.logsumexp(1), rtol=1e-6, atol=1e-6)
    assert gate.load_E.tolist() == [ids.flatten().tolist().count(e) for e in range(E)]
    # A choice made before is weighed alike, and what nobody asks for is not computed.
    given = topk_gate(logits_TE, K, normalize=normalize, score=score, topk_ids_TK=ids, with_lse=False)
    assert torch.equal(given.weights_TK, gate.weights_TK)
    assert torch.equal(given.load_E, gate.load_E)
    assert given.lse_T is None
    # The gate itself is differentiable, and its backward by hand says the same.
    leaf_TE = logits_TE.clone().requires_grad_()
    tracked = topk_gate(leaf_TE, K, normalize=normalize, score=score)
    for dlse in (None, dlse_T):
        loss = (weights * dweights_TK).sum() + (0.0 if dlse is None else (exact.logsumexp(1) * dlse).sum())
        (expected,) = torch.autograd.grad(loss, exact, retain_graph=True)
        actual = topk_gate_backward(dweights_TK, dlse, logits_TE, ids, normalize=normalize, score=score)
        torch.testing.assert_close(actual.double(), expected, rtol=1e-5, atol=2e-6)
        outputs = [(tracked.weights_TK, dweights_TK), (tracked.lse_T, dlse)][: 1 if dlse is None else 2]
        (by_autograd,) = torch.autograd.grad([y for y, _ in outputs], leaf_TE, [dy for _, dy in outputs], retain_graph=True)
        torch.testing.assert_close(by_autograd.double(), expected, rtol=1e-5, atol=2e-6)


@pytest.mark.parametrize("normalize", [True, False], ids=["normalized", "raw"])
def test_gradients_of_a_sure_choice_are_precise(normalize: bool) -> None:
    """Where one expert weighs nearly 1, what the others would change is tiny, and right to the last digits all the same."""
    gaps_T = torch.linspace(4.0, 16.0, 25)
    logits_TE = torch.stack([gaps_T, torch.zeros(25), torch.full((25,), -1.0)], dim=1)
    dweights_TK = torch.tensor([[1.25, 0.75]]).expand(25, 2)
    exact, leaf_TE = logits_TE.double().requires_grad_(), logits_TE.clone().requires_grad_()
    _, weights = naive_gate(exact, 2, normalize, "softmax", None)
    (expected,) = torch.autograd.grad(weights, exact, dweights_TK.double())
    gate = topk_gate(leaf_TE, 2, normalize=normalize)
    (by_autograd,) = torch.autograd.grad(gate.weights_TK, leaf_TE, dweights_TK)
    by_hand = topk_gate_backward(dweights_TK, None, logits_TE, gate.topk_ids_TK, normalize=normalize)
    for actual in (by_autograd, by_hand):
        torch.testing.assert_close(actual.double(), expected, rtol=3e-6, atol=1e-12)


@pytest.mark.parametrize("score", SCORES)
def test_bias_moves_the_choice_and_not_the_weights(score: str) -> None:
    logits_TE, bias_E = torch.randn(33, 9), torch.randn(9)
    gate = topk_gate(logits_TE, 3, score=score, bias_E=bias_E, normalize=False)
    ids, weights = naive_gate(logits_TE.double(), 3, False, score, bias_E.double())
    assert torch.equal(gate.topk_ids_TK, ids)
    torch.testing.assert_close(gate.weights_TK.double(), weights, rtol=1e-6, atol=1e-7)


def test_strided_inputs_give_the_same() -> None:
    """Logits and gradients as columns of wider matrices, and transposed."""
    wide_TE, logits_ET = torch.randn(33, 20), torch.randn(9, 33)
    for logits_TE in (wide_TE[:, ::2], logits_ET.t()):
        dweights_TK, dlse_T = torch.randn(33, 6)[:, ::2], torch.randn(66)[::2]
        gate, expected = topk_gate(logits_TE, 3), topk_gate(logits_TE.contiguous(), 3)
        assert torch.equal(gate.topk_ids_TK, expected.topk_ids_TK)
        torch.testing.assert_close(gate.weights_TK, expected.weights_TK, rtol=1e-6, atol=1e-7)
        ids_TK = torch.stack([gate.topk_ids_TK] * 2, dim=2)[..., 0]
        torch.testing.assert_close(
            topk_gate_backward(dweights_TK, dlse_T, logits_TE, ids_TK),
            topk_gate_backward(dweights_TK.contiguous(), dlse_T.contiguous(), logits_TE.contiguous(), gate.topk_ids_TK),
            rtol=1e-6,
            atol=1e-7,
        )


def test_equal_logits_go_to_the_lower_ids() -> None:
    gate = topk_gate(torch.tensor([[0.0, 1.0, 1.0, 1.0]]), 2)
    assert gate.topk_ids_TK.tolist() == [[1, 2]]
    assert gate.weights_TK.tolist() == [[0.5, 0.5]]
    assert gate.load_E.tolist() == [0, 1, 1, 0]


def test_experts_that_cannot_be_chosen_are_still_different_ones() -> None:
    """Scores of -inf, as masks make them, and scores that underflow: different experts, and weights that are numbers."""
    masked = topk_gate(torch.tensor([[0.0, -torch.inf, 1.0, -torch.inf]]), 3)
    assert masked.topk_ids_TK.tolist() == [[2, 0, 1]]
    for bias_E in (None, torch.zeros(4)):
        gate = topk_gate(torch.full((1, 4), -200.0), 2, score="sigmoid", bias_E=bias_E)
        assert gate.topk_ids_TK.tolist() == [[0, 1]]
        assert gate.weights_TK.tolist() == [[0.0, 0.0]]


def test_no_tokens() -> None:
    gate = topk_gate(torch.randn(0, 4), 2)
    assert gate.topk_ids_TK.shape == (0, 2)
    assert gate.load_E.tolist() == [0, 0, 0, 0]
    assert topk_gate_backward(torch.randn(0, 2), None, torch.randn(0, 4), gate.topk_ids_TK).shape == (0, 4)


def test_wrong_arguments_are_named() -> None:
    with pytest.raises(ValueError, match="top_k is 5, but there are 4 experts"):
        topk_gate(torch.randn(2, 4), 5)
    with pytest.raises(ValueError, match="logits must be float32"):
        topk_gate(torch.randn(2, 4).bfloat16(), 1)
    with pytest.raises(ValueError, match=r"bias_E must be float32 \[4\], got torch.float32 \(3,\)"):
        topk_gate(torch.randn(2, 4), 1, bias_E=torch.randn(3))
    with pytest.raises(ValueError, match=r"ids are \(2, 1\), must be \(2, 3\)"):
        topk_gate(torch.randn(2, 4), 3, topk_ids_TK=torch.zeros(2, 1, dtype=torch.int64))
