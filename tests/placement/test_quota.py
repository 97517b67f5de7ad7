"""The quota planner against its meaning in plain Python."""

from __future__ import annotations

import dataclasses

from hypothesis import given, settings
from hypothesis import strategies as st

from moesaic.placement import Problem, get_solver
from moesaic.placement.solvers.quota_reference import quota_reference
from tests.placement.cases import examples, problems


@settings(deadline=None, max_examples=examples(300))
@given(problem=problems(), half_rate_rows=st.sampled_from([0, 1, 200]))
def test_the_compiled_planner_answers_what_the_reference_does(problem: Problem, half_rate_rows: int) -> None:
    """The same copies, with groups that cost nothing by themselves, little, or much."""
    problem = dataclasses.replace(problem, topology=dataclasses.replace(problem.topology, half_rate_rows=half_rate_rows))
    assert get_solver("quota")(problem).placement == quota_reference(problem)
