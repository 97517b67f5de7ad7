"""`moesaic bench placement`, end to end at a tiny size."""

import json
from pathlib import Path

import numpy as np

from moesaic.launch.cli import cli
from moesaic.launch.entry import run_command


def test_rows(tmp_path: Path) -> None:
    path = tmp_path / "rows.json"
    sizes = ["--experts", "8", "--ranks", "2", "--top-k", "2", "--layers", "2", "--rounds", "2"]
    lanes = ["--solver", "quota", "--solver", "hecate", "--milp-limit", "1"]
    assert run_command(cli, ["bench", "placement", *sizes, *lanes, "--json", str(path)]) == 0
    rows = json.loads(path.read_text())["rows"]
    assert [(row["what"], row["solver"]) for row in rows] == [
        ("plan", "quota"),
        ("split", "quota"),
        ("plan", "hecate"),
        ("split", "hecate"),
        ("milp", "milp"),
    ]
    assert all(row["experts"] == 8 and row["ranks"] == 2 and row["max_over_mean"] >= 1 for row in rows)
    assert all(0 < row["ms_min"] <= row["ms_per_layer"] <= row["ms_max"] for row in rows[:4])
    assert 0 <= rows[4]["gap"] < 1
    assert run_command(cli, ["bench", "placement", "--what", "joint", *sizes, "--json", str(path)]) == 0
    (joint,) = json.loads(path.read_text())["rows"]
    assert (joint["solver"], joint["layers"]) == ("joint", 2)
    assert 0 <= joint["gap"] < 1


def test_wrong_sizes_are_one_line(capsys) -> None:
    assert run_command(cli, ["bench", "placement", "--experts", "4", "--top-k", "8"]) == 2
    assert "--top-k is 8 with 4 experts" in capsys.readouterr().err


def test_rows_of_a_trace(tmp_path: Path, capsys) -> None:
    """Recorded tokens: the exact solver on one layer, and hops where every token stays on its expert."""
    rng = np.random.default_rng(0)
    first_TK = rng.permuted(np.tile(np.arange(8), (400, 1)), axis=1)[:, :2]
    trace, path = tmp_path / "tokens.npz", tmp_path / "rows.json"
    np.savez(trace, topk_ids=np.stack([first_TK] * 3, axis=1), task=np.arange(400) // 100)
    lanes = ["--what", "milp", "--what", "moetuner", "--milp-limit", "5", "--trace", str(trace), "--layer", "1", "--top-k", "2"]
    assert run_command(cli, ["bench", "placement", *lanes, "--ranks", "4", "--nodes", "2", "--json", str(path)]) == 0
    milp, *hops = json.loads(path.read_text())["rows"]
    assert (milp["what"], milp["layer"], milp["ranks"]) == ("milp", 1, 4)
    assert milp["ratio_to_quota"] <= 1
    assert [row["solver"] for row in hops] == ["contiguous", "lpt", "moetuner", "joint"]
    assert all(0 < row["off_node"] < row["off_rank"] < 1 for row in hops)
    assert run_command(cli, ["bench", "placement", "--what", "milp", "--trace", str(trace), "--layer", "3"]) == 2
    assert "--layer 3 is not among the 3 layers" in capsys.readouterr().err
    assert run_command(cli, ["bench", "placement", "--what", "moetuner"]) == 2
    assert "give a --trace" in capsys.readouterr().err
