"""Owners of all layers together, against enumeration, and its promises on generated models."""

from __future__ import annotations

import dataclasses
import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moesaic.placement import ExpertLoad, LayerShape, OwnerMap, Placement, Problem, Topology, cost, get_solver, split_exact
from moesaic.placement.solvers.joint import solve, solve_joint


def model(seed: int, num_layers: int, num_experts: int, topology: Topology, slots: int = 0) -> list[Problem]:
    """Layers with skewed loads of equal totals, contiguous owners."""
    rng = np.random.default_rng(seed)
    owner_LE = OwnerMap.contiguous(num_layers, num_experts, topology.num_ranks).expert_to_owner_LE
    shape = LayerShape(num_experts, 1, 1024, 256, bytes_per_element=2)
    problems = []
    for owner_E in owner_LE:
        share_E = rng.dirichlet(np.full(num_experts, 0.7))
        load = ExpertLoad(rng.multinomial(2000, share_E, size=topology.num_ranks))
        problems.append(Problem(load, owner_E, topology, shape, slots, move_horizon_steps=1000))
    return problems


def total_s(problems: list[Problem], owner_LE: np.ndarray, pairs_LEE: np.ndarray) -> float:
    """What the module minimises, said with loops."""
    topology, seconds = problems[0].topology, 0.0
    for problem, owner_E in zip(problems, owner_LE, strict=True):
        placement = Placement.owners_only(owner_E, topology.num_ranks)
        seconds += cost(problem, placement, split_exact(problem.load, placement, topology)).total_s
    for layer, i, j in np.ndindex(pairs_LEE.shape):
        a, b = owner_LE[layer][i], owner_LE[layer + 1][j]
        row_bytes = problems[0].shape.row_bytes * int(pairs_LEE[layer, i, j])
        if a != b:
            seconds += row_bytes / topology.device_bytes_per_s / topology.num_ranks
        if a // topology.ranks_per_node != b // topology.ranks_per_node:
            seconds += row_bytes / topology.node_bytes_per_s / topology.num_nodes
    return seconds


@pytest.mark.parametrize("text, num_layers, num_experts", [("2", 2, 4), ("2x1", 3, 3), ("3", 2, 3), ("2x2", 2, 3)])
@pytest.mark.parametrize("seed", range(5))
def test_equals_enumeration(text, num_layers, num_experts, seed):
    """Every owner map with as many rows per rank as now is priced; the search finds the cheapest, the bound is below it."""
    topology = Topology.parse(text)
    problems = model(seed, num_layers, num_experts, topology)
    pairs_LEE = np.random.default_rng(seed).integers(0, 3000, (num_layers - 1, num_experts, num_experts))
    rows_R = OwnerMap.contiguous(num_layers, num_experts, topology.num_ranks).num_rows_R
    best = min(
        total_s(problems, np.array(owners).reshape(num_layers, num_experts), pairs_LEE)
        for owners in itertools.product(range(topology.num_ranks), repeat=num_layers * num_experts)
        if (np.bincount(owners, minlength=topology.num_ranks) == rows_R).all()
    )
    answer = solve_joint(problems, pair_counts_LEE=pairs_LEE)
    assert answer.total_s == pytest.approx(best, rel=1e-9)
    assert answer.total_s == pytest.approx(total_s(problems, answer.owners.expert_to_owner_LE, pairs_LEE), rel=1e-9)
    assert answer.bound_s <= best
    assert answer.gap == pytest.approx(1 - answer.bound_s / answer.total_s)


@settings(deadline=None, max_examples=20)
@given(st.integers(0, 1000), st.sampled_from(["1", "3", "2x2"]), st.integers(1, 4), st.integers(1, 7), st.integers(0, 2))
def test_promises(seed, text, num_layers, num_experts, slots):
    """Rows per rank stay, the current owners with quota's copies are never cheaper, a second run agrees."""
    topology = Topology.parse(text)
    problems = model(seed, num_layers, num_experts, topology, slots)
    answer = solve_joint(problems, effort=0.2)
    assert (answer.owners.num_rows_R == OwnerMap.contiguous(num_layers, num_experts, topology.num_ranks).num_rows_R).all()
    assert answer.bound_s <= answer.total_s
    assert answer.hops_s == 0
    current_s = sum(get_solver("quota")(problem).cost.total_s for problem in problems)
    assert answer.total_s <= current_s * (1 + 1e-12)
    for layer in answer.layers:
        assert (layer.placement.copies_RE.sum(axis=1) <= slots).all()
    again = solve_joint(problems, effort=0.2)
    assert (again.owners, again.total_s, again.bound_s) == (answer.owners, answer.total_s, answer.bound_s)


def test_copies_are_searched():
    """From the copies that quota makes, which balance, to copies that spare messages between nodes; the bound counts them."""
    rng, topology = np.random.default_rng(0), Topology.parse("4x4")
    share_E = rng.permutation(np.arange(1, 65) ** -0.8)
    load = ExpertLoad(rng.multinomial(32768, share_E / share_E.sum(), size=16))
    owner_E = OwnerMap.contiguous(1, 64, 16).expert_to_owner_LE[0]
    problem = Problem(load, owner_E, topology, LayerShape(64, 8, 2048, 512, bytes_per_element=2), slots=2, overlap_s=1e-3)
    found = solve(problem)
    moved = dataclasses.replace(problem, expert_to_owner_E=found.placement.expert_to_owner_E)
    move_s = found.cost.move_s
    assert found.cost.total_s - move_s < 0.88 * get_solver("quota")(moved).cost.total_s
    assert found.gap < 0.1


def test_layers_may_be_uneven():
    """A hot expert in layer 0 takes a rank alone; layer 1 evens the rows out."""
    topology = Topology.preset("h100", 2)
    loads = [np.array([[900, 200, 200, 200]] * 2), np.array([[10, 10, 10, 10]] * 2)]
    shape = LayerShape(4, 1, 1024, 1024)
    fast = dataclasses.replace(topology, half_rate_rows=0)
    problems = [Problem(ExpertLoad(load), np.array([0, 0, 1, 1]), fast, shape, 0, move_horizon_steps=10**6) for load in loads]
    answer = solve_joint(problems)
    alone = answer.owners.expert_to_owner_LE[0]
    assert (alone[1:] != alone[0]).all()
    assert answer.owners.num_rows_R.tolist() == [4, 4]


def test_other_rows_per_rank():
    answer = solve_joint(model(0, 2, 4, Topology.preset("h100", 2)), rows_per_rank_R=np.array([5, 3]))
    assert answer.owners.num_rows_R.tolist() == [5, 3]


def test_layers_with_other_work_ahead_have_the_same_owners():
    problems = model(0, 3, 4, Topology.preset("h100", 2), slots=1)
    others = [dataclasses.replace(problem, overlap_s=layer * 1e-3) for layer, problem in enumerate(problems)]
    assert solve_joint(others).owners == solve_joint(problems).owners


def test_bad_input():
    problems = model(0, 2, 4, Topology.preset("h100", 2))
    with pytest.raises(ValueError, match="at least one layer, got none"):
        solve_joint([])
    with pytest.raises(ValueError, match="layer 1 differs from layer 0"):
        solve_joint([problems[0], dataclasses.replace(problems[1], gathers=2)])
    with pytest.raises(ValueError, match=r"pair_counts must be \(1, 4, 4\), got \(2, 4, 4\)"):
        solve_joint(problems, pair_counts_LEE=np.zeros((2, 4, 4), int))
    with pytest.raises(ValueError, match="pair_counts must not be negative, got -1"):
        solve_joint(problems, pair_counts_LEE=np.full((1, 4, 4), -1))
    with pytest.raises(ValueError, match="must be 2 numbers of at least 0 that sum to 8 experts, got 2 that sum to 7"):
        solve_joint(problems, rows_per_rank_R=np.array([4, 3]))
