"""Plans solved offline: one placement for a whole trace, layer by layer or for all layers jointly.

They are made for the trace's mean load and hedged against its steps (`solvers/hedge.py`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from time import perf_counter
from types import MappingProxyType

import numpy as np

from ...jit import run_seconds
from ..cost import Solution, evaluate
from ..owners import OwnerMap
from ..solvers.baselines.moetuner import tune_owners
from ..solvers.hedge import hedged, solve_hedged
from ..solvers.joint import solve_joint
from ..traces.sources import LoadSource, pair_counts_of
from ..values import Placement, Problem
from .plans import SavedPlan
from .setting import SimulatorSetting, recorded_loads, run_steps


@dataclass(frozen=True)
class _Model:
    """All layers of a trace: the source of their loads, and the problem of each."""

    source: LoadSource
    setting: SimulatorSetting
    problems: Sequence[Problem]


def _solve_layers(model: _Model, solver: str, on_layer: Callable[[], None]) -> list[Solution]:
    """Solve every layer separately."""
    solve, solutions = model.setting.solver(solver), []
    for problem in model.problems:
        solutions.append(solve_hedged(problem, solver, solve))
        on_layer()
    return solutions


def _solve_joint(model: _Model, on_layer: Callable[[], None]) -> list[Solution]:
    """Distribute experts over ranks in all layers together, then hedge the copies of each."""
    sure = [replace(problem, scenarios_SE=None, forecast_error=0.0) for problem in model.problems]
    found = solve_joint(sure, on_layer=on_layer).layers
    return [hedged(problem, solution, [solution.placement]) for problem, solution in zip(model.problems, found, strict=True)]


def _tune(model: _Model, on_layer: Callable[[], None]) -> list[Solution]:
    """Run both stages of MoETuner, the second on tokens followed from layer to layer; the first alone if the source has none."""
    start = perf_counter()
    pairs_LEE = pair_counts_of(model.source)
    if pairs_LEE is None or len(model.problems) == 1:
        return _solve_layers(model, "moetuner", on_layer)
    totals_LE = np.stack([problem.load.totals_E for problem in model.problems])
    owners = tune_owners(totals_LE, pairs_LEE, model.setting.topology, time_limit_s=model.setting.time_limit_s)
    solutions = []
    for problem, owner_E in zip(model.problems, owners.expert_to_owner_LE, strict=True):
        placement = Placement.owners_only(owner_E, owners.num_ranks)
        solutions.append(evaluate(problem, placement, start, "moetuner", owners_may_move=True))
        on_layer()
    return solutions


# Solvers of all layers jointly. The others solve layer by layer.
_OVER_ALL_LAYERS: Mapping[str, Callable[[_Model, Callable[[], None]], list[Solution]]] = MappingProxyType(
    {"joint": _solve_joint, "moetuner": _tune}
)


def solve_plan(
    source: LoadSource,
    setting: SimulatorSetting,
    solver: str,
    slots: int,
    *,
    current: OwnerMap | None = None,
    horizon: int | None = None,
    trace_digest: str = "",
    on_layer: Callable[[], None] = lambda: None,
) -> SavedPlan:
    """Solve every layer for the loads of a source, starting from the `current` owners (contiguous blocks by default).

    horizon: steps over which moves are amortised, `run_steps` of the source by default.
    """
    start = run_seconds()
    meta = source.meta
    current = current or OwnerMap.contiguous(meta.num_layers, meta.num_experts, meta.num_ranks)
    if current.expert_to_owner_LE.shape != (meta.num_layers, meta.num_experts) or current.num_ranks != meta.num_ranks:
        raise ValueError(
            f"the current owners are of {current.num_layers} layers x {current.num_experts} experts on {current.num_ranks}, "
            f"the trace of {meta.num_layers} x {meta.num_experts} on {meta.num_ranks} ranks; give a plan for this trace"
        )
    problems = [
        setting.run_problem(recorded, owner_E, slots, horizon or run_steps(source.num_steps))
        for recorded, owner_E in zip(recorded_loads(source, setting), current.expert_to_owner_LE, strict=True)
    ]
    model, solve_all = _Model(source, setting, problems), _OVER_ALL_LAYERS.get(solver)
    solutions = solve_all(model, on_layer) if solve_all else _solve_layers(model, solver, on_layer)
    objective_s = sum(solution.cost.total_s for solution in solutions)
    bound_s = sum(solution.bound.total_s for solution in solutions)
    placements = tuple(solution.placement for solution in solutions)
    owners = OwnerMap(np.stack([placement.expert_to_owner_E for placement in placements]), meta.num_ranks)
    return SavedPlan(
        meta=meta,
        topology=setting.topology,
        slots=slots,
        solver=solver,
        objective_s=objective_s,
        bound_s=bound_s,
        gap=max(0.0, 1.0 - bound_s / objective_s) if objective_s > 0 else 0.0,
        seconds=run_seconds() - start,
        moves=len(current.moves_to(owners)),
        trace_digest=trace_digest,
        scale=setting.scale,
        layers=placements,
    )
