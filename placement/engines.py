"""The solvers of integer programs, through PuLP. Import this module lazily: it imports PuLP and HiGHS."""

from __future__ import annotations

import highspy
import numpy as np
import pulp

ENGINES = ("highs", "cbc")


class _WarmHighs(pulp.HiGHS):
    """PuLP's HiGHS with a start from the variables' values, and with Ctrl-C ending the search instead of the program."""

    def callSolver(self, lp: pulp.LpProblem) -> None:
        known = [(v.index, v.varValue) for v in lp.variables() if v.cat == pulp.LpInteger and v.varValue is not None]
        if known:
            index, value = zip(*known, strict=True)
            lp.solverModel.setSolution(len(index), np.array(index, dtype=np.int32), np.array(value, dtype=np.float64))
        lp.solverModel.HandleKeyboardInterrupt = True
        lp.solverModel.solve()


def make_engine(name: str, time_limit_s: float, relative_gap: float) -> pulp.LpSolver:
    """Return HiGHS ("highs") or CBC ("cbc") on one thread, so that a run that ends by its gap repeats exactly."""
    if name == "highs":
        return _WarmHighs(msg=False, timeLimit=time_limit_s, gapRel=relative_gap, threads=1)
    if name == "cbc":
        path = pulp.PULP_CBC_CMD.pulp_cbc_path
        return pulp.COIN_CMD(path=path, msg=False, timeLimit=time_limit_s, gapRel=relative_gap, threads=1, warmStart=True)
    raise ValueError(f"unknown engine {name!r}; use one of {', '.join(ENGINES)}")


def was_interrupted(program: pulp.LpProblem) -> bool:
    """Return whether Ctrl-C ended the last run of HiGHS on a program."""
    return bool(program.solverModel.getModelStatus() == highspy.HighsModelStatus.kInterrupt)
