"""`moesaic calibrate`: rates from seconds, a run on two ranks, and everything that reads its file."""

import json
import os
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh

from moesaic import MoELayer, shard_experts
from moesaic.benchmarks.scaling import ScalingCase
from moesaic.benchmarks.scaling import run as run_scaling
from moesaic.benchmarks.step import StepCase
from moesaic.collectives import RowPart
from moesaic.launch.cli import cli
from moesaic.launch.config import load_config
from moesaic.launch.doctor import machine_check
from moesaic.launch.entry import run_command
from moesaic.launch.measure import fit, hidden_share, measure_machine
from moesaic.launch.run.inputs import read_inputs
from moesaic.launch.run.process import Process, find_process, process_group
from moesaic.launch.train import Trainer
from moesaic.placement import Topology
from moesaic.placement.machine import Machine, read_machine, write_machine
from tests.helpers.cluster import Cluster
from tests.helpers.ranks import run_ranks
from tests.launch.ranks import tiny_values

MACHINE = Machine(
    num_nodes=1,
    ranks_per_node=2,
    device="cpu",
    transport="shm",
    rates={"device_bytes_per_s": 3e9, "latency_s": 3e-5, "flops_per_s": 7e10, "half_rate_rows": 11.0},
)


def test_fit_finds_what_made_the_seconds() -> None:
    """Through both ends, in several rounds at once; never below 0."""
    sizes = [1024, 4096, 65536]
    seconds = np.array([[2e-4 + size / 1e8, 1e-3 + size / 5e8] for size in sizes])
    seconds[1] *= 3  # what lies between does not count
    fixed_s, byte_s = fit(sizes, seconds)
    np.testing.assert_allclose(fixed_s, [2e-4, 1e-3])
    np.testing.assert_allclose(1 / byte_s, [1e8, 5e8])
    assert fit([1, 10], np.array([0.5, 10.0])) == (0.0, pytest.approx(9.5 / 9))
    assert fit([1, 10], np.array([3.0, 2.0])) == (pytest.approx(2.8), 0.2)


def test_what_a_gather_hides() -> None:
    """The docstring's example; timings that wander stay within 0 and 1."""
    beside_s = np.array([3.0, 4.0, 5.0, 2.9, 6.0])
    np.testing.assert_allclose(hidden_share(np.full(5, 3.0), np.full(5, 2.0), beside_s), [1.0, 0.5, 0.0, 1.0, 0.0])


@pytest.fixture
def text(tmp_path: Path) -> Path:
    (tmp_path / "text.txt").write_text("router expert slot bank owner\n" * 500)
    return tmp_path


def test_two_ranks_of_this_machine_and_a_run_that_reads_the_file(
    text: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """The command alone starts two ranks, which measure for a moment; a run of one rank prices with what they wrote."""
    folder = text / "machine"
    folder.mkdir()
    monkeypatch.chdir(folder)
    assert run_command(cli, ["calibrate", "--seconds", "0.1", "-o", "m.toml", "--json", "rates.json"]) == 0
    assert {path.name for path in folder.iterdir()} == {"m.toml", "rates.json"}
    machine = read_machine("m.toml")
    assert (machine.num_nodes, machine.ranks_per_node, machine.transport) == (1, 2, "shm")
    assert machine.spread.keys() == machine.rates.keys()
    assert {
        "device_bytes_per_s",
        "latency_s",
        "flops_per_s",
        "half_rate_rows",
        "copy_bytes_per_s",
        "gather_hides",
    } < machine.rates.keys()
    assert machine.tables.keys() == {"ranks_exchange", "ranks_pair", "experts"}
    assert all(len(table["seconds"]) >= 2 for table in machine.tables.values())
    assert machine.links["ranks"].keys() == {"0-1"}
    assert len(machine.rank_flops_per_s) == 2
    rows = json.loads((folder / "rates.json").read_text())["rows"]
    assert {row["rate"]: row["value"] for row in rows} == machine.rates
    printed = capfd.readouterr()
    assert "m.toml: 1 x 2 ranks, transport shm, cpu" in printed.out
    assert printed.err.count("links between ranks") == 1

    config = load_config(None, [*tiny_values(text), "placement.machine=m.toml"])
    process = find_process(config.launch, {})
    with process_group(process, config.launch, timeout_s=60.0) as mesh:
        handle = Trainer(config, process, mesh, read_inputs(config, process)).handle
    assert handle._group.topology == machine.topology(1, 1)
    assert next(iter(handle.layers.values())).runtime.context.model.gather_hides == machine.rates["gather_hides"]


def _inputs_of(rank: int, text: str) -> str:
    """The refusal of a run that reads m.toml in a folder of each rank's own."""
    before = os.getcwd()
    os.chdir(f"{text}/{rank}")
    try:
        config = load_config(None, [*tiny_values(Path(text)), "placement.machine=m.toml"])
        read_inputs(config, Process(rank, 2, rank, 2, None, device=torch.device("cpu")))
    except ValueError as error:
        return str(error)
    finally:
        os.chdir(before)
    return ""


def test_a_run_refuses_different_files_on_its_ranks(text: Path) -> None:
    for rank in range(2):
        (text / str(rank)).mkdir()
        write_machine(text / str(rank) / "m.toml", replace(MACHINE, name=f"host {rank}"))
    differs = 'the machine (placement.machine) differs between ranks: name = "host 0" on rank 0, name = "host 1" on rank 1'
    assert run_ranks(2, _inputs_of, str(text)) == [differs] * 2


def _topology_of(rank: int, machines: list[Machine | str | None], topology: Topology | None = None) -> Topology | str:
    model = torch.nn.Sequential(MoELayer(8, 8, num_experts=4, top_k=2))
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    try:
        return shard_experts(model, mesh=mesh, machine=machines[rank], topology=topology)._group.topology
    except ValueError as error:
        assert not model[0].experts.is_sharded
        return str(error)


def test_shard_experts_takes_a_path_or_a_machine(tmp_path: Path) -> None:
    path = str(tmp_path / "m.toml")
    write_machine(path, MACHINE)
    assert run_ranks(2, _topology_of, [path, MACHINE]) == [MACHINE.topology(1, 2)] * 2
    refused = {
        "differs": run_ranks(2, _topology_of, [MACHINE, replace(MACHINE, name="another")]),
        "on one": run_ranks(2, _topology_of, [MACHINE, None]),
        "missing": run_ranks(2, _topology_of, [path, f"{path}.old"]),
        "both": run_ranks(2, _topology_of, [path, path], MACHINE.topology(1, 2)),
    }
    differs = "the machine of rank 1 differs from that of rank 0; give the same machine file on every rank"
    assert refused["differs"] == refused["on one"] == [differs] * 2
    missing = f"there is no machine file at {path}.old: write one with `moesaic calibrate -o {path}.old` (rank 1)"
    assert refused["missing"] == [missing] * 2
    assert refused["both"] == ["both topology and machine are given; leave out one"] * 2


def test_offline_commands_price_with_the_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A plan solved with a machine file holds its rates; one node says nothing of two."""
    trace, plan, path = (str(tmp_path / name) for name in ("t.npz", "plan.json", "m.toml"))
    write_machine(path, MACHINE)
    synth = ["trace", "synth", trace, "--experts", "4", "--ranks", "2", "--steps", "2", "--layers", "1", "--top-k", "2"]
    assert run_command(cli, synth) == 0
    solve = ["place", "solve", trace, "--solver", "quota", "-o", plan, "--machine", path]
    assert run_command(cli, solve) == 0
    assert json.loads(Path(plan).read_text())["topology"]["flops_per_s"] == 7e10
    capsys.readouterr()
    assert run_command(cli, [*solve, "--topology", "2x1"]) == 2
    assert "no rates.node_bytes_per_s for 2 nodes" in capsys.readouterr().err


def test_simulated_nodes_of_a_machine_file(tmp_path: Path) -> None:
    path = str(tmp_path / "m.toml")
    write_machine(path, MACHINE)
    layer = StepCase(ranks=1, experts=4, hidden=16, ffn=16, tokens=64, top_k=1, skew=1.2, slots=1, rounds=2)
    case = ScalingCase(mode="simulated", nodes=(1,), ranks_per_node=2, link_mbit=1.0, machine=path, layer=layer)
    rows, slower = run_scaling(case), replace(MACHINE, rates=MACHINE.rates | {"flops_per_s": 7e5})
    write_machine(path, slower)
    for row, slow in zip(rows or [], run_scaling(case) or [], strict=True):
        assert row["machine"] == path
        assert slow["tokens_per_s"] < row["tokens_per_s"] / 100


def test_the_doctor_compares(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """Within a fifth is well; versions and transport are texts."""
    path = str(tmp_path / "m.toml")
    rates = {"device_bytes_per_s": 3.5e9, "latency_s": 3e-5, "flops_per_s": 3.5e10, "half_rate_rows": 11.0}
    write_machine(path, replace(MACHINE, versions={"torch": "2.0"}))

    def measured(num_ranks: int, arguments: list[str], **options: Any) -> int:
        assert num_ranks == 2
        write_machine(arguments[1], replace(MACHINE, rates=rates, versions={"torch": "2.1"}))
        return 0

    monkeypatch.setattr(machine_check, "start_ranks", measured)
    lines = {name: (status, agrees) for name, status, agrees in machine_check.compare_machine(path)}
    assert {name for name, (_, agrees) in lines.items() if not agrees} == {"torch", "flops_per_s"}
    assert lines["torch"][0] == "2.0 in the file, 2.1 here"
    assert lines["flops_per_s"][0] == "7e+10 in the file, 3.5e+10 here (-50%)"
    assert lines["transport"] == ("shm", True)
    monkeypatch.setattr("moesaic.launch.doctor.command.transports", list)
    assert run_command(cli, ["doctor", "--machine", path, "--json", "-"]) == 0
    rows = json.loads(capsys.readouterr().out)["rows"]
    assert {"what": "machine", "name": "transport", "status": "shm", "works": True} in rows


def test_one_rank_has_no_links(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("RANK", "LOCAL_RANK"):
        monkeypatch.setenv(name, "0")
    for name in ("WORLD_SIZE", "LOCAL_WORLD_SIZE"):
        monkeypatch.setenv(name, "1")
    assert run_command(cli, ["calibrate", "-o", str(tmp_path / "m.toml"), "--device", "cpu"]) == 2
    assert capsys.readouterr().err == "moesaic: one rank has no links to measure: start two or more\n"
    assert os.listdir(tmp_path) == []


def _measure(rank: int) -> Machine:
    group = dist.group.WORLD
    assert group is not None
    return measure_machine(group, torch.device("cpu"), seconds=0.5)


def _peers(rank: int) -> tuple[int, set[int]]:
    with patch("moesaic.launch.measure.RowPart", wraps=RowPart) as parts:
        measured = measure_machine(dist.group.WORLD, torch.device("cpu"), seconds=0.0)  # type: ignore[arg-type]
    return len(measured.links["ranks"]), {call.args[0] for call in parts.call_args_list}


def test_an_odd_number_of_ranks() -> None:
    """In a ring of three each turn leaves one rank alone, which sends itself nothing: Gloo would not survive it."""
    for rank, (num_pairs, peers) in enumerate(run_ranks(3, _peers)):
        assert num_pairs == 3
        assert peers == {0, 1, 2} - {rank}


def test_emulated_nodes() -> None:
    """Two nodes of two ranks: all ranks find the same, and no exchange is faster than the link that the ranks of a node share."""
    with Cluster(2, 2, bits_per_s=50e6) as cluster:
        first, *others = cluster.run(_measure)
    assert all(other == first for other in others)
    assert (first.num_nodes, first.ranks_per_node, first.transport) == (2, 2, "hierarchical")
    assert first.tables.keys() == {"ranks_exchange", "ranks_pair", "nodes_exchange", "nodes_pair", "experts"}
    assert first.links["ranks"].keys() == {"0-1", "2-3"}
    assert first.links["nodes"].keys() == {"0-1"}
    # The two ranks of a node send 2 messages each over its link, which may send 32 KiB at once and then its rate.
    exchange = first.tables["nodes_exchange"]
    for size, seconds in zip(exchange["bytes"], exchange["seconds"], strict=True):
        assert seconds > (4 * size - 2 * 32 * 1024) / (50e6 / 8)
    assert first.topology(2, 2).node_bytes_per_s == first.rates["node_bytes_per_s"]
