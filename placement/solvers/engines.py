"""The solvers of integer programs, through PuLP. Import this module lazily: it imports PuLP and HiGHS."""

from __future__ import annotations

import threading
from time import perf_counter
from typing import Any

import highspy
import numpy as np
import pulp

ENGINES = ("highs", "cbc")


# An engine without a limit would search on; one with none left still says what it knows.
_LEAST_S = 0.01
# Ctrl-C is heard between two waits.
_WAIT_S = 0.1


def _limits(low: float | None, high: float | None) -> tuple[float, float]:
    return -np.inf if low is None else low, np.inf if high is None else high


class _WarmHighs(pulp.HiGHS):
    """PuLP's HiGHS with a start from the variables' values, and with Ctrl-C ending the search instead of the program.

    Its time limit counts from here on: handing the program over takes of it, all at once instead of line by line.
    """

    def __init__(self, *, time_limit_s: float, **options: Any) -> None:
        super().__init__(timeLimit=time_limit_s, **options)
        self._end = perf_counter() + time_limit_s

    def buildSolverModel(self, lp: pulp.LpProblem) -> None:
        assert lp.sense == pulp.LpMinimize, "programs are minimised here"
        variables, constraints = lp.variables(), list(lp._constraints.values())
        for index, variable in enumerate(variables):
            variable.index = index
        cost = np.array([lp.objective.get(variable, 0.0) for variable in variables])
        limits = [_limits(variable.lowBound, variable.upBound) for variable in variables]
        no_entries, no_starts = (np.empty(0, dtype=np.int32), np.empty(0)), np.zeros(len(variables), dtype=np.int32)
        lp.solverModel.addCols(len(variables), cost, *np.array(limits).T.copy(), 0, no_starts, *no_entries)
        integers = np.array([variable.index for variable in variables if variable.cat == pulp.LpInteger], dtype=np.int32)
        kinds = np.full(integers.size, highspy.HighsVarType.kInteger)
        lp.solverModel.changeColsIntegrality(integers.size, integers, kinds)
        starts: list[int] = []
        columns: list[int] = []
        values: list[float] = []
        for index, constraint in enumerate(constraints):
            constraint.index = index
            starts.append(len(columns))
            columns += [variable.index for variable in constraint]
            values += constraint.values()
        limits = [_limits(constraint.getLb(), constraint.getUb()) for constraint in constraints]
        entries = np.array(starts, dtype=np.int32), np.array(columns, dtype=np.int32), np.array(values, dtype=np.float64)
        lp.solverModel.addRows(len(constraints), *np.array(limits).reshape(-1, 2).T.copy(), len(columns), *entries)

    def callSolver(self, lp: pulp.LpProblem) -> None:
        known = [(v.index, v.varValue) for v in lp.variables() if v.cat == pulp.LpInteger and v.varValue is not None]
        if known:
            index, value = zip(*known, strict=True)
            lp.solverModel.setSolution(len(index), np.array(index, dtype=np.int32), np.array(value, dtype=np.float64))
        lp.solverModel.setOptionValue("time_limit", max(self._end - perf_counter(), _LEAST_S))
        is_stopped, is_solved = threading.Event(), False

        def stop(event: Any) -> None:
            if is_stopped.is_set():
                event.interrupt()

        # Asked between nodes and rounds of cuts only. highspy's own way asks at every simplex iteration, and waits for Python's
        # lock each time, which other threads hold.
        lp.solverModel.cbMipInterrupt += stop
        lp.solverModel.startSolve()
        while not is_solved:
            try:
                is_solved = lp.solverModel.wait(_WAIT_S)[0]
            except KeyboardInterrupt:
                is_stopped.set()


def make_engine(name: str, time_limit_s: float, relative_gap: float) -> pulp.LpSolver:
    """Return HiGHS ("highs") or CBC ("cbc") on one thread, so that a run that ends by its gap repeats exactly."""
    if name == "highs":
        return _WarmHighs(msg=False, time_limit_s=time_limit_s, gapRel=relative_gap, threads=1)
    if name == "cbc":
        path = pulp.PULP_CBC_CMD.pulp_cbc_path
        return pulp.COIN_CMD(path=path, msg=False, timeLimit=time_limit_s, gapRel=relative_gap, threads=1, warmStart=True)
    raise ValueError(f"unknown engine {name!r}; use one of {', '.join(ENGINES)}")


def was_interrupted(program: pulp.LpProblem) -> bool:
    """Return whether Ctrl-C ended the last run of HiGHS on a program."""
    return bool(program.solverModel.getModelStatus() == highspy.HighsModelStatus.kInterrupt)
