"""The transport through shared memory: values, order, growth, what is left behind, what its errors say."""

import gc
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist

from moesaic.collectives import Buffer, CollectiveError, RowLayout, RowPart, make_transports
from moesaic.collectives.transports import shm_control
from moesaic.collectives.transports.shm import ShmTransport
from moesaic.collectives.transports.shm_control import MAX_INTS, RING
from moesaic.collectives.transports.shm_memory import Arena, Segment, open_segment
from tests.helpers.ranks import run_ranks
from tests.helpers.transports import check_transport


def shm(timeout_s: float = 60.0) -> ShmTransport:
    group = dist.group.WORLD
    assert group is not None
    (transport,) = make_transports("shm", group, num_transports=1, timeout_s=timeout_s)
    assert isinstance(transport, ShmTransport)
    return transport


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


def ask_for_rows_that_there_are_not(rank: int) -> None:
    transport, other = shm(), 1 - rank
    layout = RowLayout([RowPart(other, 1, 2)], [RowPart(other, 0, 2)])
    rows = torch.zeros(4, 3)
    for outgoing, incoming in ((rows[:2], rows), (rows, rows[:1]), (rows[:, :2], rows), (rows, rows.T)):
        with pytest.raises(AssertionError, match="rows"):
            transport.exchange_rows(layout, outgoing, incoming, op="rows")


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


def wait_for_nobody(rank: int) -> list[str]:
    transport = shm(timeout_s=0.3)
    texts = []
    if rank == 0:
        for sends, recvs in (([], [Buffer(torch.empty(6), 1)]), ([Buffer(torch.empty(5), 1)], [])):
            with pytest.raises(CollectiveError) as failed:
                transport.exchange(sends, recvs, op="dispatch", where="step 3, blocks.0.moe").wait()
            texts.append(str(failed.value))
        with pytest.raises(CollectiveError) as failed:
            transport.all_gather_ints(torch.zeros(2, dtype=torch.int64), where="step 4")
        texts.append(str(failed.value))
    dist.barrier()
    return texts


def test_a_silent_peer_is_named() -> None:
    assert run_ranks(2, wait_for_nobody)[0] == [
        "rank 0: dispatch at step 3, blocks.0.moe: did not complete within 0.3 s (received 0 of 24 B, missing 24 B from rank 1)",
        "rank 0: dispatch at step 3, blocks.0.moe: did not complete within 0.3 s (received 0 of 0 B, 20 B not read by rank 1)",
        "rank 0: gather of 2 integers at step 4: rank 1 is absent after 0.3 s",
    ]


def disagree(rank: int) -> str:
    transport, other = shm(), 1 - rank
    if rank == 0:
        transport.exchange([Buffer(torch.zeros(3), other)], [], op="combine").wait(until_sent=False)
        return ""
    with pytest.raises(CollectiveError) as failed:
        transport.exchange([], [Buffer(torch.zeros(4), other)], op="combine", where="step 1").wait()
    return str(failed.value)


def test_ranks_at_different_places_are_told() -> None:
    assert run_ranks(2, disagree)[1] == (
        "rank 1: combine at step 1: rank 0 sent 12 B where 16 B were expected; the ranks are at different places of the program"
    )


def pass_on(rank: int, cache_bytes: int, counts: list[int]) -> list[tuple[Any, list[int]]]:
    """Bytes at odd addresses go round a ring of ranks, each of which passes on what it has just received."""
    transport = shm()
    transport._cache_bytes = cache_bytes
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


VICTIM = """
import os, sys, time, torch, torch.distributed as dist
from moesaic.collectives import Buffer, make_transports
rank = int(sys.argv[1])
dist.init_process_group("gloo", store=dist.FileStore(sys.argv[2], 2), rank=rank, world_size=2)
(transport,) = make_transports("shm", dist.group.WORLD, num_transports=1, timeout_s=100)
keep = transport.empty((1 << 22,), torch.empty(0)).fill_(1)
transport.exchange([Buffer(keep, 1 - rank)], [Buffer(torch.empty(1 << 22), 1 - rank)], op="both").wait()
print("ready", flush=True)
if rank == 0:
    time.sleep(100)
else:
    transport.exchange([], [Buffer(torch.empty(2), 0)], op="dispatch", where="step 7").wait()
"""


def open_files(pid: int) -> list[str]:
    return [os.readlink(link) for link in Path(f"/proc/{pid}/fd").iterdir()]


@pytest.mark.parametrize("everybody", [False, True], ids=["one", "all"])
def test_a_killed_rank_is_noticed_and_leaves_nothing(everybody: bool, tmp_path: Path) -> None:
    ranks = [
        subprocess.Popen(
            [sys.executable, "-c", VICTIM, str(rank), str(tmp_path / "store")],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    for rank in ranks:
        assert rank.stdout is not None
        assert rank.stdout.readline() == "ready\n"
    files = [name for rank in ranks for name in open_files(rank.pid)]
    assert any("memfd:moesaic" in name for name in files)
    assert not any(name.startswith("/dev/shm/") for name in files), "memory with a name could outlive the job"
    start_s = time.monotonic()
    for rank in ranks if everybody else ranks[:1]:
        os.kill(rank.pid, signal.SIGKILL)
    errors = [rank.communicate(timeout=60)[1] for rank in ranks]
    if not everybody:
        assert time.monotonic() - start_s < 50  # far from the transport's limit of 100 s
        assert ranks[1].returncode == 1
        assert "rank 1: dispatch at step 7: rank 0 is gone (received 0 of 8 B, missing 8 B from rank 0)" in errors[1]


def test_an_arena_reuses_and_grows() -> None:
    segments: list[Segment] = []
    arena = Arena(segments.append)
    first = arena.empty((3, 5), torch.bfloat16)
    assert first.shape == (3, 5)
    assert first.dtype == torch.bfloat16
    place, address = arena.place_of(first), first.data_ptr()
    assert place is not None
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
    found = arena.place_of(large[4:])
    assert len(segments) == 2
    assert found is not None
    assert (found.segment, found.offset) == (1, 16)
    assert arena.place_of(torch.empty(4)) is None
    assert arena.empty((0, 4), torch.float32).shape == (0, 4)
    again = open_segment(os.getpid(), segments[1].fd, segments[1].nbytes)
    assert torch.frombuffer(again.memory, dtype=torch.float32)[5] == 7.0
