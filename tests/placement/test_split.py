"""The exact split against enumeration, Hall's theorem and a linear program; both splits' invariants."""

from __future__ import annotations

import itertools
from bisect import bisect_left
from dataclasses import replace

import highspy
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moesaic.placement import ExpertLoad, OwnerMap, Placement, Split, Topology, split_exact, split_local_even
from tests.placement.cases import Case, busiest, cases, examples


def hall_optimum(load: ExpertLoad, placement: Placement, topology: Topology) -> int:
    """The least possible cost: some set of ranks must compute what only it can (max-flow min-cut, all sets tried)."""
    ranks = range(placement.num_ranks)
    best = 0
    for size in range(1, placement.num_ranks + 1):
        for chosen in itertools.combinations(ranks, size):
            others = [rank for rank in ranks if rank not in chosen]
            only_E = ~placement.replicas_RE[others].any(axis=0)
            costs, rows = topology.cost_R[list(chosen)].tolist(), int(load.totals_E[only_E].sum())
            limits = range(best, rows * max(costs) + 1)
            best += bisect_left(limits, rows, key=lambda limit: sum(limit // cost for cost in costs)) if limits else 0
    return best


def enumerated_optimum(load: ExpertLoad, placement: Placement, topology: Topology) -> int:
    """The least possible cost by trying every integer division of every expert over its holders."""

    def divisions(rows: int, parts: int):
        if parts == 1:
            yield (rows,)
            return
        for first in range(rows + 1):
            for rest in divisions(rows - first, parts - 1):
                yield (first, *rest)

    holders = [np.flatnonzero(placement.replicas_RE[:, e]) for e in range(placement.num_experts)]
    best = load.total * int(topology.cost_R.max())
    for choice in itertools.product(*(divisions(int(n), len(h)) for n, h in zip(load.totals_E, holders, strict=True))):
        rows_R = np.zeros(placement.num_ranks, dtype=np.int64)
        for ranks, rows in zip(holders, choice, strict=True):
            rows_R[ranks] += rows
        best = min(best, int((topology.cost_R * rows_R).max()))
    return best


def linear_optimum(load: ExpertLoad, placement: Placement) -> int:
    """The least possible maximum from HiGHS: min Z over fractional shares, rounded up (shares are a flow, so this is exact)."""
    model = highspy.Highs()
    model.silent()
    limit = model.addVariable(lb=0, obj=1)
    per_rank: dict[int, list] = {rank: [] for rank in range(placement.num_ranks)}
    for expert in range(placement.num_experts):
        shares = []
        for rank in np.flatnonzero(placement.replicas_RE[:, expert]):
            shares.append(model.addVariable(lb=0))
            per_rank[int(rank)].append(shares[-1])
        model.addConstr(model.qsum(shares) == float(load.totals_E[expert]))
    for shares in per_rank.values():
        if shares:
            model.addConstr(model.qsum(shares) <= limit)
    model.minimize()
    return int(np.ceil(model.getObjectiveValue() - 1e-6))


def check_split(split: Split, case: Case) -> None:
    """No token lost or duplicated, nothing outside the holders, all views of the split agree."""
    num_ranks = case.placement.num_ranks
    sends_RER = np.stack([split.sends(rank) for rank in range(num_ranks)])
    recvs_RRE = np.stack([split.recvs(rank) for rank in range(num_ranks)])
    assert (sends_RER.sum(axis=2) == case.load.load_RE).all()
    assert (sends_RER.transpose(2, 0, 1) == recvs_RRE).all()
    assert (recvs_RRE.sum(axis=1) == split.rows_RE).all()
    assert (sends_RER.sum(axis=1) == split.flow_RR).all()
    assert (sends_RER >= 0).all()
    assert (split.rows_RE[~case.placement.replicas_RE] == 0).all()
    assert split.off_rank == case.load.total - sum(int(sends_RER[r, :, r].sum()) for r in range(num_ranks))
    node_R = case.topology.node_of_rank_R
    outside = [(s, d) for s in range(num_ranks) for d in range(num_ranks) if node_R[s] != node_R[d]]
    assert split.off_node(case.topology) == sum(int(sends_RER[s, :, d].sum()) for s, d in outside)


@settings(deadline=None, max_examples=400)
@given(cases())
def test_exact_is_optimal(case):
    split = split_exact(case.load, case.placement, case.topology)
    check_split(split, case)
    assert busiest(split, case.topology) == hall_optimum(case.load, case.placement, case.topology)


@settings(deadline=None, max_examples=examples(60))
@given(cases(max_ranks=3, max_experts=3))
def test_exact_equals_enumeration(case):
    small = Case(ExpertLoad(case.load.load_RE % 4), case.placement, case.topology)
    split = split_exact(small.load, small.placement, small.topology)
    assert busiest(split, small.topology) == enumerated_optimum(small.load, small.placement, small.topology)


@settings(deadline=None, max_examples=examples(15))
@given(cases(max_ranks=24, max_experts=40))
def test_exact_equals_linear_program(case):
    """Where ranks are equal: shares are then a flow, whose optimum is whole."""
    split = split_exact(case.load, case.placement, replace(case.topology, rank_costs=()))
    check_split(split, case)
    assert split.max_rows == linear_optimum(case.load, case.placement)


@settings(deadline=None, max_examples=200)
@given(cases())
def test_exact_serves_own_tokens_then_the_node_first(case):
    """Given the rows per holder, a holder's own tokens stay as far as they fit, then as much as can stays in the node."""
    split = split_exact(case.load, case.placement, case.topology)
    node_R = case.topology.node_of_rank_R
    for expert in range(case.load.num_experts):
        flow_RR = np.stack([split.sends(rank)[expert] for rank in range(case.load.num_ranks)])
        rows_R, load_R = split.rows_RE[:, expert], case.load.load_RE[:, expert]
        assert (np.diagonal(flow_RR) == np.minimum(rows_R, load_R)).all()
        for node in range(case.topology.num_nodes):
            inside = node_R == node
            assert flow_RR[np.ix_(inside, inside)].sum() == min(rows_R[inside].sum(), load_R[inside].sum())


@settings(deadline=None, max_examples=200)
@given(cases())
def test_local_even_follows_its_rule(case):
    """A source with the expert keeps its rows; others share evenly over the node's holders, else over all."""
    split = split_local_even(case.load, case.placement, case.topology)
    check_split(split, case)
    node_R = case.topology.node_of_rank_R
    for source in range(case.load.num_ranks):
        sends_ER = split.sends(source)
        for expert in range(case.load.num_experts):
            holders = np.flatnonzero(case.placement.replicas_RE[:, expert])
            near = holders[node_R[holders] == node_R[source]]
            allowed = [source] if source in holders else list(near if near.size else holders)
            rows, count = int(case.load.load_RE[source, expert]), len(allowed)
            expected_R = np.zeros(case.load.num_ranks, dtype=np.int64)
            expected_R[allowed] = [rows // count + (i < rows % count) for i in range(count)]
            assert sends_ER[expert].tolist() == expected_R.tolist()


def test_worked_example():
    """Expert 0 is hot and lives on ranks 0 and 1; expert 1 lives on rank 1 only: 12 + 4 rows become 8 and 8."""
    load = ExpertLoad(np.array([[6, 0], [2, 1], [4, 3]]))
    placement = Placement(np.array([0, 1]), np.array([[True, False], [True, True], [False, False]]))
    split = split_exact(load, placement, Topology.preset("cpu", 3))
    assert split.rows_RE.tolist() == [[8, 0], [4, 4], [0, 0]]
    assert split.sends(2).tolist() == [[2, 2, 0], [0, 3, 0]]
    assert split.recvs(1).tolist() == [
        [0, 0],
        [2, 1],
        [2, 3],
    ]
    assert split.max_over_mean == 8 * 3 / 16
    assert split.off_rank == 7


@settings(deadline=None, max_examples=200)
@given(costs=st.lists(st.integers(1, 9), min_size=1, max_size=5), rows=st.integers(0, 50))
def test_least_limit_is_the_first_that_suffices(costs, rows):
    topology = replace(Topology.preset("cpu", len(costs)), rank_costs=tuple(costs))
    expected = next(limit for limit in itertools.count() if sum(limit // cost for cost in costs) >= rows)
    assert topology.least_limit(rows) == expected


def test_a_slow_rank_gets_fewer_rows():
    """1200 rows on ranks of which one takes twice as long: 480, 480 and 240, which end together."""
    load, topology = ExpertLoad(np.full((3, 2), 200)), replace(Topology.preset("cpu", 3), rank_costs=(100, 100, 200))
    split = split_exact(load, Placement.everywhere(np.array([2, 2]), 3), topology)
    assert split.rows_R.tolist() == [480, 480, 240]
    assert topology.max_over_mean(split.rows_R) == pytest.approx(1.0)
    assert topology.max_over_mean(np.array([400, 400, 400])) == pytest.approx(800 / 480)


def _edge(load_RE: list, owner_E: list, everywhere: bool = True) -> Case:
    load, topology = ExpertLoad(np.array(load_RE)), Topology.preset("cpu", len(load_RE))
    build = Placement.everywhere if everywhere else Placement.owners_only
    return Case(load, build(np.array(owner_E), load.num_ranks), topology)


@pytest.mark.parametrize("splitter", [split_exact, split_local_even])
@pytest.mark.parametrize(
    "case, max_rows",
    [
        pytest.param(_edge([[0, 0], [0, 0]], [0, 1]), 0, id="no tokens"),
        pytest.param(_edge([[5, 3, 2]], [0, 0, 0]), 10, id="one rank"),
        pytest.param(_edge([[9, 0], [9, 0], [9, 0]], [1, 2]), 9, id="all tokens to one expert"),
        pytest.param(_edge([[9, 0], [9, 0], [9, 0]], [1, 2], everywhere=False), 27, id="all tokens to one expert, no copy"),
        pytest.param(_edge([[1] * 5, [1] * 5, [1] * 5], [0, 0, 1, 1, 2], everywhere=False), 6, id="5 experts on 3 ranks"),
        pytest.param(_edge([[4, 4], [0, 0], [0, 0]], [0, 0], everywhere=False), 8, id="ranks without experts or tokens"),
    ],
)
def test_edge_cases(splitter, case, max_rows):
    split = splitter(case.load, case.placement, case.topology)
    check_split(split, case)
    assert split.max_rows == max_rows


def test_no_tokens_count_as_balanced():
    case = _edge([[0, 0], [0, 0]], [0, 1])
    assert split_exact(case.load, case.placement, case.topology).max_over_mean == 1.0


@settings(deadline=None, max_examples=50)
@given(cases())
def test_exact_is_deterministic_and_a_value(case):
    first = split_exact(case.load, case.placement, case.topology)
    again = split_exact(ExpertLoad(case.load.load_RE.copy()), case.placement, case.topology)
    assert first == again
    assert hash(first) == hash(again)
    for array in (first.segments_4G, first.rows_RE, first.flow_RR, first.rows_R):
        assert not array.flags.writeable


def test_exact_never_computes_more_than_the_even_rule():
    rng = np.random.default_rng(5)
    owner_E = OwnerMap.contiguous(1, 64, 16).expert_to_owner_LE[0]
    for _ in range(20):
        replicas_RE = Placement.owners_only(owner_E, 16).replicas_RE | (rng.random((16, 64)) < 0.05)
        load = ExpertLoad(rng.multinomial(4096, rng.dirichlet(np.full(64, 0.3)), size=16))
        placement, topology = Placement(owner_E, replicas_RE), Topology.parse("2x8")
        assert split_exact(load, placement, topology).max_rows <= split_local_even(load, placement, topology).max_rows


def test_mismatches_are_refused():
    load, placement = ExpertLoad(np.ones((2, 3), dtype=int)), Placement.everywhere(np.array([0, 1]), 2)
    with pytest.raises(ValueError, match=r"the load is \[R, E\] = \(2, 3\), the placement \(2, 2\)"):
        split_exact(load, placement, Topology.preset("cpu", 2))
    with pytest.raises(ValueError, match="the load counts 2 ranks, the topology has 3"):
        split_local_even(load, Placement.everywhere(np.array([0, 1, 1]), 2), Topology.preset("cpu", 3))
