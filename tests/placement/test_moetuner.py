"""MoETuner's two stages against enumeration, and on real routing."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moesaic.placement import OwnerMap, Topology, count_hops, get_solver, tune_owners
from moesaic.placement.solvers.baselines.moetuner import best_assignment, cluster_experts
from tests.placement.cases import shared_trace, zipf_problem


def test_hops_by_hand():
    """2 layers, 2 experts, 4 ranks of 2 nodes: 3 tokens stay on rank 0, 4 cross to its neighbour, 5 and 6 leave the node."""
    owners = OwnerMap(np.array([[0, 2], [0, 1]]), 4)
    pairs_LEE = np.array([[[3, 4], [5, 6]]])
    hops = count_hops(owners, pairs_LEE, Topology.parse("2x2"))
    assert hops.off_rank == pytest.approx(15 / 18)
    assert hops.off_node == pytest.approx(11 / 18)
    assert count_hops(owners, np.zeros_like(pairs_LEE), Topology.parse("2x2")).off_rank == 0.0


@settings(deadline=None, max_examples=30)
@given(st.lists(st.integers(0, 30), min_size=6, max_size=6))
def test_clusters_equal_enumeration(totals):
    """6 experts in 3 clusters of 2: the sum of |load - mean| is the least of all partitions, up to the engine's tolerance."""
    totals_E, sizes_R, start_E = np.array(totals), np.array([2, 2, 2]), np.repeat(np.arange(3), 2)
    mean = totals_E.sum() / 3

    def imbalance(cluster_E: np.ndarray) -> float:
        return float(np.abs(np.bincount(cluster_E, weights=totals_E, minlength=3) - mean).sum())

    best = min(imbalance(np.array(c)) for c in set(itertools.permutations(start_E.tolist())))
    found_E = cluster_experts(totals_E, sizes_R, start_E, time_limit_s=10.0)
    assert np.bincount(found_E, minlength=3).tolist() == [2, 2, 2]
    assert imbalance(found_E) <= best * 1.03 + 1e-6 * max(mean, 1)


@settings(deadline=None, max_examples=30)
@given(st.integers(0, 1000))
def test_assignment_equals_enumeration(seed):
    rng = np.random.default_rng(seed)
    slowest_CR, mean_CR = rng.random((4, 4)), rng.random((4, 4)) * 0.3

    def objective(rank_C) -> float:
        return max(slowest_CR[c, r] for c, r in enumerate(rank_C)) + sum(mean_CR[c, r] for c, r in enumerate(rank_C))

    found_C = best_assignment(slowest_CR, mean_CR, np.ones((4, 4), dtype=bool))
    assert sorted(found_C.tolist()) == [0, 1, 2, 3]
    assert objective(found_C) == pytest.approx(min(objective(p) for p in itertools.permutations(range(4))), rel=1e-5)


@pytest.mark.parametrize("topology", [Topology.preset("h100", 3), Topology.parse("3x1")])
def test_tokens_that_stay_together_stay_on_their_rank(topology):
    """Expert e of a layer is followed by expert e + 2 (mod 6) only, and all loads are equal: no hop need leave a rank."""
    follow_EE = 10 * np.roll(np.eye(6, dtype=np.int64), 2, axis=1)
    pairs_LEE, loads_LE = np.stack([follow_EE, follow_EE]), np.full((3, 6), 10)
    owners = tune_owners(loads_LE, pairs_LEE, topology)
    assert (np.stack([np.bincount(owner_E, minlength=3) for owner_E in owners.expert_to_owner_LE]) == 2).all()
    contiguous = OwnerMap.contiguous(3, 6, 3)
    assert count_hops(contiguous, pairs_LEE, topology).off_rank == 1.0
    assert count_hops(owners, pairs_LEE, topology).off_rank == 0.0


def test_uneven_ownership_stays_even():
    rng = np.random.default_rng(1)
    loads_LE, pairs_LEE = rng.integers(0, 50, (4, 7)), rng.integers(0, 9, (3, 7, 7))
    owners = tune_owners(loads_LE, pairs_LEE, Topology.preset("h100", 3))
    for owner_E in owners.expert_to_owner_LE:
        assert sorted(np.bincount(owner_E, minlength=3).tolist()) == [2, 2, 3]
    assert owners == tune_owners(loads_LE, pairs_LEE, Topology.preset("h100", 3))


def test_one_layer_has_no_hops():
    owners = tune_owners(np.array([[5, 4, 3, 2]]), np.zeros((0, 4, 4), dtype=int), Topology.preset("h100", 2))
    assert np.bincount(owners.expert_to_owner_LE[0], weights=[5, 4, 3, 2]).tolist() == [7, 7]


def test_one_layer_is_at_least_as_balanced_as_lpt_and_moves_less():
    """Stage 1 starts from longest processing time first; clusters then go where most of their experts are."""
    problem = zipf_problem(4, 8, 0.0, slots=0)
    tuned, lpt = get_solver("moetuner")(problem), get_solver("lpt")(problem)
    assert np.bincount(tuned.placement.expert_to_owner_E).tolist() == [2, 2, 2, 2]
    assert tuned.cost.compute_s <= lpt.cost.compute_s
    assert tuned.cost.move_s <= lpt.cost.move_s


def test_pair_counts_must_fit():
    with pytest.raises(ValueError, match=r"pair_counts must be \(1, 4, 4\) for loads \(2, 4\), got \(2, 4, 4\)"):
        tune_owners(np.ones((2, 4), dtype=int), np.ones((2, 4, 4), dtype=int), Topology.preset("h100", 2))


def test_fewer_hops_on_other_tasks_of_a_real_model():
    """DeepSeek-V2-Lite, 4 layers: owners tuned on two tasks keep more tokens on their rank in the other two."""
    stored = np.load(shared_trace("deepseek_v2_lite_esft_topk.npz"))
    ids_TLK = stored["topk_ids"][:, :4].astype(np.int64)

    def pair_counts(chosen_TLK: np.ndarray) -> np.ndarray:
        codes = chosen_TLK[:, :-1, :, None] * 64 + chosen_TLK[:, 1:, None, :]
        return np.stack([np.bincount(codes[:, i].ravel(), minlength=4096).reshape(64, 64) for i in range(codes.shape[1])])

    train, test = ids_TLK[stored["task"] < 2], ids_TLK[stored["task"] >= 2]
    loads_LE = np.stack([np.bincount(train[:, i].ravel(), minlength=64) for i in range(4)])
    topology, pairs_LEE = Topology.parse("2x4"), pair_counts(test)
    tuned = count_hops(tune_owners(loads_LE, pair_counts(train), topology, time_limit_s=1.0), pairs_LEE, topology)
    contiguous = count_hops(OwnerMap.contiguous(4, 64, 8), pairs_LEE, topology)
    assert tuned.off_rank < contiguous.off_rank
    assert tuned.off_node < contiguous.off_node
