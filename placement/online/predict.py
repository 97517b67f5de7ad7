"""Predictors: the next load of a layer from the loads it has seen.

All of them are deterministic functions of integers that every rank has, so all ranks predict the same.
"""

from collections import deque
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Literal, Protocol

import numpy as np

from ..values import ExpertLoad

# Loads that the window predictor averages (Hecate, arXiv 2502.02581, section 4.2; LAER-MoE uses as many).
WINDOW = 5
EMA_DECAY = 0.9
# Past predictions whose error decides which predictor 'best' uses.
ERROR_WINDOW = 10
# Expected of a forecast before one was judged; from step to step 0.01 to 0.25 were recorded (FIELD, section 7.1).
FIRST_ERROR = 0.1


class Predictor(Protocol):
    """Sees every load once, in order, and says what it expects next."""

    def observe(self, load: ExpertLoad) -> None:
        """Take in the load that was measured."""

    def predict(self) -> ExpertLoad | None:
        """The load expected next, or None before anything was observed."""


class LastPredictor:
    """The next load is the last one. The best by far in the first few hundred steps."""

    def __init__(self) -> None:
        self._load: ExpertLoad | None = None

    def observe(self, load: ExpertLoad) -> None:
        """Keep the load."""
        self._load = load

    def predict(self) -> ExpertLoad | None:
        """The load observed last."""
        return self._load


class WindowPredictor:
    """The mean of the last `WINDOW` loads, rounded down."""

    def __init__(self) -> None:
        self._loads: deque[np.ndarray] = deque(maxlen=WINDOW)

    def observe(self, load: ExpertLoad) -> None:
        """Push the load into the window."""
        self._loads.append(load.load_RE)

    def predict(self) -> ExpertLoad | None:
        """The mean over the window."""
        return ExpertLoad(np.sum(self._loads, axis=0) // len(self._loads)) if self._loads else None


class EmaPredictor:
    """An exponential moving average, decay `EMA_DECAY`, started at the first load."""

    def __init__(self) -> None:
        self._average_RE: np.ndarray | None = None

    def observe(self, load: ExpertLoad) -> None:
        """Fold the load into the average."""
        if self._average_RE is None:
            self._average_RE = load.load_RE.astype(np.float64)
        else:
            self._average_RE = EMA_DECAY * self._average_RE + (1 - EMA_DECAY) * load.load_RE

    def predict(self) -> ExpertLoad | None:
        """The average, rounded."""
        return None if self._average_RE is None else ExpertLoad(np.rint(self._average_RE).astype(np.int64))


class BestPredictor:
    """Whichever of some predictors had the smallest error over the last `ERROR_WINDOW` loads; ties go to the first.

    The error of one prediction is the total variation distance between expert shares, from 0 to 1.
    """

    def __init__(self, *predictors: Predictor) -> None:
        self._predictors = predictors or (LastPredictor(), WindowPredictor(), EmaPredictor())
        self._errors: tuple[deque[float], ...] = tuple(deque(maxlen=ERROR_WINDOW) for _ in self._predictors)

    def observe(self, load: ExpertLoad) -> None:
        """Judge the predictions that were made for this load, then take it in."""
        for predictor, errors in zip(self._predictors, self._errors, strict=True):
            predicted = predictor.predict()
            if predicted is not None:
                errors.append(prediction_error(predicted, load))
            predictor.observe(load)

    def predict(self) -> ExpertLoad | None:
        """The prediction of the predictor that did best lately."""
        return self._predictors[self._best()].predict()

    def expected_error(self) -> float:
        """The mean error of that predictor lately; `FIRST_ERROR` before one prediction was judged."""
        errors = self._errors[self._best()]
        return sum(errors) / len(errors) if errors else FIRST_ERROR

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
    """A fresh predictor by its configuration name."""
    return PREDICTORS[name]()
