"""Generated and named cases for the placement tests."""

from __future__ import annotations

import os
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import strategies as st

import moesaic
from moesaic.placement import ExpertLoad, LayerShape, OwnerMap, Placement, Problem, Split, Topology


def examples(fast: int) -> int:
    """Return how many cases a test generates: `fast`, or MOESAIC_EXAMPLES times as many where that is set."""
    return fast * int(os.environ.get("MOESAIC_EXAMPLES", "1"))


@dataclass(frozen=True)
class Case:
    """A load on a topology with a placement to split it over."""

    load: ExpertLoad
    placement: Placement
    topology: Topology


@st.composite
def topologies(draw: st.DrawFn, max_ranks: int = 6) -> Topology:
    """Half of them of equal ranks and nodes; of the others some are a little slower, and some several times."""
    num_nodes = draw(st.integers(1, 3))
    topology = Topology.preset("h100", num_nodes=num_nodes, ranks_per_node=draw(st.integers(1, max(1, max_ranks // num_nodes))))
    costs = draw(st.sampled_from([(), (), (1, 2, 3), (100, 107, 250)]))
    if not costs:
        return topology
    of_ranks, of_nodes = (
        tuple(draw(st.lists(st.sampled_from(costs), min_size=count, max_size=count)))
        for count in (topology.num_ranks, topology.num_nodes)
    )
    return replace(topology, rank_costs=of_ranks, node_costs=of_nodes)


def busiest(split: Split, topology: Topology) -> int:
    """The largest cost of a rank's rows: their number, where ranks are equal."""
    return max(int(cost) * int(rows) for cost, rows in zip(topology.cost_R, split.rows_R, strict=True))


@st.composite
def loads(draw: st.DrawFn, num_ranks: int, num_experts: int, most: int = 40) -> ExpertLoad:
    """Loads from flat to one-hot, with empty cells, ranks and experts."""
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    popularity_E = rng.random(num_experts) ** draw(st.sampled_from([0, 1, 4, 20]))
    load_RE = rng.integers(0, most + 1, (num_ranks, num_experts)) * popularity_E
    load_RE *= rng.random((num_ranks, 1)) < draw(st.sampled_from([1.0, 0.7]))
    return ExpertLoad(np.round(load_RE).astype(np.int64))


@st.composite
def cases(draw: st.DrawFn, max_ranks: int = 6, max_experts: int = 8) -> Case:
    topology = draw(topologies(max_ranks))
    num_experts = draw(st.integers(1, max_experts))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    owner_E = rng.integers(0, topology.num_ranks, num_experts)
    replicas_RE = rng.random((topology.num_ranks, num_experts)) < draw(st.sampled_from([0.0, 0.2, 0.5, 1.0]))
    replicas_RE[owner_E, np.arange(num_experts)] = True
    return Case(draw(loads(topology.num_ranks, num_experts)), Placement(owner_E, replicas_RE), topology)


@st.composite
def problems(draw: st.DrawFn, max_ranks: int = 6, max_experts: int = 8, max_slots: int = 3) -> Problem:
    topology = draw(topologies(max_ranks))
    num_experts = draw(st.integers(1, max_experts))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    shape = LayerShape(num_experts, 1, draw(st.sampled_from([16, 1024])), draw(st.sampled_from([16, 512])))
    return Problem(
        load=draw(loads(topology.num_ranks, num_experts, most=draw(st.sampled_from([5, 40, 4000])))),
        expert_to_owner_E=rng.integers(0, topology.num_ranks, num_experts),
        topology=topology,
        shape=shape,
        slots=draw(st.integers(0, max_slots)),
        gathers=draw(st.sampled_from([1, 2])),
        overlap_s=draw(st.sampled_from([0.0, 1e-5, 1.0])),
        min_rows_per_copy=draw(st.sampled_from([None, None, 1, 7])),
    )


def zipf_problem(num_ranks: int, num_experts: int, skew: float, slots: int, *, seed: int = 0, overlap_s: float = 1.0) -> Problem:
    """A layer whose expert popularity follows a Zipf law in random order; copies are cheap by default."""
    rng = np.random.default_rng(seed)
    popularity_E = rng.permutation(np.arange(1, num_experts + 1) ** -skew)
    load = ExpertLoad(rng.multinomial(4096 * 8, popularity_E / popularity_E.sum(), size=num_ranks))
    owner_E = OwnerMap.contiguous(1, num_experts, num_ranks).expert_to_owner_LE[0]
    shape = LayerShape(num_experts, 8, 2048, 1024, bytes_per_element=2)
    return Problem(load, owner_E, Topology.preset("h100", num_ranks), shape, slots, overlap_s=overlap_s)


def shared_trace(name: str) -> Path:
    """Return the path of a real trace, or skip the test where the shared data is not at hand."""
    root = Path(os.environ.get("MOESAIC_SHARED", Path(moesaic.__file__).resolve().parent.parent / "shared"))
    path = root / "data" / "traces" / name
    if not path.exists():
        pytest.skip(f"no real trace at {path}; set MOESAIC_SHARED to the folder that holds data/traces")
    return path
