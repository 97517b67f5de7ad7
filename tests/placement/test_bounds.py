"""The counting bound against enumeration, with owners fixed and free."""

from __future__ import annotations

import dataclasses
import itertools

import numpy as np
from hypothesis import given, settings

from moesaic.placement import ExpertLoad, LayerShape, Problem, Topology, cost, get_solver, lower_bound, split_exact
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
@given(problem=problems(max_ranks=3, max_experts=4, max_slots=1))
def test_below_every_placement_with_any_owners(problem):
    """Moves are priced at nothing here, so that other owners can be tried as if they were current."""
    problem = dataclasses.replace(problem, state_multiplier=0.0, move_horizon_steps=10**9)
    current = np.sort(problem.expert_to_owner_E)
    same_counts = link_bound(problem, owners_may_move=True).total_s
    any_counts = link_bound(problem, owners_may_move=True, keep_counts=False).total_s
    assert any_counts <= same_counts * (1 + 1e-12)
    for owners in itertools.product(range(problem.num_ranks), repeat=problem.num_experts):
        moved = dataclasses.replace(problem, expert_to_owner_E=np.array(owners))
        best = get_solver("exhaustive")(moved).cost.total_s
        assert any_counts <= best
        if (np.sort(owners) == current).all():
            assert same_counts <= best


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
