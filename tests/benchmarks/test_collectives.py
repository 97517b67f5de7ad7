"""`moesaic bench collectives` end to end at tiny sizes; every way passes its gate before it is timed."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from moesaic.benchmarks.collectives_rank import COPY, COPY_IN_STEP, MPI_OWN, OPS, CollectivesCase
from tests.helpers.cluster import skip_without_network
from tests.helpers.mpi import mpirun

MOESAIC = Path(sys.executable).with_name("moesaic")
# Keys that other tools rely on.
KEYS = {
    "op",
    "transport",
    "schedule",
    "ranks",
    "nodes",
    "bytes",
    "gb_per_s",
    "ratio_to_gloo",
    "ratio_to_copy",
    "ratio_to_mpi",
    "ratio_to_bound",
}


def bench(arguments: str) -> subprocess.CompletedProcess[str]:
    command = [MOESAIC, "bench", "collectives", *arguments.split()]
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=200)


def rows_of(arguments: str) -> list[dict[str, Any]]:
    done = bench(arguments)
    assert done.returncode == 0, done.stderr
    document = json.loads(done.stdout)
    assert document["schema"] == "moesaic.bench.collectives/1"
    for row in document["rows"]:
        assert row.keys() >= KEYS
        assert row["gb_per_s_min"] <= row["gb_per_s"] <= row["gb_per_s_max"]
    rows: list[dict[str, Any]] = document["rows"]
    return rows


def test_all_transports_on_one_machine() -> None:
    """Three ranks: every op by every transport and schedule, with the baselines beside, all ratios there."""
    mpirun(3)
    rows = rows_of("--ranks 3 --sizes 4K --rounds 2 --json -")
    ways = {(row["op"], row["transport"], row["schedule"]) for row in rows}
    transports = ("c10d", "shm", "mpi")
    assert ways == (
        {("all_to_all", name, "direct") for name in transports}
        | {(op, name, schedule) for op in OPS[1:] for name in transports for schedule in ("direct", "relay")}
        | {(op, name, None) for op in OPS for name in (COPY, MPI_OWN)}
        | {("all_to_all", COPY_IN_STEP, None)}
    )
    for row in rows:
        assert all(row[ratio] > 0 for ratio in KEYS if ratio.startswith("ratio_"))
        if (row["transport"], row["schedule"]) == ("c10d", "direct"):
            assert row["ratio_to_gloo"] == 1.0
        if row["transport"] == COPY:
            assert row["ratio_to_copy"] == row["ratio_to_bound"] == 1.0


def test_nodes_with_links() -> None:
    """Two nodes of two ranks; what is not there is named and left out, and its ratio is empty.

    Routed tokens by both routes: values are checked before they are timed; by node no more crosses than must.
    """
    skip_without_network()
    arguments = "--ops sparse_gather,token_rows --ranks 4 --nodes 2 --sizes 64K --rounds 1 --json - "
    done = bench(arguments + "--transports c10d,shm,hierarchical --schedules direct,hierarchical")
    assert done.returncode == 0, done.stderr
    assert "without shm at 4 ranks: the ranks are on several nodes" in done.stderr
    rows = json.loads(done.stdout)["rows"]
    names = ("c10d", "hierarchical")
    assert {(row["op"], row["transport"], row["schedule"]) for row in rows} == {
        *((op, COPY, None) for op in ("sparse_gather", "token_rows")),
        *(("sparse_gather", name, schedule) for name in names for schedule in ("direct", "hierarchical")),
        *(("token_rows", name, route) for name in names for route in ("direct", "by_node")),
    }
    assert all(row["nodes"] == 2 and row["ratio_to_mpi"] is None for row in rows)


@pytest.mark.parametrize(
    "arguments,message",
    [
        ("--ranks 1", "--ranks has '1'; give whole numbers of 2 or more"),
        ("--sizes 3", "--sizes has 3 bytes; tensors are fp32, so give multiples of 4"),
        ("--sizes 4X", "--sizes has '4X'"),
        ("--transports c10d,pigeon", "--transports has 'pigeon'; choose from c10d, shm, mpi, hierarchical"),
        ("--ranks 3 --nodes 2", "--ranks 3 does not divide over --nodes 2"),
        ("--sizes 64G", "GiB are free: give smaller --sizes or fewer --ranks"),
    ],
)
def test_wrong_use_is_one_line(arguments: str, message: str, capsys: pytest.CaptureFixture[str]) -> None:
    from moesaic.benchmarks.cli import bench as command
    from moesaic.launch.entry import run_command

    assert run_command(command, ["collectives", *arguments.split()]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1


def test_what_must_travel() -> None:
    """Four ranks on two nodes: 3 of 4 messages reach a rank; of 4 x 4, 2 x 2 cross each link in each direction."""
    case = CollectivesCase(
        ops=OPS, ranks=4, nodes=2, link_bits_per_s=1e6, sizes=(400,), transports=("c10d",), schedules=("direct",), rounds=1
    )
    assert [case.received_bytes(op, 400) for op in OPS] == [1200, 400, 400]
    assert [case.link_bytes(op, 400) for op in OPS] == [1600, 400, 400]
    assert case.link_bytes("token_rows", 400) == 2 * 2 * 400
