"""`moesaic bench step` end to end at a tiny size, and the routing it draws."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from moesaic.benchmarks.step import POLICIES, zipf_ids

MOESAIC = Path(sys.executable).with_name("moesaic")
TINY = "--experts 4 --hidden 16 --ffn 16 --tokens 64 --rounds 2"
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


def bench(arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [MOESAIC, "bench", "step", *arguments.split()], capture_output=True, text=True, check=False, timeout=120
    )


@pytest.mark.parametrize("ranks", [1, 2])
def test_rows_as_json(ranks: int) -> None:
    """Standard output holds one JSON document with every key, and the gate has compared the policies before."""
    done = bench(f"--ranks {ranks} {TINY} --skew 1.2 --json -")
    assert done.returncode == 0, done.stderr
    document = json.loads(done.stdout)
    assert document["schema"] == "moesaic.bench.step/1"
    assert document["command"].startswith("moesaic bench step")
    assert {"processor", "cores", "torch"} <= document["machine"].keys()
    assert [row["policy"] for row in document["rows"]] == list(POLICIES)
    for row in document["rows"]:
        assert row.keys() >= KEYS
        assert row["tokens_per_s_min"] <= row["tokens_per_s"] <= row["tokens_per_s_max"]
        assert set(row["stage_s"]) == {"route", "plan", "materialize", "dispatch", "experts", "combine", "reduce"}
        assert row["max_over_mean"] >= 1.0
    assert document["rows"][0]["ratio_to_static"] == 1.0


def test_many_rounds_fit_through() -> None:
    """What the ranks report outgrows a pipe's buffer: it must not hold them up."""
    done = bench("--ranks 1 --experts 2 --hidden 4 --ffn 4 --tokens 4 --rounds 100 --json -")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["rows"][0]["rounds"] == 100


def test_a_table_and_a_file(tmp_path: Path) -> None:
    done = bench(f"--ranks 1 {TINY} --json {tmp_path / 'rows.json'}")
    assert done.returncode == 0, done.stderr
    assert done.stdout.split()[0] == "policy"
    assert len(json.loads((tmp_path / "rows.json").read_text())["rows"]) == len(POLICIES)


@pytest.mark.parametrize(
    "arguments,message", [("--top-k 5 --experts 4", "--top-k is 5 with 4 experts"), ("--ranks 0", "--ranks")]
)
def test_wrong_use_is_one_line(arguments: str, message: str) -> None:
    done = bench(arguments)
    assert done.returncode == 2
    assert message in done.stderr
    assert done.stderr.count("\n") == 1


def test_zipf_ids_follow_the_law() -> None:
    """First choices have odds (e + 1) ** -skew; the K experts of a token differ; no skew is uniform."""
    ids_TK = zipf_ids(40_000, 8, 2, 1.2, seed=0)
    assert (ids_TK[:, 0] != ids_TK[:, 1]).all()
    shares = torch.bincount(ids_TK[:, 0], minlength=8) / 40_000
    odds = torch.arange(1, 9) ** -1.2
    torch.testing.assert_close(shares, odds / odds.sum(), atol=0.01, rtol=0)
    uniform = torch.bincount(zipf_ids(40_000, 8, 2, 0.0, seed=0).flatten(), minlength=8) / 80_000
    torch.testing.assert_close(uniform, torch.full((8,), 0.125), atol=0.01, rtol=0)
