"""Calibration: further copies once the exact load is known, if they save more than they cost on the critical path.

The placement was made for a predicted load, and its copies are in flight. The solver runs again with the exact load; of its
copies, those not yet made are added within the remaining slots, all or none: if the predicted saving exceeds the time of
gathering them without overlap (after Hecate, arXiv 2502.02581, which adds copies by its own algorithm).

Copies that hedge against a wrong forecast take the slots that calibration would fill. Where past loads say how forecasts err,
they serve a step better (measured on recordings); before, a placement is not hedged where calibration is likely to pay.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from dataclasses import replace

import numpy as np

from ..cost import cost, exposed_gather_s, lower_bound
from ..solvers.registry import Solver
from ..split import Split
from ..topology import Topology
from ..values import ExpertLoad, Placement, Problem

# Calibration is on while the forecasts' errors (total variation of expert shares) of the last forwards have a larger mean.
CALIBRATE_ABOVE = 0.1
ERROR_WINDOW = 10

SplitRule = Callable[[ExpertLoad, Placement, Topology], Split]


class CalibrationSwitch:
    """Whether a layer's next forward calibrates: while its forecasts are bad, or there was none."""

    def __init__(self) -> None:
        self._errors: deque[float] = deque(maxlen=ERROR_WINDOW)

    def observe(self, error: float) -> None:
        """Record the error of a forecast."""
        self._errors.append(error)

    @property
    def is_on(self) -> bool:
        """As the mean of the last errors says."""
        return not self._errors or sum(self._errors) / len(self._errors) > CALIBRATE_ABOVE


def unhedged_if_calibrated(forecast: Problem) -> Problem:
    """The problem of a forecast whose load will be calibrated: without its error, if that is all there is to hedge against and
    calibration is likely to pay."""
    shape, topology = forecast.shape, forecast.topology
    mean_s = forecast.backward_multiplier * shape.flops_per_row / topology.flops_per_s * forecast.load.total / forecast.num_ranks
    if forecast.scenarios_SE is not None or forecast.forecast_error * mean_s <= _one_copy_s(forecast):
        return forecast
    return replace(forecast, forecast_error=0.0)


def _one_copy_s(problem: Problem) -> float:
    return problem.topology.latency_s + problem.shape.expert_bytes / problem.topology.device_bytes_per_s


def calibrate(problem: Problem, split: Split, solver: Solver, split_rule: SplitRule) -> Split | None:
    """Split the problem's load over further copies, if they save more than they cost; None if they do not.

    Args:
        problem: the problem with the exact load, which `split` splits over the placement made for the predicted load.
        solver: proposes the copies.
        split_rule: splits a load over a placement.
    """
    placement = split.placement
    now = cost(problem, placement, split)
    now_s = now.total_s - now.gather_s
    if now_s - lower_bound(problem).total_s <= _one_copy_s(problem):
        return None
    wanted = solver(replace(problem, overlap_s=0.0)).placement
    added_RE = _within_slots(problem, placement, wanted.copies_RE & ~placement.replicas_RE)
    if not added_RE.any():
        return None
    more = split_rule(problem.load, Placement(placement.expert_to_owner_E, placement.replicas_RE | added_RE), problem.topology)
    then = cost(problem, more.placement, more)
    cost_s = exposed_gather_s(problem, added_copies(more.placement, placement))
    return more if now_s - (then.total_s - then.gather_s) > cost_s else None


def added_copies(more: Placement, before: Placement) -> Placement:
    """The placement of the owners and of the copies that `before` lacks."""
    owners = Placement.owners_only(more.expert_to_owner_E, more.num_ranks)
    return Placement(more.expert_to_owner_E, owners.replicas_RE | (more.replicas_RE & ~before.replicas_RE))


def calibrated_s(problem: Problem, before: Split, more: Split) -> float:
    """Predict the seconds of a step with copies that `calibrate` added: the gather of those before may hide, theirs cannot."""
    now, then = cost(problem, before.placement, before), cost(problem, more.placement, more)
    added_s = exposed_gather_s(problem, added_copies(more.placement, before.placement))
    return then.total_s - then.gather_s + now.gather_s + added_s


def _within_slots(problem: Problem, placement: Placement, added_RE: np.ndarray) -> np.ndarray:
    """Of the additional copies, as many per rank as it has slots left, the busiest experts first."""
    by_load_E = np.argsort(-problem.load.totals_E, kind="stable")
    free_R = problem.slots - placement.copies_RE.sum(axis=1)
    is_kept = added_RE[:, by_load_E].cumsum(axis=1) <= free_R[:, None]
    kept_RE = np.zeros_like(added_RE)
    kept_RE[:, by_load_E] = added_RE[:, by_load_E] & is_kept
    return kept_RE
