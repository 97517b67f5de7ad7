"""`moesaic place` and `moesaic trace` from the command line, and plans that drive training."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from moesaic.launch.cli import cli
from moesaic.launch.entry import run_command
from moesaic.placement import Trace, read_plan
from moesaic.placement.offline import simulate
from tests.helpers.mutate import run_many
from tests.launch.ranks import metrics_of, set_options, start_ranks, tiny_values, train_tiny, wait_for

KEYS = {
    *("trace", "solver", "ranks", "nodes", "slots", "knows", "max_over_mean", "max_over_mean_p95", "max_over_mean_max", "copies"),
    *("off_rank_share", "cross_node_share", "step_s", "solve_s", "gap", "bound", "moves"),
}


def synth(path: Path, *options: str) -> str:
    shape = ["--layers", "2", "--experts", "8", "--top-k", "2", "--ranks", "4", "--tokens", "64", "--steps", "3"]
    assert run_command(cli, ["trace", "synth", str(path), *shape, *options]) == 0
    return str(path)


def rows_of(capsys: pytest.CaptureFixture[str], *args: str) -> list[dict[str, object]]:
    """The rows that a command writes to standard output, where nothing else goes."""
    capsys.readouterr()
    assert run_command(cli, [*args, "--json", "-"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert {"schema", "command", "machine", "commit", "rows"} == document.keys()
    return document["rows"]


def test_synth_makes_workloads(tmp_path: Path) -> None:
    """By the same command as other kinds; of w5 rank 0 has no tokens, and half the experts have none."""
    loads_SLRE = np.stack(list(Trace(synth(tmp_path / "t.npz", "--kind", "w5")).steps()))
    assert loads_SLRE.sum(axis=3)[0, 0].tolist() == [0, 172, 170, 170]
    assert (loads_SLRE.sum(axis=(0, 1, 2)) > 0).tolist() == [False] * 4 + [True] * 4


def test_compare_solve_show_and_replay(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    trace, plan, picture = synth(tmp_path / "t.npz"), str(tmp_path / "plan.json"), tmp_path / "p.html"
    lanes = ["--solver", "quota", "--solver", "hecate", "--slots", "0", "--slots", "1"]
    rows = rows_of(capsys, "place", "compare", trace, "--topology", "2x2", "--topology", "8", *lanes, "--picture", str(picture))
    assert len(rows) == 2 * 3 * (2 + 3)
    assert all(row.keys() >= KEYS for row in rows)
    assert {(row["ranks"], row["nodes"], row["slots"], row["knows"]) for row in rows} == {
        (ranks, nodes, slots, knows)
        for ranks, nodes in ((4, 2), (8, 1))
        for slots in (0, 1)
        for knows in ("predicted", "exact", "future")
    }
    page = picture.read_text()
    assert page.count("<svg") == 4
    assert "t.npz, 2 x 2 ranks" in page
    assert "http" not in page

    solved = ["--topology", "2x2", "--solver", "eplb", "--slots", "1", "-o", plan]
    assert run_command(cli, ["place", "solve", trace, *solved]) == 0
    shown = rows_of(capsys, "place", "show", plan)
    assert [row["owners"] for row in shown] == read_plan(plan).owners.expert_to_owner_LE.tolist()
    (replayed, _) = rows_of(capsys, "place", "replay", trace, "--plan", plan)
    assert (replayed["knows"], replayed["solver"], replayed["nodes"]) == ("future", "eplb", 2)
    other = synth(tmp_path / "other.npz", "--seed", "1")
    assert {row["knows"] for row in rows_of(capsys, "place", "replay", other, "--plan", plan)} == {"predicted"}


def test_migrate_every_by_its_old_name(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    trace = synth(tmp_path / "t.npz", "--drift", "2", "--kind", "drifting")
    moves = [
        rows_of(capsys, "place", "compare", trace, "--solver", "lpt", "--knows", "exact", *every)[0]["moves"]
        for every in ([], ["--migrate-every", "3"], ["--rehome-every", "3"])
    ]
    assert moves[0] > moves[1] == moves[2] > 0
    assert run_command(cli, ["place", "compare", trace, "--solver", "lpt", "--rehome-every", "3"]) == 0
    assert "--rehome-every is now --migrate-every" in capsys.readouterr().err


def test_an_interrupted_comparison_prints_its_rows(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """After the second of three steps of the first trace: status 130, and rows of two steps that say so."""
    trace, compare = synth(tmp_path / "t.npz"), simulate.compare

    def interrupted(*args: object, **options: object) -> object:
        raise simulate.Interrupted(compare(*args, **{**options, "num_steps": 2}))  # type: ignore[arg-type]

    monkeypatch.setattr(simulate, "compare", interrupted)
    capsys.readouterr()
    command = ["place", "compare", trace, trace, "--solver", "static", "--knows", "exact"]
    assert run_command(cli, [*command, "--json", "-"]) == 130
    captured = capsys.readouterr()
    (row,) = json.loads(captured.out)["rows"]
    assert (row["num_steps"], row["interrupted"]) == (2, True)
    assert f"{trace}: interrupted; its rows are of 2 steps" in captured.err
    assert run_command(cli, command) == 130
    assert capsys.readouterr().out.splitlines()[0].split()[-1] == "num_steps"


def test_a_plan_replays_at_its_scale(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Unless another is given."""
    trace, plan = synth(tmp_path / "t.npz"), str(tmp_path / "plan.json")
    assert run_command(cli, ["place", "solve", trace, "--solver", "quota", "--scale", "64", "-o", plan]) == 0
    seconds = [
        rows_of(capsys, "place", "replay", trace, "--plan", plan, *scale)[0]["step_s"]
        for scale in ([], ["--scale", "64"], ["--scale", "1"])
    ]
    assert seconds[0] == seconds[1] > seconds[2]


def test_tables_and_files_hold_the_same_rows(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    trace = synth(tmp_path / "t.npz")
    capsys.readouterr()
    assert run_command(cli, ["trace", "info", trace, "--json", str(tmp_path / "info.json")]) == 0
    text = capsys.readouterr().out
    rows = json.loads((tmp_path / "info.json").read_text())["rows"]
    assert [row["layer"] for row in rows] == [0, 1]
    assert "every step is valid" in text
    assert all(f"{row['expert_max_over_mean']:.3f}" in text for row in rows)
    assert len(rows_of(capsys, "trace", "backtest", trace)) == 4 * 2


def test_convert_deals_tokens_to_other_ranks(tmp_path: Path) -> None:
    ids = np.stack([[np.random.default_rng(token).permutation(6)[:2]] for token in range(40)])
    np.savez(tmp_path / "in.npz", topk_ids=ids, meta=np.array(json.dumps({"n_experts": 6})))
    command = ["trace", "convert", str(tmp_path / "in.npz"), str(tmp_path / "out.npz"), "--ranks", "5", "--tokens-per-step", "20"]
    assert run_command(cli, command) == 0
    loads = np.stack(list(Trace(tmp_path / "out.npz").steps()))
    assert loads.shape == (2, 1, 5, 6)
    assert (loads.sum(axis=3) == 8).all()
    assert np.array_equal(loads.sum(axis=(0, 1, 2)), np.bincount(ids.ravel(), minlength=6))


def test_what_is_not_plain_about_a_recording_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Beside the table, or on standard error where standard output is all JSON; a converted trace keeps and reports it."""
    counts = np.zeros((3, 4, 6), dtype=np.float64)
    counts[:, 1:] = np.random.default_rng(0).multinomial(13 * 2, np.full(6, 1 / 6), size=(3, 3))
    counts[1, 2, counts[1, 2].argmax()] -= 1
    np.savez(tmp_path / "dump.npz", logical_count=counts * 10**9)
    recording, out = str(tmp_path / "dump.npz"), str(tmp_path / "out.npz")
    options = ["--ranks", "4", "--top-k", "2"]
    lines = [
        f"{recording}: logical_count has no load in layer 0 of 4 (dense layers): left out; the meta's layers keep the numbers of",
        f"{recording}: logical_count lacks 1,000,000,000 of 234,000,000,000 assignments",
    ]
    capsys.readouterr()
    assert run_command(cli, ["trace", "convert", recording, out, *options]) == 0
    said = capsys.readouterr().out
    assert all(line in said for line in lines)
    assert np.array_equal(sum(Trace(out).steps()).sum(axis=1), counts.sum(axis=0)[1:] * 10**9)
    assert Trace(out).meta.layers == (1, 2, 3)

    for path, given in ((recording, options), (out, [])):
        assert run_command(cli, ["trace", "info", path, *given]) == 0
        captured = capsys.readouterr()
        assert "every step is valid; dropped assignments: 1,000,000,000\n" in captured.out
        assert captured.err == ""
        rows = rows_of(capsys, "trace", "info", path, *given)
        assert [(row["layer"], row["recorded_layer"], row["dropped"]) for row in rows] == [(0, 1, 0), (1, 2, 10**9), (2, 3, 0)]
    sizes = ["--dim", "64", "--ffn-dim", "64"]
    compared = ["--topology", "2x2", "--solver", "quota", "--knows", "exact", "--top-k", "2", *sizes]
    assert run_command(cli, ["place", "compare", recording, *compared, "--json", "-"]) == 0
    captured = capsys.readouterr()
    assert json.loads(captured.out)["rows"][0]["solver"] == "quota"
    assert all(line in captured.err for line in lines)
    plan = str(tmp_path / "plan.json")
    assert (
        run_command(cli, ["place", "solve", recording, *compared[:2], "--top-k", "2", *sizes, "--solver", "eplb", "-o", plan])
        == 0
    )
    capsys.readouterr()
    assert run_command(cli, ["place", "replay", recording, "--plan", plan, "--top-k", "2"]) == 0
    assert capsys.readouterr().out.count("logical_count has no load") == 1


def test_recordings_are_read_as_the_options_say(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """--axes, --none and --shares reach the recording."""
    ids = np.stack([[np.random.default_rng(token).permutation(6)[:2]] for token in range(8)])
    ids[5, 0, 1] = 99
    np.savez(tmp_path / "ids.npz", topk_ids=ids.transpose(2, 1, 0))
    np.savez(tmp_path / "counts.npz", counts=np.full((2, 6), 3))
    options = ["--ranks", "2", "--experts", "6", "--axes", "KLT", "--none", "99", "--none", "100"]
    (row,) = rows_of(capsys, "trace", "info", str(tmp_path / "ids.npz"), *options)
    assert (row["assignments"], row["dropped"]) == (15, 1)
    shares = ["--ranks", "2", "--top-k", "2", "--shares", "--tokens-per-step", "30"]
    assert [row["assignments"] for row in rows_of(capsys, "trace", "info", str(tmp_path / "counts.npz"), *shares)] == [60, 60]


@pytest.mark.parametrize(
    "args, message",
    [
        (["place", "compare", "none.npz"], "there is no trace at none.npz"),
        (["place", "compare", "t.npz", "--topology", "3x5"], "can be played on divisors and multiples of them, not on 15"),
        (["place", "compare", "t.npz", "--topology", "64x64"], "4096 ranks; at most 2048 are supported offline"),
        (["place", "compare", "t.npz", "--solver", "quotas"], "unknown solver 'quotas'; did you mean 'quota'?"),
        (["place", "compare", "t.npz", "--preset", "h10"], "unknown topology preset 'h10'; did you mean 'h100'?"),
        (["place", "compare", "t.npz", "--steps", "1", "--knows", "predicted"], "nothing to predict from"),
        (["place", "compare", "t.npz", "--overlap-s", "nan"], "overlap_s must be finite"),
        (["place", "solve", "t.npz", "-o", "nowhere/plan.json", "--solver", "static"], "cannot write or read"),
        (
            ["place", "solve", "t.npz", "-o", "p.json", "--solver", "joint", "--time-limit", "5"],
            "joint ends by itself; leave it",
        ),
        (["place", "replay", "t.npz", "--plan", "t.npz"], "cannot be read as JSON"),
        (["place", "replay", "t.npz", "--plan", "t.npz", "--machine", "m.toml"], "on the machine it was solved for; leave out"),
        (["place", "replay", "t.npz", "--plan", "t.npz", "--migrate-every", "5"], "moves no expert; leave out --migrate-every"),
        (["place", "compare", "t.npz", "--topology", "m.json", "--machine", "m.toml"], "m.json has rates of its own; leave out"),
        (["place", "show", "none.json"], "there is no plan at none.json"),
        (["trace", "info", "t.npz", "--shares"], "is a trace, which says what it holds; leave out --axes, --none and --shares"),
        (["trace", "info", "t.npz", "--tokens-per-step", "4"], "has no topk_ids; its steps cannot be cut anew"),
        (["trace", "synth", "x.npz", "--experts", "2"], "top_k 6 is above num_experts 2"),
        (["trace", "convert", "t.npz", "nowhere/x.npz"], "cannot write or read nowhere/x.npz"),
    ],
)
def test_wrong_use_is_one_line_and_nothing_is_written(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, args: list[str], message: str
) -> None:
    synth(tmp_path / "t.npz")
    monkeypatch.chdir(tmp_path)
    capsys.readouterr()
    assert run_command(cli, args) == 2
    captured = capsys.readouterr()
    assert message in captured.err
    assert (captured.out, captured.err.count("\n")) == ("", 1)
    assert [path.name for path in tmp_path.iterdir()] == ["t.npz"]


def test_damaged_files_end_in_an_answer_or_one_line(tmp_path: Path) -> None:
    """A few hundred of what `python -m tests.helpers.mutate 10000` runs."""
    counts = run_many(250, tmp_path, seed=7)
    statuses = {status: sum(count for (_, ended), count in counts.items() if ended == status) for status in (0, 2)}
    assert statuses[2] > 150
    assert statuses[0] > 3


def test_a_recorded_run_is_placed_and_the_plan_drives_the_next_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Train, compare on the trace, solve, train with the plan: its owners and copies, and the same losses."""
    words = np.random.default_rng(0).choice(["router ", "expert ", "slot ", "bank ", "owner\n"], size=3000)
    (tmp_path / "text.txt").write_text("".join(words))
    plan_path = tmp_path / "plan.json"
    train_tiny(2, ["train.steps=3"], tmp_path)
    run = tmp_path / "runs" / "demo"
    rows = rows_of(capsys, "place", "compare", str(run / "trace.npz"), "--preset", "cpu", "--solver", "eplb", "--slots", "1")
    assert {row["ranks"] for row in rows} == {2}
    solve = [
        "place",
        "solve",
        str(run / "trace.npz"),
        "--preset",
        "cpu",
        "--solver",
        "eplb",
        "--slots",
        "1",
        "-o",
        str(plan_path),
    ]
    assert run_command(cli, solve) == 0
    plan = read_plan(plan_path)
    assert plan.num_copies > 0

    first, _ = train_tiny(2, ["train.steps=3", f"placement.file={plan_path}"], tmp_path)
    assert f"plan {plan_path}" in first.stdout
    planned = [row for row in metrics_of(tmp_path / "runs" / "demo-2") if "loss" in row]
    assert [row["copies_per_layer"] for row in planned] == [plan.num_copies / 2] * 3
    free = [row["loss"] for row in metrics_of(run) if "loss" in row]
    np.testing.assert_allclose([row["loss"] for row in planned], free, rtol=1e-4)

    for values, message in (
        (["model.num_experts=6"], "the plan is for num_experts 4, this run has 6"),
        (["runtime.slots=0"], "uses 1 slots, runtime.slots is 0; set runtime.slots=1"),
        (["placement.file=none.json"], "there is no plan at none.json"),
    ):
        options = [*tiny_values(tmp_path), f"placement.file={plan_path}", *values]
        ended = wait_for(start_ranks(2, set_options(options), tmp_path))
        assert [end.status for end in ended] == [2, 2]
        assert message in ended[0].stderr
        assert [end.stderr.count("\n") for end in ended] == [1, 0]


def test_a_plan_that_is_wrong_on_one_rank_ends_all(tmp_path: Path) -> None:
    """Ranks in different folders, whose plans of one name use 1 and 2 slots: one line, the same error on both ranks."""
    (tmp_path / "text.txt").write_text("router expert slot bank owner\n" * 600, encoding="utf-8")
    sizes = "--layers 2 --experts 4 --top-k 2 --ranks 2 --tokens 64 --dim 16 --ffn-dim 16 --steps 2"
    assert run_command(cli, ["trace", "synth", str(tmp_path / "trace.npz"), *sizes.split()]) == 0
    solve = ["place", "solve", str(tmp_path / "trace.npz"), "--solver", "eplb", "--slots", "1"]
    folders = [tmp_path / "first", tmp_path / "second"]
    for folder in folders:
        folder.mkdir()
    assert run_command(cli, [*solve, "-o", str(folders[0] / "plan.json")]) == 0
    replace(read_plan(folders[0] / "plan.json"), slots=2).write(folders[1] / "plan.json")
    values = [*tiny_values(tmp_path), "runtime.slots=1", "runtime.timeout_s=5", "placement.file=plan.json"]
    first, second = wait_for(start_ranks(2, set_options(values), tmp_path, folders))
    message = "placement.file plan.json uses 2 slots, runtime.slots is 1; set runtime.slots=2 (rank 1 of 2)"
    assert (first.status, second.status) == (2, 2)
    assert (first.stderr, second.stderr) == (f"moesaic: {message}\n", "")
