"""Machine files: round trips, the topologies that they give, what is slow, and what is refused."""

from dataclasses import replace
from pathlib import Path

import pytest

from moesaic.placement import Topology
from moesaic.placement.machine import Machine, read_machine, topology_of, write_machine

RATES = {
    "device_bytes_per_s": 4e9,
    "latency_s": 1e-05,
    "node_bytes_per_s": 1e9,
    "node_latency_s": 2e-4,
    "flops_per_s": 5e10,
    "half_rate_rows": 17.4,
}
MACHINE = Machine(
    num_nodes=2,
    ranks_per_node=2,
    name='node "a"',
    device="cpu",
    transport="hierarchical",
    rank_flops_per_s=[5e10, 5e10, 2e10, 5e10],
    rates=RATES | {"copy_bytes_per_s": 1e21},
    spread={"flops_per_s": 0.05},
    versions={"torch": "2.13.0+cpu"},
    links={"ranks": {"0-1": 4e9, "2-3": 4e9}, "nodes": {"0-1": 1e9, "0-2": 1e9, "1-2": 2.5e8}},
    tables={"experts": {"rows": [1, 4], "seconds": [1e-4, 4.5e-4]}},
)
BY_HAND = """
schema = "moesaic-machine/1"
num_nodes = 1
ranks_per_node = 4
[rates]
device_bytes_per_s = 4_000_000_000
latency_s = 0
flops_per_s = 5e10
half_rate_rows = 16
"""


def test_round_trip(tmp_path: Path) -> None:
    write_machine(tmp_path / "machine.toml", MACHINE)
    assert read_machine(tmp_path / "machine.toml") == MACHINE
    assert [path.name for path in tmp_path.iterdir()] == ["machine.toml"]


def test_topologies_carry_the_rates_over() -> None:
    assert MACHINE.topology(2, 2) == Topology(2, 2, 4e9, 1e9, 2e-4, 5e10, 17, (100, 100, 250, 100))
    assert MACHINE.topology(16, 8) == Topology(16, 8, 4e9, 1e9, 2e-4, 5e10, 17)
    assert MACHINE.topology(1, 4) == Topology(1, 4, 4e9, 1e9, 1e-5, 5e10, 17)


def test_ranks_are_planned_as_fast_as_they_are() -> None:
    """In percent of the median rank's seconds; as equal within 5 percent or the spread, and at most ten times as slow."""
    rates, spread = [5e10, 5.2e10, 4.8e10, 4.4e10, 1e8, 1e11, 5e10], {"flops_per_s": 0.02}
    machine = replace(MACHINE, num_nodes=1, ranks_per_node=7, rank_flops_per_s=rates, spread=spread)
    assert machine.topology(1, 7).rank_costs == (100, 100, 100, 114, 1000, 50, 100)
    assert replace(machine, spread={"flops_per_s": 0.2}).topology(1, 7).rank_costs == (100, 100, 100, 100, 1000, 50, 100)
    assert replace(machine, rank_flops_per_s=rates[:3], ranks_per_node=3).topology(1, 3).rank_costs == ()
    assert machine.topology(1, 8).rank_costs == machine.topology(7, 1).rank_costs == ()


def test_links_of_nodes_are_planned_as_fast_as_they_are() -> None:
    """In percent of the slowest; a node is as fast as its fastest pair, so that one slow pair says nothing of its nodes."""
    pairs = {"0-1": 1e9, "0-2": 0.98e9, "1-2": 1e9, "0-3": 2.5e8, "1-3": 2.4e8, "2-3": 2e8}
    machine = replace(MACHINE, num_nodes=4, ranks_per_node=1, rank_flops_per_s=[], links={"nodes": pairs})
    assert machine.topology(4, 1).node_costs == (25, 25, 25, 100)
    one_pair = replace(machine, links={"nodes": pairs | {"0-3": 1e9, "1-3": 1e9}})
    assert one_pair.topology(4, 1).node_costs == machine.topology(3, 1).node_costs == ()


def test_links_of_a_kind_that_was_not_measured() -> None:
    """One node says nothing of links between nodes, and ranks that are alone on their nodes say nothing of those inside."""
    inside = replace(MACHINE, num_nodes=1, rates={k: v for k, v in RATES.items() if not k.startswith("node_")})
    assert inside.topology(1, 8).node_bytes_per_s == 4e9
    with pytest.raises(ValueError, match=r"no rates.node_bytes_per_s for 2 nodes: it was measured on 1 x 2 ranks"):
        inside.topology(2, 2)
    between = replace(
        MACHINE, ranks_per_node=1, rates={k: v for k, v in RATES.items() if k not in ("device_bytes_per_s", "latency_s")}
    )
    assert between.topology(4, 1) == Topology(4, 1, 1e9, 1e9, 2e-4, 5e10, 17)
    assert between.topology(1, 1).latency_s == 2e-4
    with pytest.raises(ValueError, match=r"no rates.device_bytes_per_s for 4 ranks a node"):
        between.topology(2, 4)


def test_what_is_slow_is_named() -> None:
    assert MACHINE.slow_ranks == {"rank 2": 2.5}
    assert MACHINE.slow_links == {"nodes 1-2": 4.0}
    assert replace(MACHINE, rank_flops_per_s=[5e10, 4.5e10], links={}).slow_ranks == {}


def test_a_file_by_hand_and_presets(tmp_path: Path) -> None:
    """A file of one node takes all ranks on one; nodes of a file of several have as many ranks as there."""
    path = tmp_path / "machine.toml"
    path.write_text(BY_HAND)
    assert (
        topology_of(str(path), 2)
        == topology_of(str(path), num_nodes=1, ranks_per_node=2)
        == Topology(1, 2, 4e9, 4e9, 0, 5e10, 16)
    )
    assert topology_of("a100", 16) == Topology.preset("a100", 16)
    assert topology_of(str(path), 6) == topology_of(str(path), num_nodes=1, ranks_per_node=6)
    write_machine(path, MACHINE)
    with pytest.raises(ValueError, match="5 ranks do not fill nodes of 2, as in"):
        topology_of(str(path), 5)


@pytest.mark.parametrize(
    "old, new, message",
    [
        ("moesaic-machine/1", "moesaic-machine/9", "schema = 'moesaic-machine/9', expected 'moesaic-machine/1'"),
        ("num_nodes = 1", "num_nodes = 0", "num_nodes = '0', expected a whole number from 1 to 65536"),
        ("num_nodes = 1", "", "num_nodes = 'None', expected a whole number"),
        ("num_nodes = 1", "num_nodes = 2", "rates.node_bytes_per_s is missing"),
        ("flops_per_s = 5e10", "", "rates.flops_per_s is missing"),
        ("flops_per_s = 5e10", "flop_per_s = 5e10", r"unknown key rates.flop_per_s, did you mean rates.flops_per_s\?"),
        ("num_nodes = 1", "num_nodes = 1\nzzz = 2", "unknown key zzz, leave it out"),
        ("flops_per_s = 5e10", "flops_per_s = '5e10'", "rates.flops_per_s = '5e10', expected a number from"),
        ("flops_per_s = 5e10", "flops_per_s = nan", "rates.flops_per_s = 'nan', expected a number from"),
        ("flops_per_s = 5e10", "flops_per_s = 0", "rates.flops_per_s = '0', expected a number from 1 to"),
        ("half_rate_rows = 16", "half_rate_rows = true", "rates.half_rate_rows = 'True', expected a number from"),
        ("half_rate_rows = 16", "half_rate_rows = [1]", r"rates.half_rate_rows = '\[1\]', expected a number from"),
        ("[rates]", "rank_flops_per_s = 7\n[rates]", "rank_flops_per_s = '7', expected a list"),
        ("[rates]", "rank_flops_per_s = [7, 7]\n[rates]", "rank_flops_per_s has 2 numbers, expected 4"),
        ("[rates]", "device = 7\n[rates]", "device = '7', expected a text in quotes"),
        ("[rates]", "[links.nodes]\n0-1 = 0\n[rates]", "links.nodes.0-1 = '0', expected a number from 1"),
        ("[rates]", "[tables]\nx = 3\n[rates]", "tables.x = '3', expected a section"),
        ("[rates]", "rates = 3\n[spread]", "rates = '3', expected a section"),
        ("[rates]", "[rates", "not a usable machine file: "),
    ],
)
def test_wrong_files_are_one_line(tmp_path: Path, old: str, new: str, message: str) -> None:
    """With the file, the key, the value and the cure."""
    path = tmp_path / "machine.toml"
    assert BY_HAND.count(old) >= 1
    path.write_text(BY_HAND.replace(old, new, 1))
    with pytest.raises(ValueError, match=message) as caught:
        read_machine(path)
    assert "\n" not in str(caught.value)
    assert str(caught.value).startswith(f"{path} is not a usable machine file: ")
    assert str(caught.value).endswith("; correct it, or run `moesaic calibrate` again")


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"there is no machine file at .*none.toml: write one with `moesaic calibrate -o"):
        read_machine(tmp_path / "none.toml")
    with pytest.raises(ValueError, match="cannot read the machine file"):
        read_machine(tmp_path)
    (tmp_path / "binary.toml").write_bytes(b"\xff\xfe")
    with pytest.raises(ValueError, match="not a usable machine file: 'utf-8' codec"):
        read_machine(tmp_path / "binary.toml")


def test_latencies_stand_beside_their_rates(tmp_path: Path) -> None:
    path = tmp_path / "machine.toml"
    path.write_text(BY_HAND + "node_bytes_per_s = 1e9\n")
    with pytest.raises(ValueError, match=r"machine.toml is not a usable machine file: rates.node_latency_s is missing"):
        read_machine(path)
