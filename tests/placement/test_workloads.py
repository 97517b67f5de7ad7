"""The workloads w0 to w7: what each of them promises, counted token by token."""

from typing import Any

import numpy as np
import pytest

from moesaic.placement import OwnerMap
from moesaic.placement.traces.workloads import WORKLOADS, Workload


def workload(name: str, **changes: Any) -> Workload:
    return Workload(**{"name": name, "num_ranks": 4, "num_experts": 16, "top_k": 2, "tokens_per_rank": 4096, **changes})


def owner_shares(made: Workload, step: int) -> np.ndarray:
    """The share of the assignments that every rank owns the expert of, while owners are contiguous."""
    owner_E = OwnerMap.contiguous(1, made.num_experts, made.num_ranks).expert_to_owner_LE[0]
    totals_E = made.load_RE(step).sum(axis=0)
    return np.array([totals_E[owner_E == rank].sum() for rank in range(made.num_ranks)]) / totals_E.sum()


@pytest.mark.parametrize("name", WORKLOADS)
@pytest.mark.parametrize("shape", [(1, 4, 2), (1, 1, 1), (2, 8, 2), (3, 10, 4), (8, 64, 6), (4, 4, 4), (5, 3, 1)])
def test_tokens_choose_k_different_experts_and_loads_count_them(name: str, shape: tuple[int, int, int]) -> None:
    """Any shape: experts that ranks do not divide, fewer than ranks, all of them chosen, one rank."""
    ranks, experts, top_k = shape
    made = workload(name, num_ranks=ranks, num_experts=experts, top_k=top_k, tokens_per_rank=13)
    assert made.tokens_R.sum() == ranks * 13
    for step in (0, 3, 7):
        load_RE = made.load_RE(step)
        for rank in range(ranks):
            ids_TK = made.topk_ids(rank, step)
            assert (ids_TK.shape, ids_TK.dtype) == ((made.tokens_R[rank], top_k), np.int64)
            counted = [0] * experts
            for chosen in ids_TK.tolist():
                assert len(set(chosen)) == top_k
                for expert in chosen:
                    counted[expert] += 1
            assert load_RE[rank].tolist() == counted


@pytest.mark.parametrize("name", WORKLOADS)
def test_parts_depend_on_workload_seed_step_layer_and_rank_alone(name: str) -> None:
    """Made alone or after others; any other of them makes another part."""
    made = workload(name, num_ranks=3, seed=5, layer=1, tokens_per_rank=40)
    parts = [made.topk_ids(rank, step) for step in range(4) for rank in range(3)]
    alone = workload(name, num_ranks=3, seed=5, layer=1, tokens_per_rank=40).topk_ids(2, 3)
    assert np.array_equal(parts[-1], alone)
    others = [
        *parts[:-1],
        *(workload(name, num_ranks=3, tokens_per_rank=40, **to).topk_ids(2, 3) for to in ({"seed": 5}, {"layer": 1})),
        *(workload(other, num_ranks=3, seed=5, layer=1, tokens_per_rank=40).topk_ids(2, 3) for other in {*WORKLOADS} - {name}),
    ]
    assert not any(np.array_equal(alone, other) for other in others)


def test_w0_is_balanced() -> None:
    """Exactly, and neighbouring experts are no more often chosen together than others."""
    made = workload("w0")
    assert (made.tokens_R == 4096).all()
    assert (made.load_RE(0) == 4096 * 2 / 16).all()
    pairs = [tuple(sorted(chosen)) for chosen in made.topk_ids(0, 0).tolist()]
    assert len(set(pairs)) == 16 * 15 / 2
    assert sum(second - first == 1 for first, second in pairs) / len(pairs) == pytest.approx(15 / 120, abs=0.03)


def hot_share(made: Workload, experts: set[int], step: int = 0) -> float:
    """The share of the tokens that choose only from these experts."""
    chosen = [set(chosen) for rank in range(made.num_ranks) for chosen in made.topk_ids(rank, step).tolist()]
    return sum(ids <= experts for ids in chosen) / len(chosen)


def test_w1_heats_a_set_that_stays() -> None:
    """Three of four tokens choose among a quarter of the experts, the same in every step; the seed draws it."""
    hottest = {
        (seed, step): frozenset(np.argsort(-workload("w1", seed=seed).load_RE(step).sum(axis=0))[:4].tolist())
        for seed in range(5)
        for step in (0, 9)
    }
    assert all(hottest[seed, 0] == hottest[seed, 9] for seed in range(5))
    assert len(set(hottest.values())) > 2
    assert 0.75 <= hot_share(workload("w1"), set(hottest[0, 0])) < 0.78


@pytest.mark.parametrize("ranks", [2, 4, 8])
def test_w2_heats_experts_of_rank_0(ranks: int) -> None:
    """Three of four tokens choose among its experts alone, the others among all: so many assignments go to it."""
    made = workload("w2", num_ranks=ranks, num_experts=32)
    assert hot_share(made, set(range(32 // ranks))) >= 0.75
    assert owner_shares(made, 0)[0] == pytest.approx(0.75 + 0.25 / ranks, abs=0.01)


def test_w3_is_as_hot_as_w2_on_all_ranks() -> None:
    hot, spread = workload("w2"), workload("w3")
    heat = [np.sort(made.load_RE(0).sum(axis=0))[-4:].sum() / (4 * 4096 * 2) for made in (hot, spread)]
    assert heat == pytest.approx([0.8125, 0.8125], abs=0.01)
    assert owner_shares(spread, 0) == pytest.approx([0.25] * 4, abs=0.01)


def test_w4_has_ragged_sources_and_balanced_experts() -> None:
    made = workload("w4", tokens_per_rank=1000)
    assert made.tokens_R.tolist() == [400, 800, 1200, 1600]
    totals_E = made.load_RE(0).sum(axis=0)
    assert totals_E.max() - totals_E.min() <= 4


def test_w5_has_experts_owners_and_a_source_without_tokens() -> None:
    made = workload("w5", tokens_per_rank=999)
    assert made.tokens_R.tolist() == [0, 1332, 1332, 1332]
    assert (made.load_RE(2).sum(axis=0) > 0).tolist() == [False] * 8 + [True] * 8
    assert owner_shares(made, 2)[:2].tolist() == [0.0, 0.0]
    assert workload("w5", num_ranks=1, tokens_per_rank=9).tokens_R.tolist() == [9]


def test_w6_moves_to_the_next_rank_every_three_steps() -> None:
    shares = [owner_shares(workload("w6"), step) for step in range(14)]
    assert [int(share.argmax()) for share in shares] == [0, 0, 0, 1, 1, 1, 2, 2, 2, 3, 3, 3, 0, 0]
    assert [share.max() for share in shares] == pytest.approx([0.8125] * 14, abs=0.01)


def test_w7_bursts_in_one_step_of_four() -> None:
    """Half of its tokens then choose among the experts of rank 0."""
    shares = [owner_shares(workload("w7"), step)[0] for step in range(8)]
    assert shares == pytest.approx([0.25, 0.25, 0.25, 0.625] * 2, abs=0.015)
