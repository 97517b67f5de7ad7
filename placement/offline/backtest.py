"""Back-tests of predictors on a recorded trace: the error of each, by the age of the forecast."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from ..online.predict import PREDICTORS, Predictor, prediction_error
from ..traces.sources import LoadSource
from ..values import ExpertLoad

AGES = (1, 2, 5, 10, 25, 50, 100)


@dataclass(frozen=True)
class PredictorError:
    """Error of one predictor's forecasts of one age, over layers and steps.

    age: steps between the last observed load and the load that the forecast is compared with. mean, worst: total variation
    distance between expert shares, from 0 to 1. num_cells: number of (step, layer) pairs.
    """

    predictor: str
    age: int
    mean: float
    worst: float
    num_cells: int


class _Tested:
    """One layer's predictor and its last forecasts, stored as expert totals only."""

    def __init__(self, make: Callable[[], Predictor], oldest: int) -> None:
        self._predictor = make()
        self._forecasts: deque[ExpertLoad] = deque(maxlen=oldest)

    def error(self, age: int, load: ExpertLoad) -> float | None:
        """Error of the forecast made `age` steps before `load`; None if there is none."""
        return prediction_error(self._forecasts[-age], load) if len(self._forecasts) >= age else None

    def observe(self, load: ExpertLoad) -> None:
        """Observe a load and store the next forecast."""
        self._predictor.observe(load)
        forecast = self._predictor.predict()
        assert forecast is not None
        self._forecasts.append(ExpertLoad(forecast.totals_E[None, :]))


@dataclass
class _Sum:
    """Running sums of one predictor's errors at one age."""

    total: float = 0.0
    worst: float = 0.0
    count: int = 0

    def add(self, error: float) -> None:
        """Add one error."""
        self.total += error
        self.worst = max(self.worst, error)
        self.count += 1


def backtest(
    source: LoadSource, *, ages: Sequence[int] = AGES, on_step: Callable[[], None] = lambda: None
) -> list[PredictorError]:
    """Evaluate every predictor at every age on a source; ages for which it is too short are omitted.

    A forecast made after step s is compared at age a with the load of step s + a; it uses no load after step s.
    """
    tested = {name: [_Tested(make, max(ages)) for _ in range(source.meta.num_layers)] for name, make in PREDICTORS.items()}
    sums = {(name, age): _Sum() for name in PREDICTORS for age in ages}
    for loads_LRE in source.steps():
        loads = [ExpertLoad(load_RE) for load_RE in loads_LRE]
        for name, layers in tested.items():
            for layer, load in zip(layers, loads, strict=True):
                for age in ages:
                    error = layer.error(age, load)
                    if error is not None:
                        sums[name, age].add(error)
                layer.observe(load)
        on_step()
    return [
        PredictorError(*key, found.total / found.count, found.worst, found.count) for key, found in sums.items() if found.count
    ]
