"""The command line: lazy commands, exit statuses, one line for wrong use."""

import json
import subprocess
import sys
from pathlib import Path

import click
import pytest

from moesaic.launch.cli import COMMANDS, cli
from moesaic.launch.entry import RankError, RunError, run_command


def error_of(capsys: pytest.CaptureFixture[str], *args: str) -> str:
    """The one line that a wrong use prints."""
    assert run_command(cli, args) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.count("\n") == 1
    return captured.err


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_of_the_table_exists(name: str) -> None:
    command = COMMANDS[name].load()
    assert isinstance(command, click.Command)
    assert command.name == name
    assert command.help


def test_overview_imports_no_command() -> None:
    script = """
import sys
from moesaic.launch.cli import main
try:
    main()
finally:
    heavy = {"moesaic.launch.train", "moesaic.launch.doctor.command", "moesaic.launch.config"} & set(sys.modules)
    assert not heavy, heavy
"""
    ended = subprocess.run([sys.executable, "-c", script, "--help"], capture_output=True, text=True)
    assert ended.returncode == 0, ended.stderr
    for name, lazy in COMMANDS.items():
        assert name in ended.stdout
        assert lazy.summary in " ".join(ended.stdout.split())


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert run_command(cli, ["--version"]) == 0
    assert capsys.readouterr().out.startswith("moesaic, version ")


@pytest.mark.parametrize(
    "args, message",
    [
        (["trian"], "unknown command 'trian'; did you mean 'train'?"),
        (["zzz"], "No such command 'zzz'."),
        (["train", "--sett", "a=1"], "No such option"),
        (["train", "extra"], "unexpected extra argument"),
        (["train", "--set", "model.dimm=3"], "unknown key 'model.dimm' in --set model.dimm=3; did you mean 'model.dim'?"),
        (["train", "--config", "/nowhere/run.toml"], "--config /nowhere/run.toml: No such file or directory"),
        (["doctor", "--json", "/nowhere/rows.json"], "cannot write /nowhere/rows.json: give a file in a folder that is there"),
        (["bench", "placement", "--json", "/nowhere/rows.json"], "cannot write /nowhere/rows.json: give"),
        (["place", "show", "plan.json", "--json", "/"], "cannot write /: give"),
    ],
)
def test_wrong_use_is_one_line_and_status_2(capsys: pytest.CaptureFixture[str], args: list[str], message: str) -> None:
    assert message in error_of(capsys, *args)


@pytest.mark.parametrize("args", [[], ["bench"], ["place"], ["trace"]])
def test_a_group_without_a_command_shows_its_help(capsys: pytest.CaptureFixture[str], args: list[str]) -> None:
    assert run_command(cli, args) == 2
    shown = capsys.readouterr().err
    assert shown.startswith("Usage: moesaic")
    assert "\nCommands:\n" in shown


def test_messages_are_one_line_and_statuses_pass_through(capsys: pytest.CaptureFixture[str]) -> None:
    @click.command()
    @click.argument("what")
    def command(what: str) -> int:
        if what == "wrong":
            raise ValueError("two\n  lines")
        if what == "interrupt":
            raise KeyboardInterrupt
        return int(what)

    assert run_command(command, ["wrong"]) == 2
    assert capsys.readouterr().err == "moesaic: two lines\n"
    assert run_command(command, ["143"]) == 143
    assert run_command(command, ["interrupt"]) == 130
    with pytest.raises(ZeroDivisionError):
        run_command(click.command()(lambda: 1 // 0), [])


@pytest.mark.parametrize(
    "error, rank, local_rank, prints",
    [
        (ValueError, 4, 0, True),
        (ValueError, 5, 1, False),
        (RunError, 0, 0, True),
        (RunError, 4, 0, False),
        (RankError, 5, 1, True),
        (click.UsageError, 4, 0, True),
        (click.UsageError, 5, 1, False),
        (ValueError, 8, 1, True),
    ],
)
def test_which_of_8_ranks_prints_the_line(
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    error: type[Exception],
    rank: int,
    local_rank: int,
    prints: bool,
) -> None:
    """On two machines. One that leaves it to another stays a while: the end of any rank is the end of all under torchrun."""
    variables = {"RANK": rank, "WORLD_SIZE": 8, "LOCAL_RANK": local_rank, "LOCAL_WORLD_SIZE": 4}
    for name, value in variables.items():
        monkeypatch.setenv(name, str(value))
    waits_s: list[float] = []
    monkeypatch.setattr("moesaic.launch.entry.time.sleep", waits_s.append)

    @click.command()
    def command() -> None:
        raise error("wrong")

    assert run_command(command, []) == 2
    assert capsys.readouterr().err == "moesaic: wrong\n" * prints
    assert bool(waits_s) is not prints


def test_doctor_reports_as_text_and_json(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    """Every transport was tried between two processes; the one that a run would take is named with the reason."""
    path = tmp_path / "doctor.json"
    assert run_command(cli, ["doctor", "--json", str(path)]) == 0
    text = capsys.readouterr().out
    report = json.loads(path.read_text())
    assert report["command"] == "doctor"
    rows = {row["name"]: row for row in report["rows"]}
    for name in ("c10d gloo", "shm", "hierarchical"):
        assert rows[name] == {"what": "transport", "name": name, "status": "works", "works": True}
    assert rows["mpi"]["works"] == rows["mpi4py"]["works"]
    assert rows["auto"]["status"].startswith("shm on this machine: all 2 ranks are on one node")
    assert rows["torch"]["works"]
    assert all(name in text for name in rows)


def test_doctor_as_json_alone(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("moesaic.launch.doctor.command.transports", list)
    assert run_command(cli, ["doctor", "--json", "-"]) == 0
    rows = json.loads(capsys.readouterr().out)["rows"]
    assert {"torch", "cpu"} <= {row["name"] for row in rows}
