"""`moesaic bench step` end to end at a tiny size, and the routing it draws."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from moesaic.benchmarks.cli import bench
from moesaic.benchmarks.step import POLICIES, StepCase, add_spread, records_of, zipf_ids
from moesaic.launch.entry import run_command
from moesaic.placement.machine import Machine, write_machine
from tests.helpers.cluster import skip_without_network
from tests.helpers.ranks import forking

MOESAIC = Path(sys.executable).with_name("moesaic")
TINY = "--experts 4 --hidden 16 --ffn 16 --tokens 64"
# Keys that other tools rely on.
KEYS = {
    "policy",
    "ranks",
    "skew",
    "tokens_per_s",
    "tokens_per_s_min",
    "tokens_per_s_max",
    "ratio_to_static",
    "ratio_to_ideal",
    "ratio_to_floor",
    "max_over_mean",
    "bytes_cross_rank",
    "peak_rss_bytes",
    "stage_s",
}


@pytest.fixture(autouse=True)
def ranks_are_forked(monkeypatch: pytest.MonkeyPatch) -> None:
    """From the server of all tests; and what the command sets for its ranks stays with it."""
    forking()
    monkeypatch.setattr(os, "environ", os.environ.copy())


def test_rows_as_json(capfd: pytest.CaptureFixture[str]) -> None:
    """Standard output holds one JSON document with every key, and the gate has compared the policies before."""
    assert run_command(bench, ["step", *f"--ranks 2 {TINY} --rounds 2 --skew 1.2 --json -".split()]) == 0
    document = json.loads(capfd.readouterr().out)
    assert document["schema"] == "moesaic.bench.step/1"
    assert {"processor", "cores", "torch"} <= document["machine"].keys()
    assert [row["policy"] for row in document["rows"]] == list(POLICIES)
    for row in document["rows"]:
        assert row.keys() >= KEYS
        assert row["tokens_per_s_min"] <= row["tokens_per_s"] <= row["tokens_per_s_max"]
        assert set(row["stage_s"]) == {"route", "plan", "materialize", "dispatch", "experts", "combine", "reduce"}
        assert row["max_over_mean"] >= 1.0
    assert document["rows"][0]["ratio_to_static"] == 1.0


@pytest.mark.parametrize("workload", ["w4", "w5"])
def test_ranks_with_unequal_and_no_tokens(capfd: pytest.CaptureFixture[str], workload: str) -> None:
    """The gate compares the policies' outputs on them: of w4 rank 0 has half as many tokens as rank 1, of w5 none."""
    assert run_command(bench, ["step", *f"--ranks 2 {TINY} --rounds 2 --workload {workload} --json -".split()]) == 0
    rows = json.loads(capfd.readouterr().out)["rows"]
    assert [(row["workload"], row["policy"]) for row in rows] == [(workload, policy) for policy in POLICIES]
    if workload == "w5":
        assert rows[0]["max_over_mean"] == 2.0


def test_ranks_on_nodes_with_links(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """The file has rates of links between nodes alone, so ranks of one node would be refused."""
    skip_without_network()
    rates = {"node_bytes_per_s": 1e8, "node_latency_s": 1e-4, "flops_per_s": 1e10, "half_rate_rows": 10.0}
    write_machine(tmp_path / "m.toml", Machine(num_nodes=2, ranks_per_node=1, rates=rates))
    nodes = f"--nodes 2 --link-mbit 900 --machine {tmp_path / 'm.toml'}"
    assert run_command(bench, ["step", *f"--ranks 2 {TINY} --rounds 1 {nodes} --json -".split()]) == 0
    rows = json.loads(capfd.readouterr().out)["rows"]
    assert [(row["policy"], row["nodes"], row["link_mbit"]) for row in rows] == [(policy, 2, 900.0) for policy in POLICIES]


def test_a_burst_counts_and_workloads_are_compared_by_the_ideal() -> None:
    """Each fourth step of w7 takes five times as long; the machine is half as fast as in the measurement of w0."""
    records = []
    for workload, speed, policy_s in (("w0", 1.0, [1.0] * 4), ("w7", 2.0, [1.0, 1.0, 1.0, 5.0])):
        seconds = {name: [second * speed for second in (policy_s if name != "ideal" else [1.0] * 4)] * 2 for name in POLICIES}
        counted = dict.fromkeys(
            ("max_over_mean", "copies_per_layer", "exposed_gather_s", "exposed_reduce_s", "exposed_tokens_s"), 0.5
        )
        measured = {
            "seconds": seconds,
            "metrics": {name: [counted] * 8 for name in POLICIES},
            "stage_s": {name: {"experts": 1.0} for name in POLICIES},
            "floor": [speed] * 8,
            "peak_rss_bytes": 1,
        }
        layer = {"experts": 4, "hidden": 4, "ffn": 4, "tokens": 8, "top_k": 2, "skew": 0.0, "slots": 0}
        records += records_of(StepCase(ranks=1, rounds=8, workload=workload, **layer), [measured])
    add_spread(records)
    static, ideal = ([record for record in records if record["policy"] == name] for name in ("static", "ideal"))
    assert [record["step_s"] for record in static] == [1.0, 4.0]
    assert [record["seconds_over_w0"] for record in static] == [1.0, 2.0]
    assert [record["spread"] for record in static] == [2.0, 2.0]
    assert [record["spread"] for record in ideal] == [1.0, 1.0]


def test_a_table_and_a_file_of_many_rounds(tmp_path: Path) -> None:
    """What the ranks report outgrows a pipe's buffer: it must not hold them up."""
    arguments = f"--ranks 1 {TINY} --rounds 100 --json {tmp_path / 'rows.json'}"
    command = [MOESAIC, "bench", "step", *arguments.split()]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=120)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split()[0] == "policy"
    document = json.loads((tmp_path / "rows.json").read_text())
    assert document["command"].startswith("moesaic bench step")
    assert [row["rounds"] for row in document["rows"]] == [100] * len(POLICIES)


@pytest.mark.parametrize(
    "arguments,message",
    [
        ("--top-k 5 --experts 4", "--top-k is 5 with 4 experts"),
        ("--ranks 0", "--ranks"),
        ("--ranks 3 --nodes 2", "--ranks is 3 on --nodes 2; give a multiple of the nodes"),
        ("--machine none.toml", "there is no machine file at none.toml"),
    ],
)
def test_wrong_use_is_one_line(arguments: str, message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_command(bench, ["step", *arguments.split()]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1


def test_zipf_ids_follow_the_law() -> None:
    """First choices have odds (e + 1) ** -skew; the K experts of a token differ; no skew is uniform."""
    ids_TK = zipf_ids(40_000, 8, 2, 1.2, seed=0)
    assert (ids_TK[:, 0] != ids_TK[:, 1]).all()
    shares = torch.bincount(ids_TK[:, 0], minlength=8) / 40_000
    odds = torch.arange(1, 9) ** -1.2
    torch.testing.assert_close(shares, odds / odds.sum(), atol=0.01, rtol=0)
    uniform = torch.bincount(zipf_ids(40_000, 8, 2, 0.0, seed=0).flatten(), minlength=8) / 80_000
    torch.testing.assert_close(uniform, torch.full((8,), 0.125), atol=0.01, rtol=0)
