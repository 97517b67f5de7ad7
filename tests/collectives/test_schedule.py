"""Schedules as data: what each kind sends, that it can be carried out, its transpose, and the choice among them."""

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moesaic.collectives import (
    SCHEDULES,
    LinkCounts,
    Message,
    Route,
    Schedule,
    account,
    choose_schedule,
    direct_gather,
    make_schedule,
    predicted_s,
)
from moesaic.collectives.hops import Copies
from moesaic.collectives.schedules.relay import chain_hops, tree_hops
from moesaic.placement import LayerShape, Placement, Topology

SLOW = dict(device_bytes_per_s=25e6, node_bytes_per_s=25e6, latency_s=5e-4, flops_per_s=1e10)


@st.composite
def placements(draw: st.DrawFn, max_ranks: int = 64, min_ranks: int = 1) -> Placement:
    """Any owners and any copies."""
    num_ranks, num_experts = draw(st.integers(min_ranks, max_ranks)), draw(st.integers(1, 12))
    random = np.random.default_rng(draw(st.integers(0, 10**6)))
    owners_E = random.integers(0, num_ranks, num_experts)
    copies_RE = random.random((num_ranks, num_experts)) < draw(st.sampled_from([0.0, 0.1, 0.5, 1.0]))
    return Placement(owners_E, copies_RE | Placement.owners_only(owners_E, num_ranks).replicas_RE)


def some_topology(num_ranks: int, item_bytes: int = 0) -> Topology:
    """As many nodes as divide the ranks evenly, up to four."""
    num_nodes = max(n for n in range(1, 5) if num_ranks % n == 0)
    rates = dict(device_bytes_per_s=1e9, node_bytes_per_s=2e8, latency_s=1e-5, flops_per_s=1e10)
    return Topology(num_nodes=num_nodes, ranks_per_node=num_ranks // num_nodes, **rates)


def chain_gather(placement: Placement) -> Schedule:
    return chain_hops(Copies.of(placement)).schedule()


def tree_gather(placement: Placement) -> Schedule:
    return tree_hops(Copies.of(placement)).schedule()


def schedule_of(name: str, placement: Placement, pieces: int = 1) -> Schedule:
    """A schedule by name, its routes cut into `pieces`, though items are small."""
    if name in ("chain", "tree"):
        schedule = chain_gather(placement) if name == "chain" else tree_gather(placement)
    else:
        schedule = make_schedule(name, placement, some_topology(placement.num_ranks), 1)
    return replace(schedule, routes=tuple(route.cut(pieces) for route in schedule.routes))


NAMES = (*SCHEDULES, "chain", "tree")


@settings(max_examples=100, deadline=None)
@given(placement=placements(max_ranks=9), name=st.sampled_from(NAMES), pieces=st.integers(1, 4))
def test_every_copy_gets_every_chunk_once_from_a_rank_that_has_it(placement: Placement, name: str, pieces: int) -> None:
    """Played message by message; a rank that forwards is one that needs the item itself."""
    schedule = schedule_of(name, placement, pieces)
    arrived: dict[tuple[int, int], dict[int, int]] = {}
    for m in schedule.messages():
        chunks = arrived.setdefault((m.dst, m.item), {})
        assert placement.copies_RE[m.dst, m.item]
        assert m.chunk not in chunks
        if m.src != placement.expert_to_owner_E[m.item]:
            assert arrived[m.src, m.item][m.chunk] < m.round
        chunks[m.chunk] = m.round
    assert len(arrived) == placement.num_copies
    num_chunks = {m.item: m.num_chunks for m in schedule.messages()}
    assert all(sorted(chunks) == list(range(num_chunks[item])) for (_, item), chunks in arrived.items())


@settings(max_examples=60, deadline=None)
@given(placement=placements(max_ranks=9), name=st.sampled_from(NAMES), pieces=st.integers(1, 3))
def test_transpose_turns_every_message_around(placement: Placement, name: str, pieces: int) -> None:
    gather = schedule_of(name, placement, pieces)
    reduce = gather.transpose()
    assert reduce.transpose() == gather
    assert np.array_equal(reduce.num_messages_RR(), gather.num_messages_RR().T)
    forward = [(m.item, m.chunk, m.src, m.dst) for m in gather.messages()]
    backward = [(m.item, m.chunk, m.dst, m.src) for m in reduce.messages()]
    assert sorted(forward) == sorted(backward)
    sent_at = {(m.item, m.chunk, m.src): m.round for m in reduce.messages()}
    assert all(m.round < sent_at.get((m.item, m.chunk, m.dst), 1 << 30) for m in reduce.messages())


@settings(max_examples=60, deadline=None)
@given(placement=placements(max_ranks=9), name=st.sampled_from(NAMES), is_reduce=st.booleans())
def test_each_rank_sees_its_messages_in_the_common_order(placement: Placement, name: str, is_reduce: bool) -> None:
    """Between two ranks both post in the same order, and the counts are those of the messages."""
    schedule = schedule_of(name, placement, 2)
    schedule = schedule.transpose() if is_reduce else schedule
    messages = schedule.messages()
    counts_RR = np.zeros((placement.num_ranks, placement.num_ranks), np.int64)
    for rank in range(placement.num_ranks):
        assert schedule.messages_of(rank) == [m for m in messages if rank in (m.src, m.dst)]
    for m in messages:
        counts_RR[m.src, m.dst] += 1
    assert np.array_equal(counts_RR, schedule.num_messages_RR())


@settings(max_examples=60, deadline=None)
@given(placement=placements(max_ranks=9), name=st.sampled_from(NAMES), limit=st.integers(1, 4))
def test_groups_keep_the_messages_their_order_and_the_limit(placement: Placement, name: str, limit: int) -> None:
    """No rank receives more in a group than there is room for beside a sum in progress, which a single buffer need not hold."""
    reduce = schedule_of(name, placement, 2).transpose().limit_receives(limit)
    groups = reduce.rounds()
    for rank in range(placement.num_ranks):
        assert reduce.most_received(rank) <= limit
        assert all(sum(m.dst == rank for m in group) <= max(limit - 1, 1) for group in groups)
        received = [m for m in reduce.messages() if m.dst == rank]
        assert [m for group in groups for m in group if m.dst == rank] == received
    assert sorted(m for group in groups for m in group) == reduce.messages()


@settings(max_examples=60, deadline=None)
@given(placement=placements())
def test_direct_sends_each_copy_once_from_its_owner(placement: Placement) -> None:
    messages = direct_gather(placement).messages()
    assert len(messages) == placement.num_copies
    assert all(m.src == placement.expert_to_owner_E[m.item] for m in messages)


@settings(max_examples=60, deadline=None)
@given(placement=placements(), name=st.sampled_from(["chain", "tree", "relay", "element_sharded"]))
def test_a_hot_owner_sends_each_distinct_expert_once(placement: Placement, name: str) -> None:
    """Counted in elements, of items of 1000."""
    sent_R = np.zeros(placement.num_ranks, np.int64)
    for route in schedule_of(name, placement).routes:
        sent_R[route.owner] += sum(src == route.owner for src, _ in route.hops) * route.num_elements(1000)
    copied_E = placement.num_replicas_E > 1
    assert np.array_equal(sent_R, 1000 * np.bincount(placement.expert_to_owner_E[copied_E], minlength=placement.num_ranks))


@settings(max_examples=60, deadline=None)
@given(placement=placements())
def test_chains_share_the_links(placement: Placement) -> None:
    """Every rank receives just its copies; the busiest sender is no busier than in chains without leaves."""
    counts_RR = chain_gather(placement).num_messages_RR()
    assert np.array_equal(counts_RR.sum(axis=0), placement.copies_RE.sum(axis=1))
    plain_R = placement.copies_RE.sum(axis=1)
    for expert in np.flatnonzero(placement.num_replicas_E > 1):
        plain_R[placement.expert_to_owner_E[expert]] += 1
        plain_R[np.flatnonzero(placement.copies_RE[:, expert])[0]] -= 1
    assert counts_RR.sum(axis=1).max() <= plain_R.max()


def test_a_busy_rank_becomes_a_leaf() -> None:
    """Rank 2 owns two copied experts (1, 2) and has a copy of expert 0: it passes nothing on, rank 3 sends that copy twice."""
    replicas_RE = np.array([[1, 1, 1], [1, 0, 0], [1, 1, 1], [1, 0, 0]], bool)
    chain = chain_gather(Placement(np.array([0, 2, 2]), replicas_RE))
    assert chain.routes[0].hops == ((0, 3), (3, 2), (3, 1))
    assert chain.num_messages_RR().sum(axis=1).tolist() == [1, 0, 2, 2]


@settings(max_examples=60, deadline=None)
@given(placement=placements())
def test_hierarchical_enters_each_node_once_per_expert(placement: Placement) -> None:
    topology = some_topology(placement.num_ranks)
    nodes_R = topology.node_of_rank_R
    crossings = [
        (route.item, int(nodes_R[dst]))
        for route in make_schedule("hierarchical", placement, topology, 1).routes
        for src, dst in route.hops
        if nodes_R[src] != nodes_R[dst]
    ]
    owners_E = placement.expert_to_owner_E
    needed = {
        (int(e), int(nodes_R[r]))
        for r, e in zip(*np.nonzero(placement.copies_RE), strict=True)
        if nodes_R[r] != nodes_R[owners_E[e]]
    }
    assert len(crossings) == len(needed)
    assert set(crossings) == needed


def test_worked_examples() -> None:
    """Expert 0 of rank 0 on three other ranks."""
    placement = Placement.everywhere(np.array([0]), 4)
    topology = Topology(num_nodes=2, ranks_per_node=2, **SLOW)
    assert direct_gather(placement).routes == (Route(0, ((0, 3), (0, 2), (0, 1))),)
    assert chain_gather(placement).routes == (Route(0, ((0, 3), (3, 2), (2, 1))),)
    assert tree_gather(placement).routes == (Route(0, ((0, 3), (3, 2), (3, 1))),)
    assert make_schedule("hierarchical", placement, topology, 1).routes == (Route(0, ((0, 1), (0, 3), (3, 2))),)
    assert schedule_of("element_sharded", placement).routes == (
        Route(0, ((0, 3), (3, 2), (3, 1)), 0, 1, 3),
        Route(0, ((0, 2), (2, 3), (2, 1)), 1, 2, 3),
        Route(0, ((0, 1), (1, 3), (1, 2)), 2, 3, 3),
    )
    assert chain_gather(placement).transpose().messages() == [
        Message(round=0, item=0, chunk=0, position=-2, src=1, dst=2, num_chunks=1),
        Message(round=1, item=0, chunk=0, position=-1, src=2, dst=3, num_chunks=1),
        Message(round=2, item=0, chunk=0, position=0, src=3, dst=0, num_chunks=1),
    ]


def test_predicted_time_of_a_chain() -> None:
    """4 MB through 7 hops at 25 MB/s and 0.5 ms: 31 chunks come in and go out at a rank, the last one has 6 more hops to go."""
    placement = Placement.everywhere(np.array([0]), 8)
    topology = Topology(num_nodes=8, ranks_per_node=1, **SLOW)
    chain = make_schedule("relay", placement, topology, 4_000_000)
    assert chain.routes[0].num_chunks == 31
    assert predicted_s(chain, topology, 4_000_000) == pytest.approx((31 + 6) * 4_000_000 / 31 / 25e6 + (2 * 31 + 6) * 5e-4)
    direct = predicted_s(direct_gather(placement), topology, 4_000_000)
    assert direct == pytest.approx(7 * (4_000_000 / 25e6 + 5e-4))


def test_small_items_travel_down_a_tree() -> None:
    """1 KiB to 15 others: the tree has 4 levels, the chain 15."""
    placement = Placement.everywhere(np.array([0]), 16)
    small, large = (make_schedule("relay", placement, Topology.preset("cpu", 16), num_bytes) for num_bytes in (1024, 1 << 26))
    assert small == tree_gather(placement)
    assert large.routes[0].hops == chain_gather(placement).routes[0].hops


@settings(deadline=None)
@given(placement=placements(max_ranks=16), item_elements=st.integers(1, 10**7))
def test_the_choice_is_the_fastest_prediction_and_no_faster_than_the_bound(placement: Placement, item_elements: int) -> None:
    topology = some_topology(placement.num_ranks)
    shape = LayerShape(placement.num_experts, 1, item_elements, 1, num_matrices=1)
    choice = choose_schedule(placement, topology, shape)
    assert choice == choose_schedule(placement, topology, shape)
    seconds = dict(choice.candidates_s)
    assert tuple(seconds) == SCHEDULES
    assert seconds[choice.name] == min(seconds.values()) == predicted_s(choice.schedule, topology, shape.expert_bytes)
    for name in SCHEDULES:
        counted = account(make_schedule(name, placement, topology, shape.expert_bytes), topology, item_elements)
        assert counted.bound.seconds <= counted.predicted_s * (1 + 1e-9)
        assert counted.bound.rank_bytes <= counted.bound.busiest_bytes
        assert counted.predicted_s == pytest.approx(seconds[name])


def test_account_of_a_hot_expert() -> None:
    """Two nodes of two, a slow link between: hierarchical crosses once, direct twice."""
    placement = Placement.everywhere(np.array([0]), 4)
    topology = Topology(num_nodes=2, ranks_per_node=2, **(SLOW | {"device_bytes_per_s": 1e9}))
    shape = LayerShape(num_experts=1, top_k=1, dim=1000, ffn_dim=1000)
    direct = account(direct_gather(placement), topology, shape.parameters_per_expert)
    assert direct.bytes == LinkCounts(same_rank=0, same_node=12_000_000, cross_node=24_000_000)
    assert direct.messages == LinkCounts(0, 1, 2)
    assert (direct.bound.rank_bytes, direct.bound.busiest_bytes) == (12_000_000, 36_000_000)
    choice = choose_schedule(placement, topology, shape)
    assert choice.name == "hierarchical"
    once = account(choice.schedule, topology, shape.parameters_per_expert)
    assert once.bytes == LinkCounts(0, 24_000_000, 12_000_000)
    assert once.bound.node_bytes == 12_000_000
    assert LinkCounts.sent_by(1, np.array([1, 2, 4, 8]), topology) == LinkCounts(2, 1, 12)


def test_an_unknown_schedule_is_refused() -> None:
    with pytest.raises(ValueError, match="unknown schedule 'ring'; choose one of direct, relay, hierarchical, element_sharded"):
        make_schedule("ring", Placement.everywhere(np.array([0]), 2), some_topology(2), 1)
