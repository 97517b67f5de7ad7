"""Dispatch over nodes of several ranks: the reference's values and gradients, and one crossing per (token, node) each way."""

from collections import defaultdict
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from moesaic import DebugConfig
from moesaic.placement import ExpertLoad, Placement, Topology, split_exact
from moesaic.runtime.dispatch.assignments import anchor_ranks
from moesaic.runtime.dispatch.by_node import by_node_handle, num_mask_words, pack_masks, unpack_masks
from moesaic.runtime.group import RankGroup
from tests.helpers.cases import PLACEMENTS, Case, cases, share_experts
from tests.helpers.compare import assert_bitwise
from tests.helpers.configs import runtime_config
from tests.helpers.threads import run_threads
from tests.runtime.test_dispatch import crossing_pairs
from tests.runtime.test_parity import NAMED, check, train

# (nodes, ranks of each)
SHAPES = ((2, 2), (2, 3), (4, 2))


@pytest.mark.parametrize("num_nodes,ranks_per_node", SHAPES)
@settings(max_examples=15, deadline=None)
@given(data=st.data())
def test_any_case_equals_the_reference(num_nodes: int, ranks_per_node: int, data: st.DataObject) -> None:
    """Outputs, input gradients, gate gradients (through the router's weight) and all parameter gradients."""
    num_ranks = num_nodes * ranks_per_node
    case = data.draw(cases(max_world_size=num_ranks, min_world_size=num_ranks))
    check(case, num_nodes=num_nodes, token_route="by_node")


@settings(max_examples=10, deadline=None)
@given(case=cases(max_world_size=4, min_world_size=4))
def test_two_runs_are_bitwise_equal_also_under_checkpointing(case: Case) -> None:
    plain = check(case, order="interleaved", token_route="by_node")
    assert_bitwise(train(case, order="interleaved", use_checkpoint=True, token_route="by_node"), plain)


@pytest.mark.parametrize("placement", PLACEMENTS)
@pytest.mark.parametrize("name", [name for name in NAMED if NAMED[name]["world_size"] == 4])
def test_named_edge_cases(name: str, placement: str) -> None:
    given = dict(num_layers=2, hot_expert=False, any_owner=False, normalize=True, seed=3) | NAMED[name]
    check(Case(placement=placement, **given), num_nodes=2, token_route="by_node")  # type: ignore[arg-type]


@pytest.mark.parametrize("num_nodes", [1, 4])
def test_one_node_and_nodes_of_one_rank(num_nodes: int) -> None:
    """Where there is nothing to share, rows travel as they do directly, to the same bits."""
    case = Case(4, 6, 3, 1, (5, 7, 0, 6), "random", hot_expert=False, any_owner=True, normalize=True, seed=2)
    assert_bitwise(
        check(case, num_nodes=num_nodes, token_route="by_node"), check(case, num_nodes=num_nodes, token_route="direct")
    )


def forward_and_count(group: RankGroup, case: Case, route: str) -> tuple[dict[str, Any], np.ndarray, np.ndarray]:
    """Bytes to each rank by direction, over one forward and backward; the choices; who held what."""
    (layer,) = case.layers()
    config = runtime_config(slots=case.slots, token_route=route)
    share_experts({"moe": layer}, group, config=config, solver=case.solver(), owners=case.owners())
    layer(case.tokens(group.rank, 0))
    group.tokens.traffic.reset()
    x = case.tokens(group.rank, 1).requires_grad_()
    y = layer(x)
    assert layer.runtime.latest_pass is not None
    replicas_RE = layer.runtime.latest_pass.planned.placement.replicas_RE
    y.sum().backward()
    ops = ("describe", "dispatch", "combine", "combine_backward", "dispatch_backward")
    sent = {op: group.tokens.traffic.bytes_R(op) for op in ops}
    routing = layer.router(x.detach())
    ids_TK = layer.capacity.kept_ids(routing.topk_ids_TK, routing.weights_TK.detach(), case.num_experts)
    return sent, ids_TK.numpy(), replicas_RE


@pytest.mark.parametrize("num_nodes,ranks_per_node", SHAPES)
@settings(max_examples=10, deadline=None)
@given(data=st.data())
def test_a_row_crosses_to_each_node_once_and_returns_once(num_nodes: int, ranks_per_node: int, data: st.DataObject) -> None:
    """By source rank and node, in both directions; inside a node every rank but the gateway gets each row once."""
    num_ranks = num_nodes * ranks_per_node
    case = replace(data.draw(cases(max_world_size=num_ranks, min_world_size=num_ranks)), num_layers=1)
    topology = replace(case.topology(), num_nodes=num_nodes, ranks_per_node=ranks_per_node)
    results = run_threads(num_ranks, forward_and_count, case, "by_node", topology=topology)
    load_RE = np.stack([np.bincount(ids.ravel(), minlength=case.num_experts)[: case.num_experts] for _, ids, _ in results])
    placement = Placement(case.owners().expert_to_owner_LE[0], results[0][2])
    split = split_exact(ExpertLoad(load_RE), placement, topology)
    nodes_R, row_bytes = topology.node_of_rank_R, case.dim * 4
    crossings_RN = np.zeros((num_ranks, num_nodes), np.int64)
    rows_inside_N = np.zeros(num_nodes, np.int64)
    for rank, (_, ids_TK, _) in enumerate(results):
        anchors = anchor_ranks(torch.from_numpy(ids_TK), split, rank).flatten().tolist()
        order = sorted(range(len(ids_TK)), key=lambda t, anchors=anchors: anchors[t])
        ranks_of: dict[tuple[int, int], int] = defaultdict(int)
        for token, destination in crossing_pairs(split.sends(rank), ids_TK, rank, order):
            ranks_of[token, int(nodes_R[destination])] += 1
        for (_, node), count in ranks_of.items():
            is_far = node != nodes_R[rank]
            crossings_RN[rank, node] += is_far
            rows_inside_N[node] += count - is_far

    def by_node(op: str) -> np.ndarray:
        """Bytes that each rank sent to each node, [R, N]."""
        return np.stack([np.bincount(nodes_R, weights=sent[op], minlength=num_nodes) for sent, _, _ in results])

    is_far_RN = nodes_R[:, None] != np.arange(num_nodes)
    flow_RR = split.flow_RR
    returned_grads_NN, crossings_NN = np.zeros((num_nodes, num_nodes)), np.zeros((num_nodes, num_nodes))
    np.add.at(returned_grads_NN, (nodes_R[None, :], nodes_R[:, None]), 4 * flow_RR)
    np.add.at(crossings_NN, nodes_R, crossings_RN)
    np.fill_diagonal(returned_grads_NN, 0)
    for op in ("dispatch", "combine_backward"):
        assert np.array_equal(by_node(op) * is_far_RN, crossings_RN * row_bytes)
        assert np.array_equal((by_node(op) * ~is_far_RN).sum(axis=0), rows_inside_N * row_bytes)
    for op, beside in (("combine", 0), ("dispatch_backward", returned_grads_NN)):
        returned_NN = np.zeros((num_nodes, num_nodes))
        np.add.at(returned_NN, nodes_R, by_node(op) * is_far_RN)
        assert np.array_equal(returned_NN, crossings_NN.T * row_bytes + beside)
    assert (by_node("combine") * ~is_far_RN).sum() == rows_inside_N.sum() * row_bytes
    # A description crosses once for each assignment: code, weight and mask, after one number for each pair of ranks.
    far_RR = flow_RR * (nodes_R[:, None] != nodes_R)
    described = 4 * (3 * far_RR.sum() + np.count_nonzero(far_RR))
    assert (by_node("describe") * is_far_RN).sum() == described


def test_the_topology_decides() -> None:
    """By node where several nodes have several ranks, unless configured otherwise; fewer bytes cross then."""
    case = Case(4, 8, 4, 1, (8, 8, 8, 8), "static", hot_expert=False, any_owner=False, normalize=True, seed=1)
    crossed = {}
    for route in ("auto", "direct", "by_node"):
        topology = replace(case.topology(), num_nodes=2, ranks_per_node=2)
        results = run_threads(4, forward_and_count, case, route, topology=topology)
        crossed[route] = sum(int(sent["dispatch"][2:].sum()) for sent, _, _ in results[:2])
    assert crossed["auto"] == crossed["by_node"] < crossed["direct"]
    with pytest.raises(ValueError, match=r"runtime.debug.token_route is 'both'; choose 'auto', 'direct' or 'by_node'"):
        DebugConfig(token_route="both")  # type: ignore[arg-type]


def describe(group: RankGroup, split: Any) -> Any:
    """One token on rank 0, which chose all four experts."""
    num_tokens = 1 if group.rank == 0 else 0
    ids_TK, weights_TK = torch.arange(4).expand(num_tokens, 4), torch.ones(num_tokens, 4)
    handle = by_node_handle(ids_TK, weights_TK, split, [group.rank], group.tokens, "describe", "", ranks_per_node=2)
    sent, forwarded = (hop.layout.sent for hop in handle.hops)
    return sent, forwarded, handle.source_ids_N.tolist()


def test_worked_example() -> None:
    """Token 0 of rank 0 needs ranks 1, 2, 3: it goes to rank 1, and to rank 2, whose turn it is, which forwards it to rank 3."""
    placement = Placement.owners_only(np.arange(4), 4)
    load_RE = np.zeros((4, 4), np.int64)
    load_RE[0] = 1
    split = split_exact(ExpertLoad(load_RE), placement, Topology.preset("cpu", 4))
    results = run_threads(4, describe, split)
    # (rank, first token, number of tokens)
    assert [sent for sent, _, _ in results] == [((1, 0, 1), (2, 1, 1)), (), (), ()]
    assert [forwarded for _, forwarded, _ in results] == [(), (), ((3, 0, 1),), ()]
    assert [ids for _, _, ids in results] == [[0]] * 4


@given(num_flags=st.integers(1, 100), num_rows=st.integers(0, 5), seed=st.integers(0, 1000))
def test_masks_of_any_width(num_flags: int, num_rows: int, seed: int) -> None:
    """Nodes of more ranks than an int32 has bits."""
    flags_PM = torch.rand(num_rows, num_flags, generator=torch.Generator().manual_seed(seed)) < 0.5
    words_PW = pack_masks(flags_PM)
    assert words_PW.dtype == torch.int32
    assert words_PW.shape == (num_rows, num_mask_words(num_flags))
    assert torch.equal(unpack_masks(words_PW, num_flags), flags_PM)
    assert pack_masks(torch.tensor([[True, False, True]])).tolist() == [[5]]
