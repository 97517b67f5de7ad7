"""Calibration adds copies only where the model says that they pay, within the slots, and never takes one away."""

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from moesaic.placement import (
    ExpertLoad,
    LayerShape,
    Placement,
    Problem,
    Topology,
    added_copies,
    calibrate,
    cost,
    get_solver,
    split_exact,
)


def one_node(num_ranks: int, bytes_per_s: float) -> Topology:
    return Topology(1, num_ranks, bytes_per_s, bytes_per_s, latency_s=1e-5, flops_per_s=1e9, half_rate_rows=0)


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 10_000), rate=st.sampled_from([1e6, 1e8, 1e11]), overlap_s=st.sampled_from([0.0, 1.0]))
def test_added_copies_pay_for_themselves(seed: int, rate: float, overlap_s: float) -> None:
    """Against the definition: seconds of the layer with them, and with a gather of them alone under no overlap, are fewer."""
    random = np.random.default_rng(seed)
    num_ranks, num_experts, slots = int(random.integers(2, 6)), int(random.integers(2, 9)), int(random.integers(1, 4))
    topology = Topology(
        1, num_ranks, device_bytes_per_s=rate, node_bytes_per_s=rate, latency_s=1e-5, flops_per_s=1e9, half_rate_rows=0
    )
    owners_E = random.integers(0, num_ranks, num_experts)
    load = ExpertLoad(random.multinomial(4000, random.dirichlet(np.full(num_experts, 0.3)), size=num_ranks))
    shape = LayerShape(num_experts=num_experts, top_k=1, dim=16, ffn_dim=32)
    problem = Problem(load, owners_E, topology, shape, slots=slots, overlap_s=overlap_s)
    placed = Placement.owners_only(owners_E, num_ranks).replicas_RE.copy()
    placed[random.integers(num_ranks), random.integers(num_experts)] = True  # a copy that a prediction asked for
    split = split_exact(load, Placement(owners_E, placed), topology)
    more = calibrate(problem, split, get_solver("quota", keeps_owners=True), split_exact)
    if more is None:
        return
    assert (more.placement.replicas_RE >= placed).all()
    assert more.placement.copies_RE.sum(axis=1).max() <= slots
    added = added_copies(more.placement, split.placement)
    assert added.num_copies == more.placement.num_copies - split.placement.num_copies > 0
    alone = Problem(load, owners_E, topology, shape, slots=num_experts, overlap_s=0.0)
    gather_s = cost(alone, added, split_exact(load, added, topology)).gather_s
    before, after = cost(problem, split.placement, split), cost(problem, more.placement, more)
    assert after.compute_s + after.dispatch_s + after.reduce_s + gather_s < before.compute_s + before.dispatch_s + before.reduce_s


def test_many_rows_are_worth_a_copy_and_few_are_not() -> None:
    for rows, copies in ((1000, 1), (4, 0)):
        load = ExpertLoad(np.array([[rows, 0], [rows, 0]]))
        owners_E, shape = np.array([0, 1]), LayerShape(num_experts=2, top_k=1, dim=16, ffn_dim=32)
        problem = Problem(load, owners_E, one_node(2, 1e6), shape, slots=1)
        split = split_exact(load, Placement.owners_only(owners_E, 2), problem.topology)
        more = calibrate(problem, split, get_solver("quota", keeps_owners=True), split_exact)
        assert (0 if more is None else more.placement.num_copies) == copies
