"""The tabu search for owners: its seconds against the cost model's, owners against enumeration, moves levelled over the ranks."""

from __future__ import annotations

import itertools
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moesaic.placement import ExpertLoad, LayerShape, OwnerMap, Placement, Problem, Topology, cost, split_exact
from moesaic.placement.solvers.exchange import _layer_of, level_moves, search_owners
from moesaic.placement.solvers.exchange_numba import search
from tests.placement.cases import problems


def seconds(problem: Problem, owner_E: np.ndarray) -> float:
    """Of a layer without copies."""
    placement = Placement.owners_only(np.array(owner_E), problem.num_ranks)
    return cost(problem, placement, split_exact(problem.load, placement, problem.topology)).total_s


@settings(deadline=None, max_examples=60)
@given(problem=problems(max_ranks=6, max_experts=8), horizon=st.sampled_from([1, 20, 10**6]), tries=st.sampled_from([1, 300]))
def test_its_seconds_are_the_cost_models(problem: Problem, horizon: int, tries: int) -> None:
    """Also of unequal ranks and nodes; ranks keep their numbers of experts, and nothing gets worse."""
    problem = replace(problem, move_horizon_steps=horizon, mean_moves=True)
    owner_E = problem.expert_to_owner_E.copy()
    best_s = search(_layer_of(problem, np.full(problem.num_ranks, 1 / problem.num_ranks)), owner_E, tries)
    assert best_s == pytest.approx(seconds(problem, owner_E), rel=1e-9, abs=1e-15)
    assert best_s <= seconds(problem, problem.expert_to_owner_E) * (1 + 1e-9)
    assert np.array_equal(np.sort(owner_E), np.sort(problem.expert_to_owner_E))


@pytest.mark.parametrize("nodes", [1, 2])
def test_it_finds_the_best_owners_of_small_layers(nodes: int) -> None:
    """Where every owner map of eight experts on four ranks can be priced, none is better, whatever moves cost."""
    topology, shape = Topology.preset("h100", num_nodes=nodes, ranks_per_node=4 // nodes), LayerShape(8, 1, 512, 512)
    owner_E, rng = np.repeat(np.arange(4), 2), np.random.default_rng(0)
    maps = np.array(sorted(set(itertools.permutations(owner_E.tolist()))))
    for horizon in (20, 1000, 10**6):
        load_RE = np.round(rng.random((4, 8)) * 4000 * rng.random(8) ** 3)
        problem = Problem(ExpertLoad(load_RE.astype(np.int64)), owner_E, topology, shape, 0, move_horizon_steps=horizon)
        problem = replace(problem, mean_moves=True)
        found_E = search_owners([problem]).expert_to_owner_LE[0]
        assert seconds(problem, found_E) == pytest.approx(min(seconds(problem, after_E) for after_E in maps), rel=1e-9)


def test_moves_are_levelled_over_the_ranks() -> None:
    """Rank 0 has both hot experts of one layer, rank 1 of the other: each can give one to rank 2 almost as well as to rank 3."""
    topology, shape = Topology.preset("h100", 4), LayerShape(8, 1, 512, 512)
    current = OwnerMap(np.tile(np.repeat(np.arange(4), 2), (2, 1)), 4)
    loads_LE = [[9000, 9000, 10, 10, 10, 10, 10, 10], [10, 10, 9000, 9000, 400, 400, 10, 10]]
    layers = [
        Problem(ExpertLoad(np.tile(load_E, (4, 1))), owner_E, topology, shape, 0, move_horizon_steps=20, mean_moves=True)
        for load_E, owner_E in zip(loads_LE, current.expert_to_owner_LE, strict=True)
    ]
    both_from_3 = OwnerMap(np.array([[0, 3, 1, 1, 2, 2, 0, 3], [0, 0, 1, 3, 2, 2, 1, 3]]), 4)
    assert current.most_sent(both_from_3, topology) == 2
    levelled = next(owners for owners in level_moves(layers, both_from_3) if current.most_sent(owners, topology) == 1)
    for problem, before_E, after_E in zip(layers, both_from_3.expert_to_owner_LE, levelled.expert_to_owner_LE, strict=True):
        assert seconds(problem, after_E) == pytest.approx(seconds(problem, before_E))
