"""The verbs against their list-of-ranks references: in-process ranks for generated cases, real processes for c10d."""

import functools
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
import torch.distributed as dist
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from moesaic.collectives import (
    C10dTransport,
    RowLayout,
    RowPart,
    Schedule,
    Transport,
    all_to_all_rows,
    sparse_all_gather,
    sparse_reduce_scatter,
)
from moesaic.collectives.progress import CommunicationThread
from moesaic.collectives.reference import (
    all_to_all_rows_reference,
    reduce_along_reference,
    sparse_all_gather_reference,
    sparse_reduce_scatter_reference,
)
from moesaic.placement import Placement
from moesaic.runtime.group import RankGroup
from tests.collectives.test_schedule import NAMES, placements, schedule_of
from tests.helpers.ranks import run_ranks
from tests.helpers.threads import run_threads

# An item is two tensors; chunks end in the middle of either.
SHAPES = ((3, 5), (7,))
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
Item = tuple[Tensor, ...]
# The schedules whose sums go from left to right in rank order.
IN_RANK_ORDER = ("direct", "chain")


def items(placement: Placement, dtype: torch.dtype, seed: int = 0, shapes: Any = SHAPES) -> list[Item]:
    generator = torch.Generator().manual_seed(seed)
    return [tuple(torch.randn(shape, generator=generator).to(dtype) for shape in shapes) for _ in range(placement.num_experts)]


def contributions(placement: Placement, rank: int, dtype: torch.dtype) -> dict[int, Item]:
    values = items(placement, dtype, seed=1 + rank)
    return {e: values[e] for e in range(placement.num_experts) if placement.copies_RE[rank, e]}


def owned_by(rank: int, placement: Placement, values: list[Item]) -> dict[int, Item]:
    return {e: values[e] for e in range(placement.num_experts) if placement.expert_to_owner_E[e] == rank}


def poisoned(like: Item) -> Item:
    return tuple(torch.full_like(t, torch.nan) for t in like)


def gather(transport: Transport, placement: Placement, dtype: torch.dtype, schedule: Schedule) -> dict[int, Item]:
    """This rank's copies, received into poisoned buffers."""
    copies = {e: poisoned(item) for e, item in contributions(placement, transport.rank, dtype).items()}
    owned = owned_by(transport.rank, placement, items(placement, dtype))
    sparse_all_gather(schedule, transport, owned, copies, op="gather").wait()
    return copies


def reduce(
    transport: Transport,
    placement: Placement,
    dtype: torch.dtype,
    schedule: Schedule,
    wire: torch.dtype | None = None,
    limit: int = 2,
) -> dict[int, Item]:
    """This rank's totals, with poisoned staging for `limit` items."""
    schedule = schedule.transpose().limit_receives(limit)
    totals = owned_by(transport.rank, placement, items(placement, dtype))
    addends = contributions(placement, transport.rank, dtype)
    staging = [poisoned(items(placement, dtype)[0]) for _ in range(schedule.most_received(transport.rank))]
    assert len(staging) <= limit
    sparse_reduce_scatter(schedule, transport, addends, totals, staging, op="reduce", wire=wire).wait()
    return totals


def assert_same(actual: dict[int, Item], expected: dict[int, Item]) -> None:
    assert actual.keys() == expected.keys()
    for e in expected:
        assert all(torch.equal(a, b) for a, b in zip(actual[e], expected[e], strict=True))


def flat(placement: Placement, values: list[Item]) -> list[Tensor]:
    return [torch.cat([t.flatten() for t in item]) for item in values]


def unflat(values: list[Tensor]) -> list[Item]:
    return [(value[:15].view(3, 5), value[15:]) for value in values]


def check_gather(placement: Placement, dtype: torch.dtype, gathered: list[Any]) -> None:
    expected = sparse_all_gather_reference(placement, flat(placement, items(placement, dtype)))
    for rank, copies in enumerate(expected):
        assert_same(gathered[rank], {e: unflat([t])[0] for e, t in copies.items()})


def expected_totals(placement: Placement, dtype: torch.dtype, schedule: Schedule | None) -> list[Item]:
    """After the reduce along a schedule; without one, what the sum means."""
    totals_E = flat(placement, items(placement, dtype))
    addends_R = [
        {e: flat(placement, [item])[0] for e, item in contributions(placement, r, dtype).items()}
        for r in range(placement.num_ranks)
    ]
    if schedule is None:
        return unflat(sparse_reduce_scatter_reference(placement, totals_E, addends_R))
    return unflat(reduce_along_reference(schedule, totals_E, addends_R))


def check_reduce(placement: Placement, dtype: torch.dtype, schedule: Schedule, name: str, reduced: list[Any]) -> None:
    """Bitwise as the schedule associates; and as the sum in rank order, bitwise where the schedule keeps it."""
    along, meant = expected_totals(placement, dtype, schedule), expected_totals(placement, dtype, None)
    for rank in range(placement.num_ranks):
        assert_same(reduced[rank], owned_by(rank, placement, along))
    is_exact = name == "direct" or (name in IN_RANK_ORDER and dtype == torch.float32)
    for a, b in zip(along, meant, strict=True):
        for actual, expected in zip(a, b, strict=True):
            if is_exact:
                assert torch.equal(actual, expected)
            else:
                torch.testing.assert_close(actual, expected, rtol=1e-5 if dtype == torch.float32 else 0.1, atol=0.2)


@contextmanager
def in_rounds(wanted: bool) -> Iterator[None]:
    """The way of CUDA tensors, on this device."""
    with mock.patch("moesaic.collectives.verbs._is_on_cuda", return_value=wanted):
        yield


@settings(max_examples=80, deadline=None)
@given(
    placement=placements(max_ranks=9),
    dtype=st.sampled_from(DTYPES),
    name=st.sampled_from(NAMES),
    pieces=st.sampled_from([1, 2, 5, 40]),
    rounds=st.booleans(),
    limit=st.integers(1, 3),
)
def test_sparse_verbs_equal_their_references(
    placement: Placement, dtype: torch.dtype, name: str, pieces: int, rounds: bool, limit: int
) -> None:
    """Bitwise: the order of the sum is part of the meaning. 40 pieces of 22 elements leave some empty."""
    schedule = schedule_of(name, placement, pieces)

    def body(group: RankGroup) -> Any:
        copies = gather(group.experts, placement, dtype, schedule)
        return copies, reduce(group.tokens, placement, dtype, schedule, limit=limit)

    with in_rounds(rounds):
        results = run_threads(placement.num_ranks, body)
    check_gather(placement, dtype, [r[0] for r in results])
    check_reduce(placement, dtype, schedule, name, [r[1] for r in results])


@pytest.mark.parametrize("name", NAMES)
def test_sixty_four_ranks(name: str) -> None:
    """Two owners whose experts everybody needs."""
    placement = Placement.everywhere(torch.arange(2).numpy() * 32, 64)
    schedule = schedule_of(name, placement, 1)

    def body(group: RankGroup) -> Any:
        copies = gather(group.experts, placement, torch.float32, schedule)
        return copies, reduce(group.tokens, placement, torch.float32, schedule)

    results = run_threads(64, body)
    check_gather(placement, torch.float32, [r[0] for r in results])
    check_reduce(placement, torch.float32, schedule, name, [r[1] for r in results])


@settings(max_examples=60, deadline=None)
@given(placement=placements(max_ranks=8), name=st.sampled_from(NAMES), pieces=st.integers(1, 3))
def test_reduce_is_the_adjoint_of_gather(placement: Placement, name: str, pieces: int) -> None:
    """<gather(w), g> == <w, reduce(g)>, with owners' own contributions left at zero."""
    schedule = schedule_of(name, placement, pieces)

    def body(group: RankGroup) -> tuple[float, float]:
        rank, values = group.rank, items(placement, torch.float64)
        copies = gather(group.experts, placement, torch.float64, schedule)
        addends = contributions(placement, rank, torch.float64)
        left = sum(dot(copies[e], addends[e]) for e in copies)
        totals = {e: tuple(torch.zeros_like(t) for t in item) for e, item in owned_by(rank, placement, values).items()}
        transposed = schedule.transpose().limit_receives(3)
        staging = [poisoned(values[0]) for _ in range(transposed.most_received(rank))]
        sparse_reduce_scatter(transposed, group.experts, addends, totals, staging, op="reduce").wait()
        return left, sum(dot(values[e], totals[e]) for e in totals)

    results = run_threads(placement.num_ranks, body)
    assert sum(r[0] for r in results) == pytest.approx(sum(r[1] for r in results), abs=1e-9)


def dot(a: Item, b: Item) -> float:
    return sum((x * y).sum().item() for x, y in zip(a, b, strict=True))


@settings(max_examples=40, deadline=None)
@given(placement=placements(max_ranks=7), pieces=st.integers(1, 3))
def test_contributions_may_travel_in_bf16_and_are_summed_in_fp32(placement: Placement, pieces: int) -> None:
    """Half the bytes; the sum is that of the rounded contributions, in fp32."""
    schedule = schedule_of("direct", placement, pieces)

    def body(group: RankGroup) -> Any:
        totals = reduce(group.experts, placement, torch.float32, schedule, wire=torch.bfloat16)
        return totals, int(group.experts.traffic.bytes_R("reduce").sum())

    results = run_threads(placement.num_ranks, body)
    addends_R = [
        {e: flat(placement, [item])[0].bfloat16().float() for e, item in contributions(placement, r, torch.float32).items()}
        for r in range(placement.num_ranks)
    ]
    totals_E = flat(placement, items(placement, torch.float32))
    expected = unflat(sparse_reduce_scatter_reference(placement, totals_E, addends_R))
    for rank in range(placement.num_ranks):
        assert_same(results[rank][0], owned_by(rank, placement, expected))
    assert sum(r[1] for r in results) == placement.num_copies * 22 * 2


@given(placement=placements(max_ranks=6, min_ranks=2), name=st.sampled_from(NAMES))
@settings(max_examples=30, deadline=None)
def test_items_without_elements(placement: Placement, name: str) -> None:
    """Nothing travels, nobody waits."""
    schedule = schedule_of(name, placement, 2)

    def body(group: RankGroup) -> None:
        values = items(placement, torch.float32, shapes=((0, 4), (0,)))
        copies = {e: values[e] for e in range(placement.num_experts) if placement.copies_RE[group.rank, e]}
        owned = owned_by(group.rank, placement, values)
        sparse_all_gather(schedule, group.experts, owned, copies, op="gather").wait()
        reverse = schedule.transpose()
        staging = [values[0] for _ in range(reverse.most_received(group.rank))]
        sparse_reduce_scatter(reverse, group.experts, copies, owned, staging, op="reduce").wait()
        assert not group.experts.traffic.total_bytes()

    run_threads(placement.num_ranks, body)


@settings(max_examples=40, deadline=None)
@given(placement=placements(max_ranks=7), names=st.tuples(st.sampled_from(NAMES), st.sampled_from(NAMES)))
def test_collectives_in_flight_do_not_mix(placement: Placement, names: tuple[str, str]) -> None:
    """Two gathers on one transport, the second awaited first, though the first has chunks still to pass on."""
    schedules = [schedule_of(name, placement, 3) for name in names]

    def body(group: RankGroup) -> Any:
        pending, results = [], []
        for schedule, dtype in zip(schedules, (torch.float32, torch.float64), strict=True):
            copies = {e: poisoned(item) for e, item in contributions(placement, group.rank, dtype).items()}
            owned = owned_by(group.rank, placement, items(placement, dtype))
            pending.append(sparse_all_gather(schedule, group.experts, owned, copies, op="gather"))
            results.append(copies)
        pending[1].wait()
        pending[0].wait()
        return results

    results = run_threads(placement.num_ranks, body)
    check_gather(placement, torch.float32, [r[0] for r in results])
    check_gather(placement, torch.float64, [r[1] for r in results])


def test_a_rank_passes_on_before_others_wait_for_its_rows() -> None:
    """A chain 0, 1, 2, 3, then a gather without rank 1, which all launch before rank 1 waits for everybody's rows.

    Rank 2, which passes on to rank 3, finishes the chain as it launches the second gather: rank 1 must pass on first.
    """
    first = Placement(np.array([0]), np.ones((4, 1), dtype=bool))
    second = Placement(np.array([0]), np.array([[True], [False], [True], [False]]))

    def body(group: RankGroup) -> dict[int, Item]:
        pending, copies = [], {}
        for placement, name in ((first, "chain"), (second, "direct")):
            copies = {e: poisoned(item) for e, item in contributions(placement, group.rank, torch.float32).items()}
            owned = owned_by(group.rank, placement, items(placement, torch.float32))
            pending.append(sparse_all_gather(schedule_of(name, placement), group.experts, owned, copies, op="gather"))
        parts = [RowPart(r, r, 1) for r in range(4) if r != group.rank]
        all_to_all_rows(group.tokens, RowLayout(parts, parts), torch.ones(4), torch.empty(4), op="rows").wait()
        for gather in pending:
            gather.wait()
        return copies

    with mock.patch("tests.helpers.threads.LIMIT_S", 5.0):
        check_gather(second, torch.float32, run_threads(4, body))


@settings(max_examples=40, deadline=None)
@given(placement=placements(max_ranks=8), name=st.sampled_from(NAMES), pieces=st.integers(1, 3))
def test_the_bytes_sent_are_those_of_the_schedule(placement: Placement, name: str, pieces: int) -> None:
    """By rank and peer, there and back; a whole item is 22 elements."""
    schedule = schedule_of(name, placement, pieces)

    def body(group: RankGroup) -> Any:
        gather(group.experts, placement, torch.float32, schedule)
        reduce(group.experts, placement, torch.float32, schedule)
        return group.experts.traffic.bytes_R("gather"), group.experts.traffic.bytes_R("reduce")

    results = run_threads(placement.num_ranks, body)
    bytes_RR = schedule.num_elements_RR(22) * 4
    assert [r[0].tolist() for r in results] == bytes_RR.tolist()
    assert [r[1].tolist() for r in results] == bytes_RR.T.tolist()


def exchange_rows(transport: Transport, rows_RR: list[list[Tensor]]) -> Tensor:
    """Each rank's rows from all ranks; those that stay here lie between the others, and are copied by hand."""
    rank, world_size = transport.rank, transport.world_size
    outgoing = torch.cat(rows_RR[rank])
    received = torch.full((sum(len(rows[rank]) for rows in rows_RR), outgoing.shape[1]), torch.nan)
    sent, expected = [], []
    sent_end = received_end = 0
    for peer in range(world_size):
        num_sent, num_received = len(rows_RR[rank][peer]), len(rows_RR[peer][rank])
        if peer == rank:
            received[received_end : received_end + num_received] = rows_RR[rank][rank]
        else:
            sent.append(RowPart(peer, sent_end, num_sent))
            expected.append(RowPart(peer, received_end, num_received))
        sent_end, received_end = sent_end + num_sent, received_end + num_received
    all_to_all_rows(transport, RowLayout(sent, expected), outgoing, received, op="rows").wait()
    return received


def some_rows(world_size: int, seed: int) -> list[list[Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    counts_RR = torch.randint(0, 4, (world_size, world_size), generator=generator).tolist()
    return [[torch.randn(n, 5, generator=generator) for n in row] for row in counts_RR]


@settings(max_examples=40, deadline=None)
@given(world_size=st.integers(1, 9), seed=st.integers(0, 10**6))
def test_all_to_all_rows_equals_its_reference(world_size: int, seed: int) -> None:
    """Uneven counts, zero included."""
    rows_RR = some_rows(world_size, seed)
    results = run_threads(world_size, lambda group: exchange_rows(group.tokens, rows_RR))
    for actual, expected in zip(results, all_to_all_rows_reference(rows_RR), strict=True):
        assert torch.equal(actual, expected)


@functools.cache
def c10d() -> C10dTransport:
    """One for all cases that a rank runs: making a group costs more than what they send."""
    return C10dTransport(dist.new_group(), timeout_s=30)


def over_c10d(rank: int, placement: Placement, dtype: torch.dtype, seed: int, name: str) -> Any:
    transport = c10d()
    transport.traffic.reset()
    schedule = schedule_of(name, placement, 2)
    results = gather(transport, placement, dtype, schedule), reduce(transport, placement, dtype, schedule)
    rows = exchange_rows(transport, some_rows(transport.world_size, seed))
    ints = transport.all_gather_ints(torch.tensor([rank, 10 * rank]))
    return *results, rows, ints, transport.traffic.bytes_R("gather"), transport.traffic.bytes_R("reduce")


@pytest.mark.parametrize("world_size", [1, 2, 3, 4])
@pytest.mark.parametrize("dtype", DTYPES)
@settings(max_examples=8, deadline=None)
@given(data=st.data())
def test_c10d_on_real_processes(world_size: int, dtype: torch.dtype, data: st.DataObject) -> None:
    """Values, and the bytes that the schedule says."""
    placement = data.draw(placements(max_ranks=world_size, min_ranks=world_size))
    name = data.draw(st.sampled_from(NAMES))
    results = run_ranks(world_size, over_c10d, placement, dtype, 7, name)
    schedule = schedule_of(name, placement, 2)
    check_gather(placement, dtype, [r[0] for r in results])
    check_reduce(placement, dtype, schedule, name, [r[1] for r in results])
    bytes_RR = schedule.num_elements_RR(22) * dtype.itemsize
    for rank, (_, _, rows, ints, gathered, reduced) in enumerate(results):
        assert torch.equal(rows, all_to_all_rows_reference(some_rows(world_size, 7))[rank])
        assert ints.tolist() == [[r, 10 * r] for r in range(world_size)]
        assert gathered.tolist() == bytes_RR[rank].tolist()
        assert reduced.tolist() == bytes_RR[:, rank].tolist()


def chunks_pass_a_busy_rank(rank: int) -> list[float]:
    """A relay through rank 1, whose main thread waits for the gather only after the last rank has all of it."""
    placement = Placement.everywhere(np.zeros(1, np.int64), 3)
    transport = C10dTransport(dist.new_group(), timeout_s=30)
    item = [torch.full((4000,), 7.0 if rank == 0 else torch.nan)]
    owned, copies = ({0: item}, {}) if rank == 0 else ({}, {0: item})
    pending = sparse_all_gather(schedule_of("chain", placement, 4), transport, owned, copies, op="gather", where="here")
    if rank == 2:
        pending.wait()
    dist.barrier()
    pending.wait()
    return item[0].unique().tolist()


def test_chunks_are_passed_on_while_the_main_thread_is_busy() -> None:
    assert run_ranks(3, chunks_pass_a_busy_rank) == [[7.0]] * 3


def test_the_communication_thread_works_in_order_and_tells_what_went_wrong() -> None:
    thread = CommunicationThread()
    done: list[int] = []

    def fail() -> None:
        raise ValueError("this")

    first, second, third = (thread.submit(work) for work in (lambda: done.append(1), fail, lambda: done.append(2)))
    third.wait()
    assert done == [1, 2]
    first.wait()
    with pytest.raises(ValueError, match="this"):
        second.wait()
