"""The registry of solvers, by name."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Mapping
from types import MappingProxyType

from ..cost import Solution
from ..values import Problem
from . import balance, exhaustive, joint, quota, static
from .baselines import eplb, flexmoe, hecate, laer, moetuner, permutation
from .milp import planner as milp

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
        "balance": balance.solve,
        "milp": milp.solve,
        "joint": joint.solve,
        "moetuner": moetuner.solve,
        "exhaustive": exhaustive.solve,
    }
)


# Solvers that only add copies, which a training step can apply at once. The others also change owners, between steps.
KEEPS_OWNERS = frozenset({"static", "flexmoe", "laer", "hecate", "quota", "balance", "exhaustive"})


# What `runtime.policy` may name beside a solver: several, of which each layer takes the one that suits it.
AUTO = ("quota", "balance")


def keeps_owners(policy: str) -> bool:
    """Whether a solver, or every solver of `auto`, only adds copies."""
    return KEEPS_OWNERS.issuperset(policy_solvers(policy))


def policy_solvers(policy: str) -> tuple[str, ...]:
    """The solvers of a policy: `auto` stands for several, every other name for itself."""
    return AUTO if policy == "auto" else (policy,)


def get_solver(name: str, *, keeps_owners: bool = False) -> Solver:
    """Return the solver called `name`, or raise ValueError that names the nearest one.

    With `keeps_owners` a solver that may change owners raises as well.
    """
    known = [solver for solver in SOLVERS if solver in KEEPS_OWNERS or not keeps_owners]
    if name in SOLVERS and name not in known:
        raise ValueError(f"solver {name!r} changes owners, which a step cannot; use one of {', '.join(known)}")
    if name not in known:
        near = difflib.get_close_matches(str(name), known, n=1)
        raise ValueError(f"unknown solver {name!r}; " + (f"did you mean {near[0]!r}?" if near else f"known: {', '.join(known)}"))
    return SOLVERS[name]
