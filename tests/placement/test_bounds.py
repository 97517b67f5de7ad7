"""The counting bound against enumeration, with owners fixed and free."""

from __future__ import annotations

import dataclasses
import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moesaic.placement import ExpertLoad, LayerShape, Placement, Problem, Topology, cost, get_solver, lower_bound, split_exact
from moesaic.placement.cost import tally
from moesaic.placement.solvers.bounds import link_bound, range_bound_s, room_within
from moesaic.placement.solvers.exhaustive import every_placement
from tests.placement.cases import problems, zipf_problem


@settings(deadline=None, max_examples=150)
@given(problem=problems(max_ranks=3, max_experts=4, max_slots=2))
def test_below_every_placement_with_these_owners(problem):
    bound = link_bound(problem)
    assert bound.total_s <= get_solver("exhaustive")(problem).cost.total_s
    assert bound.total_s >= lower_bound(problem).total_s


@settings(deadline=None, max_examples=30)
@given(
    problem=problems(max_ranks=3, max_experts=4, max_slots=1),
    horizon=st.sampled_from([1, 100, 10**6]),
    mean_moves=st.booleans(),
)
def test_below_every_placement_with_any_owners(problem, horizon, mean_moves):
    """With the same numbers of owned experts the moves count as well, those of the mean rank with any numbers."""
    problem = dataclasses.replace(problem, move_horizon_steps=horizon, mean_moves=mean_moves)
    current = np.sort(problem.expert_to_owner_E)
    same_counts = link_bound(problem, owners_may_move=True).total_s
    any_counts = link_bound(problem, owners_may_move=True, keep_counts=False).total_s
    assert any_counts <= same_counts * (1 + 1e-12)
    for owners in itertools.product(range(problem.num_ranks), repeat=problem.num_experts):
        moved = dataclasses.replace(problem, expert_to_owner_E=np.array(owners))
        assert mean_moves or any_counts <= get_solver("exhaustive")(moved).cost.total_s
        is_same = (np.sort(owners) == current).all()
        for placement in every_placement(moved) if is_same or mean_moves else ():
            split = split_exact(problem.load, placement, problem.topology)
            assert (same_counts if is_same else any_counts) <= cost(problem, placement, split).total_s


@settings(deadline=None, max_examples=40)
@given(problem=problems(max_ranks=4, max_experts=6, max_slots=0), horizon=st.sampled_from([1, 20, 100]))
def test_moves_of_the_mean_rank_without_copies(problem, horizon):
    """Most loads that moves level need some number of moves: no owner map with as many experts per rank is below the bound."""
    problem = dataclasses.replace(problem, move_horizon_steps=horizon, mean_moves=True)
    bound_s = link_bound(problem, owners_may_move=True).total_s
    for owners in set(itertools.permutations(problem.expert_to_owner_E.tolist())):
        placement = Placement.owners_only(np.array(owners), problem.num_ranks)
        assert bound_s <= cost(problem, placement, split_exact(problem.load, placement, problem.topology)).total_s


@pytest.mark.parametrize("keep_counts", [True, False])
def test_the_bound_knows_which_moves_levelling_takes(keep_counts):
    """Rank 0 owns both hot experts: giving one away is one move, exchanging it two, and nothing levels the load for less."""
    load = ExpertLoad(np.array([[9000, 9000, 0, 0]] * 2))
    topology = dataclasses.replace(Topology.preset("h100", 2), half_rate_rows=0)
    problem = Problem(load, np.array([0, 0, 1, 1]), topology, LayerShape(4, 1, 64, 64), slots=0, mean_moves=True)
    level = Placement.owners_only(np.array([0, 1, 0, 1] if keep_counts else [0, 1, 1, 1]), 2)
    level_s = cost(problem, level, split_exact(load, level, topology))
    assert level_s.move_s > 0
    assert link_bound(problem, owners_may_move=True, keep_counts=keep_counts).total_s == pytest.approx(level_s.total_s, rel=1e-6)


def test_moves_that_cost_too_much_leave_the_bound_of_the_present_owners():
    problem = zipf_problem(8, 64, 1.0, slots=1, overlap_s=0.0)
    cheap, dear = (dataclasses.replace(problem, move_horizon_steps=steps) for steps in (10**9, 1))
    assert link_bound(dear, owners_may_move=True).total_s == pytest.approx(link_bound(dear).total_s, rel=1e-9)
    assert link_bound(cheap, owners_may_move=True).total_s < 0.99 * link_bound(cheap).total_s


def test_owners_need_no_copies_of_their_own():
    """One expert has nearly all rows: two copies serve all three ranks, so the third copy cannot stand for its owner's tokens."""
    load = ExpertLoad(np.array([[100, 1, 1]] * 3))
    problem = Problem(load, np.arange(3), Topology.preset("h100", 3), LayerShape(3, 1, 64, 64), slots=1)
    bound = link_bound(problem, owners_may_move=True, keep_counts=False)
    assert bound.total_s >= lower_bound(problem, owners_may_move=True).total_s + 4 * problem.topology.latency_s


def test_links_count():
    """Rows that must travel make the bound far better than compute alone."""
    problem = zipf_problem(8, 64, 0.8, slots=1, overlap_s=0.0)
    assert link_bound(problem, owners_may_move=True).total_s > 1.3 * lower_bound(problem, owners_may_move=True).total_s


@settings(deadline=None, max_examples=60)
@given(problem=problems(max_ranks=3, max_experts=4, max_slots=2))
def test_every_placement_has_room_within_its_own_seconds(problem):
    for placement in every_placement(problem):
        split = split_exact(problem.load, placement, problem.topology)
        counts, seconds = tally(problem, placement, split), cost(problem, placement, split).total_s
        copies = counts.device_copies
        assert range_bound_s(problem, copies, copies, owners_may_move=False) <= seconds
        room = room_within(problem, seconds, copies, copies, owners_may_move=False)
        assert counts.work_rows <= room.work_rows * (1 + 1e-9)
        assert counts.device_rows <= room.device_rows * (1 + 1e-9)
