"""The run folder: nobody's files are overwritten, and what is written can be read back."""

import json
import os
import sys
import tracemalloc
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

import numpy as np
import pytest
import torch

from moesaic.launch.cli import cli
from moesaic.launch.config import Config, LaunchConfig, ModelConfig, PlacementConfig, RunConfig, load_config
from moesaic.launch.entry import run_command
from moesaic.launch.run.inputs import _read_plan
from moesaic.launch.run.process import Process
from moesaic.launch.run.records import Records, StepRecord, create_run_folder, show, trace_meta
from moesaic.placement import ExpertLoad, LayerShape, Problem, Topology, Trace, get_solver
from moesaic.runtime import RuntimeConfig
from moesaic.runtime.experts.expert import ExpertShape
from moesaic.runtime.wrap.migration_policy import Decision
from moesaic.runtime.wrap.recorder import Recorder
from moesaic.runtime.wrap.tensorboard import require_tensorboard


def record_of(step: int) -> StepRecord:
    """Of that step."""
    numbers = {"loss": 3.0, "aux_loss": 0.1, "grad_norm": 1.0, "lr": 0.1, "seconds": 0.5, "compile_s": 0.0, "bytes_sent": 8.0}
    return StepRecord(tokens_per_s=100.0 * step, **numbers)


METRICS = {
    "max_over_mean": 1.1,
    "max_over_mean_static": 1.5,
    "copies_per_layer": 2.0,
    "gathers_direct": 0.25,
    "gathers_relay": 0.75,
    "gathers_hierarchical": 0.0,
    "gathers_element_sharded": 0.0,
    "expert_bytes": 4e6,
    "slot_bytes_bound": 3e6,
    "slot_bytes_peak": 2e6,
}


def tiny_config(folder: Path) -> Config:
    model = ModelConfig(dim=8, num_layers=2, num_heads=1, ffn_dim=8, num_experts=3, top_k=2)
    return Config(run=RunConfig(name="tiny", folder=str(folder)), model=model, launch=LaunchConfig(progress=False))


def process_of(rank: int) -> Process:
    return Process(rank, 2, rank, 2, None, torch.device("cpu"))


class FakeRun:
    """What a handle has after each step, given by hand; two layers on two ranks."""

    def __init__(self, rank: int = 0):
        self.metrics: dict[str, float] = dict(METRICS)
        self.loads_LRE = np.full((2, 2, 3), 2)
        self.layers: dict[str, dict[str, float]] = {}
        self.decisions: list[Decision] = []
        owner_E, topology, shape = np.array([0, 1, 1]), Topology.preset("cpu", 2), LayerShape(3, 2, 8, 8)
        planner = SimpleNamespace(problem=lambda load: Problem(load, owner_E, topology, shape, slots=2))
        layer = SimpleNamespace(num_experts=3, top_k=2, shape=ExpertShape(8, 8), runtime=SimpleNamespace(planner=planner))
        group = SimpleNamespace(is_first=rank == 0, world_size=2)
        self._sharded: Any = SimpleNamespace(layers={"blocks.0.moe": layer, "blocks.1.moe": layer}, group=group)
        self._telemetry: Any = SimpleNamespace(
            loads=lambda: self.loads_LRE, layer_metrics=lambda: self.layers, migrations=lambda: list(self.decisions)
        )

    def record(self, folder: Path, *, layers: bool = False, trace_every: int = 1, tensorboard: bool = False) -> Recorder:
        return Recorder(
            folder,
            self._sharded,
            self._telemetry,
            lambda: dict(self.metrics),
            RuntimeConfig(),
            first_step=0,
            layers=layers,
            trace_every=trace_every,
            tensorboard=tensorboard,
        )


def test_the_next_free_name_is_taken(tmp_path: Path) -> None:
    """NAME, NAME-2, NAME-3; a file of that name counts as taken, and a gap is filled."""
    config = RunConfig(name="a", folder=str(tmp_path / "runs"))
    assert create_run_folder(config).name == "a"
    (tmp_path / "runs" / "a-2").write_text("not a run")
    (tmp_path / "runs" / "a-4").mkdir()
    assert [create_run_folder(config).name for _ in range(3)] == ["a-3", "a-5", "a-6"]
    assert (tmp_path / "runs" / "a-2").read_text() == "not a run"


def test_a_folder_that_cannot_be_made(tmp_path: Path) -> None:
    """A file where the parent should be: one line with the cure, no endless search for a free name."""
    (tmp_path / "runs").write_text("not a folder")
    with pytest.raises(ValueError, match=r"cannot make a run folder in .*runs/a.* set run.folder to another"):
        create_run_folder(RunConfig(name="b", folder=str(tmp_path / "runs" / "a")))
    with pytest.raises(ValueError, match=r"cannot make a run folder"):
        create_run_folder(RunConfig(name="b", folder=str(tmp_path / "runs")))


def test_runs_that_start_together_get_different_folders(tmp_path: Path) -> None:
    config = RunConfig(name="a", folder=str(tmp_path))
    with ThreadPoolExecutor(8) as pool:
        folders = list(pool.map(lambda _: create_run_folder(config), range(16)))
    assert len(set(folders)) == 16


@pytest.mark.parametrize(("trace_every", "steps"), [(2, [2, 4]), (0, [])])
def test_traces_of_some_steps(tmp_path: Path, trace_every: int, steps: list[int]) -> None:
    run = FakeRun()
    with run.record(tmp_path, trace_every=trace_every) as recorder:
        for step in range(1, 6):
            run.loads_LRE = np.array([[[2 + step, 2, 0], [1, 1 + step, 2]]] * 2)
            recorder.write(asdict(record_of(step)))
    assert not list(tmp_path.glob("*.partial"))
    assert (tmp_path / "trace.npz").exists() == bool(steps)
    if steps:
        assert [int(loads_LRE[0, 0, 0]) - 2 for loads_LRE in Trace(tmp_path / "trace.npz").steps()] == steps


def test_readers_that_leave_stop_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """As with `moesaic train | head -1`: what nobody reads is dropped."""
    reading, writing = os.pipe()
    os.close(reading)
    with open(writing, "w", encoding="utf-8") as stdout:
        monkeypatch.setattr(sys, "stdout", stdout)
        for _ in range(3):
            show("a line")
        assert os.readlink(f"/proc/self/fd/{stdout.fileno()}") == os.devnull


def test_files_of_a_run(tmp_path: Path) -> None:
    """config.toml, one metrics line per step, the trace, and a summary of medians and means."""
    config, run = tiny_config(tmp_path), FakeRun()
    loads_SLRE = np.array([[[[2, 2, 0], [1, 1, 2]]] * 2, [[[4, 0, 0], [0, 2, 2]]] * 2])
    with run.record(tmp_path) as recorder, Records(recorder, config, process_of(0)) as records:
        recorder.add_validation(5.5)
        for step, run.loads_LRE in enumerate(loads_SLRE, start=1):
            records.add(record_of(step), METRICS, val_loss=2.5 if step == 2 else None)
    summary = recorder.summary()
    assert load_config(tmp_path / "config.toml") == config
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [0, 1, 2]
    assert [row.get("val_loss") for row in rows] == [5.5, None, 2.5]
    assert rows[1]["max_over_mean_static"] == 1.5
    trace = Trace(tmp_path / "trace.npz")
    assert (trace.meta.num_ranks, trace.meta.dim) == (2, 8)
    assert np.array_equal(np.stack(list(trace.steps())), loads_SLRE)
    assert summary is not None
    assert (summary.first_val_loss, summary.last_val_loss, summary.tokens_per_s, summary.steps) == (5.5, 2.5, 150.0, 2)
    assert json.loads((tmp_path / "summary.json").read_text())["max_over_mean"] == pytest.approx(1.1)
    assert "validation loss        5.500 -> 2.500\n" in str(summary)
    assert "1.500 under static EP, 1.100 under FSSDP" in str(summary)
    assert "relay (75% of gathers), direct (25% of gathers)\n" in str(summary)


def test_steps_are_not_kept(tmp_path: Path) -> None:
    """Besides what the files hold, a step leaves a number for the median behind, not its row."""
    run = FakeRun()
    with run.record(tmp_path) as recorder:

        def add(steps: range) -> int:
            for step in steps:
                run.metrics = METRICS | {f"exposed_s/{layer}": step / 7 for layer in range(50)}
                recorder.write(asdict(record_of(step)))
            return tracemalloc.get_traced_memory()[0]

        tracemalloc.start()
        grown = -add(range(20)) + add(range(20, 120))
        tracemalloc.stop()
    assert grown < 100 * 500  # such a row takes 3,000 bytes


def test_an_error_loses_no_steps(tmp_path: Path) -> None:
    def stumble() -> None:
        with FakeRun().record(tmp_path) as recorder:
            recorder.add_validation(5.5)
            recorder.write(asdict(record_of(1)))
            raise RuntimeError("stumbled")

    with pytest.raises(RuntimeError, match="stumbled"):
        stumble()
    assert Trace(tmp_path / "trace.npz").num_steps == 1
    assert len((tmp_path / "metrics.jsonl").read_text().splitlines()) == 2


def test_other_ranks_write_nothing(tmp_path: Path) -> None:
    config = tiny_config(tmp_path)
    with FakeRun(rank=1).record(tmp_path) as recorder, Records(recorder, config, process_of(1)) as records:
        recorder.add_validation(5.5)
        records.add(record_of(1), METRICS, val_loss=None)
        records.print_line("nothing")
    assert recorder.summary() is None
    assert list(tmp_path.iterdir()) == []


LAYERS = {
    "blocks.0.moe": {"max_over_mean": 1.2, "dead_experts": 1.0},
    "blocks.1.moe": {"max_over_mean": 1.0, "dead_experts": 0.0},
}
DECISION = Decision(
    4, "experts migrate: 2 experts would save 0.5 s over 4 steps and take 0.25 s", 2, "milp", 2.0, 1.5, 0.25, 0.75, 0.5, 0.125
)


class FakeWriter:
    """Stands in for TensorBoard's."""

    written: ClassVar[dict[str, object]] = {}

    def __init__(self, folder: str):
        self.written["folder"] = Path(folder).name

    def add_scalar(self, tag: str, value: float, step: int) -> None:
        self.written[tag] = (value, step)

    add_text = add_scalar

    def close(self) -> None:
        self.written["closed"] = True


@pytest.mark.parametrize("level", ["brief", "detailed"])
def test_layers_and_decisions(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], level: str
) -> None:
    """Decisions are always written and said; layers when detailed; TensorBoard gets the same."""
    monkeypatch.setattr("moesaic.runtime.wrap.tensorboard.find_spec", lambda name: name)
    monkeypatch.setattr("moesaic.runtime.wrap.tensorboard.import_module", lambda name: SimpleNamespace(SummaryWriter=FakeWriter))
    monkeypatch.setattr(FakeWriter, "written", {})
    config, run = tiny_config(tmp_path), FakeRun()
    run.layers = LAYERS
    with (
        run.record(tmp_path, layers=level == "detailed", tensorboard=True) as recorder,
        Records(recorder, config, process_of(0)) as records,
    ):
        run.decisions.append(DECISION)
        records.add(record_of(1), METRICS, val_loss=3.0)
        run.metrics |= {"saved_s_observed": 0.4, "migration_step": 1.0}
        records.add(record_of(2), METRICS, val_loss=None)
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert rows[0]["migrations"] == [
        {
            "solver": "milp",
            "moved": 2,
            "objective": 2.0,
            "bound": 1.5,
            "gap": 0.25,
            "seconds": 0.75,
            "saved_s_predicted": 0.5,
            "move_s": 0.125,
            "reason": DECISION.reason,
        }
    ]
    assert "migrations" not in rows[1]
    assert (rows[1]["saved_s_observed"], rows[1]["migration_step"]) == (0.4, 1.0)
    summary = recorder.summary()
    assert summary is not None
    assert summary.migrations == [{"step": 1, **rows[0]["migrations"][0], "saved_s_observed": 0.4}]
    line = "2 experts, which save until the next proposal: 0.5 s predicted, 0.4 s observed (milp, gap 25.0%)"
    assert line in str(summary)
    assert capsys.readouterr().out == f"step 1: {DECISION.reason}\n"
    layers = [{"layer": name, **summary} for name, summary in LAYERS.items()]
    assert rows[1].get("layers") == (layers if level == "detailed" else None)
    written = FakeWriter.written
    assert (written["folder"], written["closed"], written["migration"]) == ("tensorboard", True, (DECISION.reason, 1))
    assert (written["step/loss"], written["step/val_loss"]) == ((3.0, 2), (3.0, 1))
    assert written.get("max_over_mean/blocks.0.moe") == ((1.2, 2) if level == "detailed" else None)


def test_tensorboard_that_is_not_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("moesaic.runtime.wrap.tensorboard.find_spec", lambda name: None)
    with pytest.raises(
        ValueError, match=r"TensorBoard is not installed: pip install 'moesaic\[report\]', or set run.tensorboard=false"
    ):
        require_tensorboard()


def test_the_owners_after_a_migration_are_a_plan(tmp_path: Path) -> None:
    """With the policy's copies; what is written is what is read, by training and by `moesaic place`."""
    config = tiny_config(tmp_path)
    topology, shape = Topology.preset("cpu", 2), LayerShape(3, 2, 8, 8)
    loads_LRE = np.array([[[900, 20, 3], [900, 20, 3]], [[1, 1, 90], [1, 1, 90]]]) * 100
    problems = [
        Problem(ExpertLoad(load_RE), np.array(owner_E), topology, shape, slots=2)
        for load_RE, owner_E in zip(loads_LRE, ([1, 0, 0], [0, 0, 1]), strict=True)
    ]
    with FakeRun().record(tmp_path) as recorder:
        recorder.write_plan(problems, DECISION)
    plan = _read_plan(replace(config, placement=PlacementConfig(file=str(tmp_path / "plan.json"))), trace_meta(config, 2))
    assert [placement.expert_to_owner_E.tolist() for placement in plan.layers] == [[1, 0, 0], [0, 0, 1]]
    assert plan.layers == tuple(get_solver("quota")(problem).placement for problem in problems)
    figures = (plan.solver, plan.slots, plan.objective_s, plan.bound_s, plan.gap, plan.seconds, plan.moves)
    assert figures == ("milp", 2, 2.0, 1.5, 0.25, 0.75, 2)
    assert plan.topology == topology
    assert [path.name for path in tmp_path.glob("plan*")] == ["plan.json"]
    assert run_command(cli, ["place", "show", str(tmp_path / "plan.json")]) == 0
