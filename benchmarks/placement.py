"""Time of planner and split by experts and ranks, gap of the exact solver by time, and gap of all layers' owners together.

Every problem is one layer whose expert popularity follows a Zipf law in random order, with 4,096 tokens per rank, on H100 nodes
of 8 ranks; copies are hidden under other work. Planner and split are timed after a warm-up, on one core, over several layers.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Sequence
from typing import Any

import numpy as np

from ..placement import ExpertLoad, LayerShape, OwnerMap, Problem, Topology, get_solver, solve_joint, split_exact
from . import placement_trace
from .placement_trace import TraceCase, about

COLUMNS = (
    *("what", "solver", "experts", "ranks", "slots", "skew", "ms_per_layer", "ms_min", "ms_max"),
    *("layer", "max_over_mean", "off_rank", "off_node", "copies", "gap", "seconds"),
)
WHATS = ("plan", "milp", "joint", "moetuner")
_TOKENS_PER_RANK = 4096


def make_problem(experts: int, ranks: int, top_k: int, slots: int, skew: float, seed: int) -> Problem:
    """One layer's problem; the same for the same arguments."""
    rng = np.random.default_rng(seed)
    popularity_E = rng.permutation(np.arange(1, experts + 1) ** -skew)
    load = ExpertLoad(rng.multinomial(_TOKENS_PER_RANK * top_k, popularity_E / popularity_E.sum(), size=ranks))
    return Problem(
        load=load,
        expert_to_owner_E=OwnerMap.contiguous(1, experts, ranks).expert_to_owner_LE[0],
        topology=Topology.preset("h100", ranks),
        shape=LayerShape(experts, top_k, 2048, 1024, bytes_per_element=2),
        slots=slots,
        overlap_s=1.0,
    )


def _spread(seconds: Sequence[float]) -> dict[str, float]:
    return {"ms_per_layer": 1e3 * float(np.median(seconds)), "ms_min": 1e3 * min(seconds), "ms_max": 1e3 * max(seconds)}


def _time_layers(solver: str, problems: Sequence[Problem], rounds: int) -> list[dict[str, Any]]:
    """Time one planner and the exact split of its placements; two records."""
    solve = get_solver(solver)
    placements = [solve(problem).placement for problem in problems]
    splits = [split_exact(p.load, placed, p.topology) for p, placed in zip(problems, placements, strict=True)]
    # Checks before timing: the split keeps every assignment, and the planner repeats its plan.
    for problem, placed, split in zip(problems, placements, splits, strict=True):
        if (split.rows_RE.sum(axis=0) != problem.load.totals_E).any() or solve(problem).placement != placed:
            raise RuntimeError(f"{solver} lost assignments or did not repeat its plan")
    plan_s, split_s = [], []
    for _ in range(rounds):
        for problem, placed in zip(problems, placements, strict=True):
            start = time.perf_counter()
            solve(problem)
            plan_s.append(time.perf_counter() - start)
            start = time.perf_counter()
            split_exact(problem.load, placed, problem.topology)
            split_s.append(time.perf_counter() - start)
    balance = float(np.mean([split.max_over_mean for split in splits]))
    timed = (("plan", plan_s), ("split", split_s))
    return [{**about(what, solver, problems[0]), **_spread(seconds), "max_over_mean": balance} for what, seconds in timed]


def _joint_gap(problems: Sequence[Problem]) -> dict[str, Any]:
    """Place all layers together."""
    answer = solve_joint(problems)
    splits = [split_exact(p.load, found.placement, p.topology) for p, found in zip(problems, answer.layers, strict=True)]
    return {
        **about("joint", "joint", problems[0]),
        "layers": len(problems),
        "max_over_mean": float(np.mean([split.max_over_mean for split in splits])),
        "copies": sum(found.placement.num_copies for found in answer.layers) / len(problems),
        "ms_of_step": 1e3 * answer.total_s,
        "gap": answer.gap,
        "seconds": answer.seconds,
    }


def run(
    experts: Sequence[int],
    ranks: Sequence[int],
    solvers: Sequence[str],
    limits_s: Sequence[float],
    *,
    whats: Sequence[str],
    top_k: int,
    slots: int,
    skews: Sequence[float],
    layers: int,
    rounds: int,
    trace: TraceCase | None = None,
) -> list[dict[str, Any]]:
    """Measure the given `whats`; without a trace the exact solver runs on the first of each size."""
    records: list[dict[str, Any]] = []
    for num_experts in experts:
        if top_k > num_experts:
            raise ValueError(f"--top-k is {top_k} with {num_experts} experts; it must be from 1 to {num_experts}")
    for num_experts, num_ranks, skew in itertools.product(experts, ranks, skews) if "plan" in whats else ():
        problems = [make_problem(num_experts, num_ranks, top_k, slots, skew, seed) for seed in range(layers)]
        for solver in solvers:
            records += [{**record, "skew": skew} for record in _time_layers(solver, problems, rounds)]
    for num_experts, num_ranks, skew in itertools.product(experts, ranks, skews) if "joint" in whats else ():
        problems = [make_problem(num_experts, num_ranks, top_k, slots, skew, seed) for seed in range(layers)]
        records.append({**_joint_gap(problems), "skew": skew})
    if "milp" in whats and limits_s:
        if trace is None:
            records += placement_trace.milp_gaps(make_problem(experts[0], ranks[0], top_k, slots, skews[0], seed=0), limits_s)
        else:
            records += placement_trace.milp_gaps_of_trace(trace, ranks[0], slots, limits_s)
    if "moetuner" in whats:
        if trace is None:
            raise ValueError("--what moetuner follows recorded tokens from layer to layer; give a --trace")
        records += placement_trace.hops(trace, ranks[0], limit_s=max(limits_s))
    return records
