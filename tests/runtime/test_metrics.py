"""What a step's counters say, and how much they keep."""

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from moesaic import MoELayer
from moesaic.placement import ExpertLoad, Placement
from moesaic.runtime.step.metrics import LayerCounters


def test_balance_and_forecasts_are_means_over_forwards() -> None:
    """Against the lists of them. A forward without a forecast counts for no error."""
    random, counters = np.random.default_rng(0), LayerCounters()
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
