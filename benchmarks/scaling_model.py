"""One MoE layer's training step on a simulated machine: placed by the previous load, priced on the current one."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from functools import partial
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..placement import (
    Cost,
    ExpertLoad,
    LayerShape,
    OwnerMap,
    Placement,
    Problem,
    Solver,
    SolverChoice,
    Split,
    Topology,
    cost,
    get_solver,
    policy_solvers,
    split_exact,
    split_local_even,
)
from ..placement.solvers.baselines.hecate import solve as hecate
from ..runtime.routing.router import balanced_ids
from ..runtime.step.metrics import max_over_mean
from .step import NUM_ROUTINGS, StepCase, zipf_ids


def simulate(case: StepCase, topology: Topology, bytes_per_element: int) -> list[dict[str, Any]]:
    """Predict a case on `topology`: records with the keys of `moesaic bench step` that the cost model covers.

    Seconds are those of cost.py: expert matrix products, routed tokens and copies of `bytes_per_element`, gradients in fp32;
    nothing overlaps.
    """
    T, E, K = case.tokens, case.experts, case.top_k
    drawn = [_load([zipf_ids(T, E, K, case.skew, seed) for seed in _seeds(case, i)], E) for i in range(NUM_ROUTINGS)]
    balanced = [_load([balanced_ids(T, E, K, seed=seed) for seed in _seeds(case, i)], E) for i in range(NUM_ROUTINGS)]
    owners_E = OwnerMap.contiguous(1, E, case.ranks).expert_to_owner_LE[0]
    shape = LayerShape(num_experts=E, top_k=K, dim=case.hidden, ffn_dim=case.ffn, bytes_per_element=bytes_per_element)

    def simulate_run(
        loads: Sequence[ExpertLoad], solvers: Mapping[str, Solver], slots: int, split_rule: Callable[..., Split]
    ) -> list[_Step]:
        choice, simulated = SolverChoice(solvers, split_rule), []
        for previous, current in pairwise(loads):
            past, present = (Problem(load, owners_E, topology=topology, shape=shape, slots=slots) for load in (previous, current))
            placement = choice.solve(past)
            choice.observe(present)
            split = split_rule(current, placement, topology)
            simulated.append((cost(present, placement, split), split, placement))
        return simulated

    def solvers_of(policy: str) -> dict[str, Solver]:
        return {name: get_solver(name) for name in policy_solvers(policy)}

    runs = {
        "static": simulate_run(drawn, solvers_of("static"), 0, split_exact),
        "hecate": simulate_run(drawn, {"hecate": partial(hecate, degree=case.slots)}, case.slots, split_local_even),
        **{policy: simulate_run(drawn, solvers_of(policy), case.slots, split_exact) for policy in ("quota", "balance", "auto")},
        "ideal": simulate_run(balanced, solvers_of("static"), 0, split_exact),
    }
    seconds = {name: float(np.median([step.total_s for step, _, _ in steps])) for name, steps in runs.items()}
    return [
        {
            "policy": name,
            **asdict(case),
            "rounds": NUM_ROUTINGS - 1,
            "tokens_per_s": case.ranks * T / seconds[name],
            "ratio_to_static": seconds["static"] / seconds[name],
            "ratio_to_ideal": seconds["ideal"] / seconds[name],
            "max_over_mean": float(np.mean([max_over_mean(split.rows_RE.sum(axis=1)) for _, split, _ in steps])),
            "copies": float(np.mean([placement.num_copies for _, _, placement in steps])),
            "exposed_comm_share": float(np.mean([1 - step.compute_s / step.total_s for step, _, _ in steps])),
        }
        for name, steps in runs.items()
    ]


_Step = tuple[Cost, Split, Placement]


def _seeds(case: StepCase, index: int) -> list[int]:
    """The seeds of the ranks' routings in `moesaic bench step`."""
    return [1000 * rank + index for rank in range(case.ranks)]


def _load(ids_of_R: Sequence[Tensor], num_experts: int) -> ExpertLoad:
    return ExpertLoad(np.stack([torch.bincount(ids_TK.flatten(), minlength=num_experts).numpy() for ids_TK in ids_of_R]))
