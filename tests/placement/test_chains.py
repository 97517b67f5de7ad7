"""Single copies: no placement within its own limits is missed, the best of tiny layers is proven, and a real layer is closed."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from moesaic.placement import ExpertLoad, LayerShape, OwnerMap, Problem, Topology
from moesaic.placement.cost import price, prices_of, seconds_of, tally
from moesaic.placement.solvers.exhaustive import every_placement
from moesaic.placement.solvers.milp import planner as milp
from moesaic.placement.solvers.milp.chains import are_few, find, refute
from moesaic.placement.solvers.milp.model import CopyRange
from moesaic.placement.solvers.milp.priced import split_priced
from tests.placement.cases import examples, problems, shared_trace


def drawn_split(problem, rng):
    """Draw single copies and their rows; return the work of the busiest rank and the rows of the busiest device."""
    load_RE, totals_E, owner_E = problem.load.load_RE, problem.load.totals_E, problem.expert_to_owner_E
    rows_RE = np.zeros_like(load_RE)
    rows_RE[owner_E, np.arange(owner_E.size)] = totals_E
    receivers = iter(rng.permutation(problem.num_ranks))
    for sender in rng.permutation(problem.num_ranks):
        owned = np.flatnonzero(owner_E == sender)
        receiver = next(receivers)
        if owned.size and receiver != sender and rng.random() < 0.8:
            expert = rng.choice(owned)
            rows = rng.choice([rng.integers(0, totals_E[expert] + 1), totals_E[expert]])
            rows_RE[sender, expert] -= rows
            rows_RE[receiver, expert] += rows
    kept_R = np.minimum(rows_RE, load_RE).sum(axis=1)
    work_R = rows_RE.sum(axis=1) + problem.topology.half_rate_rows * np.count_nonzero(rows_RE, axis=1)
    device_rows = max((load_RE.sum(axis=1) - kept_R).max(), (rows_RE.sum(axis=1) - kept_R).max())
    return int((problem.topology.cost_R * work_R).max()), int(device_rows)


@settings(deadline=None, max_examples=examples(150))
@given(problem=problems(max_ranks=5, max_experts=8), half_rate_rows=st.sampled_from([0, 3, 200]), seed=st.integers(0, 2**32 - 1))
def test_no_placement_is_missed(problem, half_rate_rows, seed):
    """Its own work and rows are the tightest limits that a placement is within."""
    problem = dataclasses.replace(problem, topology=dataclasses.replace(problem.topology, half_rate_rows=half_rate_rows))
    rng = np.random.default_rng(seed)
    for _ in range(5):
        may_be, placement = find(problem, *drawn_split(problem, rng))
        assert may_be
        assert placement is not None
        copies_RE = placement.copies_RE
        assert copies_RE.sum(axis=1).max() <= 1
        assert np.bincount(placement.expert_to_owner_E[copies_RE.any(axis=0)], minlength=1).max() <= 1


@settings(deadline=None, max_examples=examples(20))
@given(problem=problems(max_ranks=3, max_experts=4, max_slots=1))
@example(  # the cheapest placement sends no row
    problem=Problem(
        ExpertLoad(np.array([[2, 3], [4, 3]])), np.array([0, 1]), Topology.preset("h100", 2), LayerShape(2, 1, 16, 512), slots=1
    )
)
def test_refutes_just_below_the_best(problem):
    """What is wanted is refuted where enumeration has nothing as cheap at the price of one copy, and not where it has."""
    if not are_few(problem):
        return
    cheapest_s = np.inf
    for placement in every_placement(problem):
        counts = tally(problem, placement, split_priced(problem, placement))
        if counts.device_copies <= 1:
            cheapest_s = min(cheapest_s, price(problem, dataclasses.replace(counts, device_copies=1)).total_s)
    assert not refute(problem, 1, lambda: cheapest_s, lambda placement: False, np.inf)
    if problem.topology.num_nodes == 1:
        # Links of several nodes are only bounded. The program's split is fractional: rounding costs a row here and there.
        a_row = sum(seconds_of(prices_of(problem)._replace(latency_s=0.0), int(problem.topology.cost_R.max()), 2, 2, 0, 0, 0, 0))
        assert refute(problem, 1, lambda: cheapest_s * (1 - 1e-3) - 2 * a_row, lambda placement: False, np.inf)


def test_real_layer_is_closed():
    """DeepSeek-V2-Lite, layer 2: no move pays within one step, and no second copy."""
    ids_TLK = np.load(shared_trace("deepseek_v2_lite_esft_topk.npz"))["topk_ids"]
    blocks = np.array_split(ids_TLK[:4096, 2], 8)
    load = ExpertLoad(np.stack([np.bincount(block.ravel(), minlength=64) for block in blocks]))
    owner_E = OwnerMap.contiguous(1, 64, 8).expert_to_owner_LE[0]
    shape = LayerShape(64, 6, 2048, 1408, bytes_per_element=2)
    problem = Problem(load, owner_E, Topology.preset("h100", 8), shape, slots=2, overlap_s=2e-5, move_horizon_steps=1)
    answer = milp.solve(problem, time_limit_s=60.0, relative_gap=0.004)
    assert answer.gap <= 0.005
    assert (answer.placement.expert_to_owner_E == owner_E).all()


def test_that_moves_pay_not_enough_proves_no_more_than_what_was_wanted() -> None:
    """A moved owner may still be better than the best placement, by less than the tolerance; only without moves is one left."""
    problem = Problem(
        ExpertLoad(np.array([[900, 10, 10, 10], [900, 10, 10, 10]])),
        np.array([0, 0, 1, 1]),
        Topology.preset("h100", 2),
        LayerShape(num_experts=4, top_k=1, dim=4096, ffn_dim=4096),
        slots=1,
        overlap_s=1.0,
    )
    copies = CopyRange(0, 0)
    best = milp.best_heuristic(problem)
    static_s = milp.static.solve(problem).cost.total_s
    assert best.cost.total_s < 0.9 * static_s
    for move_owners in (True, False):
        proof = milp._Proof(problem, move_owners, "highs", best, 0.0, milp._Clock(0.0, np.inf))
        proof._proven_s = {copies: 0.0}
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(milp, "_moves_may_pay", lambda *_: False)
            assert proof._refute_chains(copies, 0.01, np.inf)
        assert proof._proven_s[copies] == (0.99 * best.cost.total_s if move_owners else static_s)
