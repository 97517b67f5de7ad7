"""`moesaic bench scaling` in its three modes at a tiny size, and the shares of a core that emulated ranks get."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from moesaic.benchmarks.cpu_share import CpuShares, enter
from moesaic.benchmarks.scaling import ScalingCase, command, run
from moesaic.benchmarks.step import POLICIES, StepCase
from moesaic.launch.entry import run_command
from tests.helpers.cluster import skip_without_network

TINY = "--experts 4 --hidden 16 --ffn 16 --tokens 64 --rounds 1"
# Keys that other tools rely on.
KEYS = {
    "mode",
    "policy",
    "nodes",
    "ranks",
    "tokens_per_s",
    "ratio_to_ideal",
    "efficiency",
    "max_over_mean",
    "exposed_comm_share",
}


def skip_without_shares() -> None:
    """Skip the calling test on a machine that cannot limit a process's share of the CPU."""
    try:
        CpuShares(1, 0.5).close()
    except OSError as error:
        pytest.skip(f"no control groups that limit the CPU here: {error}")


def check(rows: list[dict[str, object]], mode: str, counts: list[int], ranks_per_node: int) -> None:
    """Rows of every count and policy, in order, with the keys; the first ideal is what efficiency is measured against."""
    assert [(row["nodes"], row["policy"]) for row in rows] == [(nodes, policy) for nodes in counts for policy in POLICIES]
    for row in rows:
        assert row.keys() >= KEYS
        assert row["mode"] == mode
        assert row["ranks"] == row["nodes"] * ranks_per_node
        assert row["max_over_mean"] >= 1.0
        assert 0.0 <= row["exposed_comm_share"] <= 1.0
    ideal = next(row for row in rows if row["policy"] == "ideal")
    assert ideal["ratio_to_ideal"] == ideal["efficiency"] == 1.0
    for row in rows:
        assert row["efficiency"] == pytest.approx(row["tokens_per_s"] / row["ranks"] / (ideal["tokens_per_s"] / ideal["ranks"]))


def test_simulated_nodes() -> None:
    """A Zipf load costs static expert parallelism what its busiest rank has too much; exact splits over copies get it back."""
    layer = StepCase(ranks=1, experts=32, hidden=1024, ffn=4096, tokens=8192, top_k=2, skew=1.2, slots=2, rounds=1)
    case = ScalingCase(mode="simulated", nodes=(1, 2), ranks_per_node=4, link_mbit=1.0, machine="h100", layer=layer)
    rows = run(case)
    assert rows is not None
    check(rows, "simulated", [1, 2], 4)
    for nodes in (1, 2):
        by_policy = {row["policy"]: row for row in rows if row["nodes"] == nodes}
        assert by_policy["static"]["copies"] == 0
        assert by_policy["quota"]["max_over_mean"] < 1.1 < 1.9 < by_policy["static"]["max_over_mean"]
        assert by_policy["quota"]["tokens_per_s"] > max(by_policy[p]["tokens_per_s"] for p in ("static", "hecate"))


def test_real_nodes_in_one_job(tmp_path: Path) -> None:
    """Three ranks as three nodes: one waits while two measure, and the first writes the table."""
    path = tmp_path / "rows.json"
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "3"]
    program = ["-m", "moesaic.benchmarks.scaling", "--nodes", "2,1", "--ranks-per-node", "1", *TINY.split(), "--json", str(path)]
    done = subprocess.run([*torchrun, *program], capture_output=True, text=True, check=False, timeout=120)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split()[0] == "mode"
    document = json.loads(path.read_text())
    assert document["schema"] == "moesaic.bench.scaling/1"
    check(document["rows"], "real", [1, 2], 1)


def test_emulated_nodes() -> None:
    """Two nodes of one rank each; nothing of them is left behind."""
    skip_without_network()
    skip_without_shares()
    layer = StepCase(ranks=1, experts=4, hidden=16, ffn=16, tokens=64, top_k=2, skew=1.2, slots=1, rounds=1)
    case = ScalingCase(mode="emulated", nodes=(1, 2), ranks_per_node=1, link_mbit=200.0, machine="h100", layer=layer)
    rows = run(case)
    assert rows is not None
    check(rows, "emulated", [1, 2], 1)
    assert not list(Path("/sys/fs/cgroup").glob(f"**/moesaic-{os.getpid()}-*"))


def test_a_process_enters_its_share() -> None:
    """The limit stands in the group, the process is in it with its children, and the groups go with the context."""
    skip_without_shares()
    with CpuShares(2, 0.25) as shares:
        folders = [shares.folder(rank) for rank in range(2)]
        program = f"from {enter.__module__} import *; enter(Path({str(folders[1])!r})); print(open('/proc/self/cgroup').read())"
        seen = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout
        assert folders[1].name in seen
        assert folders[0].name not in seen
        limits = [folder / name for folder in folders for name in ("cpu.max", "cpu.cfs_quota_us") if (folder / name).exists()]
        assert [int(limit.read_text().split()[0]) for limit in limits] == [1250, 1250]
    assert not any(folder.exists() for folder in folders)


@pytest.mark.parametrize(
    "arguments,message",
    [
        ("--nodes 1,x", "--nodes has '1,x'; give whole numbers of 1 or more"),
        ("--nodes 0", "--nodes has '0'"),
        ("--mode simulated --machine h101", "unknown topology preset 'h101'; did you mean 'h100'?"),
        ("--top-k 5 --experts 4", "--top-k is 5 with 4 experts"),
        ("--mode real", "--mode real needs the variables that torchrun sets"),
    ],
)
def test_wrong_use_is_one_line(capsys: pytest.CaptureFixture[str], arguments: str, message: str) -> None:
    assert run_command(command, arguments.split()) == 2
    captured = capsys.readouterr()
    assert message in captured.err
    assert captured.err.count("\n") == 1
    assert captured.out == ""


def test_a_job_that_is_too_small_is_refused(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    environment = {"RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert run_command(command, ["--mode", "real", "--nodes", "2", "--ranks-per-node", "4"]) == 2
    assert "--nodes 2 of 4 ranks are 8 ranks, the job has 1; start more, or give fewer" in capsys.readouterr().err
