"""The choice between solvers while training: against pricing every trial by hand; the same on every rank."""

from collections.abc import Callable
from itertools import pairwise
from typing import Any

import numpy as np
import pytest

from moesaic.placement import ExpertLoad, LayerShape, Placement, Problem, SolverChoice, Topology, cost, get_solver, split_exact
from moesaic.placement.online.choose import FIRST_TRIALS, PLANNER_S, TRIAL_EVERY
from moesaic.placement.solvers.registry import AUTO, policy_solvers

OWNERS_E = np.repeat(np.arange(4), 4)


def problem(load_RE: np.ndarray, rate: float, forecast_error: float = 0.0) -> Problem:
    topology = Topology(1, 4, rate, rate, latency_s=1e-6, flops_per_s=1e12, half_rate_rows=0)
    shape = LayerShape(num_experts=16, top_k=2, dim=512, ffn_dim=1024)
    return Problem(ExpertLoad(load_RE), OWNERS_E, topology, shape, slots=2, forecast_error=forecast_error)


def loads(seed: int, count: int, assignments: int = 8192) -> list[np.ndarray]:
    """Skewed loads whose hot experts change, so that forecasts are wrong."""
    random = np.random.default_rng(seed)
    return [random.multinomial(assignments, random.dirichlet(np.full(16, 0.3)), size=4) for _ in range(count)]


@pytest.mark.parametrize("assignments,rate,expected", [(64, 1e9, "quota"), (8192, 1e12, "balance")])
def test_the_choice_is_what_the_exact_loads_say(assignments: int, rate: float, expected: str) -> None:
    """Where copies cost more than they save, `quota`, which makes few; where they are free, `balance`, as forecasts are wrong."""
    solvers = {name: get_solver(name, keeps_owners=True) for name in AUTO}
    choice = SolverChoice(solvers, split_exact)
    assert choice.chosen == "quota"
    seconds = dict.fromkeys(AUTO, 0.0)
    history = loads(3, FIRST_TRIALS + 1, assignments)
    for before, now in pairwise(history):
        forecast, exact = problem(before, rate, forecast_error=0.3), problem(now, rate)
        placed = choice.solve(forecast)
        assert placed == solvers[choice.chosen](forecast).placement
        for name, solve in solvers.items():
            placement = solve(forecast).placement
            total_s = cost(exact, placement, split_exact(exact.load, placement, exact.topology)).total_s
            seconds[name] += total_s + PLANNER_S[name](4, 16)
        choice.observe(exact)
        assert choice.chosen == min(seconds, key=lambda name: seconds[name])
    assert choice.chosen == expected


def counted(calls: dict[str, int], name: str) -> Callable[[Problem], Any]:
    def solve(given: Problem) -> Any:
        calls[name] += 1
        return get_solver("static")(given)

    return solve


def test_the_others_are_asked_in_trials_only() -> None:
    calls = dict.fromkeys(AUTO, 0)
    choice = SolverChoice({name: counted(calls, name) for name in AUTO}, split_exact)
    (load,) = loads(1, 1)
    for _ in range(2 * TRIAL_EVERY + 1):
        assert choice.solve(problem(load, 1e9)) == Placement.owners_only(OWNERS_E, 4)
        choice.observe(problem(load, 1e9))
    assert calls == {"quota": 2 * TRIAL_EVERY + 1, "balance": FIRST_TRIALS + 2}


def test_forwards_that_are_not_observed_use_up_no_trial() -> None:
    """An evaluation at the place of a trial: the next training forward is the trial."""
    calls = dict.fromkeys(AUTO, 0)
    choice = SolverChoice({name: counted(calls, name) for name in AUTO}, split_exact)
    (load,) = loads(1, 1)
    for _ in range(TRIAL_EVERY + 1):
        choice.solve(problem(load, 1e9), is_observed=False)
        assert not choice.is_trying
        choice.solve(problem(load, 1e9))
        choice.observe(problem(load, 1e9))
    assert calls["balance"] == FIRST_TRIALS + 1


def test_one_candidate_is_simply_asked() -> None:
    calls = {"quota": 0}
    choice = SolverChoice({"quota": counted(calls, "quota")}, split_exact)
    for load in loads(2, 3):
        choice.solve(problem(load, 1e9))
        choice.observe(problem(load, 1e9))
    assert (choice.chosen, calls) == ("quota", {"quota": 3})


def test_what_a_policy_stands_for() -> None:
    assert policy_solvers("auto") == AUTO
    assert policy_solvers("hecate") == ("hecate",)
    assert set(AUTO) == set(PLANNER_S)
