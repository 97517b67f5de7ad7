"""Placement and topology files: round trips, and what is refused."""

import json
from dataclasses import replace

import numpy as np
import pytest

from moesaic.placement import Placement, SavedPlan, Topology, TraceMeta, read_plan
from moesaic.placement.offline.plans import read_topology

META = TraceMeta(num_layers=2, num_experts=4, top_k=2, num_ranks=2, dim=8, ffn_dim=16)


def make_plan() -> SavedPlan:
    replicas_RE = np.array([[1, 1, 1, 0], [0, 0, 1, 1]], dtype=bool)
    return SavedPlan(
        meta=META,
        topology=Topology.preset("h100", 2),
        slots=1,
        solver="quota",
        objective_s=2.0,
        bound_s=1.5,
        gap=0.25,
        seconds=0.5,
        moves=0,
        trace_digest="sha256:00",
        layers=(Placement(np.array([0, 0, 1, 1]), replicas_RE), Placement.owners_only(np.array([1, 0, 1, 0]), 2)),
    )


def test_round_trip(tmp_path):
    plan = make_plan()
    plan.write(tmp_path / "plan.json")
    assert read_plan(tmp_path / "plan.json") == plan
    assert plan.owners.expert_to_owner_LE.tolist() == [[0, 0, 1, 1], [1, 0, 1, 0]]
    assert plan.num_copies == 1
    assert json.loads(plan.to_json())["layers"][0] == {"owners": [0, 0, 1, 1], "copies": [[2, 0]]}
    assert [path.name for path in tmp_path.iterdir()] == ["plan.json"]


@pytest.mark.parametrize(
    "change, message",
    [
        ({"schema": "other/1"}, "its schema is 'other/1', not 'moesaic-plan/1'"),
        ({"gap": None}, "gap must be a number from 0 to 1, got 'None'"),
        ({"objective": -1.0}, "objective must be a number"),
        ({"slots": 0}, "layer 0 puts 1 copies on rank 0, the plan has 0 slots"),
        ({"layers": []}, "layers must list 2 layers"),
        ({"layers": [{"owners": [0, 0, 1], "copies": []}] * 2}, "owners must list 4 ranks"),
        ({"layers": [{"owners": [0, 0, 1, 2], "copies": []}] * 2}, "names '2', but there are 2 ranks"),
        ({"layers": [{"owners": [0, 0, 1, 1], "copies": [[0, 0]]}] * 2}, "puts expert 0 on rank 0 twice"),
        ({"model": {"num_layers": 2}}, "model has no 'num_experts'"),
        ({"topology": {**json.loads(make_plan().to_json())["topology"], "num_nodes": 10**6}}, "at most 2048 are supported"),
        (
            {"topology": {**json.loads(make_plan().to_json())["topology"], "flops_per_s": 0}},
            "flops_per_s must be a number from 1",
        ),
        (
            {"topology": {**json.loads(make_plan().to_json())["topology"], "rank_costs": [100]}},
            "rank_costs has 1 numbers for 2 ranks; give one for each, or none",
        ),
        (
            {"topology": {**json.loads(make_plan().to_json())["topology"], "rank_costs": [100, 1001]}},
            "rank_costs has 1001 percent, at most 1000 are supported; give less",
        ),
        (
            {"topology": {**json.loads(make_plan().to_json())["topology"], "node_costs": [0]}},
            "node_costs must be an integer of at least 1, got 0",
        ),
    ],
)
def test_bad_plans_are_one_clear_line(tmp_path, change, message):
    data = json.loads(make_plan().to_json()) | change
    (tmp_path / "plan.json").write_text(json.dumps(data))
    with pytest.raises(ValueError, match=message) as caught:
        read_plan(tmp_path / "plan.json")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "text, message", [("[" * 100000, "cannot be read as JSON"), ('{"a": NaN}', "it holds NaN"), ("7", "not an object")]
)
def test_text_that_is_no_plan(tmp_path, text, message):
    (tmp_path / "plan.json").write_text(text)
    with pytest.raises(ValueError, match=message):
        read_plan(tmp_path / "plan.json")
    with pytest.raises(ValueError, match=message):
        read_topology(tmp_path / "plan.json")


def test_missing_files_and_folders(tmp_path):
    with pytest.raises(ValueError, match="there is no plan at"):
        read_plan(tmp_path / "none.json")
    with pytest.raises(ValueError, match="cannot read the plan"):
        read_plan(tmp_path)


def test_a_plan_for_another_model_is_refused():
    plan = make_plan()
    plan.check_model(META, "the run")
    plan.check_model(TraceMeta(num_layers=2, num_experts=4, top_k=2, num_ranks=2), "the run")
    for name, value in (("num_layers", 3), ("num_experts", 5), ("top_k", 1), ("num_ranks", 4), ("dim", 9)):
        other = TraceMeta(**{**META.__dict__, name: value})
        with pytest.raises(ValueError, match=f"the plan is for {name} {getattr(META, name)}, the run has {value}"):
            plan.check_model(other, "the run")


def test_topology_files(tmp_path):
    topology = json.loads(make_plan().to_json())["topology"]
    (tmp_path / "t.json").write_text(json.dumps(topology))
    assert read_topology(tmp_path / "t.json") == Topology.preset("h100", 2)
    (tmp_path / "t.json").write_text(json.dumps(topology | {"rank_costs": [100, 250]}))
    assert read_topology(tmp_path / "t.json") == replace(Topology.preset("h100", 2), rank_costs=(100, 250))


def test_plans_of_unequal_ranks_and_of_older_versions(tmp_path):
    """Older files do not say how ranks and nodes differ: they are equal."""
    plan = make_plan()
    slow = replace(plan, topology=replace(plan.topology, rank_costs=(100, 250), node_costs=(100,)))
    slow.write(tmp_path / "plan.json")
    assert read_plan(tmp_path / "plan.json") == slow != plan
    data = json.loads(slow.to_json())
    del data["topology"]["rank_costs"], data["topology"]["node_costs"]
    (tmp_path / "plan.json").write_text(json.dumps(data))
    assert read_plan(tmp_path / "plan.json") == plan
