"""The solvers of integer programs that PuLP writes down. Import this module lazily: it imports PuLP and HiGHS.

HiGHS gets a program from here, not from PuLP: PuLP 3 and PuLP 4 have different ways to do that, and share what says what a
program is. Both are in use: PuLP 4 needs Python 3.12.
"""

from __future__ import annotations

import ctypes
import os
import threading
from collections.abc import Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from functools import cache
from itertools import chain
from time import perf_counter
from typing import Any

import highspy
import numpy as np
import pulp

ENGINES = ("highs", "cbc")


# An engine without a limit would search on; one with none left still returns its bound.
_LEAST_S = 0.01
# Ctrl-C is heard between two waits.
_WAIT_S = 0.1
# Why HiGHS may stop with the best solution so far.
_STOPPED_EARLY = (
    highspy.HighsModelStatus.kTimeLimit,
    highspy.HighsModelStatus.kInterrupt,
    highspy.HighsModelStatus.kIterationLimit,
    highspy.HighsModelStatus.kObjectiveBound,
    highspy.HighsModelStatus.kObjectiveTarget,
)
_INFEASIBLE = (highspy.HighsModelStatus.kInfeasible, highspy.HighsModelStatus.kUnboundedOrInfeasible)


@dataclass(frozen=True)
class Outcome:
    """What an engine found out about a program. The program's variables have the values of its solution, if it has one."""

    has_solution: bool
    is_complete: bool
    """Whether the solution is the best one, up to the gap."""
    is_infeasible: bool
    is_interrupted: bool
    """Whether Ctrl-C ended the search."""
    bound: float
    """What no solution's objective goes below; -inf where nothing is known."""


def check_engine(name: str) -> None:
    """Raise ValueError unless an engine of this name exists and can run here."""
    if name not in ENGINES:
        raise ValueError(f"unknown engine {name!r}; use one of {', '.join(ENGINES)}")
    if name == "cbc" and not _cbc(1.0, 0.0).available():
        raise ValueError(
            f"engine 'cbc' needs the program cbc, which PuLP {pulp.__version__} does not find; "
            "install it with pip install 'pulp[cbc]', or use engine 'highs'"
        )


def minimise(program: pulp.LpProblem, engine: str, time_limit_s: float, relative_gap: float) -> Outcome:
    """Minimise a program by HiGHS ("highs") or CBC ("cbc"), on one thread, so that a run that ends by its gap repeats exactly.

    Its integer variables' values, where they have some, are where the search starts. HiGHS's time limit counts from here on:
    handing the program over takes of it. Ctrl-C ends HiGHS's search instead of the program.
    """
    assert program.sense == pulp.LpMinimize, "programs are minimised here"
    check_engine(engine)
    if engine == "cbc":
        return _minimise_by_cbc(program, time_limit_s, relative_gap)
    end = perf_counter() + time_limit_s
    _greet()
    highs, variables = highspy.Highs(), program.variables()
    highs.setOptionValue("output_flag", False)
    highs.setOptionValue("mip_rel_gap", relative_gap)
    highs.setOptionValue("threads", 1)
    _hand_over(program, variables, highs)
    highs.setOptionValue("time_limit", max(end - perf_counter(), _LEAST_S))
    _run(highs)
    status, info = highs.getModelStatus(), highs.getInfo()
    is_complete = status == highspy.HighsModelStatus.kOptimal
    has_solution = is_complete or (status in _STOPPED_EARLY and bool(np.isfinite(info.objective_function_value)))
    if has_solution:
        for variable, value in zip(variables, highs.getSolution().col_value, strict=True):
            variable.varValue = value
    return Outcome(
        has_solution,
        is_complete,
        is_infeasible=status in _INFEASIBLE,
        is_interrupted=status == highspy.HighsModelStatus.kInterrupt,
        bound=info.mip_dual_bound if np.isfinite(info.mip_dual_bound) else -np.inf,
    )


@cache
def _greet() -> None:
    """From 1.16 on HiGHS prints its name when a process makes its first solver, whatever its options: discard that."""
    flush = ctypes.CDLL(None).fflush
    flush(None)
    with suppress(OSError), open(os.devnull, "wb") as nowhere, ExitStack() as restoring:
        stdout = os.dup(1)
        restoring.callback(os.close, stdout)
        restoring.callback(os.dup2, stdout, 1)
        restoring.callback(flush, None)
        os.dup2(nowhere.fileno(), 1)
        highspy.Highs()


def _hand_over(program: pulp.LpProblem, variables: list[pulp.LpVariable], highs: highspy.Highs) -> None:
    """Write a program into HiGHS, all at once instead of line by line, and where to start."""
    # By name: PuLP 4 makes a variable's object anew whenever it is asked for one.
    column_of = {variable.name: j for j, variable in enumerate(variables)}
    cost = np.zeros(len(variables))
    for variable, coefficient in program.objective.items():
        cost[column_of[variable.name]] = coefficient
    no_entries, no_starts = (np.empty(0, dtype=np.int32), np.empty(0)), np.zeros(len(variables), dtype=np.int32)
    low, high = _limits([(variable.lowBound, variable.upBound) for variable in variables])
    highs.addCols(len(variables), cost, low, high, 0, no_starts, *no_entries)
    highs.changeObjectiveOffset(program.objective.constant)
    integers = np.array([j for j, variable in enumerate(variables) if variable.cat == pulp.LpInteger], dtype=np.int32)
    highs.changeColsIntegrality(integers.size, integers, np.full(integers.size, highspy.HighsVarType.kInteger))

    rows = program.constraints()
    entries = [row.items() for row in rows]
    starts = np.cumsum([0, *map(len, entries)])[:-1].astype(np.int32)
    columns = np.array([column_of[variable.name] for variable, _ in chain.from_iterable(entries)], dtype=np.int32)
    values = np.array([value for _, value in chain.from_iterable(entries)], dtype=np.float64)
    low, high = _limits([(row.getLb(), row.getUb()) for row in rows])
    highs.addRows(len(rows), low, high, len(columns), starts, columns, values)

    known = [(j, variables[j].varValue) for j in integers.tolist() if variables[j].varValue is not None]
    if known:
        index, value = zip(*known, strict=True)
        highs.setSolution(len(index), np.array(index, dtype=np.int32), np.array(value, dtype=np.float64))


def _limits(pairs: Sequence[tuple[float | None, float | None]]) -> tuple[np.ndarray, np.ndarray]:
    """The lower and the upper ones; None is no limit."""
    low = np.array([-np.inf if low is None else low for low, _ in pairs], dtype=np.float64)
    return low, np.array([np.inf if high is None else high for _, high in pairs], dtype=np.float64)


def _run(highs: highspy.Highs) -> None:
    """Search until the end, or until Ctrl-C."""
    is_stopped, is_solved = threading.Event(), False

    def stop(event: Any) -> None:
        if is_stopped.is_set():
            event.interrupt()

    # Asked between nodes and rounds of cuts only. highspy's own way asks at every simplex iteration, and waits for Python's
    # lock each time, which other threads hold.
    highs.cbMipInterrupt += stop
    highs.startSolve()
    while not is_solved:
        try:
            is_solved = highs.wait(_WAIT_S)[0]
        except KeyboardInterrupt:
            is_stopped.set()


def _cbc(time_limit_s: float, relative_gap: float) -> pulp.LpSolver:
    # PuLP 3 brings the program; PuLP 4 takes that of the package cbcbox, or the one on PATH.
    path = pulp.PULP_CBC_CMD.pulp_cbc_path if hasattr(pulp, "PULP_CBC_CMD") else None
    return pulp.COIN_CMD(path=path, msg=False, timeLimit=time_limit_s, gapRel=relative_gap, threads=1, warmStart=True)


def _minimise_by_cbc(program: pulp.LpProblem, time_limit_s: float, relative_gap: float) -> Outcome:
    stats = program.solve(_cbc(time_limit_s, relative_gap))
    if isinstance(stats, int):
        # PuLP 3: "optimal" is any solution, and the program says whether it is the best.
        has_solution, is_complete = stats == pulp.LpStatusOptimal, program.sol_status == pulp.LpSolutionOptimal
        is_infeasible = stats == pulp.LpStatusInfeasible
    else:
        has_solution, is_complete = stats.has_solution, stats.status == pulp.LpSolveStatus.Optimal
        is_infeasible = stats.status == pulp.LpSolveStatus.Infeasible
    bound = pulp.value(program.objective) * (1 - relative_gap) if is_complete else -np.inf
    return Outcome(has_solution, is_complete, is_infeasible, is_interrupted=False, bound=bound)
