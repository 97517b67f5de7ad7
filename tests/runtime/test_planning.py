"""Invariants 2, 3, 5 and 6 on what planning and banks hold: one owner, one plan, no token lost, bounded memory."""

import dataclasses
import itertools
import math
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from hypothesis import given, settings
from hypothesis import strategies as st

from moesaic import MoELayer, RuntimeConfig
from moesaic.placement import ExpertLoad, LayerShape, Placement, Problem, Topology, get_solver
from moesaic.runtime.group import RankGroup
from moesaic.runtime.step.planning import LayerPlanner, Plan
from tests.helpers.cases import Case, cases, share_experts
from tests.helpers.configs import runtime_config
from tests.helpers.ranks import run_ranks
from tests.helpers.threads import run_threads
from tests.runtime.test_shard import trained, wrapped


def plans_of_three_forwards(group: RankGroup, case: Case, is_auto: bool) -> list[Plan]:
    layers = {str(i): layer for i, layer in enumerate(case.layers())}
    config, solver = RuntimeConfig(slots=case.slots, policy="auto"), None if is_auto else case.solver()
    share_experts(layers, group, config=config, solver=solver, owners=case.owners())
    seen: list[Plan] = []
    for layer in layers.values():
        split = layer.runtime.planner.split
        layer.runtime.planner.split = lambda plan, load, split=split: seen.append(split(plan, load)) or seen[-1]  # type: ignore[method-assign]
    for batch in range(3):
        x = case.tokens(group.rank, batch)
        for layer in layers.values():
            x = x + layer(x)
    return seen


@settings(max_examples=60, deadline=None)
@given(case=cases(), is_auto=st.booleans())
def test_every_rank_reaches_the_same_plan(case: Case, is_auto: bool) -> None:
    """Invariants 3, 5 and the budget: equal plans, every assignment computed once, by a rank that holds the expert.

    Where all ranks hold all experts, each computes as many as it is fast.
    """
    topology = case.topology()
    plans_R = run_threads(case.world_size, plans_of_three_forwards, case, is_auto, topology=topology)
    for plans in zip(*plans_R, strict=True):
        assert all(plan == plans[0] for plan in plans)
        placement, split = plans[0].placement, plans[0].split
        assert split is not None
        if math.isinf(case.capacity_factor):
            assert split.rows_RE.sum() == sum(case.tokens_R) * case.top_k
        assert np.array_equal(split.rows_RE.sum(axis=0), split.load.totals_E)
        assert not split.rows_RE[~placement.replicas_RE].any()
        if placement.replicas_RE.all():
            assert (topology.cost_R * split.rows_R).max() == topology.least_limit(split.load.total)
        assert placement.copies_RE.sum(axis=1).max() <= case.slots


def planner(solver: Any, slots: int) -> LayerPlanner:
    owners_E = np.array([0, 0, 1, 1])
    shape = LayerShape(num_experts=4, top_k=1, dim=4, ffn_dim=4)
    return LayerPlanner(owners_E, Topology.preset("cpu", 2), shape, {"given": solver}, RuntimeConfig(slots=slots))


def everywhere(problem: Problem) -> Any:
    return SimpleNamespace(placement=Placement.everywhere(problem.expert_to_owner_E, problem.num_ranks))


def test_a_solver_that_breaks_the_budget_is_refused() -> None:
    breaking = planner(everywhere, slots=1)
    assert breaking.place().placement.num_copies == 0
    breaking.observe(ExpertLoad(np.ones((2, 4), np.int64)))
    with pytest.raises(ValueError, match="2 copies on rank 0, which has 1 slots"):
        breaking.place()


def test_calibration_rests_while_predictions_are_good() -> None:
    """On until something was predicted; off when the load repeats; on again when it jumps to other experts; always and never."""
    hot, other = (ExpertLoad(np.outer([1, 1], shares)) for shares in ([700, 100, 100, 100], [100, 100, 100, 700]))
    learning, seen = planner(get_solver("quota"), slots=2), []
    for load in (hot, *5 * [hot], other, *9 * [hot, other], *20 * [hot]):
        learning.place()
        seen.append(learning.is_calibrating)
        learning.observe(load)
    assert seen[:7] == [True, True, False, False, False, False, False]
    assert all(seen[9:25])
    assert not seen[-1]
    for choice in ("always", "never"):
        config = runtime_config(slots=2, calibrate=choice)
        shape = LayerShape(num_experts=4, top_k=1, dim=4, ffn_dim=4)
        fixed = LayerPlanner(np.array([0, 0, 1, 1]), Topology.preset("cpu", 2), shape, {"quota": get_solver("quota")}, config)
        assert fixed.is_calibrating == (choice == "always")


def test_copies_hedge_only_where_no_calibration_follows() -> None:
    """The first forecast is placed without hedging where calibration would pay; with errors to learn from, or copies too slow for
    calibration, every one is hedged."""
    hot, other = (ExpertLoad(1000 * np.outer([1, 1], shares)) for shares in ([700, 100, 100, 100], [100, 100, 100, 700]))
    for rate, is_late_copy_cheap in ((1e12, True), (1e3, False)):
        asked: list[Problem] = []

        def solver(problem: Problem, asked: list[Problem] = asked) -> Any:
            asked.append(problem)
            return get_solver("static")(problem)

        topology = dataclasses.replace(Topology.preset("cpu", 2), device_bytes_per_s=rate)
        shape = LayerShape(num_experts=4, top_k=1, dim=64, ffn_dim=64)
        planner = LayerPlanner(np.array([0, 0, 1, 1]), topology, shape, {"given": solver}, RuntimeConfig(slots=2))
        for load in (*10 * [hot, other], *8 * [hot]):
            is_calibrating = planner.is_calibrating
            planner.place()
            planner.observe(load)
            if asked:
                assert (asked[-1].forecast_error == 0) == (is_calibrating and is_late_copy_cheap and len(asked) == 1)
        assert len(asked) == 27


def row_bytes_of(group: RankGroup, top_k: int) -> int:
    layer = MoELayer(8, 6, 4, top_k)
    share_experts({"layer": layer}, group, config=RuntimeConfig(slots=1))
    return layer.runtime.planner.problem(ExpertLoad(np.ones((group.world_size, 4), np.int64))).shape.row_bytes


@pytest.mark.parametrize("world_size,top_k", [(1, 3), (2, 2), (3, 3), (3, 1)])
def test_another_expert_of_a_token_sends_no_row_where_it_is_already(world_size: int, top_k: int) -> None:
    """Against all ranks that the token's other experts can be on: a row of 8 floats where none is on rank 0."""
    others = list(itertools.product(range(world_size), repeat=top_k - 1))
    rows = sum(0 not in ranks for ranks in others) if world_size > 1 else len(others)
    assert run_threads(world_size, row_bytes_of, top_k) == [round(8 * 4 * rows / len(others))] * world_size


def count_state(rank: int) -> dict[str, int]:
    """Elements of expert weights and of their AdamW state on this rank, and the memory report."""
    model, optimizer, _ = trained(rank, 2)
    layers = [block.moe.runtime for block in model.blocks]
    parameters = list(layers[0].bank.parameters())
    state = [value for p in parameters for value in optimizer.state[p].values() if value.ndim]
    return {
        "weights": sum(p.numel() for p in parameters),
        "state": sum(value.numel() for value in state),
        "experts": sum(len(layer.owned_experts) for layer in layers),
    }


@pytest.mark.parametrize("world_size", [1, 2, 3, 4])
def test_every_expert_and_its_state_exist_once(world_size: int) -> None:
    """Invariant 2: 2 layers x 5 experts of 3 * 16 * 24 weights over all ranks, two moments each."""
    counts = run_ranks(world_size, count_state)
    assert sum(c["experts"] for c in counts) == 10
    assert sum(c["weights"] for c in counts) == 10 * 3 * 16 * 24
    assert sum(c["state"] for c in counts) == 2 * 10 * 3 * 16 * 24


def memory_after_steps(rank: int, solver: str) -> dict[str, int]:
    model, handle = wrapped(solver)
    for _ in range(3):
        ids = torch.randint(0, 11, (4, 6))
        model(ids).square().sum().backward()
        handle.step()
    assert dist.get_world_size() == 2
    return handle.telemetry.memory()


@pytest.mark.parametrize("solver", ["static", "random", "everywhere"])
def test_memory_stays_within_its_prediction(solver: str) -> None:
    """Invariant 6: what slots took at most, beside what the budget said they may take."""
    expert_bytes = 3 * 16 * 24 * 4
    for memory in run_ranks(2, memory_after_steps, solver):
        assert memory["expert_bytes"] == 2 * 5 * expert_bytes
        assert memory["slot_bytes_bound"] == (2 + 1) * 5 * expert_bytes
        assert memory["slot_bytes_peak"] <= memory["slot_bytes_bound"]
        assert (memory["slot_bytes_peak"] == 0) == (solver == "static")
