"""What a step's counters say, and how much they keep."""

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from moesaic import MoELayer
from moesaic.placement import ExpertLoad, Placement, Topology
from moesaic.runtime.step.metrics import LayerCounters, gamma_eff, step_metrics


def test_balance_and_forecasts_are_means_over_forwards() -> None:
    """Against the lists of them. A forward without a forecast counts for no error."""
    random, counters = np.random.default_rng(0), LayerCounters(Topology.preset("cpu", 2))
    owners_E = np.array([0, 0, 1])
    account = SimpleNamespace(bound=SimpleNamespace(busiest_bytes=0, rank_bytes=0), bytes=SimpleNamespace(cross_node=0))
    balance, balance_static, errors = [], [], [None, 0.25, None, 0.5]
    for error in errors:
        rows_RE, load_RE = random.integers(1, 9, (2, 2, 3))
        plan: Any = SimpleNamespace(
            placement=Placement.owners_only(owners_E, 2),
            split=SimpleNamespace(rows_RE=rows_RE),
            num_added=0,
            schedule_name="direct",
            gather_account=account,
        )
        counters.count(plan, ExpertLoad(load_RE), ExpertLoad(load_RE), error)
        balance.append(rows_RE.sum(1).max() / rows_RE.sum(1).mean())
        static_R = np.array([load_RE[:, :2].sum(), load_RE[:, 2].sum()])
        balance_static.append(static_R.max() / static_R.mean())
    found = counters.summary()
    assert found["max_over_mean"] == pytest.approx(np.mean(balance))
    assert found["max_over_mean_static"] == pytest.approx(np.mean(balance_static))
    assert found["prediction_error"] == 0.375


def test_a_layer_whose_steps_nobody_closes_keeps_no_more_with_every_step() -> None:
    layer = MoELayer(8, 6, 3, 2)

    def kept_after_steps(num_steps: int) -> int:
        for _ in range(num_steps):
            layer(torch.randn(2, 8)).sum().backward()
        return sum(np.size(list(value)) for value in vars(layer.runtime.counters).values() if hasattr(value, "__iter__"))

    assert kept_after_steps(2) == kept_after_steps(5)


@pytest.mark.parametrize("gamma", [0.0, 4.0, 37.0])
def test_gamma_eff_is_that_of_the_equilibrium(gamma: float) -> None:
    """The fixed point of m = softmax(q - gamma m) by plain iteration, for qualities of standard deviation 1; an unused expert."""
    quality_E = np.random.default_rng(0).standard_normal(16)
    quality_E = (quality_E - quality_E.mean()) / quality_E.std()
    share_E = np.full(16, 1 / 16)
    for _ in range(5000):
        worth_E = np.exp(quality_E - gamma * share_E)
        share_E = 0.9 * share_E + 0.1 * worth_E / worth_E.sum()
    counts_E = np.append(np.rint(share_E * 1e9), 0).astype(np.int64)
    assert gamma_eff(counts_E) == pytest.approx(gamma, abs=1e-3)


def test_gamma_eff_of_few_and_of_extreme_loads() -> None:
    """The docstring's example; loads that differ more than qualities; equal loads, which any gamma is right for."""
    assert gamma_eff(np.array([3, 1])) == pytest.approx(2 * (2 - np.log(3)))
    assert gamma_eff(np.array([1000, 1, 1])) == 0.0
    assert [gamma_eff(np.array(counts)) for counts in ([5, 5, 0], [7], [0, 0])] == [None] * 3


def test_gamma_eff_of_a_step_is_that_of_its_sum() -> None:
    layer = MoELayer(8, 6, 3, 2)
    for _ in range(2):
        layer(torch.randn(5, 8)).sum().backward()
    load_RE = layer.runtime.counters.load_RE
    assert load_RE is not None
    assert layer.runtime.counters.summary().get("gamma_eff") == gamma_eff(load_RE.sum(axis=0))
    assert step_metrics([layer.runtime.counters], {}).get("gamma_eff") == gamma_eff(load_RE.sum(axis=0))
