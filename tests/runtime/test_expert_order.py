"""In which order experts are computed: those at home around those whose rows travel, and what happens when on every rank."""

import threading
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
from moesaic import RuntimeConfig
from moesaic.collectives import Pending
from moesaic.placement import ExpertLoad, Placement, Split, Topology, split_exact, split_local_even
from moesaic.runtime.expert_order import ExpertOrder, regroup
from moesaic.runtime.group import RankGroup
from moesaic.runtime.shard import share_experts
from moesaic.runtime.stages import StageClock
from tests.helpers.cases import Case
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


@settings(max_examples=200)
@given(split=splits(), num_parts=st.sampled_from((1, 2)), separates=st.booleans())
def test_runs_against_a_loop(split: Split, num_parts: int, separates: bool) -> None:
    """Every expert in one run, by id within its phase; at home what no other rank sends to; halves as close as cuts can be."""
    order, at_home = ExpertOrder.of(split), separates or num_parts == 2
    for rank in range(split.placement.num_ranks):
        recvs_RE = split.recvs(rank)
        held = np.flatnonzero(split.placement.replicas_RE[rank])
        experts_X = order.experts(rank, held)
        assert sorted(experts_X) == held.tolist()
        sizes = recvs_RE.sum(axis=0)[experts_X].tolist()
        runs = order.runs(rank, experts_X, sizes, num_parts, at_home=at_home)
        assert [run.part for run in runs] == ([None, *range(num_parts), None] if at_home else [0])
        assert [run.num_groups for run in runs] == [run.groups.stop - run.groups.start for run in runs]
        assert [x for run in runs for x in range(len(held))[run.groups]] == list(range(len(held)))
        assert [n for run in runs for n in range(sum(sizes))[run.rows]] == list(range(sum(sizes)))
        from_others_E = recvs_RE.sum(axis=0) - recvs_RE[rank]
        for run in runs:
            experts = experts_X[run.groups].tolist()
            assert run.rows.stop - run.rows.start == sum(sizes[run.groups])
            is_by_id = experts == sorted(experts)
            assert is_by_id or not at_home or num_parts == 1
            for e in experts if at_home else ():
                assert (from_others_E[e] == 0 and recvs_RE[rank, e] > 0) == (run.part is None)
                if run.part is not None:
                    assert order.part_RE(num_parts)[rank, e] == run.part
        if num_parts == 2:
            first, one, two, last = ([int(e) for e in experts_X[run.groups]] for run in runs)
            check_halves(first, last, recvs_RE[rank])
            check_halves(one, two, from_others_E)


def check_halves(first: list[int], second: list[int], rows_E: np.ndarray) -> None:
    """Of the experts in the order of their ids, the first go to the first half, and no other cut is closer to the middle."""
    together = sorted(first + second)
    assert first + second == together
    rows = rows_E[together].tolist()

    def distance(cut: int) -> int:
        return abs(sum(rows[:cut]) - sum(rows[cut:]))

    assert distance(len(first)) == min(distance(cut) for cut in range(len(rows) + 1))


def test_halves_are_of_rows() -> None:
    """Rank 0 computes expert 1 for both ranks, experts 0, 2 and 3 for itself; rank 1 has nothing at home."""
    split = split_exact(
        ExpertLoad(np.array([[2, 3, 2, 1], [0, 4, 0, 0]])),
        Placement.owners_only(np.array([0, 0, 0, 0]), 2),
        Topology.preset("cpu", 2),
    )
    order = ExpertOrder.of(split)
    assert order.phase_RE[0].tolist() == [0, 1, 3, 3]
    assert order.experts(0, [0, 1, 2, 3]).tolist() == [0, 1, 2, 3] and order.is_by_id
    split = split_exact(
        ExpertLoad(np.array([[2, 3, 2, 1], [4, 0, 0, 0]])),
        Placement.owners_only(np.array([0, 0, 0, 0]), 2),
        Topology.preset("cpu", 2),
    )
    order = ExpertOrder.of(split)
    assert not order.is_by_id
    experts_X = order.experts(0, [0, 1, 2, 3])
    assert experts_X.tolist() == [1, 0, 2, 3]
    runs = order.runs(0, experts_X, [3, 6, 2, 1], 2, at_home=True)
    assert [(run.groups, run.rows) for run in runs] == [
        (slice(0, 1), slice(0, 3)),
        (slice(1, 2), slice(3, 9)),
        (slice(2, 2), slice(9, 9)),
        (slice(2, 4), slice(9, 12)),
    ]


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
# A second hop, on the node, comes behind the first on the way out and before the last on the way home.
FORWARD_BY_NODE = [
    "launch dispatch", 1, "wait dispatch", "launch dispatch", "wait dispatch", 2,
    "launch combine", "wait combine", "launch combine", 1, "wait combine"
]  # fmt: skip
BACKWARD_BY_NODE = [
    "launch combine_backward", 1, "wait combine_backward", "launch combine_backward", "wait combine_backward", 2,
    "launch dispatch_backward", "wait dispatch_backward", *2 * ["launch dispatch_backward"], 1, *2 * ["wait dispatch_backward"]
]  # fmt: skip


def events_of_a_step(group: RankGroup, ranks: threading.local, options: dict[str, Any]) -> list[str | int]:
    """What a rank launches and waits for in a layer's forward and backward, and the number of experts whenever it computes."""
    ranks.events = events = []
    exchange_rows = group.tokens.exchange_rows

    def recording(*args: Any, op: str, where: str) -> Pending:
        pending = exchange_rows(*args, op=op, where=where)
        if op not in ROWS:
            return pending
        events.append(f"launch {op}")
        return Recorded(pending, op, events)

    group.tokens.exchange_rows = recording  # type: ignore[method-assign]
    case = Case(2, 6, 2, 1, (40, 40), "static", hot_expert=False, any_owner=False, normalize=True, seed=3)
    (layer,) = case.layers()
    config = RuntimeConfig(slots=1, split="local_even", calibrate="never", **options)
    placed = SimpleNamespace(placement=HELD)
    share_experts({"moe": layer}, group, config=config, solver=lambda problem: placed, clock=StageClock(), owners=case.owners())
    layer(case.tokens(group.rank))  # Copies are placed for loads that were seen.
    events.clear()
    layer(case.tokens(group.rank).requires_grad_()).sum().backward()
    return events


@pytest.mark.parametrize(
    "options,expected",
    [
        ({"token_route": "direct"}, [*FORWARD_IN_PARTS, *BACKWARD_IN_PARTS]),
        ({"token_route": "by_node"}, [*FORWARD_BY_NODE, *BACKWARD_BY_NODE]),
    ],
)
def test_experts_at_home_run_before_rows_come_and_after_results_left(
    options: dict[str, Any], expected: list[str | int], monkeypatch: pytest.MonkeyPatch
) -> None:
    ranks = threading.local()
    for name in ("grouped_ffn", "grouped_ffn_backward"):
        compute = getattr(experts_module, name)

        def recording(*args: Any, compute: Callable[..., Any] = compute, **options: Any) -> Any:
            (sizes,) = (arg for arg in args if isinstance(arg, tuple))
            ranks.events.append(len(sizes))
            return compute(*args, **options)

        monkeypatch.setattr(experts_module, name, recording)
    topology = replace(Topology.preset("cpu", 2), num_nodes=2, ranks_per_node=1)
    for events in run_threads(2, events_of_a_step, ranks, options, topology=topology):
        assert events == expected
