"""The value types: what they refuse, and that they are values."""

from __future__ import annotations

import subprocess
import sys

import numpy as np
import pytest

from moesaic.placement import ExpertLoad, LayerShape, Placement, Problem, Topology, get_solver


def test_import_is_free():
    """Importing the package loads no compiler and no solver engine."""
    code = "import sys, moesaic.placement; print([m for m in ('numba', 'pulp', 'highspy') if m in sys.modules])"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"


def test_values_are_read_only_and_compare_by_content():
    source = np.array([[1, 2], [3, 4]])
    load, same, other = ExpertLoad(source), ExpertLoad(source.astype(np.int32)), ExpertLoad(source + 1)
    source[0, 0] = 99
    assert load == same
    assert hash(load) == hash(same)
    assert load != other
    assert load.load_RE[0, 0] == 1
    assert load.totals_E.tolist() == [4, 6]
    assert load.load_ER.tolist() == [[1, 3], [2, 4]]
    assert load.total == 10
    placement = Placement.everywhere(np.array([0, 1]), 2)
    for array in (
        load.load_RE,
        load.totals_E,
        load.load_ER,
        placement.replicas_RE,
        placement.copies_RE,
        placement.expert_to_owner_E,
    ):
        with pytest.raises(ValueError, match="read-only"):
            array[0] = 0
    with pytest.raises(AttributeError):
        load.load_RE = source


def test_placement_counts_copies():
    placement = Placement(np.array([0, 1, 1]), np.array([[True, True, False], [True, True, True]]))
    assert placement.num_copies == 2
    assert placement.copies_RE.tolist() == [[False, True, False], [True, False, False]]
    assert Placement.owners_only(np.array([2, 0]), 3).num_copies == 0
    assert Placement.everywhere(np.array([2, 0]), 3).num_copies == 4


def test_topology_numbers_ranks_by_node():
    topology = Topology.parse("2x3", preset="a100")
    assert topology.num_ranks == 6
    assert topology.node_of_rank_R.tolist() == [0, 0, 0, 1, 1, 1]
    assert Topology.parse("4") == Topology.preset("h100", 4)
    assert Topology.preset("h100", 32).num_nodes == 4
    assert Topology.preset("cpu", 3).num_nodes == 1


def test_layer_shape_counts_bytes_and_flops():
    shape = LayerShape(8, 2, 10, 20, num_matrices=3, bytes_per_element=2)
    assert (shape.expert_bytes, shape.gradient_bytes, shape.row_bytes, shape.flops_per_row) == (1200, 2400, 20, 1200)


def _problem(**changes: object) -> Problem:
    values = {
        "load": ExpertLoad(np.ones((2, 4), dtype=np.int64)),
        "expert_to_owner_E": np.array([0, 0, 1, 1]),
        "topology": Topology.preset("cpu", 2),
        "shape": LayerShape(4, 2, 8, 8),
        "slots": 1,
    }
    return Problem(**(values | changes))


@pytest.mark.parametrize(
    "build, message",
    [
        (lambda: ExpertLoad(np.ones((2, 2))), "load_RE must hold integers, got float64"),
        (lambda: ExpertLoad(np.full((2, 2), np.nan)), "load_RE must hold integers, got float64"),
        (lambda: ExpertLoad(np.ones(3, dtype=int)), r"2 non-empty dims, got shape \(3,\)"),
        (lambda: ExpertLoad(np.ones((0, 3), dtype=int)), r"2 non-empty dims, got shape \(0, 3\)"),
        (lambda: ExpertLoad(np.array([[1, -2]])), "must not be negative, got -2"),
        (lambda: ExpertLoad(np.full((4, 4), 2**62)), "above 9007199254740992"),
        (lambda: Placement(np.array([0, 3]), np.ones((2, 2), dtype=bool)), "holds 3, but there are 2 ranks"),
        (lambda: Placement(np.array([0]), np.array([[False], [True]])), "leaves out expert 0 at its owner, rank 0"),
        (lambda: Placement(np.array([0]), np.ones((2, 2), dtype=bool)), r"bool \[R, 1\] to match"),
        (lambda: LayerShape(4, 5, 8, 8), "top_k 5 is above num_experts 4"),
        (lambda: LayerShape(4, 2, 0, 8), "dim must be an integer of at least 1, got 0"),
        (lambda: Topology(1, 2, 0.0, 1.0, 0.0, 1.0), "device_bytes_per_s must be finite and above 0, got 0.0"),
        (lambda: Topology(1, 2, 1.0, float("nan"), 0.0, 1.0), "node_bytes_per_s must be finite"),
        (lambda: Topology(1000, 1000, 1.0, 1.0, 0.0, 1.0), "1000000 ranks; at most 65536"),
        (lambda: Topology.preset("h10", 8), "did you mean 'h100'"),
        (lambda: Topology.preset("h100", 12), "12 ranks do not fill h100 nodes of 8"),
        (lambda: Topology.parse("2x"), "write for example 2x8"),
        (lambda: Topology.parse("2x8x4"), "write for example 2x8"),
        (lambda: _problem(slots=-1), "slots must be an integer of at least 0, got -1"),
        (lambda: _problem(topology=Topology.preset("cpu", 3)), "the load counts 2 ranks, the topology has 3"),
        (lambda: _problem(shape=LayerShape(5, 2, 8, 8)), "the load counts 4 experts, the shape says 5"),
        (lambda: _problem(expert_to_owner_E=np.array([0, 1])), "names 2 owners for 4 experts"),
        (lambda: _problem(gathers=3), "gathers must be 1 .* or 2 .*, got 3"),
        (lambda: _problem(overlap_s=-1.0), "overlap_s must be finite and at least 0"),
        (lambda: get_solver("quotta"), "did you mean 'quota'"),
        (lambda: get_solver("zzz"), "unknown solver 'zzz'; known: static, "),
    ],
)
def test_errors_are_one_clear_line(build, message):
    with pytest.raises(ValueError, match=message) as caught:
        build()
    assert "\n" not in str(caught.value)
