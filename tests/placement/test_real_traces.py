"""The planner's promise on recorded routing of real models."""

from __future__ import annotations

import numpy as np
import pytest

from moesaic.placement import ExpertLoad, LayerShape, OwnerMap, Problem, Topology, get_solver, split_exact
from tests.placement.cases import shared_trace


def rank_loads(ids_TLK: np.ndarray, num_experts: int, num_ranks: int) -> np.ndarray:
    """Count the assignments of consecutive token blocks, one block a rank: int64 [L, R, E]."""
    blocks = np.array_split(ids_TLK, num_ranks)
    num_layers = ids_TLK.shape[1]
    return np.stack(
        [[np.bincount(block[:, layer].ravel(), minlength=num_experts) for block in blocks] for layer in range(num_layers)]
    )


@pytest.mark.parametrize("name", ["deepseek_v2_lite_esft_topk.npz", "flame_moe_290m_topk.npz"])
@pytest.mark.parametrize("num_ranks", [8, 16, 32, 64])
def test_two_slots_and_the_exact_split_balance_real_routing(name, num_ranks):
    """With the exact load and free links: max/mean at most 1.03 on average over layers and tasks."""
    stored = np.load(shared_trace(name))
    ids_TLK = stored["topk_ids"]
    groups = [ids_TLK[stored["task"] == task] for task in np.unique(stored["task"])] if "task" in stored else [ids_TLK]
    owner_E = OwnerMap.contiguous(1, 64, num_ranks).expert_to_owner_LE[0]
    # Only the busiest rank's rows count here: links and small groups are free.
    topology = Topology(num_ranks // 8, 8, 1e18, 1e18, latency_s=0.0, flops_per_s=1e12, half_rate_rows=0)
    shape = LayerShape(64, 6, 2048, 1408)
    quota, ratios = get_solver("quota"), []
    for group in groups:
        for load_RE in rank_loads(group, 64, num_ranks):
            load = ExpertLoad(load_RE)
            placement = quota(Problem(load, owner_E, topology, shape, slots=2)).placement
            ratios.append(split_exact(load, placement, topology).max_over_mean)
    assert np.mean(ratios) <= 1.03
