"""Predictors: what each expects, and that 'best' follows whichever was right lately."""

import numpy as np
import pytest

from moesaic.placement import ExpertLoad
from moesaic.placement.online.predict import EMA_DECAY, SLOW_EMA_DECAY, WINDOW, EmaPredictor, make_predictor, prediction_error

NAMES = ("best", "last", "window", "ema")


def load(*counts: int) -> ExpertLoad:
    return ExpertLoad(np.array([counts], np.int64))


@pytest.mark.parametrize("name", NAMES)
def test_nothing_is_expected_before_the_first_load(name: str) -> None:
    assert make_predictor(name).predict() is None  # type: ignore[arg-type]


@pytest.mark.parametrize("name", NAMES)
def test_a_constant_load_is_expected_again(name: str) -> None:
    predictor = make_predictor(name)  # type: ignore[arg-type]
    for _ in range(7):
        predictor.observe(load(5, 0, 9))
    assert predictor.predict() == load(5, 0, 9)


def test_last_window_and_ema() -> None:
    """Loads 0, 10, 20, ...: the last is the last, the window is the mean of five, the average weighs all of them."""
    predictors = {name: make_predictor(name) for name in ("last", "window", "ema")}  # type: ignore[arg-type]
    for step in range(8):
        for predictor in predictors.values():
            predictor.observe(load(10 * step, 100))
    expected = {name: predictor.predict() for name, predictor in predictors.items()}
    assert expected["last"] == load(70, 100)
    assert expected["window"] == load(sum(10 * s for s in range(8 - WINDOW, 8)) // WINDOW, 100)
    weights = [EMA_DECAY ** (7 - step) for step in range(8)]
    assert expected["ema"] == load(round(sum(10 * s * w for s, w in enumerate(weights)) / sum(weights)), 100)


def test_a_long_memory_forgets_the_first_load_as_any_other() -> None:
    """After two loads it is about their mean. Where loads only jitter, `best` takes it."""
    predictor, best = EmaPredictor(SLOW_EMA_DECAY), make_predictor("best")
    for first in (1000, 3000):
        predictor.observe(load(first, 1000))
    assert predictor.predict() == load(round((0.9 * 1000 + 3000) / 1.9), 1000)
    random = np.random.default_rng(0)
    loads = [load(*(1000 + random.integers(-300, 300, 8))) for _ in range(40)]
    for observed in loads:
        best.observe(observed)
    weights = [SLOW_EMA_DECAY ** (39 - step) for step in range(40)]
    mean_RE = sum(w * observed.load_RE for w, observed in zip(weights, loads, strict=True)) / sum(weights)
    assert best.predict() == ExpertLoad(np.rint(mean_RE).astype(np.int64))


def test_best_uses_the_last_load_while_routing_drifts() -> None:
    best = make_predictor("best")
    for step in range(12):
        best.observe(load(10 * step, 120 - 10 * step))
    assert best.predict() == load(110, 10)


def test_best_uses_an_average_when_loads_only_jitter() -> None:
    """Around a constant mean the last load is the worst guess."""
    best, random = make_predictor("best"), np.random.default_rng(0)
    for _ in range(40):
        best.observe(load(*(1000 + random.integers(-300, 300, 8))))
    predicted = best.predict()
    assert predicted is not None
    assert prediction_error(predicted, load(*[1000] * 8)) < 0.06


def test_error_is_the_total_variation_of_shares() -> None:
    assert prediction_error(load(1, 1), load(50, 50)) == 0.0
    assert prediction_error(load(1, 0), load(0, 7)) == 1.0
    assert prediction_error(load(3, 1), load(1, 1)) == pytest.approx(0.25)
    assert prediction_error(load(0, 0), load(0, 0)) == 0.0


def test_scenarios_are_past_loads_and_past_errors_again():
    """Against the definition, load after load: the last eight, and the forecast with each of its last eight errors, doubled."""
    predictor, random = make_predictor("last"), np.random.default_rng(4)
    loads_SE = random.integers(0, 100, (12, 6))
    assert predictor.scenarios() is None
    for step, totals_E in enumerate(loads_SE):
        predictor.observe(ExpertLoad(totals_E[None]))
        errors_SE = np.diff(loads_SE[: step + 1], axis=0)[-8:]
        if not step:
            assert predictor.scenarios() is None
            continue
        past_SE = loads_SE[: step + 1][-8:]
        assert (predictor.scenarios() == np.concatenate([past_SE, np.maximum(totals_E + 2 * errors_SE, 0)])).all()
