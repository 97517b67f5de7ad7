"""The transport over torch.distributed where something goes wrong: what its errors say, and what is left of an exchange."""

import gc
import time
from collections.abc import Callable
from contextlib import suppress
from unittest import mock

import pytest
import torch
import torch.distributed as dist

from moesaic.collectives import Buffer, C10dTransport, CollectiveError, make_transports
from tests.helpers.ranks import run_ranks


def c10d(timeout_s: float, *, group_s: float = 30.0) -> C10dTransport:
    """A transport, and how long its ranks have to come together."""
    group = dist.group.WORLD
    assert group is not None
    (transport,) = make_transports("c10d", group, num_transports=1, timeout_s=group_s)
    assert isinstance(transport, C10dTransport)
    transport.timeout_s = timeout_s
    return transport


def failure(action: Callable[[], object]) -> str:
    with pytest.raises(CollectiveError) as failed:
        action()
    return str(failed.value)


def wait_for_a_silent_peer(rank: int, peers: list[int]) -> list[str]:
    """Rank 0 waits for all, of whom rank 2 is silent; then once more."""
    transport, where = c10d(1.0), "step 3, blocks.0.moe"
    if rank == 1:
        transport.exchange([Buffer(torch.ones(6), 0)], [], op="dispatch", where=where).wait()
    messages = []
    if rank == 0:
        recvs = [Buffer(torch.zeros(6 if peer == 1 else 4), peer) for peer in peers]
        pending = transport.exchange([], recvs, op="dispatch", where=where)
        messages = [failure(pending.wait) for _ in range(2)]
    dist.barrier()
    return messages


@pytest.mark.parametrize("peers", [[1, 2], [2, 1]])
def test_a_silent_peer_is_named(peers: list[int]) -> None:
    """Invariant 10: rank, operation, place, limit, the bytes that came and those that did not; the same when asked again."""
    for message in run_ranks(3, wait_for_a_silent_peer, peers)[0]:
        assert message.startswith(
            "rank 0: dispatch at step 3, blocks.0.moe did not complete within 1 s "
            "(received 24 of 40 B, 16 B from rank 2 are missing): "
        )
        assert "\n" not in message


def receive_drop_by_drop(rank: int) -> str:
    """Each message comes within the limit, all of them do not."""
    transport = c10d(1.0)
    if rank == 0:
        return failure(transport.exchange([], [Buffer(torch.zeros(1), 1) for _ in range(6)], op="dispatch").wait)
    with suppress(CollectiveError):  # the receiver has gone
        for _ in range(6):
            time.sleep(0.4)
            transport.exchange([Buffer(torch.ones(1), 0)], [], op="dispatch").wait()
    return ""


def test_the_limit_is_that_of_the_wait_not_of_each_message() -> None:
    assert "did not complete within 1 s" in run_ranks(2, receive_drop_by_drop)[0]


def wait_again_after_an_interrupt(rank: int, has_arrived: bool) -> list[float]:
    transport = c10d(30.0)
    received = [torch.zeros(1), torch.zeros(1)]
    if rank == 1:
        transport.exchange([Buffer(torch.ones(1), 0), Buffer(torch.ones(1), 0)], [], op="dispatch").wait()
        return []

    def interrupted(work: dist.Work, limit_s: float) -> None:
        """Python raises when torch has returned."""
        if has_arrived:
            C10dTransport.wait_for(transport, work, limit_s)
        raise KeyboardInterrupt

    pending = transport.exchange([], [Buffer(tensor, 1) for tensor in received], op="dispatch")
    with mock.patch.object(transport, "wait_for", interrupted), pytest.raises(KeyboardInterrupt):
        pending.wait()
    pending.wait()
    return torch.cat(received).tolist()


@pytest.mark.parametrize("has_arrived", [False, True])
def test_an_interrupted_wait_can_be_taken_up_again(has_arrived: bool) -> None:
    """Every message is waited for, and none twice, which Gloo would never answer."""
    assert run_ranks(2, wait_again_after_an_interrupt, has_arrived)[0] == [1.0, 1.0]


def leave_a_gather(rank: int) -> str:
    """Rank 1 comes only when rank 0 has put the group away; the group's threads are joined there, as at the end of a process."""
    dist.barrier()
    transport, message = c10d(1.0, group_s=2.0), ""
    if rank == 0:
        message = failure(lambda: transport.all_gather_ints(torch.tensor([1, 2]), where="step 4"))
        dist.destroy_process_group(transport.group)
        del transport
        gc.collect()
    dist.barrier()
    return message


def test_a_gather_that_failed_does_not_keep_the_process() -> None:
    assert run_ranks(2, leave_a_gather)[0].startswith(
        "rank 0: gather of 2 integers at step 4 did not complete within 1 s "
        "(received 0 of 16 B, 16 B from rank 1 are missing, 16 B to rank 1 were not taken): "
    )


def gather_another_number(rank: int) -> str:
    """Rank 1 gathers more integers than rank 0, whose limit is the shorter."""
    transport = c10d(30.0 if rank else 1.0)
    return failure(lambda: transport.all_gather_ints(torch.arange(2 + rank), where=f"step {rank}"))


def test_gathers_of_different_sizes_never_meet() -> None:
    """Gloo would end the process that receives the longer one."""
    first, second = run_ranks(2, gather_another_number)
    assert first.startswith("rank 0: gather of 2 integers at step 0 did not complete within 1 s (received 0 of 16 B")
    assert second.startswith("rank 1: gather of 3 integers at step 1 failed (received 0 of 24 B")


def be_in_different_layers(rank: int, first: int) -> str:
    """Both ranks exchange as many bytes, rank 0 those of the second layer, rank 1 of the first. `first` has the shorter limit."""
    transport, other = c10d(1.0 if rank == first else 30.0), 1 - rank
    sends, recvs = [Buffer(torch.ones(3), other)], [Buffer(torch.full((3,), -1.0), other)]

    def exchange() -> None:
        transport.exchange(sends, recvs, op="combine_backward", where=f"step 1, blocks.{other}.moe").wait()

    message = failure(exchange)
    assert (recvs[0].tensor == -1).all(), "rows of another layer"
    return message


@pytest.mark.parametrize("first", [0, 1])
def test_messages_of_different_layers_never_meet(first: int) -> None:
    """Each rank names what it waits for, and what nobody took.

    Gloo closes the connections of a rank whose limit is over, so that the others fail at once.
    """
    for rank, message in enumerate(run_ranks(2, be_in_different_layers, first)):
        ending = "did not complete within 1 s" if rank == first else "failed"
        assert message.startswith(
            f"rank {rank}: combine_backward at step 1, blocks.{1 - rank}.moe {ending} "
            f"(received 0 of 12 B, 12 B from rank {1 - rank} are missing, 12 B to rank {1 - rank} were not taken): "
        )


def test_on_nccl_the_host_does_not_wait() -> None:
    """A work of NCCL that is waited for with a limit blocks the host; without one, the current stream."""
    work = mock.Mock(spec=dist.Work)
    with (
        mock.patch.multiple(dist, get_backend=lambda _: "nccl", get_rank=lambda _: 0, get_world_size=lambda _: 2),
        mock.patch.multiple(dist, P2POp=mock.DEFAULT, batch_isend_irecv=lambda _: [work], all_gather=lambda *_, **__: work),
    ):
        transport = C10dTransport(mock.Mock(), timeout_s=1.0)
        assert transport.thread is None
        transport.exchange([Buffer(torch.ones(1), 1)], [Buffer(torch.ones(1), 1)], op="dispatch").wait()
        transport.all_gather_ints(torch.tensor([1]))
    assert work.wait.call_args_list == [mock.call(), mock.call()]
