"""Failure reports: which collective failed, after which stage, and the status of every other rank."""

import os
import signal
import subprocess
import sys
from pathlib import Path
from unittest import mock

import pytest
import torch
import torch.distributed as dist

from moesaic.collectives import CollectiveError
from moesaic.launch.run.failure_report import Peers, failure_report
from moesaic.launch.run.process import Process

ME = Process(rank=0, world_size=4, local_rank=0, local_world_size=3, launcher=None, device=torch.device("cpu"))
BOOT_ID = Path("/proc/sys/kernel/random/boot_id")


def wait_until_stopped(pid: int) -> None:
    while Path(f"/proc/{pid}/stat").read_text(encoding="utf-8").rpartition(")")[2].split()[0] != "T":
        pass


@pytest.mark.skipif(sys.platform != "linux", reason="ranks of one machine are watched through /proc")
def test_every_other_rank_is_accounted_for() -> None:
    """One killed, one stopped, one on another machine, which published its problem."""
    here = (BOOT_ID.read_text(encoding="ascii").strip(), os.stat("/proc/self/ns/pid").st_ino)
    with subprocess.Popen(["sleep", "60"]) as killed, subprocess.Popen(["sleep", "60"]) as stopped:
        pids = [(here, os.getpid()), (here, killed.pid), (here, stopped.pid), (("elsewhere", 1), 7)]
        with mock.patch("moesaic.launch.run.failure_report.gather", return_value=pids):
            peers = Peers(ME)
        store = dist.HashStore()
        store.set("moesaic/failed/3", "rank 3, step 5")
        killed.kill()
        stopped.send_signal(signal.SIGSTOP)
        wait_until_stopped(stopped.pid)
        with mock.patch("moesaic.launch.run.failure_report.default_store", return_value=store):
            report = peers.report("rank 0, step 6")
        stopped.kill()
    assert report == (
        f"rank 1 is gone (its process {killed.pid} has ended), rank 2 is stopped (process {stopped.pid}), "
        "rank 3 failed too (rank 3, step 5)"
    )
    assert store.get("moesaic/failed/0") == b"rank 0, step 6"


def raised_by_all_reduce() -> Exception:
    with pytest.raises(ValueError, match="process group") as failed:
        dist.all_reduce(torch.zeros(6))
    return failed.value


def test_the_collective_and_the_last_stage_are_named() -> None:
    peers = mock.Mock(spec=Peers)
    peers.report.return_value = "rank 1 runs (process 8)"
    last = "combine of step 3, blocks.1.moe, plan 2"
    ours = failure_report(CollectiveError("rank 0: dispatch at step 3: rank 1 is gone"), 0, 3, last, peers)
    assert ours == (
        "rank 0, step 3: rank 0: dispatch at step 3: rank 1 is gone; last completed on this rank: combine of step 3, "
        "blocks.1.moe, plan 2; rank 1 runs (process 8)"
    )
    of_torch = failure_report(raised_by_all_reduce(), 0, 3, last, peers)
    assert of_torch.startswith("rank 0, step 3: outside the layers' collectives, in all_reduce of 24 B: Default process group")
    assert of_torch.endswith(f"; last completed on this rank: {last}; rank 1 runs (process 8)")
    # An error outside communication asks no other rank.
    peers.reset_mock()
    assert failure_report(RuntimeError("shapes differ"), 0, 3, last, peers) == "rank 0, step 3: shapes differ"
    peers.report.assert_not_called()
