"""`moesaic bench placement`, end to end at a tiny size."""

import json
from pathlib import Path

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


def test_wrong_sizes_are_one_line(capsys) -> None:
    assert run_command(cli, ["bench", "placement", "--experts", "4", "--top-k", "8"]) == 2
    assert "--top-k is 8 with 4 experts" in capsys.readouterr().err
