"""The balancers of others: published examples, worked cases, and the oracle."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from hypothesis import given, settings

from moesaic.placement import ExpertLoad, LayerShape, Problem, Topology, cost, get_solver, split_exact, split_local_even
from moesaic.placement.offline.setting import SimulatorSetting
from moesaic.placement.solvers.baselines import hecate
from moesaic.placement.solvers.baselines.eplb import balanced_packing, choose_owners, rebalance, replicate
from tests.placement.cases import problems, zipf_problem


def problem_of(load_RE: list, owner_E: list, topology: Topology, slots: int, **changes: object) -> Problem:
    """A problem in which only compute counts: links are free."""
    topology = dataclasses.replace(topology, device_bytes_per_s=1e18, node_bytes_per_s=1e18, latency_s=0.0, half_rate_rows=0)
    load = ExpertLoad(np.array(load_RE))
    return Problem(load, np.array(owner_E), topology, LayerShape(load.num_experts, 1, 8, 8), slots, **changes)


def test_eplb_reproduces_its_published_example():
    """README of deepseek-ai/EPLB: 2 layers, 12 experts, 16 replicas, 4 groups, 2 nodes, 8 GPUs."""
    weights_LE = np.array(
        [[90, 132, 40, 61, 104, 165, 39, 4, 73, 56, 183, 86], [20, 107, 104, 64, 19, 197, 187, 157, 172, 86, 16, 27]]
    )
    assert rebalance(weights_LE, 16, 4, 2, 8).tolist() == [
        [5, 6, 5, 7, 8, 4, 3, 4, 10, 9, 10, 2, 0, 1, 11, 1],
        [7, 10, 6, 8, 6, 11, 8, 9, 2, 4, 5, 1, 5, 0, 3, 1],
    ]


def test_eplb_pieces():
    packing = balanced_packing(np.array([5.0, 4.0, 3.0, 2.0]), 2)
    assert (packing.pack.tolist(), packing.position.tolist()) == ([0, 1, 1, 0], [0, 0, 1, 1])
    assert replicate(np.array([9.0, 4.0]), 5).tolist() == [0, 1, 0, 0, 1]
    with pytest.raises(ValueError, match="3 items do not fill 2 packs evenly"):
        balanced_packing(np.ones(3), 2)
    with pytest.raises(ValueError, match="15 replicas of 12 experts in 1 groups do not divide over 1 nodes and 8 GPUs"):
        rebalance(np.ones((1, 12)), 15, 1, 1, 8)


@pytest.mark.parametrize("extremes", [np.ones(12), np.r_[1000.0, np.ones(11)], np.zeros(12)])
def test_eplb_keeps_every_expert(extremes):
    physical_LP = rebalance(np.stack([extremes, extremes[::-1]]), 16, 4, 2, 8)
    counts_LE = np.stack([np.bincount(row, minlength=12) for row in physical_LP])
    assert (counts_LE >= 1).all()
    assert (counts_LE.sum(axis=1) == 16).all()


@pytest.mark.parametrize("name", ["eplb", "eplb_hierarchical"])
def test_eplb_keeps_ownership_nearly_even(name):
    """Copies of one expert on one GPU can make an even choice of owners impossible, by one here; moves are charged."""
    answer = get_solver(name)(zipf_problem(16, 64, 0.5, slots=2))
    assert set(np.bincount(answer.placement.expert_to_owner_E, minlength=16).tolist()) <= {3, 4, 5}
    assert answer.cost.move_s > 0


def test_eplb_finds_an_even_choice_of_owners_by_augmenting():
    """Expert 0 could stay on rank 0 or 1; only if it leaves rank 0 can expert 2, held by rank 0 alone, have an owner there."""
    problem = problem_of([[1, 1, 1], [1, 1, 1], [1, 1, 1]], [0, 1, 2], Topology.preset("cpu", 3), slots=2)
    held_RE = np.array([[True, False, True], [True, True, False], [False, True, False]])
    assert choose_owners(problem, held_RE).tolist() == [1, 2, 0]


def test_lpt_pairs_large_with_small():
    """Loads 8, 7, 3, 2 on two ranks of two experts: 8 + 2 and 7 + 3."""
    problem = problem_of([[8, 7, 0, 0], [0, 0, 3, 2]], [0, 0, 1, 1], Topology.preset("cpu", 2), slots=0)
    placement = get_solver("lpt")(problem).placement
    assert placement.expert_to_owner_E.tolist() == [0, 1, 1, 0]
    assert placement.num_copies == 0


def test_smartmoe_keeps_a_placement_it_cannot_improve():
    """10 + 2 is the least possible maximum: owners stay, also the ones a tie would have moved."""
    problem = problem_of([[10, 4, 4, 2]], [0, 0, 0, 0], Topology.preset("cpu", 1), slots=0)
    assert get_solver("smartmoe")(problem).placement.expert_to_owner_E.tolist() == [0, 0, 0, 0]
    balanced = problem_of([[2, 4, 4, 10], [0] * 4], [0, 1, 1, 0], Topology.preset("cpu", 2), slots=0)
    assert get_solver("smartmoe")(balanced).placement.expert_to_owner_E.tolist() == [0, 1, 1, 0]


@settings(deadline=None, max_examples=100)
@given(problem=problems())
def test_permutations_keep_the_rows_of_every_rank(problem):
    before = np.bincount(problem.expert_to_owner_E, minlength=problem.num_ranks)
    for name in ("lpt", "smartmoe"):
        placement = get_solver(name)(problem).placement
        assert (np.bincount(placement.expert_to_owner_E, minlength=problem.num_ranks) == before).all()
    rows = split_exact(problem.load, placement, problem.topology).max_rows
    assert rows <= problem.owned_rows_R.max()


def test_laer_starts_with_one_replica_per_node():
    """8 places hold 4 experts on 2 nodes once per node, so that is what every expert gets."""
    problem = problem_of([[90, 2, 2, 2]] + [[0] * 4] * 3, [0, 1, 2, 3], Topology.parse("2x2"), slots=1)
    placement = get_solver("laer")(problem).placement
    assert placement.replicas_RE.reshape(2, 2, 4).sum(axis=1).tolist() == [[1, 1, 1, 1]] * 2


def test_laer_gives_the_hot_expert_the_places_on_one_node():
    problem = problem_of([[24, 1, 1, 1]] * 4, [0, 1, 2, 3], Topology.preset("cpu", 4), slots=1)
    placement = get_solver("laer")(problem).placement
    assert placement.replicas_RE[:, 0].all()
    assert split_exact(problem.load, placement, problem.topology).max_rows == 27


def test_hecate_is_simulated_with_the_t_that_suits_it():
    """Nothing hides, so t is 0 as published; the simulator takes the cheapest of several under the even split."""
    problem = zipf_problem(4, 16, 1.2, slots=1, overlap_s=0.0)
    problem = dataclasses.replace(problem, load=ExpertLoad(problem.load.load_RE * 100))

    def even_s(degree: int) -> float:
        placement = hecate.solve(problem, degree=degree).placement
        return cost(problem, placement, split_local_even(problem.load, placement, problem.topology)).total_s

    found = hecate.solve_with_best_degree(problem).placement
    assert hecate.overlap_degree(problem) == 0 == get_solver("hecate")(problem).placement.num_copies
    seconds = cost(problem, found, split_local_even(problem.load, found, problem.topology)).total_s
    assert seconds == min(even_s(degree) for degree in (0, 1, 2, 4, 8, 16)) < even_s(0)
    setting = SimulatorSetting(topology=problem.topology, shape=problem.shape)
    assert setting.solver("hecate")(problem).placement == found


def test_flexmoe_expands_the_hot_expert():
    problem = problem_of([[24, 1, 1, 1]] * 4, [0, 1, 2, 3], Topology.preset("cpu", 4), slots=1)
    placement = get_solver("flexmoe")(problem).placement
    assert placement.replicas_RE[:, 0].sum() >= 3


@settings(deadline=None, max_examples=100)
@given(problem=problems(max_ranks=4, max_experts=4, max_slots=1))
def test_nobody_with_the_same_owners_beats_exhaustive(problem):
    best = get_solver("exhaustive")(problem).cost.total_s
    for name in ("static", "quota", "hecate", "laer", "flexmoe"):
        assert best <= get_solver(name)(problem).cost.total_s


def test_exhaustive_refuses_large_problems():
    with pytest.raises(ValueError, match="placements are too many to try, at most 200000; use milp, or fewer slots"):
        get_solver("exhaustive")(zipf_problem(8, 64, 1.0, slots=2))
