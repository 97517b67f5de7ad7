"""The transport through shared memory when something is wrong: what errors say, who is noticed, what is left behind."""

import contextlib
import gc
import os
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist

from moesaic.collectives import Buffer, CollectiveError, make_transports
from tests.helpers.ranks import RankPool, run_ranks
from tests.helpers.transports import shm


def wait_for_nobody(rank: int) -> list[str]:
    transport = shm(timeout_s=0.3)
    texts = []
    if rank == 0:
        for sends, recvs in (([], [Buffer(torch.empty(6), 1)]), ([Buffer(torch.empty(5), 1)], [])):
            with pytest.raises(CollectiveError) as failed:
                transport.exchange(sends, recvs, op="dispatch", where="step 3, moe").wait()
            texts.append(str(failed.value))
        with pytest.raises(CollectiveError) as failed:
            transport.all_gather_ints(torch.zeros(2, dtype=torch.int64), where="step 4")
        texts.append(str(failed.value))
    dist.barrier()
    return texts


def test_a_silent_peer_is_named() -> None:
    assert run_ranks(2, wait_for_nobody)[0] == [
        "rank 0: dispatch at step 3, moe: did not complete within 0.3 s (received 0 of 24 B, 24 B from rank 1 are missing)",
        "rank 0: dispatch at step 3, moe: did not complete within 0.3 s (received 0 of 0 B, 20 B to rank 1 were not taken)",
        "rank 0: gather of 2 integers at step 4: rank 1 is absent after 0.3 s",
    ]


def open_files(pid: int | str = "self") -> list[str]:
    """The names of the files that a process has open; none if it is no more."""
    names = []
    with contextlib.suppress(FileNotFoundError):
        for link in Path(f"/proc/{pid}/fd").iterdir():
            with contextlib.suppress(FileNotFoundError):  # that of the listing itself
                names.append(os.readlink(link))
    return names


def disagree(rank: int) -> str:
    transport, other = shm(), 1 - rank
    if rank == 0:
        transport.exchange([Buffer(torch.zeros(3), other)], [], op="combine", where="step 1").wait(until_sent=False)
        return ""
    with pytest.raises(CollectiveError) as failed:
        transport.exchange([], [Buffer(torch.zeros(4), other)], op="combine", where="step 1").wait()
    return str(failed.value)


def test_ranks_that_expect_other_bytes_are_told() -> None:
    assert run_ranks(2, disagree)[1] == (
        "rank 1: combine at step 1: rank 0 sent 12 B where 16 B were expected; the ranks are at different places of the program"
    )


def be_in_different_layers(rank: int, has_been_there: bool) -> str:
    """Both ranks exchange as many bytes, rank 0 those of the second layer, rank 1 those of the first."""
    transport, other = shm(), 1 - rank
    if has_been_there:
        for layer in range(2):
            transport.exchange([], [], op="combine_backward", where=f"step 1, blocks.{layer}.moe").wait()
    sends, recvs = [Buffer(torch.ones(3), other)], [Buffer(torch.full((3,), -1.0), other)]
    with pytest.raises(CollectiveError) as failed:
        transport.exchange(sends, recvs, op="combine_backward", where=f"step 1, blocks.{other}.moe").wait()
    assert (recvs[0].tensor == -1).all(), "rows of another layer"
    return str(failed.value)


@pytest.mark.parametrize("has_been_there", [True, False])
def test_ranks_in_different_layers_are_told_what_came(has_been_there: bool) -> None:
    """Each names its own place and, where it knows that place, the other's; nothing is copied."""
    for rank, text in enumerate(run_ranks(2, be_in_different_layers, has_been_there)):
        came = f"combine_backward at step 1, blocks.{rank}.moe" if has_been_there else "something that this rank has not come to"
        assert text == (
            f"rank {rank}: combine_backward at step 1, blocks.{1 - rank}.moe: rank {1 - rank} sent {came}; the ranks are at "
            "different places of the program: every rank must run the same layers in the same order, in forward and in backward"
        )


def disagree_about_integers(rank: int) -> str:
    transport = shm(timeout_s=5.0)
    with pytest.raises(CollectiveError) as failed:
        transport.all_gather_ints(torch.arange(2 + rank), where="step 1")
    return str(failed.value)


def test_ranks_that_gather_other_integers_are_told() -> None:
    assert run_ranks(2, disagree_about_integers) == [
        f"rank {rank}: gather of {2 + rank} integers at step 1: rank {1 - rank} shows {3 - rank}; "
        "the ranks are at different places of the program"
        for rank in range(2)
    ]


def wait_inside_a_node(rank: int) -> list[str]:
    """Ranks 2 and 3 share a node, and rank 2 is silent."""
    group, texts = dist.group.WORLD, []
    assert group is not None
    with mock.patch("moesaic.collectives.transports.choose.nodes_of_group", return_value=[0, 0, 1, 1]):
        (transport,) = make_transports("hierarchical", group, num_transports=1, timeout_s=0.3)
    if rank == 3:
        for sends, recvs in (([], [Buffer(torch.empty(6), 2)]), ([Buffer(torch.empty(5), 2)], [])):
            with pytest.raises(CollectiveError) as failed:
                transport.exchange(sends, recvs, op="dispatch").wait()
            texts.append(str(failed.value))
        with pytest.raises(CollectiveError) as failed:
            transport.all_gather_ints(torch.tensor([0]))
        texts.append(str(failed.value))
    dist.barrier()
    return texts


def test_errors_inside_a_node_name_the_ranks_of_the_group() -> None:
    assert run_ranks(4, wait_inside_a_node)[3] == [
        "rank 3: dispatch: did not complete within 0.3 s (received 0 of 24 B, 24 B from rank 2 are missing)",
        "rank 3: dispatch: did not complete within 0.3 s (received 0 of 0 B, 20 B to rank 2 were not taken)",
        "rank 3: gather of 1 integers: rank 2 is absent after 0.3 s",
    ]


def break_off_and_wait_again(rank: int) -> None:
    transport, received = shm(), torch.full((3,), torch.nan)
    pending = transport.exchange([Buffer(torch.ones(3), 1 - rank)], [Buffer(received, 1 - rank)], op="combine")
    with mock.patch.object(transport, "look", side_effect=KeyboardInterrupt), pytest.raises(KeyboardInterrupt):
        pending.wait()
    pending.wait()
    assert received.tolist() == [1.0, 1.0, 1.0]


def test_an_exchange_can_be_waited_for_again() -> None:
    run_ranks(2, break_off_and_wait_again)


def make_and_drop_transports(rank: int) -> None:
    def make() -> None:
        transport, other = shm(), 1 - rank
        buffers = [transport.empty((1 << 20,), torch.empty(0)).fill_(rank) for _ in range(2)]
        transport.exchange([Buffer(buffers[0], other)], [Buffer(buffers[1], other)], op="both").wait()
        assert buffers[1][-1] == other

    def held() -> list[str]:
        gc.collect()
        dist.barrier()
        maps = Path("/proc/self/maps").read_text(encoding="utf-8").splitlines()
        return sorted(name for name in open_files() if "moesaic" in name or "pidfd" in name) + [m for m in maps if "moesaic" in m]

    before = held()
    for _ in range(3):
        make()
    assert held() == before


def test_a_transport_that_is_dropped_holds_nothing() -> None:
    run_ranks(2, make_and_drop_transports)


def run_while_ranks_end(world_size: int, body: Callable[..., Any]) -> list[Any]:
    """Like `run_ranks`, in processes that are killed when this is over; None of those that ended before."""
    pool = RankPool(world_size, may_end=True)
    try:
        return pool.run(body)
    finally:
        pool.stop()


def kill_a_peer(rank: int) -> tuple[str, set[str]] | None:
    transport, other, pids = shm(timeout_s=100.0), 1 - rank, [0, 0]
    dist.all_gather_object(pids, os.getpid())
    keep = transport.empty((1 << 22,), torch.empty(0)).fill_(1)
    transport.exchange([Buffer(keep, other)], [Buffer(torch.empty(1 << 22), other)], op="both").wait()
    if rank == 0:
        time.sleep(100)
        return None
    files = [name for pid in pids for name in open_files(pid)]
    assert not any(name.startswith("/dev/shm/") for name in files), "memory with a name could outlive the job"
    segments = {segment for pid in pids for segment in mapped_segments(pid)}
    pending = transport.exchange([], [Buffer(torch.empty(2), 0)], op="dispatch", where="step 7")
    os.kill(pids[0], signal.SIGKILL)
    start_s = time.monotonic()
    with pytest.raises(CollectiveError) as failed:
        pending.wait()
    assert time.monotonic() - start_s < 50  # far from the transport's limit of 100 s
    return str(failed.value), segments


def test_a_killed_rank_is_noticed_and_no_segment_outlives_the_last() -> None:
    _, found = run_while_ranks_end(2, kill_a_peer)
    text, segments = found
    assert text == "rank 1: dispatch at step 7: rank 0 is gone (received 0 of 8 B, 8 B from rank 0 are missing)"
    assert len(segments) >= 4  # a control segment and a data segment each
    alive = [int(path.name) for path in Path("/proc").iterdir() if path.name.isdigit()]
    assert not segments & {segment for pid in alive for segment in mapped_segments(pid)}


def mapped_segments(pid: int) -> set[str]:
    """The inodes of the segments that a process maps; none if it is no more."""
    try:
        lines = Path(f"/proc/{pid}/maps").read_text(encoding="utf-8").splitlines()
    except OSError:
        return set()
    return {line.split()[4] for line in lines if "memfd:moesaic" in line}


def end_after_sending(rank: int) -> str:
    """Rank 0 is gone before rank 1 has mapped the segment in which the message lies."""
    transport, pids = shm(timeout_s=100.0), [0, 0]
    dist.all_gather_object(pids, os.getpid())
    if rank == 0:
        transport.exchange([Buffer(torch.ones(1000), 1)], [], op="dispatch", where="step 1")
        os._exit(0)
    while open_files(pids[0]):
        time.sleep(0.01)
    with pytest.raises(CollectiveError) as failed:
        transport.exchange([], [Buffer(torch.empty(1000), 0)], op="dispatch", where="step 1").wait()
    return str(failed.value)


def test_memory_of_a_rank_that_was_gone_before_anybody_mapped_it() -> None:
    assert run_while_ranks_end(2, end_after_sending)[1] == (
        "rank 1: dispatch at step 1: rank 0 is gone (received 0 of 4000 B, 4000 B from rank 0 are missing)"
    )


def ring_until_noticed(rank: int) -> str:
    """Rank 0 is gone, which rank 1 waits for, while rank 2 wakes it all the time."""
    transport = shm(timeout_s=100.0)
    if rank == 0:
        os._exit(0)
    if rank == 1:
        with pytest.raises(CollectiveError) as failed:
            transport.exchange([], [Buffer(torch.empty(2), 0)], op="dispatch").wait()
        transport.exchange([Buffer(torch.ones(1), 2)], [], op="noticed").wait(until_sent=False)
        return str(failed.value)
    noticed = torch.zeros(1)
    pending = transport.exchange([], [Buffer(noticed, 1)], op="noticed")
    end_s = time.monotonic() + 20
    while not noticed.item() and time.monotonic() < end_s:
        transport.exchange([Buffer(torch.ones(1), 1)], [], op="ring").wait(until_sent=False)
        time.sleep(0.02)
        transport.look(pending, False, 0)
    return "noticed" if noticed.item() else "too late"


def test_a_rank_that_is_woken_all_the_time_notices_who_is_gone() -> None:
    assert run_while_ranks_end(3, ring_until_noticed)[1:] == [
        "rank 1: dispatch: rank 0 is gone (received 0 of 8 B, 8 B from rank 0 are missing)",
        "noticed",
    ]
