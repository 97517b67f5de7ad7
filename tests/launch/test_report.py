"""moesaic report: one page of a run or a trace, and what is no run in one line."""

import json
import re
from pathlib import Path

import numpy as np
import pytest

from moesaic.launch.cli import cli
from moesaic.launch.entry import run_command
from moesaic.placement import TraceMeta, write_trace
from moesaic.placement.traces.synth import SynthSpec, synthesize

META = TraceMeta(num_layers=2, num_experts=3, top_k=2, num_ranks=2, dim=8, ffn_dim=8)
ROWS = [
    {"step": 0, "val_loss": 5.5},
    {"step": 1, "loss": 5.0, "grad_norm": 2.0, "max_over_mean": 1.1, "max_over_mean_static": 1.5, "gamma_eff": 8.0},
    {"step": 2, "loss": 4.0, "grad_norm": 1.0, "max_over_mean": 1.0, "max_over_mean_static": 1.4, "bytes_gather": 9.0},
]
MOVE = {
    "solver": "milp",
    "moved": 3,
    "saved_s_predicted": 0.5,
    "move_s": 0.1,
    "gap": 0.021,
    "reason": "owners move: 3 experts <save>",
}


def loads(num_steps: int) -> np.ndarray:
    return np.stack(list(synthesize(SynthSpec(meta=META, kind="drifting", num_steps=num_steps, tokens_per_rank=5))))


def run_folder(folder: Path) -> Path:
    folder.mkdir()
    rows = [*ROWS[:-1], ROWS[-1] | {"migrations": [MOVE]}, {"step": 3, "saved_s_observed": 0.375, "migration_step": 2.0}]
    rows.append(
        {"step": 4, "rehomings": [{"step": 4, "num_moved": 7, "saved_s": 0.25, "move_s": 0.1, "reason": "of an old run"}]}
    )
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "summary.json").write_text(json.dumps({"steps": 2, "tokens_per_s": 100.0, "migrations": [{"step": 2}]}))
    write_trace(folder / "trace.npz", META, loads(2))
    return folder


def page_of(source: Path, out: Path, *options: str) -> str:
    assert run_command(cli, ["report", str(source), "-o", str(out), *options]) == 0
    return out.read_text()


def test_a_run_as_one_page(tmp_path: Path) -> None:
    """Every chart that has numbers, the moves, and the trace; nothing is fetched, nothing runs, and it is the same each time."""
    folder = run_folder(tmp_path / "tiny")
    page = page_of(folder, tmp_path / "a.html")
    titles = ("Loss", "Busiest rank over the mean rank", "Sent by rank 0", "Proposals to migrate experts", "Routing by layer")
    for title in (*titles, "Congestion coefficient gamma_eff, our reconstruction"):
        assert f"<h2>{title}</h2>" in page
    assert "<h2>Throughput</h2>" not in page  # these rows have none
    assert "3 experts &lt;save&gt;" in page
    columns, move = page[page.index("saved_s_predicted") - 40 :].splitlines()[:2]
    assert columns.split()[-8:-5] == ["saved_s_predicted", "saved_s_observed", "move_s"], columns
    assert move.split()[:6] == ["2", "milp", "3", "0.500", "0.375", "0.100"], move
    assert re.search(r"^ *4 +- +7 +0\.250 .* of an old run", page, re.MULTILINE)
    assert page.count("<svg") == page.count("</svg>") == 7
    assert "<script" not in page
    assert 'href="http' not in page
    assert page == page_of(folder, tmp_path / "b.html")


def test_a_trace_as_one_page(tmp_path: Path) -> None:
    """Also at another number of ranks, and without any assignment in a step."""
    loads_SLRE = loads(300)
    loads_SLRE[4] = 0
    write_trace(tmp_path / "t.npz", META, loads_SLRE)
    page = page_of(tmp_path / "t.npz", tmp_path / "t.html")
    assert page.count("<svg") == 2
    assert "<h2>Shares of the experts in layer" in page


def test_a_run_that_was_killed(tmp_path: Path) -> None:
    """No summary, and half a last line."""
    folder = run_folder(tmp_path / "killed")
    (folder / "summary.json").unlink()
    (folder / "trace.npz").unlink()
    with open(folder / "metrics.jsonl", "a") as file:
        file.write('{"step": 3, "lo')
    assert page_of(folder, tmp_path / "a.html").count("<svg") == 5


@pytest.mark.parametrize(
    "text,message",
    [
        (None, "is no run: it has no metrics.jsonl"),
        ('{"step": 0, "val_loss": 5.5}\n', "has no training step yet"),
        ('{"step": 1, "loss": 5.5}\n{"ste\n', "metrics.jsonl line 2 is damaged"),
        ("[1]\n", "metrics.jsonl line 1 is damaged: it is no object"),
    ],
)
def test_what_is_no_run_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str], text: str | None, message: str) -> None:
    if text is not None:
        (tmp_path / "metrics.jsonl").write_text(text)
    assert run_command(cli, ["report", str(tmp_path), "-o", str(tmp_path / "x.html")]) == 2
    captured = capsys.readouterr()
    assert message in captured.err
    assert captured.err.count("\n") == 1
    assert not (tmp_path / "x.html").exists()
