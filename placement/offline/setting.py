"""The setting of the policy simulator and of offline plans, and what both take from a recording as a whole.

Shape letters: S steps or scenarios, L layers, R ranks, E experts.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from itertools import islice
from typing import Literal

import numpy as np

from ..content import MAX_TOTAL, check_positive_int, check_seconds
from ..cost import Solution
from ..online.predict import PREDICTORS
from ..solvers.baselines import hecate
from ..solvers.hedge import solve_hedged
from ..solvers.registry import Solver, get_solver
from ..topology import Topology
from ..traces.sources import LoadSource
from ..values import ExpertLoad, LayerShape, Problem
from .plans import MAX_RANKS

# Most recorded loads that a plan for a whole recording is hedged against.
_MOST_SCENARIOS = 32
# Another step's loads, at most MAX_TOTAL, still fit int64.
_MAX_SUM = 1 << 62


@dataclass(frozen=True)
class Recorded:
    """What a plan for a whole recording is made from, of one layer.

    mean: over the steps, rounded. scenarios_SE: recorded loads of experts, and loads twice as far from the mean; None for one
    step. error: mean `prediction_error` of the mean for the recorded loads.
    """

    mean: ExpertLoad
    scenarios_SE: np.ndarray | None
    error: float


def takes_time_limit(solver: str) -> bool:
    """Return whether a solver takes a time limit."""
    return "time_limit_s" in inspect.signature(get_solver(solver)).parameters


@dataclass(frozen=True, kw_only=True)
class SimulatorSetting:
    """The setting that all runs of a comparison share.

    overlap_s: seconds of other work that hide the gather. migrate_every: steps between two plans of solvers that change owners,
    over which a move is amortised; a plan for a whole run amortises it over `run_steps`. scale: factor on every recorded load.
    time_limit_s: of one call of an exact solver.
    """

    topology: Topology
    shape: LayerShape
    predictor: Literal["best", "last", "window", "ema"] = "best"
    overlap_s: float = 0.0
    gathers: int = 1
    backward_multiplier: int = 3
    migrate_every: int = 1
    scale: int = 1
    time_limit_s: float = 10.0

    def __post_init__(self) -> None:
        if self.topology.num_ranks > MAX_RANKS:
            raise ValueError(f"the topology has {self.topology.num_ranks} ranks; at most {MAX_RANKS} are supported offline")
        if self.predictor not in PREDICTORS:
            raise ValueError(f"unknown predictor {self.predictor!r}; known: {', '.join(PREDICTORS)}")
        check_seconds("overlap_s", self.overlap_s)
        check_seconds("time_limit_s", self.time_limit_s, positive=True)
        check_positive_int("migrate_every", self.migrate_every)
        check_positive_int("scale", self.scale)

    def solver(self, name: str) -> Solver:
        """The named solver, with the time limit if it takes one; Hecate with the t that suits it best."""
        solve: Callable[..., Solution] = hecate.solve_with_best_degree if name == "hecate" else get_solver(name)
        return partial(solve, time_limit_s=self.time_limit_s) if takes_time_limit(name) else solve

    def solve_run(self, name: str, recorded: Recorded, owner_E: np.ndarray, slots: int, horizon: int) -> Solution:
        """Solve one layer for a whole run by the named solver, hedged against the recorded loads."""
        return solve_hedged(self.run_problem(recorded, owner_E, slots, horizon), name, self.solver(name))

    def run_problem(self, recorded: Recorded, owner_E: np.ndarray, slots: int, horizon: int) -> Problem:
        """The problem of one layer for a whole run."""
        problem = self.problem(recorded.mean, owner_E, slots, horizon, recorded.error)
        return replace(problem, scenarios_SE=recorded.scenarios_SE)

    def problem(self, load: ExpertLoad, owner_E: np.ndarray, slots: int, horizon: int, forecast_error: float = 0.0) -> Problem:
        """The problem of one layer at one step."""
        return Problem(
            load=load,
            expert_to_owner_E=owner_E,
            topology=self.topology,
            shape=self.shape,
            slots=slots,
            gathers=self.gathers,
            overlap_s=self.overlap_s,
            backward_multiplier=self.backward_multiplier,
            move_horizon_steps=horizon,
            forecast_error=forecast_error,
        )

    def loads(self, loads_LRE: np.ndarray) -> list[ExpertLoad]:
        """A step's loads by layer, scaled."""
        if int(loads_LRE.max(initial=0)) * self.scale > MAX_TOTAL:
            raise ValueError(f"a load of {int(loads_LRE.max())} at scale {self.scale} is above {MAX_TOTAL}; lower --scale")
        return [ExpertLoad(load_RE * self.scale) for load_RE in loads_LRE]


def attention_s(source: LoadSource, setting: SimulatorSetting) -> float:
    """Predict the seconds of work before an MoE layer that hide its gather: the four projections of attention, forward.

    A lower estimate: attention scores, norms and other dense work are not included. Tokens per rank are those of the first step.
    """
    first_LRE = next(source.steps())
    tokens = setting.scale * int(first_LRE.sum(axis=(1, 2)).max()) / source.meta.top_k / source.meta.num_ranks
    return 8 * setting.shape.dim**2 * tokens / setting.topology.flops_per_s


def recorded_loads(source: LoadSource, setting: SimulatorSetting, num_steps: int | None = None) -> list[Recorded]:
    """Return every layer's loads in the first `num_steps` of a source, by default all, scaled."""
    sum_LRE = np.zeros(source.meta.step_shape, dtype=np.int64)
    steps = min(source.num_steps, num_steps or source.num_steps)
    every, kept = -(-steps // _MOST_SCENARIOS), []
    for step, loads_LRE in enumerate(islice(source.steps(), steps)):
        sum_LRE += loads_LRE
        if sum_LRE.max(initial=0) > _MAX_SUM:
            raise ValueError(f"loads sum to {int(sum_LRE.max())} up to a step, above {_MAX_SUM}; divide the recording's counts")
        if step % every == 0:
            kept.append(loads_LRE.sum(axis=1))
    means = setting.loads(np.rint(sum_LRE / steps).astype(np.int64))
    totals_SLE = np.stack([[load.totals_E for load in setting.loads(totals_LE[:, None])] for totals_LE in kept])
    return [_recorded(mean, totals_SLE[:, layer]) for layer, mean in enumerate(means)]


def _recorded(mean: ExpertLoad, totals_SE: np.ndarray) -> Recorded:
    if len(totals_SE) == 1:
        return Recorded(mean, None, 0.0)
    share_SE, share_E = totals_SE / np.maximum(totals_SE.sum(axis=1, keepdims=True), 1), mean.totals_E / max(mean.total, 1)
    error = 0.5 * float(np.abs(share_SE - share_E).sum(axis=1).mean())
    return Recorded(mean, np.concatenate([totals_SE, np.maximum(2 * totals_SE - mean.totals_E, 0)]), min(error, 1.0))


def run_steps(num_steps: int) -> int:
    """Steps over which a plan for a whole run amortises its moves: those of its trace, which may show a part of the run only."""
    return max(num_steps, Problem.move_horizon_steps)
