"""What every solver promises, and what quota and hecate promise beyond it."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from hypothesis import given, settings

from moesaic.placement import (
    KEEPS_OWNERS,
    SOLVERS,
    ExpertLoad,
    LayerShape,
    Problem,
    Topology,
    cost,
    get_solver,
    split_exact,
)
from moesaic.placement.solvers.baselines import hecate as hecate_module
from tests.placement.cases import busiest, problems, zipf_problem


@pytest.mark.parametrize("name", sorted(SOLVERS))
@settings(deadline=None, max_examples=40)
@given(problem=problems(max_ranks=4, max_experts=5, max_slots=2))
def test_every_solver(name, problem):
    """Slots are respected, the cost is the model's own, the bound holds, the problem is not changed, a second run agrees."""
    before = hash(problem)
    answer = get_solver(name)(problem)
    assert answer.solver == name
    assert (answer.placement.copies_RE.sum(axis=1) <= problem.slots).all()
    split = answer.split or split_exact(problem.load, answer.placement, problem.topology)
    assert (answer.split is None) == (name != "milp")
    assert answer.cost == cost(problem, answer.placement, split)
    assert answer.bound.max_rows <= busiest(split, problem.topology)
    assert answer.bound.total_s <= answer.cost.total_s * (1 + 1e-12)
    assert 0 <= answer.gap <= 1
    if name in KEEPS_OWNERS:
        assert (answer.placement.expert_to_owner_E == problem.expert_to_owner_E).all()
    assert answer.seconds >= 0
    assert hash(problem) == before
    again = get_solver(name)(problem)
    assert (again.placement, again.cost, again.bound) == (answer.placement, answer.cost, answer.bound)


def test_a_step_refuses_solvers_that_change_owners():
    assert get_solver("quota", keeps_owners=True) is SOLVERS["quota"]
    with pytest.raises(ValueError, match="solver 'lpt' changes owners, which a step cannot; use one of static, flexmoe, laer, "):
        get_solver("lpt", keeps_owners=True)
    with pytest.raises(ValueError, match="unknown solver 'quot'; did you mean 'quota'"):
        get_solver("quot", keeps_owners=True)


@settings(deadline=None, max_examples=100)
@given(problem=problems())
def test_quota_keeps_owners_and_never_costs_more_than_no_copies(problem):
    answer, static = get_solver("quota")(problem), get_solver("static")(problem)
    assert (answer.placement.expert_to_owner_E == problem.expert_to_owner_E).all()
    assert answer.cost.total_s <= static.cost.total_s
    if answer.cost.total_s == static.cost.total_s:
        assert answer.placement.num_copies == 0


@pytest.mark.parametrize("num_ranks, num_experts", [(8, 64), (16, 32), (64, 256)])
@pytest.mark.parametrize("skew", [0.5, 1.0, 1.5])
def test_quota_balances_with_few_copies_when_copies_are_free(num_ranks, num_experts, skew):
    problem = zipf_problem(num_ranks, num_experts, skew, slots=2)
    answer = get_solver("quota")(problem)
    static = get_solver("static")(problem)
    assert 0 < answer.placement.num_copies <= num_ranks * 2
    assert answer.cost.compute_s < static.cost.compute_s
    balanced = split_exact(problem.load, answer.placement, problem.topology).max_over_mean
    assert balanced <= max(1.03, 0.05 * split_exact(problem.load, static.placement, problem.topology).max_over_mean)


def test_quota_makes_no_copy_that_does_not_pay():
    """A balanced load, a load whose copies would cost more than they save, one rank, no slots: static."""
    flat = Problem(
        ExpertLoad(np.full((4, 8), 100)), np.repeat(np.arange(4), 2), Topology.preset("h100", 4), LayerShape(8, 2, 64, 64), 2
    )
    slow = dataclasses.replace(Topology.preset("h100", 8), device_bytes_per_s=1e6)
    few_tokens = ExpertLoad(np.where(np.eye(8, 64, dtype=bool), 9, 0))
    slow_links = dataclasses.replace(zipf_problem(8, 64, 1.0, slots=2, overlap_s=0.0), topology=slow, load=few_tokens)
    alone = zipf_problem(1, 16, 1.0, slots=2)
    no_slots = zipf_problem(8, 64, 1.0, slots=0)
    for problem in (flat, slow_links, alone, no_slots):
        assert get_solver("quota")(problem).placement.num_copies == 0


def test_quota_respects_the_smallest_group():
    problem = dataclasses.replace(zipf_problem(8, 64, 1.0, slots=2), min_rows_per_copy=10**9)
    assert get_solver("quota")(problem).placement.num_copies == 0


def test_quota_shares_one_hot_expert():
    """All tokens go to one expert of rank 0: it is copied to every rank and the split is even."""
    load = ExpertLoad(np.tile(np.array([4096, 0, 0, 0]), (4, 1)))
    problem = Problem(load, np.arange(4), Topology.preset("h100", 4), LayerShape(4, 1, 1024, 4096), 1, overlap_s=1.0)
    placement = get_solver("quota")(problem).placement
    assert placement.replicas_RE[:, 0].all()
    assert placement.num_copies == 3
    assert split_exact(load, placement, problem.topology).max_over_mean == 1.0


def test_hecate_copies_the_top_everywhere_when_memory_allows():
    """Algorithm 1, first branch: t = 2 experts fit into 2 slots."""
    load = ExpertLoad(np.array([[1, 9, 2, 8], [1, 9, 2, 8]]))
    problem = Problem(load, np.array([0, 0, 1, 1]), Topology.preset("h100", 2), LayerShape(4, 1, 16, 16), slots=2)
    placement = hecate_module.solve(problem, degree=2).placement
    assert placement.replicas_RE.tolist() == [[True, True, False, True], [False, True, True, True]]


def test_hecate_spreads_by_load_over_nodes_when_memory_is_tight():
    """Algorithm 1, second branch: 4 slots over loads 6 : 2 give 3 copies and 1; copies go to the other node first."""
    load = ExpertLoad(np.array([[6, 2, 0, 0], [0] * 4, [0] * 4, [0] * 4]))
    problem = Problem(load, np.arange(4), Topology.parse("2x2"), LayerShape(4, 1, 16, 16), slots=1)
    placement = hecate_module.solve(problem, degree=2).placement
    assert placement.copies_RE.tolist() == [
        [False, True, False, False],
        [True, False, False, False],
        [True, False, False, False],
        [True, False, False, False],
    ]


def test_hecate_degree_follows_the_overlap():
    """t = seconds x rate / expert bytes; nothing hides under nothing, and never more than all experts."""
    problem = zipf_problem(16, 64, 1.0, slots=2, overlap_s=0.0)
    assert hecate_module.overlap_degree(problem) == 0
    assert hecate_module.solve(problem).placement.num_copies == 0
    one = problem.shape.expert_bytes / problem.topology.node_bytes_per_s
    assert hecate_module.overlap_degree(dataclasses.replace(problem, overlap_s=3.5 * one)) == 3
    assert hecate_module.overlap_degree(dataclasses.replace(problem, overlap_s=1e6)) == 64


def test_quota_copies_for_bytes_only_where_that_pays():
    """A balanced load whose tokens stay home once copied: copies from w * F * (q + beta) / 4 rows on, or when they hide."""
    # Rank r's tokens go to the expert of rank r + 1: every rank computes as much, every row travels.
    shape = LayerShape(4, 1, 512, 64, bytes_per_element=2, gradient_bytes_per_element=2)
    topology = dataclasses.replace(Topology.preset("h100", 4), latency_s=0.0, half_rate_rows=0)
    break_even = 3 * 64 * (1 + 1) // 4
    for rows, copies in ((break_even - 2, 0), (break_even + 2, 4)):
        load = ExpertLoad(np.roll(np.eye(4, dtype=np.int64), 1, axis=1) * rows)
        problem = Problem(load, np.arange(4), topology, shape, slots=1)
        assert get_solver("quota")(problem).placement.num_copies == copies
        assert get_solver("quota")(dataclasses.replace(problem, overlap_s=1.0)).placement.num_copies == 4
