"""Token rows in two parts: bits and bytes of one, for any case; out with the first part that needs a row, home with the last."""

import warnings
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh

from moesaic import DebugConfig, shard_experts
from moesaic.kernels import Clamp
from moesaic.placement import ExpertLoad, Placement, Topology, split_exact
from moesaic.runtime.dispatch.direct import build_handle
from moesaic.runtime.dispatch.expert_order import ExpertOrder
from moesaic.runtime.group import RankGroup
from moesaic.runtime.step.layer_runtime import _handle_builder
from tests.helpers.cases import Case, cases
from tests.helpers.compare import assert_bitwise
from tests.helpers.configs import runtime_config
from tests.helpers.model import cross_entropy, global_batch, make_model, rank_slice
from tests.helpers.ranks import run_ranks
from tests.helpers.threads import run_threads
from tests.runtime.test_dispatch import crossing_pairs
from tests.runtime.test_memory import two_copies
from tests.runtime.test_parity import NAMED, merged, train_on_ranks
from tests.runtime.test_shard import whole_gradients

OPS = ("measure", "describe", "dispatch", "combine", "combine_backward", "dispatch_backward")
Sent = dict[str, tuple[list[int], list[int]]]


def sent_by(group: RankGroup) -> Sent:
    """Bytes and messages to every rank, by operation."""
    traffic = group.tokens.traffic
    assert traffic.unfinished is None, "rows are left on their way"
    return {op: (traffic.bytes_R(op).tolist(), traffic.messages_R(op).tolist()) for op in OPS}


def results_and_traffic(group: RankGroup, *args: Any) -> tuple[dict[str, Tensor], Sent]:
    results = train_on_ranks(group, *args)
    return results, sent_by(group)


def assert_alike(one: Sent, two: Sent) -> None:
    """As many bytes to every rank, in at most twice the messages; descriptions in one, whatever the parts."""
    for op in OPS:
        assert two[op][0] == one[op][0], f"{op}: {two[op][0]} bytes in two parts, {one[op][0]} in one"
        most = [n * (1 if op in ("measure", "describe") else 2) for n in one[op][1]]
        assert all(n <= limit for n, limit in zip(two[op][1], most, strict=True)), op


def check_parts(case: Case, order: str = "each", use_checkpoint: bool = False, is_frozen: bool = False, **options: Any) -> None:
    """Outputs and every gradient in two parts are, bit for bit, those in one; so is what was sent."""
    found = []
    for row_parts in (1, 2):
        args = case, order, use_checkpoint, {"row_parts": row_parts, **options}, is_frozen
        found.append(run_threads(case.world_size, results_and_traffic, *args, topology=case.topology()))
    one, two = found
    assert_bitwise(merged(case, [results for results, _ in two]), merged(case, [results for results, _ in one]))
    for (_, sent_in_one), (_, sent_in_two) in zip(one, two, strict=True):
        assert_alike(sent_in_one, sent_in_two)


@settings(max_examples=16, deadline=None)
@given(
    case=cases(),
    order=st.sampled_from(("each", "interleaved")),
    use_checkpoint=st.booleans(),
    is_frozen=st.booleans(),
    is_clamped=st.booleans(),
    options=st.fixed_dictionaries(
        {"materialize": st.sampled_from(("keep", "rematerialize")), "reuse_copies": st.booleans(), "overlap": st.booleans()}
    ),
)
def test_two_parts_are_bitwise_one(
    case: Case, order: str, use_checkpoint: bool, is_frozen: bool, is_clamped: bool, options: dict[str, Any]
) -> None:
    """Any ranks, experts, top-k, copies, shared experts, dropping, recomputation that ends behind the experts or goes on."""
    case = replace(case, clamp=Clamp(1.7, 2.0) if is_clamped else None)
    check_parts(case, order, use_checkpoint, is_frozen, **options)


@settings(max_examples=5, deadline=None)
@given(case=cases(min_world_size=2), use_checkpoint=st.booleans())
def test_two_parts_with_calibrated_copies(case: Case, use_checkpoint: bool) -> None:
    check_parts(replace(case, hot_expert=True), "interleaved", use_checkpoint, calibrate="always")


@pytest.mark.parametrize("name", NAMED)
def test_named_edge_cases(name: str) -> None:
    given = dict(num_layers=2, hot_expert=False, any_owner=False, normalize=True, seed=3) | NAMED[name]
    check_parts(Case(placement="random", **given), use_checkpoint=True)  # type: ignore[arg-type]


def test_anomaly_detection_meets_no_row_on_its_way() -> None:
    """It checks all gradients that pass through the graph for NaN, which receive buffers hold in these tests."""
    case = Case(2, 5, 2, 1, (7, 6), "random", hot_expert=False, any_owner=False, normalize=True, seed=1)
    with warnings.catch_warnings(), torch.autograd.detect_anomaly(check_nan=True):
        warnings.simplefilter("ignore")
        check_parts(case)


def rows_by_part(group: RankGroup, case: Case, split: Any, ids_TK: Tensor) -> Any:
    """(sent, home) [H, R] of one rank, and (received, returned)."""
    here = np.flatnonzero(split.placement.replicas_RE[group.rank])
    handle = build_handle(ids_TK, torch.ones(ids_TK.shape), split, here, group.tokens, "describe", "", num_parts=2)
    return (handle.sent_rows_HR, handle.home_rows_HR), (handle.received_rows_HR, handle.returned_rows_HR)


@settings(max_examples=25, deadline=None)
@given(case=cases(min_world_size=2), seed=st.integers(0, 1000))
def test_a_row_goes_out_with_the_first_part_and_home_with_the_last(case: Case, seed: int) -> None:
    """Every rank knows both, of what it sends and of what it gets; replayed by a loop over tokens without copies."""
    random = torch.Generator().manual_seed(seed)
    num_ranks, num_experts = case.world_size, case.num_experts
    placement = Placement.owners_only(case.owners().expert_to_owner_LE[0], num_ranks)
    ids_R = [torch.rand(n, num_experts, generator=random).argsort(1)[:, : case.top_k] for n in case.tokens_R]
    load = ExpertLoad(np.stack([np.bincount(ids.numpy().ravel(), minlength=num_experts) for ids in ids_R]))
    split = split_exact(load, placement, case.topology())
    part_RE = ExpertOrder.of(split, 2).part_RE
    expected = np.zeros((2, 2, num_ranks, num_ranks), np.int64)  # (out, home), part, source, destination
    for source, ids_TK in enumerate(ids_R):
        for token, destination in crossing_pairs(split.sends(source), ids_TK.numpy(), source, range(len(ids_TK))):
            parts = [int(part_RE[destination, e]) for e in ids_TK[token] if placement.replicas_RE[destination, e]]
            expected[0, min(parts), source, destination] += 1
            expected[1, max(parts), source, destination] += 1

    def body(group: RankGroup) -> Any:
        return rows_by_part(group, case, split, ids_R[group.rank])

    for rank, (sent, received) in enumerate(run_threads(num_ranks, body, topology=case.topology())):
        assert np.array_equal(np.array(sent), expected[:, :, rank])
        assert np.array_equal(np.array(received), expected[:, :, :, rank])


def test_two_parts_between_nodes() -> None:
    """By default where rows go straight from node to node and may travel under other work; never by node."""

    def options_of(num_nodes: int, ranks_per_node: int, **options: Any) -> dict[str, Any]:
        topology = replace(Topology.preset("cpu", num_nodes * ranks_per_node), num_nodes=num_nodes, ranks_per_node=ranks_per_node)
        found: dict[str, Any] = _handle_builder(DebugConfig(**options), topology).keywords  # type: ignore[attr-defined]
        return found

    two, one = {"num_parts": 2}, {"num_parts": 1}
    assert options_of(2, 1) == options_of(2, 2, token_route="direct") == options_of(1, 2, row_parts=2) == two
    assert options_of(1, 4) == options_of(2, 1, overlap=False) == options_of(2, 1, row_parts=1) == one
    assert options_of(2, 2) == {"ranks_per_node": 2}
    with pytest.raises(ValueError, match=r"runtime.debug.row_parts is 3; choose 'auto', 1 or 2"):
        DebugConfig(row_parts=3)  # type: ignore[arg-type]


def steps_on_ranks(rank: int, row_parts: int, use_checkpoint: bool) -> tuple[dict[str, Tensor], Sent]:
    """Gradients of two micro-batches, and logits without gradients, over real messages."""
    model = make_model(use_checkpoint=use_checkpoint)
    config = runtime_config(policy="static", slots=5, timeout_s=30, transport="c10d", row_parts=row_parts)
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    handle = shard_experts(model, mesh=mesh, config=config, solver=two_copies)
    for step in range(2):
        ids, targets = (rank_slice(t, rank, dist.get_world_size()) for t in global_batch(step))
        (cross_entropy(model(ids), targets) + handle.aux_loss()).backward()
    grads = whole_gradients(model, handle)
    with torch.no_grad():
        logits = model.eval()(ids)
    return grads | {"logits": logits}, sent_by(handle._group)


@pytest.mark.parametrize("world_size,use_checkpoint", [(2, True), (4, False)])
def test_over_real_messages(world_size: int, use_checkpoint: bool) -> None:
    one, two = (run_ranks(world_size, steps_on_ranks, row_parts, use_checkpoint) for row_parts in (1, 2))
    for (results, sent), (expected, sent_in_one) in zip(two, one, strict=True):
        assert_bitwise(results, expected)
        assert_alike(sent_in_one, sent)
        assert sum(sent["dispatch"][1]) > sum(sent_in_one["dispatch"][1])
