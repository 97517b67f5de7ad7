"""In which order experts are computed: those at home around those whose rows travel, and what happens when on every rank."""

import threading
import weakref
from collections.abc import Callable
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import moesaic.runtime.experts as experts_module
from moesaic.collectives import Pending
from moesaic.placement import ExpertLoad, Placement, Split, Topology, split_exact, split_local_even
from moesaic.runtime.dispatch.expert_order import ExpertOrder, regroup
from moesaic.runtime.group import RankGroup
from moesaic.runtime.stages import StageClock
from moesaic.runtime.wrap.shard import share_experts
from tests.helpers.cases import Case
from tests.helpers.configs import runtime_config
from tests.helpers.threads import run_threads
from tests.runtime.test_token_rows import ROWS, Recorded


@st.composite
def splits(draw: st.DrawFn) -> Split:
    """Of any load over any copies, locality first or to the last row."""
    random = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    num_ranks, num_experts = draw(st.integers(1, 5)), draw(st.integers(1, 9))
    owners_E = random.integers(0, num_ranks, num_experts)
    copied_RE = random.random((num_ranks, num_experts)) < draw(st.sampled_from((0.0, 0.3, 0.8)))
    placement = Placement(owners_E, copied_RE | Placement.owners_only(owners_E, num_ranks).replicas_RE)
    load = ExpertLoad(random.integers(0, 6, (num_ranks, num_experts)) * (random.random((num_ranks, num_experts)) < 0.7))
    split = draw(st.sampled_from((split_exact, split_local_even)))
    return split(load, placement, Topology.preset("cpu", num_ranks))


@given(split=splits())
def test_home_rows_are_the_diagonal_of_the_split(split: Split) -> None:
    for rank in range(split.placement.num_ranks):
        assert split.home_rows_RE[rank].tolist() == split.recvs(rank)[rank].tolist() == split.sends(rank)[:, rank].tolist()


def is_worth_it(split: Split) -> bool:
    """Whether at least one row in 32 is of an expert that is at home where it is computed."""
    at_home = [
        (rows_E := split.recvs(rank).sum(axis=0))[rows_E == split.recvs(rank)[rank]].sum()
        for rank in range(split.placement.num_ranks)
    ]
    return bool(32 * sum(at_home) >= split.load.total > 0)


@settings(max_examples=200)
@given(split=splits(), num_parts=st.sampled_from((1, 2)))
def test_runs_against_a_loop(split: Split, num_parts: int) -> None:
    """Every expert in one run, by id in it; at home what no other rank sends to; halves as close as cuts can be."""
    order = ExpertOrder.of(split, num_parts)
    has_home = num_parts == 2 and is_worth_it(split)
    for rank in range(split.placement.num_ranks):
        recvs_RE = split.recvs(rank)
        held = np.flatnonzero(split.placement.replicas_RE[rank])
        experts_X = order.experts(rank, held)
        sizes = recvs_RE.sum(axis=0)[experts_X].tolist()
        runs = order.runs(rank, experts_X, sizes)
        assert [run.part for run in runs] == ([None, 0, 1, None] if has_home else [*range(num_parts)])
        assert [x for run in runs for x in range(len(held))[run.groups]] == list(range(len(held)))
        assert [n for run in runs for n in range(sum(sizes))[run.rows]] == list(range(sum(sizes)))
        from_others_E = recvs_RE.sum(axis=0) - recvs_RE[rank]
        experts_of = [[int(e) for e in experts_X[run.groups]] for run in runs]
        assert sorted(e for experts in experts_of for e in experts) == held.tolist()
        for run, experts in zip(runs, experts_of, strict=True):
            assert run.num_groups == len(experts) and experts == sorted(experts)
            assert run.rows.stop - run.rows.start == sum(sizes[run.groups])
            for e in experts:
                is_at_home = has_home and from_others_E[e] == 0 and recvs_RE[rank, e] > 0
                assert is_at_home == (run.part is None)
                assert run.part in (None, order.part_RE[rank, e])
        if has_home:
            check_halves(experts_of[0], experts_of[3], recvs_RE[rank])
        if num_parts == 2:
            first, second = experts_of[1:3] if has_home else experts_of
            check_halves(first, second, from_others_E)


@given(split=splits(), num_parts=st.sampled_from((1, 2)))
def test_orders_of_assignments_against_loops(split: Split, num_parts: int) -> None:
    """To each destination in its order of experts; what a rank received from each, back in the order of ids."""
    order, num_ranks = ExpertOrder.of(split, num_parts), split.placement.num_ranks
    experts_RX = [order.experts(r, np.flatnonzero(split.placement.replicas_RE[r])).tolist() for r in range(num_ranks)]
    for rank in range(num_ranks):
        sends_ER = split.sends(rank)
        pieces = {(r, e): [(r, e, i) for i in range(sends_ER[e, r])] for r in range(num_ranks) for e in range(len(sends_ER))}
        in_id_order = [piece for r in range(num_ranks) for e in range(len(sends_ER)) for piece in pieces[r, e]]
        expected = [piece for r in range(num_ranks) for e in experts_RX[r] for piece in pieces[r, e]]
        found = order.by_destination(torch.arange(len(in_id_order)), sends_ER).tolist()
        assert [in_id_order[i] for i in found] == expected

        here_X = experts_RX[rank]
        recvs_RX = split.recvs(rank)[:, here_X]
        by_source = [(s, e, i) for s in range(num_ranks) for x, e in enumerate(here_X) for i in range(recvs_RX[s, x])]
        by_id = order.by_id(recvs_RX, np.array(here_X, np.int64), torch.device("cpu"))
        assert (by_source if by_id is None else [by_source[i] for i in by_id.tolist()]) == sorted(by_source)


def check_halves(first: list[int], second: list[int], rows_E: np.ndarray) -> None:
    """Of the experts in the order of their ids, the first go to the first half, and no other cut is closer to the middle."""
    together = sorted(first + second)
    assert first + second == together
    rows = rows_E[together].tolist()

    def distance(cut: int) -> int:
        return abs(sum(rows[:cut]) - sum(rows[cut:]))

    assert distance(len(first)) == min(distance(cut) for cut in range(len(rows) + 1))


def test_halves_are_of_rows() -> None:
    """Rank 0 computes expert 0 for both ranks, experts 1 to 3 for itself; rank 1 has none."""
    load, owners_E = ExpertLoad(np.array([[2, 3, 2, 1], [4, 0, 0, 0]])), np.array([0, 0, 0, 0])
    split = split_exact(load, Placement.owners_only(owners_E, 2), Topology.preset("cpu", 2))
    order = ExpertOrder.of(split, 2)
    experts_X = order.experts(0, [0, 1, 2, 3])
    assert experts_X.tolist() == [1, 0, 2, 3]
    runs = order.runs(0, experts_X, [3, 6, 2, 1])
    assert [(run.groups, run.rows) for run in runs] == [
        (slice(0, 1), slice(0, 3)),
        (slice(1, 2), slice(3, 9)),
        (slice(2, 2), slice(9, 9)),
        (slice(2, 4), slice(9, 12)),
    ]


def test_few_rows_at_home_stay_in_the_parts() -> None:
    """One row in 33 would hide less than runs of its own cost; in 32 it would not."""
    for others, parts in ((32, [0, 1]), (31, [None, 0, 1, None])):
        load = ExpertLoad(np.array([[0, 1], [others, 0]]))
        split = split_exact(load, Placement.owners_only(np.array([0, 0]), 2), Topology.preset("cpu", 2))
        assert [run.part for run in ExpertOrder.of(split, 2).runs(0, np.array([0, 1]), [others, 1])] == parts


@given(sizes=st.lists(st.integers(0, 4), max_size=8), data=st.data())
def test_regroup_moves_segments(sizes: list[int], data: st.DataObject) -> None:
    order = data.draw(st.permutations(range(len(sizes))))
    starts = np.cumsum([0, *sizes])
    expected = [i for s in order for i in range(starts[s], starts[s + 1])]
    assert regroup(np.array(sizes, np.int64), np.array(order, np.int64), torch.device("cpu")).tolist() == expected


# Rank 0 owns experts 0 to 2 and holds a copy of 3, rank 1 owns 3 to 5 and holds one of 0: experts 0 and 3 are at home on both.
HELD = Placement(np.repeat([0, 1], 3), np.array([[1, 1, 1, 1, 0, 0], [1, 0, 0, 1, 1, 1]], bool))
FORWARD_IN_PARTS = [
    *2 * ["launch dispatch"], 1, "wait dispatch", 1, "launch combine", "wait dispatch", 1, "launch combine", 1,
    *2 * ["wait combine"]
]  # fmt: skip
BACKWARD_IN_PARTS = [
    *2 * ["launch combine_backward"], 1, "wait combine_backward", 1, *2 * ["launch dispatch_backward"],
    "wait combine_backward", 1, *2 * ["launch dispatch_backward"], 1, *4 * ["wait dispatch_backward"]
]  # fmt: skip


def events_of_a_step(group: RankGroup, ranks: threading.local) -> list[str | int]:
    """What a rank launches and waits for in a layer's forward and backward, and the number of experts whenever it computes."""
    events: list[str | int] = []
    ranks.events, ranks.out = events, {op: [] for op in ROWS}
    exchange_rows = group.tokens.exchange_rows

    def recording(*args: Any, op: str, where: str) -> Pending:
        pending = exchange_rows(*args, op=op, where=where)
        if op not in ROWS:
            return pending
        events.append(f"launch {op}")
        ranks.out[op] += (weakref.ref(rows) for rows in args[1:])
        return Recorded(pending, op, events)  # type: ignore[arg-type]

    group.tokens.exchange_rows = recording  # type: ignore[method-assign]
    case = Case(2, 6, 2, 1, (40, 40), "static", hot_expert=False, any_owner=False, normalize=True, seed=3)
    (layer,) = case.layers()
    config = runtime_config(slots=1, split="local_even", calibrate="never")
    placed = SimpleNamespace(placement=HELD)
    share_experts({"moe": layer}, group, config=config, solver=lambda problem: placed, clock=StageClock(), owners=case.owners())
    layer(case.tokens(group.rank))  # Copies are placed for loads that were seen.
    events.clear()
    ranks.out["dispatch"].clear()
    layer(case.tokens(group.rank).requires_grad_()).sum().backward()
    return events


def test_experts_at_home_run_before_rows_come_and_after_results_left(monkeypatch: pytest.MonkeyPatch) -> None:
    """And what is computed when both parts have come holds none of the buffers in which they did."""
    ranks = threading.local()
    for name, way_out in (("grouped_ffn", "dispatch"), ("grouped_ffn_backward", "combine_backward")):
        compute = getattr(experts_module, name)

        def recording(*args: Any, compute: Callable[..., Any] = compute, op: str = way_out, **options: Any) -> Any:
            (sizes,) = (arg for arg in args if isinstance(arg, tuple))
            ranks.events.append(len(sizes))
            have_come = ranks.events.count(f"wait {op}") == 2
            assert [rows() is None for rows in ranks.out[op]] == 4 * [have_come]
            return compute(*args, **options)

        monkeypatch.setattr(experts_module, name, recording)
    topology = replace(Topology.preset("cpu", 2), num_nodes=2, ranks_per_node=1)
    for events in run_threads(2, events_of_a_step, ranks, topology=topology):
        assert events == [*FORWARD_IN_PARTS, *BACKWARD_IN_PARTS]
