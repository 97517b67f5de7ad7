"""Predictors: a forecast of a layer's next load from its past loads.

All are deterministic functions of integers that are the same on every rank, so all ranks make the same forecast.
"""

from collections import deque
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Literal, Protocol

import numpy as np

from ..values import ExpertLoad

# Number of loads that the window predictor averages (as Hecate, arXiv 2502.02581, section 4.2, and LAER-MoE).
WINDOW = 5
# Decays of the exponential moving averages: short memory, best on drifting loads, and long, best on loads that only jitter
# (docs/placement.md, Forecasts).
EMA_DECAY = 0.3
SLOW_EMA_DECAY = 0.9
# Number of past forecasts by whose error 'best' chooses a predictor.
ERROR_WINDOW = 10
# Number of past loads, and of past errors, that scenarios are made from; and the multiple of an error that one of them makes.
NUM_SCENARIOS = 8
SCENARIO_ERRORS = 2
# Expected error before any forecast has been evaluated; recorded errors from step to step are 0.01 to 0.25.
FIRST_ERROR = 0.1


class Predictor(Protocol):
    """Observes every load once, in order, and forecasts the next."""

    def observe(self, load: ExpertLoad) -> None:
        """Observe a measured load."""

    def predict(self) -> ExpertLoad | None:
        """The forecast of the next load; None before any load was observed."""


class LastPredictor:
    """Forecasts the last load. By far the best in the first few hundred steps."""

    def __init__(self) -> None:
        self._load: ExpertLoad | None = None

    def observe(self, load: ExpertLoad) -> None:
        """Keep the load."""
        self._load = load

    def predict(self) -> ExpertLoad | None:
        """The load observed last."""
        return self._load


class WindowPredictor:
    """Forecasts the mean of the last `WINDOW` loads, rounded down."""

    def __init__(self) -> None:
        self._loads: deque[np.ndarray] = deque(maxlen=WINDOW)

    def observe(self, load: ExpertLoad) -> None:
        """Push the load into the window."""
        self._loads.append(load.load_RE)

    def predict(self) -> ExpertLoad | None:
        """The mean over the window."""
        return ExpertLoad(np.sum(self._loads, axis=0) // len(self._loads)) if self._loads else None


class EmaPredictor:
    """Forecasts the mean of all loads, with weights that fall by the factor `decay` per step back."""

    def __init__(self, decay: float = EMA_DECAY) -> None:
        self._decay = decay
        self._weight = 0.0
        self._average_RE: np.ndarray | None = None

    def observe(self, load: ExpertLoad) -> None:
        """Fold the load into the average."""
        self._weight = self._decay * self._weight + 1.0
        before_RE = 0.0 if self._average_RE is None else self._average_RE
        self._average_RE = before_RE + (load.load_RE - before_RE) / self._weight

    def predict(self) -> ExpertLoad | None:
        """The average, rounded."""
        return None if self._average_RE is None else ExpertLoad(np.rint(self._average_RE).astype(np.int64))


class BestPredictor:
    """Uses the predictor with the smallest error over the last `ERROR_WINDOW` loads; ties go to the first.

    By default it chooses from the last load, an average of short memory and one of long memory. The error of a forecast is the
    total variation distance between expert shares, from 0 to 1.
    """

    def __init__(self, *predictors: Predictor) -> None:
        self._predictors = predictors or (LastPredictor(), EmaPredictor(), EmaPredictor(SLOW_EMA_DECAY))
        self._errors: tuple[deque[float], ...] = tuple(deque(maxlen=ERROR_WINDOW) for _ in self._predictors)
        self._totals_SE: deque[np.ndarray] = deque(maxlen=NUM_SCENARIOS)
        self._residuals_SE: deque[np.ndarray] = deque(maxlen=NUM_SCENARIOS)

    def observe(self, load: ExpertLoad) -> None:
        """Evaluate the forecasts of this load, then observe it."""
        forecast = self.predict()
        if forecast is not None:
            self._residuals_SE.append(load.totals_E - forecast.totals_E)
        self._totals_SE.append(load.totals_E)
        for predictor, errors in zip(self._predictors, self._errors, strict=True):
            predicted = predictor.predict()
            if predicted is not None:
                errors.append(prediction_error(predicted, load))
            predictor.observe(load)

    def predict(self) -> ExpertLoad | None:
        """The forecast of the predictor with the smallest recent error."""
        return self._predictors[self._best()].predict()

    def expected_error(self) -> float:
        """The recent mean error of that predictor; `FIRST_ERROR` before any forecast was evaluated."""
        errors = self._errors[self._best()]
        return sum(errors) / len(errors) if errors else FIRST_ERROR

    def scenarios(self) -> np.ndarray | None:
        """Loads that may come instead of the forecast, int64 [S, E]: the last ones, and the forecast with each last error.

        The errors count double, as those to come may be larger. None before any forecast was evaluated.
        """
        forecast = self.predict()
        if forecast is None or not self._residuals_SE:
            return None
        erring_SE = np.maximum(forecast.totals_E + SCENARIO_ERRORS * np.stack(self._residuals_SE), 0)
        return np.concatenate([np.stack(self._totals_SE), erring_SE])

    def _best(self) -> int:
        scores = [sum(errors) for errors in self._errors]
        return scores.index(min(scores))


def prediction_error(predicted: ExpertLoad, actual: ExpertLoad) -> float:
    """Total variation distance between the expert shares of two loads, from 0 (equal) to 1."""
    shares = [load.totals_E / max(load.total, 1) for load in (predicted, actual)]
    return 0.5 * float(np.abs(shares[0] - shares[1]).sum())


PREDICTORS: Mapping[str, Callable[[], BestPredictor]] = MappingProxyType(
    {
        "best": BestPredictor,
        "last": lambda: BestPredictor(LastPredictor()),
        "window": lambda: BestPredictor(WindowPredictor()),
        "ema": lambda: BestPredictor(EmaPredictor()),
    }
)


def make_predictor(name: Literal["best", "last", "window", "ema"]) -> BestPredictor:
    """A new predictor by its configuration name."""
    return PREDICTORS[name]()
