"""The transport through shared memory: values, order, growth."""

import gc
import os
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch

from moesaic.collectives import Buffer, RowLayout, RowPart, sparse_all_gather
from moesaic.collectives.hops import Copies
from moesaic.collectives.schedules.relay import chain_hops
from moesaic.collectives.transports import shm_control
from moesaic.collectives.transports.shm_control import MAX_INTS, RING
from moesaic.collectives.transports.shm_memory import Arena, Segment, open_segment
from moesaic.placement import Placement
from tests.helpers.ranks import run_ranks
from tests.helpers.transports import check_transport, shm


def use_it(rank: int) -> None:
    check_transport(shm())


@pytest.mark.parametrize("world_size", [1, 2, 3, 4])
def test_it_does_what_a_transport_must(world_size: int) -> None:
    run_ranks(world_size, use_it)


def send_more_than_a_ring_holds(rank: int) -> None:
    transport, other = shm(), 1 - rank
    count = 3 * RING + 7
    sent = [torch.tensor([1000.0 * rank + i]) for i in range(count)]
    received = [torch.full((1,), torch.nan) for _ in range(count)]
    # Both send everything before either reads anything.
    sending = transport.exchange([Buffer(t, other) for t in sent], [], op="many")
    transport.exchange([], [Buffer(t, other) for t in received], op="many").wait()
    sending.wait()
    assert torch.cat(received).tolist() == [1000.0 * other + i for i in range(count)]


def test_more_messages_than_a_ring_holds() -> None:
    run_ranks(2, send_more_than_a_ring_holds)


def send_past_a_full_ring(rank: int) -> None:
    """Rank 1 reads what rank 0 sent it only after a word from rank 2, which waits for rank 0."""
    transport, count = shm(timeout_s=30.0), RING + 5
    if rank == 0:
        many = [Buffer(torch.tensor([i]), 1) for i in range(count)]
        transport.exchange([*many, Buffer(torch.tensor([-1]), 2)], [], op="both").wait()
        return
    word, received = torch.tensor([7]), torch.full((count,), 101)
    if rank == 2:
        transport.exchange([], [Buffer(word, 0)], op="both").wait()
        transport.exchange([Buffer(word, 1)], [], op="word").wait()
    else:
        transport.exchange([], [Buffer(word, 2)], op="word").wait()
        transport.exchange([], [Buffer(part, 0) for part in received.split(1)], op="both").wait()
        assert received.tolist() == list(range(count))
    assert word.item() == -1


def test_a_full_ring_holds_up_nobody_else() -> None:
    run_ranks(3, send_past_a_full_ring)


def gather_before_the_rest_is_posted(rank: int) -> None:
    transport, count = shm(timeout_s=30.0), RING + 5
    parts = torch.arange(count) if rank == 0 else torch.full((count,), -1)
    buffers = [Buffer(part, 1 - rank) for part in parts.split(1)]
    if rank == 0:
        sending = transport.exchange(buffers, [], op="many")
        transport.all_gather_ints(torch.tensor([0]))
        sending.wait()
    else:
        transport.exchange([], buffers, op="many").wait()
        transport.all_gather_ints(torch.tensor([0]))
        assert parts.tolist() == list(range(count))


def test_integers_are_gathered_while_messages_are_still_to_be_posted() -> None:
    run_ranks(2, gather_before_the_rest_is_posted)


def pass_on_more_than_a_ring_holds(rank: int) -> None:
    """Rank 1 passes on more messages than a ring holds, and rank 2 takes them after a word from rank 1 on another transport."""
    tokens, experts = shm(timeout_s=30.0), shm(timeout_s=30.0)
    placement = Placement.everywhere(np.zeros(1, np.int64), 3)
    chain = chain_hops(Copies.of(placement)).cut(RING + 5).schedule()
    owned = {0: [torch.arange(2.0 * RING)]} if rank == 0 else {}
    copies = [{0: [torch.full((2 * RING,), torch.nan)]} if rank else {} for _ in range(2)]
    gathers = [sparse_all_gather(chain, experts, owned, copy, op="gather") for copy in copies]
    tokens.all_gather_ints(torch.tensor([rank]))
    for gather in gathers:
        gather.wait()
    assert all(torch.equal(item[0], torch.arange(2.0 * RING)) for copy in copies for item in copy.values())


def test_a_wait_on_one_transport_posts_what_another_has_left() -> None:
    run_ranks(3, pass_on_more_than_a_ring_holds)


def send_to_itself(rank: int) -> None:
    transport, received = shm(timeout_s=5.0), torch.empty(3)
    transport.exchange([Buffer(torch.arange(3.0), rank)], [Buffer(received, rank)], op="self").wait()
    assert received.tolist() == [0.0, 1.0, 2.0]


def test_a_rank_may_send_to_itself() -> None:
    run_ranks(2, send_to_itself)


def send_one_tensor_to_all(rank: int) -> None:
    transport, message = shm(), torch.arange(1000.0) + rank
    peers = [peer for peer in range(transport.world_size) if peer != rank]
    received = {peer: torch.empty(1000) for peer in peers}
    recvs = [Buffer(into, peer) for peer, into in received.items()]
    with mock.patch.object(transport._arena, "empty", wraps=transport._arena.empty) as staged:
        transport.exchange([Buffer(message, peer) for peer in peers], recvs, op="all").wait()
    assert staged.call_count == 1
    assert all(torch.equal(into, torch.arange(1000.0) + peer) for peer, into in received.items())


def test_what_goes_to_several_ranks_is_staged_once() -> None:
    run_ranks(3, send_one_tensor_to_all)


def send_one_row(rank: int) -> None:
    """torch calls a tensor of one row contiguous whatever lies between its rows."""
    transport, other = shm(), 1 - rank
    wide, received = torch.arange(12.0).view(2, 6) + 100 * rank, torch.full((1, 3), torch.nan)
    layout = RowLayout([RowPart(other, 0, 1)], [RowPart(other, 0, 1)])
    for row in (wide[:1, :3], wide[0, :3].expand(1, 3)):
        transport.exchange_rows(layout, row, received, op="row").wait()
        assert received.tolist() == [[100.0 * other, 100.0 * other + 1, 100.0 * other + 2]]


def test_one_row_of_a_wider_tensor() -> None:
    run_ranks(2, send_one_row)


def ask_for_rows_that_there_are_not(rank: int) -> None:
    transport, other = shm(), 1 - rank
    layout = RowLayout([RowPart(other, 1, 2)], [RowPart(other, 0, 2)])
    rows = torch.zeros(4, 3)
    for outgoing, incoming in ((rows[:2], rows), (rows, rows[:1]), (rows[:, :2], rows), (rows, rows.T)):
        with pytest.raises(AssertionError, match="rows"):
            transport.exchange_rows(layout, outgoing, incoming, op="rows")
    for sends, recvs in (([Buffer(rows[:, :2], other)], []), ([], [Buffer(rows[:, :2], other)])):
        with pytest.raises(AssertionError, match="contiguous"):
            transport.exchange(sends, recvs, op="rows")


def test_rows_beyond_a_tensor_are_refused() -> None:
    """What the compiled loops would read or overwrite there belongs to somebody else."""
    run_ranks(2, ask_for_rows_that_there_are_not)


def drop_what_was_sent(rank: int) -> None:
    """Without `until_sent` a tensor may be dropped at once; its memory is not reused before the peer has read it."""
    transport, other = shm(), 1 - rank
    like = torch.empty(0)
    if rank == 0:
        for i in range(20):
            transport.exchange([Buffer(transport.empty((1000,), like).fill_(i), 1)], [], op="drop").wait(until_sent=False)
        assert not transport.all_gather_ints(torch.tensor([0])).any()
    else:
        transport.all_gather_ints(torch.tensor([0]))
        received = [torch.empty(1000) for _ in range(20)]
        transport.exchange([], [Buffer(t, other) for t in received], op="drop").wait()
        assert [t.unique().tolist() for t in received] == [[float(i)] for i in range(20)]
    transport.all_gather_ints(torch.tensor([0]))


def test_dropped_tensors_live_until_they_are_read() -> None:
    run_ranks(2, drop_what_was_sent)


def gather_many_integers(rank: int) -> None:
    values = torch.arange(2 * MAX_INTS + 3) + rank
    assert torch.equal(shm().all_gather_ints(values), torch.stack([torch.arange(2 * MAX_INTS + 3) + r for r in range(2)]))


def test_more_integers_than_a_board_holds() -> None:
    run_ranks(2, gather_many_integers)


def pass_on(rank: int, cache_bytes: int, counts: list[int]) -> list[tuple[Any, list[int]]]:
    """Bytes at odd addresses go round a ring of ranks, each of which passes on what it has just received."""
    with mock.patch("moesaic.collectives.transports.shm.cache_bytes", return_value=cache_bytes):
        transport = shm()
    world_size = transport.world_size
    right, left = (rank + 1) % world_size, (rank - 1) % world_size
    results = []
    for count in counts:
        message = torch.arange(count, dtype=torch.int64).to(torch.uint8) + rank
        for step in range(world_size):
            outgoing = transport.empty((count + step,), message)[step:].copy_(message)
            received = torch.full((count + 7,), 255, dtype=torch.uint8)
            incoming = transport.empty((count + 7,), message).fill_(255) if step % 2 else received
            into = incoming[step + 1 :][:count]
            transport.exchange([Buffer(outgoing, right)], [Buffer(into, left)], op="ring").wait()
            edges = [*incoming[: step + 1].tolist(), *incoming[step + 1 + count :].tolist()]
            message = into
        results.append((bool((message == torch.arange(count, dtype=torch.int64).to(torch.uint8) + rank).all()), edges))
    return results


@pytest.mark.parametrize("cache_bytes", [0, 1 << 62], ids=["past the caches", "through the caches"])
def test_bytes_come_whole_past_the_caches_and_through_them(cache_bytes: int) -> None:
    """Also those before the first whole line and behind the last; nothing beside them is touched."""
    counts = [(64 << 10) - 1, 64 << 10, (64 << 10) + 1, 300_007]
    for results in run_ranks(3, pass_on, cache_bytes, counts):
        assert results == [(True, [255] * 7)] * len(counts)


def test_what_goes_past_the_caches() -> None:
    """What all ranks read and where they put it, where that fills the caches; ranks that read nothing count nothing."""
    controls = [np.zeros(shm_control.Control.nbytes(3) // 8, np.int64) for _ in range(3)]
    controls_R = np.array([control.ctypes.data for control in controls])
    for rank, num_bytes in enumerate([1000, 0, 500]):
        shm_control._announce(controls_R, rank, num_bytes)
    assert shm_control._outgrows(controls_R, 3000)
    assert not shm_control._outgrows(controls_R, 3001)


def test_an_arena_reuses_and_grows() -> None:
    segments: list[Segment] = []
    arena = Arena(segments.append)
    first = arena.empty((3, 5), torch.bfloat16)
    assert first.shape == (3, 5)
    assert first.dtype == torch.bfloat16
    address = first.data_ptr()
    view = first[1:]
    del first
    gc.collect()
    second = arena.empty((3, 5), torch.bfloat16)
    assert second.data_ptr() != address, "the view still lives"
    del view
    gc.collect()
    assert arena.empty((15,), torch.float16).data_ptr() == address
    large = arena.empty((5 << 20,), torch.float32)
    large.fill_(7.0)
    assert [segment.address for segment in segments] == [address, large.data_ptr()]
    assert arena.empty((0, 4), torch.float32).shape == (0, 4)
    again = open_segment(os.getpid(), segments[1].fd, segments[1].nbytes)
    assert torch.frombuffer(again.memory, dtype=torch.float32)[5] == 7.0
