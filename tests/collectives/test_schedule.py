"""Schedules as data: what the direct gather sends, and its transpose."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from moesaic.collectives import Message, Schedule, direct_gather
from moesaic.placement import Placement


@st.composite
def placements(draw: st.DrawFn, max_ranks: int = 64, min_ranks: int = 1) -> Placement:
    """Any owners and any copies."""
    num_ranks, num_experts = draw(st.integers(min_ranks, max_ranks)), draw(st.integers(1, 12))
    random = np.random.default_rng(draw(st.integers(0, 10**6)))
    owners_E = random.integers(0, num_ranks, num_experts)
    copies_RE = random.random((num_ranks, num_experts)) < draw(st.sampled_from([0.0, 0.1, 0.5, 1.0]))
    return Placement(owners_E, copies_RE | Placement.owners_only(owners_E, num_ranks).replicas_RE)


@given(placement=placements())
def test_direct_gather_sends_each_copy_once_from_its_owner(placement: Placement) -> None:
    messages = list(direct_gather(placement).messages())
    assert len(messages) == len(set(messages)) == placement.num_copies
    for m in messages:
        assert m.src == placement.expert_to_owner_E[m.item]
        assert placement.copies_RE[m.dst, m.item]


@given(placement=placements())
def test_transpose_turns_every_message_around(placement: Placement) -> None:
    gather = direct_gather(placement)
    reduce = gather.transpose()
    assert {(m.item, m.dst, m.src) for m in gather.messages()} == {(m.item, m.src, m.dst) for m in reduce.messages()}
    assert reduce.transpose() == gather
    assert np.array_equal(reduce.num_messages_RR(), gather.num_messages_RR().T)


@given(placement=placements(), limit=st.integers(1, 4))
def test_limited_receives_keep_the_messages_and_their_order(placement: Placement, limit: int) -> None:
    """No rank receives more than the limit in a round, and each gets its messages in the order it had."""
    reduce = direct_gather(placement).transpose()
    limited = reduce.limit_receives(limit)
    for rank in range(placement.num_ranks):
        assert limited.most_received(rank) <= limit
        received = [[m for m in schedule.messages() if m.dst == rank] for schedule in (reduce, limited)]
        assert received[0] == received[1]


def test_transpose_reverses_rounds() -> None:
    """A relay, 0 to 1 and then 1 to 2, sums on the way back: 2 to 1 first."""
    relay = Schedule(3, ((Message(0, 0, 1),), (Message(0, 1, 2),)))
    assert relay.transpose() == Schedule(3, ((Message(0, 2, 1),), (Message(0, 1, 0),)))


def test_worked_example() -> None:
    """Owners [0, 1], expert 0 also on rank 1: one message."""
    placement = Placement(np.array([0, 1]), np.array([[True, False], [True, True]]))
    assert direct_gather(placement) == Schedule(2, ((Message(item=0, src=0, dst=1),),))
