"""Ranks end with the process that started them, whoever that was and however it ended."""

import os
import select
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from moesaic.collectives.lifetime import end_with_parent, first_failure
from tests.helpers.cluster import skip_without_network
from tests.helpers.mpi import ROOT, mpirun
from tests.helpers.ranks import forking

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells a process that its parent has ended")

RANK = "import sys, os, time; open(f'{sys.argv[1]}/{os.getpid()}', 'x'); time.sleep(1000)"

# Every way in which we start ranks. All of them stay: in a body of a test, in a benchmark on nodes, under a launcher.
STARTERS = {
    "pool": """
from tests.collectives.test_lifetime import stay
from tests.helpers.ranks import run_ranks
run_ranks(2, stay, folder)
""",
    "nodes": """
from moesaic.benchmarks.network import run_on_nodes
run_on_nodes([*rank, folder], 2, 2, 1e9, {})
""",
    "children": """
from moesaic.launch.doctor.children import run_children
run_children([[*rank, folder]] * 2, [os.environ] * 2)
""",
    "mpirun": """
from moesaic.collectives.lifetime import start
from tests.helpers.mpi import mpi_environment, mpirun
start([*mpirun(2), *rank, folder], env=mpi_environment()).wait()
""",
}


def stay(rank: int, folder: str) -> None:
    Path(folder, str(os.getpid())).touch()
    time.sleep(1000)


@pytest.mark.parametrize("starter", STARTERS)
def test_ranks_end_with_whom_they_were_started_by(starter: str, tmp_path: Path) -> None:
    if starter == "nodes":
        skip_without_network()
    if starter == "mpirun":
        mpirun(2)
    program = f"import os, sys\nfolder, rank = sys.argv[1], [sys.executable, '-c', {RANK!r}]\n{STARTERS[starter]}"
    with subprocess.Popen([sys.executable, "-c", program, str(tmp_path)], cwd=ROOT) as parent:
        try:
            deadline_s = time.monotonic() + 100
            while len(pids := [int(name) for name in os.listdir(tmp_path)]) < 2:
                assert parent.poll() is None
                assert time.monotonic() < deadline_s, "the ranks did not start"
                time.sleep(0.02)
            ranks = [os.pidfd_open(pid) for pid in pids]
        finally:
            parent.send_signal(signal.SIGKILL)
    try:
        for pidfd in ranks:
            assert select.select([pidfd], [], [], 20)[0], f"a rank outlives the {starter} that started it"
    finally:
        for pidfd in ranks:
            if not select.select([pidfd], [], [], 0)[0]:
                signal.pidfd_send_signal(pidfd, signal.SIGKILL)
            os.close(pidfd)


def test_a_parent_that_was_gone_before() -> None:
    """A process that comes too late to see its parent end is killed at once."""
    process = forking().Process(target=end_with_parent, args=(os.getpid(),))  # its parent is the server, not this process
    process.start()
    process.join()
    assert process.exitcode == -signal.SIGKILL


def test_the_first_that_fails_is_found_while_others_run() -> None:
    later = iter([None, 0])
    assert first_failure([lambda: None, lambda: 3]) == 3
    assert first_failure([lambda: next(later), lambda: 0]) == 0
