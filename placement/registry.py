"""The solvers by name."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Mapping
from types import MappingProxyType

from . import eplb, exhaustive, flexmoe, hecate, laer, milp, moetuner, permutation, quota, static
from .cost import Solution
from .values import Problem

Solver = Callable[[Problem], Solution]

SOLVERS: Mapping[str, Solver] = MappingProxyType(
    {
        "static": static.solve,
        "lpt": permutation.solve_lpt,
        "smartmoe": permutation.solve_smartmoe,
        "eplb": eplb.solve,
        "eplb_hierarchical": eplb.solve_hierarchical,
        "flexmoe": flexmoe.solve,
        "laer": laer.solve,
        "hecate": hecate.solve,
        "quota": quota.solve,
        "milp": milp.solve,
        "moetuner": moetuner.solve,
        "exhaustive": exhaustive.solve,
    }
)


def get_solver(name: str) -> Solver:
    """Return the solver called `name`, or raise ValueError that names the nearest one."""
    if name not in SOLVERS:
        near = difflib.get_close_matches(str(name), SOLVERS, n=1)
        raise ValueError(
            f"unknown solver {name!r}; " + (f"did you mean {near[0]!r}?" if near else f"known: {', '.join(SOLVERS)}")
        )
    return SOLVERS[name]
