"""The quota planner against its meaning in plain Python: every plan that it tries, and its answer."""

from __future__ import annotations

import dataclasses
from itertools import groupby

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from moesaic.placement import Problem, get_solver, lower_bound
from moesaic.placement.cost import prices_of
from moesaic.placement.solvers import quota_reference as reference
from moesaic.placement.solvers.quota import plans_to_try
from tests.placement.cases import examples, problems


@st.composite
def priced_problems(draw: st.DrawFn) -> Problem:
    """With groups that cost nothing by themselves, little, or much."""
    problem = draw(problems())
    half_rate_rows = draw(st.sampled_from([0, 1, 200]))
    return dataclasses.replace(problem, topology=dataclasses.replace(problem.topology, half_rate_rows=half_rate_rows))


@settings(deadline=None, max_examples=examples(200))
@given(problem=priced_problems())
def test_the_compiled_planner_answers_what_the_reference_does(problem: Problem) -> None:
    assert get_solver("quota")(problem).placement == reference.quota_reference(problem)


@settings(deadline=None, max_examples=examples(200))
@given(problem=priced_problems(), min_rows=st.integers(1, 20), rises=st.lists(st.integers(0, 40), min_size=1, max_size=4))
def test_every_export_is_the_reference_s(problem: Problem, min_rows: int, rises: list[int]) -> None:
    """Of the plans that the planner tries, and of others; those that fail or repeat the one before are left out."""
    from moesaic.placement.solvers import quota_numba, score_numba

    tried_2P = plans_to_try(problem, prices_of(problem))
    more_2P = np.array([[min_rows] * len(rises), rises])
    plans_2P = np.concatenate([tried_2P, more_2P], axis=1)
    layer, least_rows = score_numba.layer_of(problem), lower_bound(problem).max_rows
    _, sizes, copies = quota_numba.candidates(layer, least_rows, *plans_2P)
    threshold = reference.smallest_threshold(problem, int(plans_2P[0, 0]))
    exports = [reference.export(problem, threshold + threshold * rise // 32, rows) for rows, rise in plans_2P.T.tolist()]
    expected = [plan for plan, _ in groupby([[], *(plan for plan in exports if plan)])]
    assert [list(map(tuple, plan[:, :size].T.tolist())) for plan, size in zip(copies, sizes, strict=True)] == expected


@settings(deadline=None, max_examples=examples(200))
@given(
    problem=priced_problems(),
    per_device=st.integers(0, 6),
    per_node=st.integers(0, 8),
    saved_rows=st.sampled_from([0, 1, 10, 100]),
    min_rows=st.sampled_from([0, 1, 5]),
    has_node_price=st.booleans(),
)
def test_further_copies_are_the_reference_s(
    problem: Problem, per_device: int, per_node: int, saved_rows: int, min_rows: int, has_node_price: bool
) -> None:
    """Whatever the limits, beside the copies of a first plan."""
    from moesaic.placement.solvers import quota_numba, score_numba

    row_s, node_row_s = 1e-6, 3e-6 * has_node_price
    threshold = reference.smallest_threshold(problem, 1)
    first = reference.export(problem, threshold, 1) or []
    limit = reference.Limit(per_device, per_node, saved_rows * row_s)
    _, sizes, copies = quota_numba.with_further_copies(
        score_numba.layer_of(problem),
        problem.load.load_RE,
        np.array(first, np.int64).reshape(-1, 2).T.copy(),
        np.array([[per_device], [per_node]]),
        np.array([limit.saved_s]),
        min_rows,
        row_s,
        node_row_s,
    )
    expected = reference.localize(problem, first, limit, min_rows, row_s, node_row_s)
    assert list(map(tuple, copies[0, :, : sizes[0]].T.tolist())) == expected


@settings(deadline=None, max_examples=examples(200))
@given(problem=priced_problems())
def test_the_copies_of_balance_are_never_cheaper(problem: Problem) -> None:
    """In quota's own seconds, for a load that is known."""
    quota, balance = get_solver("quota")(problem), get_solver("balance")(problem)
    assert quota.cost.total_s <= balance.cost.total_s * (1 + 1e-12)
