"""The verbs against their list-of-ranks references: in-process ranks for generated cases, real processes for c10d."""

from typing import Any

import pytest
import torch
import torch.distributed as dist
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from moesaic.collectives import (
    Buffer,
    C10dTransport,
    CollectiveError,
    Transport,
    all_to_all_rows,
    direct_gather,
    sparse_all_gather,
    sparse_reduce_scatter,
)
from moesaic.collectives.reference import (
    all_to_all_rows_reference,
    sparse_all_gather_reference,
    sparse_reduce_scatter_reference,
)
from moesaic.placement import Placement
from moesaic.runtime.group import RankGroup
from tests.collectives.test_schedule import placements
from tests.helpers.ranks import run_ranks
from tests.helpers.threads import run_threads

ROWS, COLUMNS = 3, 5
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def items(placement: Placement, dtype: torch.dtype, seed: int = 0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(ROWS, COLUMNS, generator=generator).to(dtype) for _ in range(placement.num_experts)]


def contributions(placement: Placement, rank: int, dtype: torch.dtype) -> dict[int, Tensor]:
    values = items(placement, dtype, seed=1 + rank)
    return {e: values[e] for e in range(placement.num_experts) if placement.copies_RE[rank, e]}


def gather(transport: Transport, placement: Placement, dtype: torch.dtype) -> dict[int, Tensor]:
    """This rank's copies, received into poisoned buffers."""
    values = items(placement, dtype)
    owned = {e: (values[e],) for e in range(placement.num_experts) if placement.expert_to_owner_E[e] == transport.rank}
    copies = {e: torch.full((ROWS, COLUMNS), torch.nan, dtype=dtype) for e in contributions(placement, transport.rank, dtype)}
    sparse_all_gather(direct_gather(placement), transport, owned, {e: (t,) for e, t in copies.items()}, op="gather").wait()
    return copies


def reduce(transport: Transport, placement: Placement, dtype: torch.dtype) -> dict[int, Tensor]:
    """This rank's totals."""
    values = items(placement, dtype)
    totals = {e: values[e].clone() for e in range(placement.num_experts) if placement.expert_to_owner_E[e] == transport.rank}
    addends = {e: (t,) for e, t in contributions(placement, transport.rank, dtype).items()}
    reduce_on(transport, placement, addends, totals)
    return totals


def reduce_on(transport: Transport, placement: Placement, addends: Any, totals: dict[int, Tensor], limit: int = 2) -> None:
    """The reduce with staging for two contributions at a time, poisoned."""
    schedule = direct_gather(placement).transpose().limit_receives(limit)
    some = next(iter(totals.values()), torch.empty(0))
    staging = [(torch.full_like(some, torch.nan),) for _ in range(schedule.most_received(transport.rank))]
    assert len(staging) <= limit
    sparse_reduce_scatter(schedule, transport, addends, {e: (t,) for e, t in totals.items()}, staging, op="reduce").wait()


def assert_same(actual: dict[int, Tensor], expected: dict[int, Tensor]) -> None:
    assert actual.keys() == expected.keys()
    assert all(torch.equal(actual[e], expected[e]) for e in expected)


def check_sparse(placement: Placement, dtype: torch.dtype, gathered: list[Any], reduced: list[Any]) -> None:
    num_ranks = placement.num_ranks
    for rank, expected in enumerate(sparse_all_gather_reference(placement, items(placement, dtype))):
        assert_same(gathered[rank], expected)
    addends_R = [contributions(placement, r, dtype) for r in range(num_ranks)]
    totals_E = sparse_reduce_scatter_reference(placement, items(placement, dtype), addends_R)
    for rank in range(num_ranks):
        owned = {e: totals_E[e] for e in range(placement.num_experts) if placement.expert_to_owner_E[e] == rank}
        assert_same(reduced[rank], owned)


@settings(max_examples=60, deadline=None)
@given(placement=placements(max_ranks=9), dtype=st.sampled_from(DTYPES))
def test_sparse_verbs_equal_their_references(placement: Placement, dtype: torch.dtype) -> None:
    """Bitwise: the order of the sum is part of the meaning."""

    def body(group: RankGroup) -> Any:
        return gather(group.experts, placement, dtype), reduce(group.tokens, placement, dtype)

    results = run_threads(placement.num_ranks, body)
    check_sparse(placement, dtype, [r[0] for r in results], [r[1] for r in results])


def test_sixty_four_ranks() -> None:
    placement = Placement.everywhere(torch.arange(8).numpy() * 8, 64)
    results = run_threads(64, lambda group: gather(group.experts, placement, torch.float32))
    for rank, expected in enumerate(sparse_all_gather_reference(placement, items(placement, torch.float32))):
        assert_same(results[rank], expected)


@settings(max_examples=40, deadline=None)
@given(placement=placements(max_ranks=8))
def test_reduce_is_the_adjoint_of_gather(placement: Placement) -> None:
    """<gather(w), g> == <w, reduce(g)>, with owners' own contributions left at zero."""

    def body(group: RankGroup) -> tuple[float, float]:
        rank = group.rank
        copies = gather(group.experts, placement, torch.float32)
        addends = contributions(placement, rank, torch.float32)
        left = sum((copies[e].double() * addends[e].double()).sum().item() for e in copies)
        owned = [e for e in range(placement.num_experts) if placement.expert_to_owner_E[e] == rank]
        totals = {e: torch.zeros(ROWS, COLUMNS, dtype=torch.float64) for e in owned}
        doubled = {e: (t.double(),) for e, t in addends.items()}
        reduce_on(group.experts, placement, doubled, totals)
        values = items(placement, torch.float32)
        right = sum((values[e].double() * totals[e]).sum().item() for e in owned)
        return left, right

    results = run_threads(placement.num_ranks, body)
    assert sum(r[0] for r in results) == pytest.approx(sum(r[1] for r in results), abs=1e-9)


def exchange_rows(transport: Transport, rows_RR: list[list[Tensor]]) -> Tensor:
    rank, world_size = transport.rank, transport.world_size
    received = [torch.full_like(rows_RR[src][rank], torch.nan) for src in range(world_size)]
    received[rank] = rows_RR[rank][rank]
    sends = [[] if r == rank else [rows_RR[rank][r]] for r in range(world_size)]
    recvs = [[] if r == rank else [received[r]] for r in range(world_size)]
    all_to_all_rows(transport, sends, recvs, op="rows").wait()
    return torch.cat(received)


def some_rows(world_size: int, seed: int) -> list[list[Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    counts_RR = torch.randint(0, 4, (world_size, world_size), generator=generator).tolist()
    return [[torch.randn(n, COLUMNS, generator=generator) for n in row] for row in counts_RR]


@settings(max_examples=40, deadline=None)
@given(world_size=st.integers(1, 9), seed=st.integers(0, 10**6))
def test_all_to_all_rows_equals_its_reference(world_size: int, seed: int) -> None:
    """Uneven counts, zero included."""
    rows_RR = some_rows(world_size, seed)
    results = run_threads(world_size, lambda group: exchange_rows(group.tokens, rows_RR))
    for actual, expected in zip(results, all_to_all_rows_reference(rows_RR), strict=True):
        assert torch.equal(actual, expected)


def over_c10d(rank: int, placement: Placement, dtype: torch.dtype, seed: int) -> Any:
    transport = C10dTransport(dist.new_group(), timeout_s=30)
    results = gather(transport, placement, dtype), reduce(transport, placement, dtype)
    rows = exchange_rows(transport, some_rows(transport.world_size, seed))
    ints = transport.all_gather_ints(torch.tensor([rank, 10 * rank]))
    return *results, rows, ints, transport.traffic.bytes_R("gather"), transport.traffic.messages_R("reduce")


@pytest.mark.parametrize("world_size", [1, 2, 3, 4])
@pytest.mark.parametrize("dtype", DTYPES)
@settings(max_examples=5, deadline=None)
@given(data=st.data())
def test_c10d_on_real_processes(world_size: int, dtype: torch.dtype, data: st.DataObject) -> None:
    """Values, and the bytes and messages that the schedule says."""
    placement = data.draw(placements(max_ranks=world_size, min_ranks=world_size))
    results = run_ranks(world_size, over_c10d, placement, dtype, 7)
    check_sparse(placement, dtype, [r[0] for r in results], [r[1] for r in results])
    messages_RR = direct_gather(placement).num_messages_RR()
    for rank, (_, _, rows, ints, sent_bytes, reduced) in enumerate(results):
        assert torch.equal(rows, all_to_all_rows_reference(some_rows(world_size, 7))[rank])
        assert ints.tolist() == [[r, 10 * r] for r in range(world_size)]
        assert sent_bytes.tolist() == (messages_RR[rank] * ROWS * COLUMNS * dtype.itemsize).tolist()
        assert reduced.tolist() == messages_RR[:, rank].tolist()


def wait_for_a_silent_peer(rank: int) -> str:
    transport = C10dTransport(dist.new_group(), timeout_s=0.2)
    message = ""
    if rank == 0:
        buffer = Buffer(torch.empty(4), 1)
        with pytest.raises(CollectiveError) as failed:
            transport.exchange([], [buffer], op="dispatch", where="step 3, blocks.0.moe").wait()
        message = str(failed.value)
    return message


def test_a_silent_peer_is_named() -> None:
    """Invariant 10: the error names rank, operation, place, peer, bytes and the limit."""
    message = run_ranks(2, wait_for_a_silent_peer)[0]
    for part in ("rank 0", "dispatch", "step 3, blocks.0.moe", "0.2 s", "16 B from rank 1"):
        assert part in message
    assert "\n" not in message
