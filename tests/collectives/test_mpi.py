"""The transport over MPI: ranks under mpirun, its errors, and how a job ends when a rank fails."""

import os
import subprocess
import sys
from pathlib import Path
from unittest.mock import patch

import pytest
import torch
import torch.distributed as dist

from moesaic.collectives import Buffer, CollectiveError
from moesaic.collectives.transports.choose import make_transports
from moesaic.collectives.transports.mpi import MpiTransport
from tests.helpers.mpi import mpi_environment, mpirun, run_mpi_ranks, segments
from tests.helpers.ranks import run_ranks
from tests.helpers.transports import check_transport


def group() -> dist.ProcessGroup:
    found = dist.group.WORLD
    assert found is not None
    return found


def use_two_transports(rank: int) -> None:
    """Two transports over the same ranks are matched apart."""
    tokens, experts = make_transports("mpi", group(), num_transports=2, timeout_s=60)
    assert (tokens.name, tokens.rank, tokens.world_size) == ("mpi", rank, dist.get_world_size())
    check_transport(tokens)
    other = (rank + 1) % tokens.world_size
    before = (rank - 1) % tokens.world_size
    first, second = torch.zeros(3), torch.zeros(3)
    late = experts.exchange([Buffer(torch.full((3,), 1.0), other)], [Buffer(first, before)], op="experts")
    tokens.exchange([Buffer(torch.full((3,), 2.0), other)], [Buffer(second, before)], op="tokens").wait()
    late.wait()
    assert first.tolist() == [1.0] * 3
    assert second.tolist() == [2.0] * 3


def test_four_ranks() -> None:
    run_mpi_ranks(4, use_two_transports)


def refuse_for_all(rank: int) -> str:
    """Rank 1 cannot import mpi4py, and answers nothing but the agreement. MPI runs already."""
    make_transports("mpi", group(), num_transports=1, timeout_s=60)
    without = {"mpi4py": None} if rank == 1 else {}
    with patch.dict(sys.modules, without), pytest.raises(ValueError, match="needs mpi4py") as failed:
        make_transports("mpi", group(), num_transports=1, timeout_s=60)
    return str(failed.value)


def test_a_rank_without_mpi4py_keeps_nobody_waiting() -> None:
    """The same line on every rank."""
    assert len(set(run_mpi_ranks(4, refuse_for_all))) == 1


def wait_again_after_an_interrupt(rank: int) -> list[float]:
    """Rank 0 is interrupted while it waits for rank 1, which sends afterwards."""
    (transport,) = make_transports("mpi", group(), num_transports=1, timeout_s=60)
    assert isinstance(transport, MpiTransport)
    received = torch.zeros(3)
    pending = transport.exchange([], [Buffer(received, 1)] if rank == 0 else [], op="dispatch")
    if rank == 0:
        with patch("os.sched_yield", side_effect=KeyboardInterrupt), pytest.raises(KeyboardInterrupt):
            pending.wait()
        assert transport.job.unfinished == {pending}
    dist.barrier()
    if rank == 1:
        transport.exchange([Buffer(torch.ones(3), 0)], [], op="dispatch").wait()
    pending.wait()
    assert not transport.job.unfinished
    return received.tolist()


def test_an_interrupted_wait_can_be_taken_up_again() -> None:
    """Until it has been, MPI may write into its buffers, and must not be left in order."""
    assert run_mpi_ranks(4, wait_again_after_an_interrupt)[0] == [1.0] * 3


def wait_in_vain(rank: int, timeout_s: float, sizes: list[int]) -> list[str]:
    """Rank 0 waits twice for 24 B from rank 1 and 16 B from rank 2, which send tensors of other sizes."""
    (transport,) = make_transports("mpi", group(), num_transports=1, timeout_s=60)
    assert isinstance(transport, MpiTransport)
    transport.timeout_s, where = timeout_s, "step 3, blocks.0.moe"
    if rank in (1, 2):
        transport.exchange([Buffer(torch.ones(sizes[rank - 1]), 0)], [], op="dispatch", where=where).wait()
    dist.barrier()
    messages = []
    if rank == 0:
        recvs = [Buffer(torch.zeros(6), 1), Buffer(torch.zeros(4), 2)]
        pending = transport.exchange([], recvs, op="dispatch", where=where)
        for _ in range(2):
            with pytest.raises(CollectiveError) as failed:
                pending.wait()
            messages.append(str(failed.value))
    return messages


@pytest.mark.parametrize(
    "timeout_s, sizes, ending",
    [
        (0.3, [6, 0], "did not complete within 0.3 s (received 24 of 40 B, 16 B from rank 2 are missing)"),
        (60, [6, 3], "failed: 12 B instead of 16 B from rank 2; the ranks are at different places of the program"),
        (60, [6, 5], "failed: MPI says MPI_ERR_IN_STATUS: error code in status, more than 16 B from rank 2"),
    ],
    ids=["silent", "less", "more"],
)
def test_errors_name_who_is_to_blame(timeout_s: float, sizes: list[int], ending: str) -> None:
    """And rank, operation, place, limit, bytes that came and those that did not; at once when asked again."""
    messages = run_mpi_ranks(4, wait_in_vain, timeout_s, sizes)[0]
    assert messages == [f"rank 0: dispatch at step 3, blocks.0.moe {ending}"] * 2


def be_in_different_layers(rank: int) -> str:
    """Ranks 0 and 1 exchange as many bytes, rank 0 those of the second layer, rank 1 those of the first."""
    (transport,) = make_transports("mpi", group(), num_transports=1, timeout_s=60)
    message, other = "", 1 - rank
    for layer in range(2):
        transport.exchange([], [], op="combine_backward", where=f"step 1, blocks.{layer}.moe").wait()
    if rank in (0, 1):
        sends, recvs = [Buffer(torch.ones(3), other)], [Buffer(torch.zeros(3), other)]
        with pytest.raises(CollectiveError) as failed:
            transport.exchange(sends, recvs, op="combine_backward", where=f"step 1, blocks.{other}.moe").wait()
        message = str(failed.value)
    dist.barrier()
    return message


def test_ranks_in_different_layers_are_told_what_came() -> None:
    for rank, text in enumerate(run_mpi_ranks(4, be_in_different_layers)[:2]):
        assert text == (
            f"rank {rank}: combine_backward at step 1, blocks.{1 - rank}.moe failed: rank {1 - rank} sent combine_backward at "
            f"step 1, blocks.{rank}.moe; the ranks are at different places of the program: every rank must run the same layers "
            "in the same order, in forward and in backward"
        )


def ask_for_mpi(rank: int) -> tuple[str, int]:
    with pytest.raises(ValueError, match="MPI") as failed:
        make_transports("mpi", group(), num_transports=1, timeout_s=5)
    return str(failed.value), os.getpid()


def test_without_mpirun_it_is_refused() -> None:
    """The same line on every rank; and no shared memory stays behind when they are killed."""
    mpirun(2)
    before = segments()
    lines, pids = zip(*run_ranks(2, ask_for_mpi), strict=True)
    assert lines[0] == lines[1]
    assert "MPI has 1 rank(s), the process group has 2: start all ranks with one mpirun -n 2" in lines[0]
    assert not segments(pids) - before


FAILING = """
import os, signal, sys, torch
from moesaic.collectives import Buffer
from moesaic.collectives.transports.mpi import MpiJob
job = MpiJob()
rank = job.mpi.COMM_WORLD.rank
if rank == 1:
    {early}
transport = job.transport(rank, 3, timeout_s={making_s})
transport.timeout_s = 2
if rank == 1:
    {late}
transport.exchange([], [Buffer(torch.zeros(4), 1)], op="combine", where="step 5").wait()
"""


@pytest.mark.parametrize(
    "early, making_s, late, message",
    [
        ("os.kill(os.getpid(), signal.SIGSTOP)", 2, "pass", "rank 0: making a transport did not complete within 2 s"),
        ("pass", 60, "os.kill(os.getpid(), signal.SIGSTOP)", "rank 0: combine at step 5 did not complete within 2 s"),
        ("pass", 60, "os.kill(os.getpid(), signal.SIGKILL)", "signal 9"),
    ],
    ids=["is stopped early", "is stopped", "is killed"],
)
def test_a_failed_rank_ends_the_job(early: str, making_s: int, late: str, message: str, tmp_path: Path) -> None:
    """Not zero, somebody says why, and neither a rank nor shared memory is left."""
    before = segments()
    script = tmp_path / "job.py"
    script.write_text(FAILING.format(early=early, making_s=making_s, late=late), encoding="utf-8")
    done = subprocess.run(
        [*mpirun(3), sys.executable, str(script)], env=mpi_environment(), capture_output=True, text=True, timeout=100, check=False
    )
    assert done.returncode != 0
    assert message in done.stdout + done.stderr
    left = subprocess.run(["pgrep", "-f", str(script)], capture_output=True, text=True, check=False)
    assert left.stdout == ""
    assert not segments() - before
