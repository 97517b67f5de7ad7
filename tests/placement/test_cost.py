"""The cost model against a plain restatement, and lower bounds against every placement."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given, settings

from moesaic.placement import (
    ExpertLoad,
    LayerShape,
    Placement,
    Problem,
    Topology,
    cost,
    get_solver,
    lower_bound,
    split_exact,
)
from tests.placement.cases import busiest as busiest_cost
from tests.placement.cases import problems


def busiest(flow: dict[tuple[int, int], int], place_of, slower_by=lambda place: 1.0) -> float:
    """The most items one place sends or receives, as many times as it is slower; items that stay in the place not counted."""
    sent: dict[int, int] = {}
    received: dict[int, int] = {}
    for (src, dst), items in flow.items():
        if place_of(src) != place_of(dst):
            sent[place_of(src)] = sent.get(place_of(src), 0) + items
            received[place_of(dst)] = received.get(place_of(dst), 0) + items
    return max([0, *(items * slower_by(place) for each in (sent, received) for place, items in each.items())])


def link_seconds(problem: Problem, flow: dict[tuple[int, int], int], item_bytes: float) -> float:
    topology = problem.topology
    device = busiest(flow, lambda rank: rank)
    percents = topology.node_costs or [100] * topology.num_nodes
    node = busiest(flow, lambda rank: rank // topology.ranks_per_node, lambda node: percents[node] / 100)
    if device == 0:
        return 0.0
    return topology.latency_s + item_bytes * max(device / topology.device_bytes_per_s, node / topology.node_bytes_per_s)


@settings(deadline=None, max_examples=150)
@given(problems())
def test_cost_restated(problem):
    """Every stage from first principles, by plain loops over ranks and experts."""
    placement = get_solver("quota")(problem).placement
    split = split_exact(problem.load, placement, problem.topology)
    result = cost(problem, placement, split)
    topology, shape, ranks = problem.topology, problem.shape, range(problem.num_ranks)

    work = 0.0
    for rank in ranks:
        groups = [int(split.rows_RE[rank, e]) for e in range(problem.num_experts) if split.rows_RE[rank, e]]
        full_rate = topology.flops_per_s * (100 / topology.rank_costs[rank] if topology.rank_costs else 1)
        rate = [full_rate * n / (n + topology.half_rate_rows) for n in groups]
        work = max(work, sum(n * shape.flops_per_row / r for n, r in zip(groups, rate, strict=True)))
    assert result.compute_s == pytest.approx(problem.backward_multiplier * work)

    rows = {(s, d): int(split.sends(s)[:, d].sum()) for s in ranks for d in ranks}
    assert result.dispatch_s == pytest.approx(4 * link_seconds(problem, rows, shape.row_bytes))

    copies: dict[tuple[int, int], int] = {}
    for rank, expert in np.argwhere(placement.copies_RE).tolist():
        pair = (int(placement.expert_to_owner_E[expert]), rank)
        copies[pair] = copies.get(pair, 0) + 1
    gather, reduce = (link_seconds(problem, copies, size) for size in (shape.expert_bytes, shape.gradient_bytes))
    room = 2 * problem.overlap_s
    again = gather if problem.gathers == 2 else 0.0
    assert result.gather_s == pytest.approx(max(0, gather - problem.overlap_s) + max(0, again - room))
    assert result.reduce_s == pytest.approx(max(0, reduce - max(0, room - again)))
    assert result.move_s == 0.0
    parts = result.compute_s + result.dispatch_s + result.gather_s + result.reduce_s + result.move_s
    assert result.total_s == pytest.approx(parts)


def test_worked_example():
    """Two ranks, one copy: 6 + 2 rows of one expert run as 4 and 4."""
    topology = Topology(1, 2, device_bytes_per_s=100.0, node_bytes_per_s=1.0, latency_s=0.5, flops_per_s=10.0, half_rate_rows=2)
    shape = LayerShape(1, 1, dim=5, ffn_dim=1, num_matrices=2, bytes_per_element=4)
    load = ExpertLoad(np.array([[6], [2]]))
    problem = Problem(load, np.array([0]), topology, shape, slots=1)
    placement = Placement.everywhere(np.array([0]), 2)
    result = cost(problem, placement, split_exact(load, placement, topology))
    assert result.compute_s == pytest.approx(3 * (4 + 2) * 20 / 10)
    assert result.dispatch_s == pytest.approx(4 * (0.5 + 2 * 20 / 100))
    assert result.gather_s == pytest.approx(0.5 + 40 / 100)
    assert result.reduce_s == pytest.approx(0.5 + 40 / 100)


def test_moving_an_owner_is_charged_over_the_horizon():
    topology = Topology(1, 2, device_bytes_per_s=100.0, node_bytes_per_s=1.0, latency_s=0.5, flops_per_s=10.0)
    shape = LayerShape(2, 1, dim=5, ffn_dim=1, num_matrices=2)
    load = ExpertLoad(np.array([[1, 1], [1, 1]]))
    problem = Problem(load, np.array([0, 0]), topology, shape, slots=0, move_horizon_steps=10)
    placement = Placement.owners_only(np.array([0, 1]), 2)
    result = cost(problem, placement, split_exact(load, placement, topology))
    assert result.move_s == pytest.approx((0.5 + 10 * 4 * 3 / 100) / 10)


def test_gather_hides_under_the_overlap():
    """What fits under the overlap costs nothing; the backward pass has twice the room, shared with the second gather."""
    topology = Topology(1, 2, device_bytes_per_s=100.0, node_bytes_per_s=1.0, latency_s=0.0, flops_per_s=10.0)
    shape = LayerShape(1, 1, dim=5, ffn_dim=1, num_matrices=2)
    load, placement = ExpertLoad(np.array([[4], [4]])), Placement.everywhere(np.array([0]), 2)
    split = split_exact(load, placement, topology)

    def priced(gathers: int, overlap_s: float):
        result = cost(Problem(load, np.array([0]), topology, shape, 1, gathers, overlap_s), placement, split)
        return pytest.approx((result.gather_s, result.reduce_s))

    assert priced(1, 0.0) == (0.4, 0.4)
    assert priced(1, 0.3) == (0.1, 0.0)
    assert priced(2, 0.3) == (0.1, 0.2)
    assert priced(2, 0.1) == (0.3 + 0.2, 0.4)
    assert priced(2, 0.4) == (0.0, 0.0)


def placements_within(problem: Problem):
    """Every placement with the problem's owners and at most `slots` copies per rank."""
    base = Placement.owners_only(problem.expert_to_owner_E, problem.num_ranks).replicas_RE
    per_rank = []
    for rank in range(problem.num_ranks):
        foreign = np.flatnonzero(~base[rank]).tolist()
        sets = [c for size in range(problem.slots + 1) for c in itertools.combinations(foreign, size)]
        per_rank.append(sets)
    for choice in itertools.product(*per_rank):
        replicas_RE = base.copy()
        for rank, experts in enumerate(choice):
            replicas_RE[rank, list(experts)] = True
        yield Placement(problem.expert_to_owner_E, replicas_RE)


@settings(deadline=None, max_examples=60)
@given(problems(max_ranks=3, max_experts=4, max_slots=2))
def test_bounds_are_never_above_a_solution(problem):
    fixed, free = lower_bound(problem), lower_bound(problem, owners_may_move=True)
    assert free.max_rows <= fixed.max_rows
    assert free.total_s <= fixed.total_s
    for placement in placements_within(problem):
        split = split_exact(problem.load, placement, problem.topology)
        assert fixed.max_rows <= busiest_cost(split, problem.topology)
        assert fixed.total_s <= cost(problem, placement, split).total_s * (1 + 1e-12)


@settings(deadline=None, max_examples=60)
@given(problems(max_ranks=3, max_experts=4, max_slots=0))
def test_free_owner_bound_holds_for_every_owner_map(problem):
    free = lower_bound(problem, owners_may_move=True)
    for owner_E in itertools.product(range(problem.num_ranks), repeat=problem.num_experts):
        placement = Placement.owners_only(np.array(owner_E), problem.num_ranks)
        split = split_exact(problem.load, placement, problem.topology)
        assert free.max_rows <= busiest_cost(split, problem.topology)
        assert free.total_s <= cost(problem, placement, split).total_s * (1 + 1e-12)


def test_static_bound_is_tight_without_slots():
    load = ExpertLoad(np.array([[8, 1], [8, 1]]))
    problem = Problem(load, np.array([0, 1]), Topology.preset("h100", 2), LayerShape(2, 1, 16, 16), slots=0)
    assert lower_bound(problem).max_rows == 16
    assert get_solver("static")(problem).placement.num_copies == 0
