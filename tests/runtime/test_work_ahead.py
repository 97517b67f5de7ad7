"""The work ahead of a layer: observed in its first forwards in training, agreed on once, the same on every rank."""

import logging
import threading
from statistics import median
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils.checkpoint import checkpoint

from moesaic.collectives.progress import CommunicationThread
from moesaic.placement import ExpertLoad, LayerShape, Topology, get_solver
from moesaic.runtime.group import RankGroup
from moesaic.runtime.step import work_ahead
from moesaic.runtime.step.planning import LayerPlanner
from moesaic.runtime.step.work_ahead import NUM_OBSERVED, NUM_WARM_UP, Moment, rounded
from tests.helpers.cases import Case, share_experts
from tests.helpers.configs import runtime_config
from tests.helpers.model import cross_entropy
from tests.helpers.ranks import run_ranks
from tests.helpers.threads import run_threads
from tests.runtime.test_overlap import batch, wrapped

CASE = Case(3, 4, 2, 1, (5, 0, 3), "quota", hot_expert=False, any_owner=False, normalize=True, seed=0)
NUM_FORWARDS = NUM_WARM_UP + NUM_OBSERVED + 1


def test_seconds_are_rounded_to_the_nearest_of_two_bits() -> None:
    steps = [mantissa * 2.0**exponent for exponent in range(-30, 10) for mantissa in (1.0, 1.5)]
    for seconds in (*np.geomspace(1e-8, 100, 999), 21.0, 19.0):
        assert abs(rounded(seconds) - seconds) == min(abs(step - seconds) for step in steps)
    assert [rounded(seconds) for seconds in (0.0, 21.0, 19.0, 1.5, 2.0)] == [0.0, 24.0, 16.0, 1.5, 2.0]


class _Clock(threading.local):
    """Of each rank: two readings, one after the other, lie so far apart."""

    apart_s = 0.0
    now_s = 0.0

    def __call__(self) -> float:
        self.now_s += self.apart_s
        return self.now_s


def overlap_of_forwards(group: RankGroup, clock: _Clock, seconds_RF: np.ndarray, is_beside: bool, options: Any) -> list[float]:
    """What the layer is planned with after each forward in training, which is recomputed and follows one that is not."""
    (layer,) = CASE.layers()
    group.experts.thread = CommunicationThread() if is_beside else None
    config = runtime_config(slots=2, **options)
    share_experts({"layer": layer}, group, config=config, solver=get_solver("quota"), gather_hides=0.7)
    layer.experts.requires_grad_(False)
    x, seen = CASE.tokens(group.rank).requires_grad_(), []
    for seconds in seconds_RF[group.rank].tolist():
        clock.apart_s = 1e6
        with torch.no_grad():
            layer.eval()(x)
        clock.apart_s = seconds
        y = checkpoint(layer.train(), x, use_reentrant=False)
        this = layer.runtime.latest_pass
        assert this is not None
        assert not this.grads.is_trained  # a flag that goes along with the seconds
        clock.apart_s = 1e6
        y.sum().backward()
        seen.append(layer.runtime.planner.problem(ExpertLoad(np.ones((3, 4), np.int64))).overlap_s)
    return seen


@pytest.mark.parametrize("is_beside,options", [(True, {}), (False, {}), (True, {"overlap_s": 0.3}), (True, {"overlap": False})])
def test_ranks_plan_with_the_least_of_their_medians(
    monkeypatch: pytest.MonkeyPatch, is_beside: bool, options: dict[str, Any]
) -> None:
    """With the share that hides, from one forward on; not where nothing travels beside work, nor over a value given by hand."""
    seconds_RF = np.random.default_rng(0).uniform(0.1, 0.9, (3, NUM_FORWARDS + 2))
    seconds_RF[:, :NUM_WARM_UP] = 100.0
    seconds_RF[:, NUM_WARM_UP + 3] = 50.0  # one forward that something else slows down
    clock = _Clock()
    monkeypatch.setattr(work_ahead, "run_seconds", clock)
    first, *others = run_threads(3, overlap_of_forwards, clock, seconds_RF, is_beside, options)
    assert others == [first] * 2
    least_s = min(median(seconds) for seconds in seconds_RF[:, NUM_WARM_UP : NUM_WARM_UP + NUM_OBSERVED].tolist())
    agreed = rounded(0.7 * least_s) if is_beside and not options else options.get("overlap_s", 0.0)
    assert first == [options.get("overlap_s", 0.0)] * (NUM_FORWARDS - 1) + [agreed] * 3


def test_the_solvers_are_tried_again_with_the_work_ahead() -> None:
    """Their first trials were priced without, and would count for hundreds of forwards."""
    shape, solvers = (
        LayerShape(num_experts=4, top_k=1, dim=4, ffn_dim=4),
        {name: get_solver(name) for name in ("quota", "balance")},
    )
    planner = LayerPlanner(np.array([0, 0, 1, 1]), Topology.preset("cpu", 2), shape, solvers, runtime_config(slots=2))
    tried = []
    for forward in range(21):
        if forward in (11, 15):
            planner.set_overlap(1.0)
        planner.place()
        tried.append(planner.choice.is_trying)
        planner.observe(ExpertLoad(np.array([[7, 1, 1, 1]] * 2)))
    # The first forward has no forecast, and of the next ones eight are trials; so are eight from the 11th on, not from the 15th.
    assert tried == [False] + [True] * 8 + [False] * 2 + [True] * 8 + [False] * 2


def test_a_moment_of_a_device_is_on_its_clock(monkeypatch: pytest.MonkeyPatch) -> None:
    """Events that the stream records, in milliseconds; nothing waits for them."""
    recorded: list[Any] = []

    def event(device: torch.device, *, enable_timing: bool) -> Any:
        assert enable_timing
        assert device.type == "cuda"
        one = SimpleNamespace(record=lambda: recorded.append(one), elapsed_time=lambda later: 2.0 * recorded.index(later))
        return one

    monkeypatch.setattr(torch, "Event", event)
    launched, routed = Moment(torch.device("cuda", 0)), Moment(torch.device("cuda", 0))
    assert len(recorded) == 2
    assert launched.seconds_to(routed) == pytest.approx(2e-3)


def measured_over_gloo(rank: int) -> tuple[list[float], list[str]]:
    messages: list[str] = []
    logger = logging.getLogger("moesaic.overlap")
    handler = logging.Handler()
    handler.emit = lambda record: messages.append(record.getMessage())  # type: ignore[method-assign]
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    try:
        model, handle = wrapped(transport="c10d")
        sums = []
        for step in range(NUM_FORWARDS):
            handle.step()
            sums.append(handle.metrics()["overlap_s"])
            assert sums[-1] == sum(layer["overlap_s"] for layer in handle.telemetry.layer_metrics().values())
            cross_entropy(model(batch(step)[0]), batch(step)[1]).backward()
        return sums, messages
    finally:
        logger.removeHandler(handler)


def test_what_gloo_carries_is_measured_and_logged_once() -> None:
    """By the real clock: after 11 forwards all ranks have the same seconds of work ahead of two layers, and rank 0 says so."""
    (sums, messages), (sums_of_other, no_messages) = run_ranks(2, measured_over_gloo)
    assert sums == sums_of_other
    assert sums[:-1] == [0.0] * (NUM_FORWARDS - 1)
    assert sums[-1] > 0
    assert len(messages) == 1
    assert messages[0].startswith("gathers of copies hide under ")
    assert no_messages == []
