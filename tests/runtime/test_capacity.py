"""Capacity: who is turned away, against plain loops. Parity with drops is part of every generated case; see test_parity.py."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from moesaic import MoELayer
from moesaic.placement import ExpertLoad
from moesaic.runtime.routing.capacity import Capacity
from tests.helpers.reference import DenseMoE


@settings(deadline=None)
@given(
    data=st.data(),
    num_experts=st.integers(1, 6),
    num_tokens=st.integers(0, 12),
    factor=st.floats(0.01, 8),
    seed=st.integers(0, 99),
)
@pytest.mark.parametrize("policy", ["probs", "position"])
def test_what_is_kept(data: st.DataObject, num_experts: int, num_tokens: int, factor: float, seed: int, policy: str) -> None:
    """Every expert keeps up to its capacity, the largest weights or the first tokens, and the counts say so beforehand."""
    top_k = data.draw(st.integers(1, num_experts))
    generator = torch.Generator().manual_seed(seed)
    ids_TK = torch.rand(num_tokens, num_experts, generator=generator).topk(top_k, dim=1).indices
    weights_TK = torch.randint(0, 4, (num_tokens, top_k), generator=generator).float()  # with ties
    layer = MoELayer(4, 4, num_experts, top_k, capacity_factor=factor, drop_policy=policy)
    kept = DenseMoE(layer).kept(ids_TK, weights_TK)
    expected_TK = [[e if (t, e) in kept else num_experts for e in row] for t, row in enumerate(ids_TK.tolist())]
    found_TK = layer.capacity.kept_ids(ids_TK, weights_TK, num_experts)
    assert found_TK.tolist() == expected_TK
    load = ExpertLoad(np.bincount(ids_TK.flatten().numpy(), minlength=num_experts)[None])
    assert (
        layer.capacity.limit(load).totals_E.tolist() == found_TK.flatten().bincount(minlength=num_experts)[:num_experts].tolist()
    )


def test_every_rank_has_a_capacity_of_its_own() -> None:
    """Factor 1: a rank of 4 assignments on 2 experts keeps 2 for each, one of 8 keeps 4, one without tokens nothing."""
    load = ExpertLoad(np.array([[3, 1], [3, 5], [0, 0]]))
    assert Capacity(1.0).limit(load).load_RE.tolist() == [[2, 1], [3, 4], [0, 0]]
    assert Capacity().limit(load) == load
    assert Capacity(1.25).of(8, 3) == 4


def test_a_token_without_experts_keeps_what_passes_beside_them() -> None:
    """One expert that takes one of three tokens: the first in place, or the one with the largest weight."""
    torch.manual_seed(0)
    shared = torch.nn.Linear(4, 4)
    outputs = {}
    for factor, policy in ((math.inf, "probs"), (1 / 3, "probs"), (1 / 3, "position")):
        layer = MoELayer(4, 4, 1, 1, shared=shared, capacity_factor=factor, drop_policy=policy)
        layer.load_state_dict({key: torch.ones_like(value) for key, value in layer.state_dict().items()})
        x = torch.arange(12.0).view(3, 4).requires_grad_()
        outputs[factor, policy] = layer(x)
        outputs[factor, policy].sum().backward()
    for policy in ("probs", "position"):  # all weights are 1
        assert torch.equal(outputs[1 / 3, policy][0], outputs[math.inf, "probs"][0])
        assert torch.equal(outputs[1 / 3, policy][1:], shared(x)[1:])
    assert layer.runtime.counters.summary()["dropped_share"] == pytest.approx(2 / 3)
    assert layer.router.weight.grad is not None and layer.router.weight.grad.isfinite().all()


@pytest.mark.parametrize("factor", [0.0, -1.0, math.nan])
def test_no_capacity_is_refused(factor: float) -> None:
    with pytest.raises(ValueError, match=rf"^capacity_factor is {factor}; it must be more than 0, or inf to drop nothing$"):
        MoELayer(4, 4, 2, 1, capacity_factor=factor)
    with pytest.raises(ValueError, match=r"^drop_policy is 'random'; choose 'probs' or 'position'$"):
        MoELayer(4, 4, 2, 1, drop_policy="random")
