"""Plans solved offline: one placement for a whole trace, layer by layer, from its mean load."""

from __future__ import annotations

from collections.abc import Callable
from time import perf_counter

import numpy as np

from .cost import Solution, evaluate
from .joint import solve_joint
from .lab import LabSetting, mean_loads
from .moetuner import tune_owners
from .owners import OwnerMap
from .plans import SavedPlan
from .sources import LoadSource, pair_counts_of
from .values import ExpertLoad, Placement, Problem


def solve_plan(
    source: LoadSource,
    setting: LabSetting,
    solver: str,
    slots: int,
    *,
    current: OwnerMap | None = None,
    trace_digest: str = "",
    on_layer: Callable[[], None] = lambda: None,
) -> SavedPlan:
    """Solve every layer for the mean load of a source, starting from the `current` owners (contiguous blocks by default).

    `joint` deals rows out over all layers together; `moetuner` follows tokens from layer to layer where the source knows them.
    """
    start = perf_counter()
    meta = source.meta
    current = current or OwnerMap.contiguous(meta.num_layers, meta.num_experts, meta.num_ranks)
    if current.expert_to_owner_LE.shape != (meta.num_layers, meta.num_experts) or current.num_ranks != meta.num_ranks:
        raise ValueError(
            f"the current owners are of {current.num_layers} layers x {current.num_experts} experts on {current.num_ranks}, "
            f"the trace of {meta.num_layers} x {meta.num_experts} on {meta.num_ranks} ranks; give a plan for this trace"
        )
    loads = mean_loads(source, setting)
    pairs_LEE = pair_counts_of(source) if solver == "moetuner" else None
    problems = [
        setting.problem(load, owner_E, slots, setting.rehome_every)
        for load, owner_E in zip(loads, current.expert_to_owner_LE, strict=True)
    ]
    if solver == "joint":
        solutions = list(solve_joint(problems).layers)
        on_layer()
    elif pairs_LEE is not None and meta.num_layers > 1:
        solutions = _tune(problems, loads, pairs_LEE, setting)
        on_layer()
    else:
        solve = setting.solver(solver)
        solutions = []
        for problem in problems:
            solutions.append(solve(problem))
            on_layer()
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
        seconds=perf_counter() - start,
        moves=len(current.moves_to(owners)),
        trace_digest=trace_digest,
        layers=placements,
    )


def _tune(problems: list[Problem], loads: list[ExpertLoad], pairs_LEE: np.ndarray, setting: LabSetting) -> list[Solution]:
    """Run MoETuner over all layers at once."""
    start = perf_counter()
    totals_LE = np.stack([load.totals_E for load in loads])
    owners = tune_owners(totals_LE, pairs_LEE, setting.topology, time_limit_s=setting.time_limit_s)
    placements = [Placement.owners_only(owner_E, owners.num_ranks) for owner_E in owners.expert_to_owner_LE]
    return [
        evaluate(problem, placement, start, "moetuner", owners_may_move=True)
        for problem, placement in zip(problems, placements, strict=True)
    ]
