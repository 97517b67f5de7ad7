"""Compilation ahead of use: the routines of one run before its first step, or all (`moesaic doctor --warm`).

Each routine is called on a small example, which compiles and caches it, or loads it from the cache. Compiled code depends on the
types of the arguments, not on sizes. Any other routine is compiled at its first call.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import torch

from ...collectives import SCHEDULES, account, choose_schedule, make_schedule
from ...jit import compile_seconds
from ...kernels import bags_of, gather_rows, grouped_gemm, grouped_gemm_backward, sum_rows, swiglu, swiglu_backward
from ...placement import (
    SOLVERS,
    ExpertLoad,
    LayerShape,
    Placement,
    Problem,
    Solver,
    Topology,
    calibrate,
    get_solver,
    policy_solvers,
    split_exact,
)
from ...placement.solvers.exchange import search_owners
from ...placement.solvers.hedge import solve_hedged
from ...runtime import MoELayer, RuntimeConfig


def warm_run(config: RuntimeConfig, device: torch.device) -> None:
    """Compile the routines of a training run on this rank. The transport compiled its own when it was built."""
    if device.type == "cpu":
        warm_kernels([torch.bfloat16 if config.compute_dtype == "bf16" else torch.float32])
    warm_planning([get_solver(name) for name in policy_solvers(config.policy)])


def warm_all() -> float:
    """Compile or load every routine; return the seconds that took."""
    before_s = compile_seconds()
    from ...collectives.transports import shm_control

    assert shm_control.DONE == 0, "importing the module compiles its routines"
    warm_kernels([torch.float32, torch.float64, torch.bfloat16])
    warm_planning(list(SOLVERS.values()))
    problem = _problem(Topology.preset("cpu", 2))
    search_owners([problem])
    solve_hedged(replace(problem, scenarios_SE=problem.load.totals_E[None]), "quota", get_solver("quota"))
    return compile_seconds() - before_s


def warm_planning(solvers: Sequence[Solver]) -> None:
    """Place copies, split a load over them and schedule the gather, on one node and on two."""
    for topology in (Topology.preset("cpu", 2), Topology.preset("cpu", num_nodes=2, ranks_per_node=2)):
        problem = _problem(topology)
        owners = Placement.owners_only(problem.expert_to_owner_E, problem.num_ranks)
        for solver in solvers:
            solver(problem)
            calibrate(problem, split_exact(problem.load, owners, topology), solver, split_exact)
        replicas_RE = owners.replicas_RE.copy()
        replicas_RE[:, 0] = True  # the first expert, on every rank
        placement = Placement(owners.expert_to_owner_E, replicas_RE)
        split_exact(problem.load, placement, topology)
        choose_schedule(placement, topology, problem.shape)
        for name in SCHEDULES:
            schedule = make_schedule(name, placement, topology, problem.shape.expert_bytes)
            account(schedule, topology, problem.shape.parameters_per_expert)


def _problem(topology: Topology) -> Problem:
    """A layer with one expert per rank, whose first expert gets most tokens."""
    num_ranks = topology.num_ranks
    load_RE = np.ones((num_ranks, num_ranks), dtype=np.int64)
    load_RE[:, 0] = 100_000
    shape = LayerShape(num_experts=num_ranks, top_k=1, dim=8, ffn_dim=8)
    return Problem(ExpertLoad(load_RE), np.arange(num_ranks), topology, shape, slots=1, forecast_error=0.1)


def warm_kernels(dtypes: Sequence[torch.dtype]) -> None:
    """Train a layer on the CPU for a step, then call what only several ranks, or other tensor layouts, use."""
    for dtype in dtypes:
        with torch.random.fork_rng(devices=()), torch.enable_grad():
            layer = MoELayer(8, 8, num_experts=2, top_k=2, dtype=dtype)
            layer(torch.ones(4, 8, dtype=dtype, requires_grad=True)).sum().backward()
        x, weights = torch.ones(2, 8, dtype=dtype), [torch.ones(8, 8, dtype=dtype)]
        gather_rows(x, torch.tensor([0, 3]), beside=x)
        sum_rows(x, bags_of(torch.tensor([0, 0, 1, 1]), 2), beside=x)
        sum_rows(x, bags_of(torch.tensor([0, 1]), 2))
        swiglu_backward(swiglu(x), x)
        grouped_gemm(x, weights, [2])
        grouped_gemm_backward(x, x, weights, [2], [weights[0].clone()])
