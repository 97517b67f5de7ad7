"""Placement: loads, owners, copies, the token split, cost, and the solvers. numpy only; no process group, no device.

content.py      Shared machinery of the value types: frozen arrays, equality by content, checks with one clear line.
files.py        Files that appear whole or not at all, and one line where they cannot.
split_numba.py  Compiled integer routines of the exact split.
owners.py       The owner map: the frozen map (layer, expert) -> (rank, row).
topology.py     The machine as the planner sees it: nodes, ranks per node, link rates, matrix rate.
traces/         Traces: recorded and generated loads, on disk and as a stream.
values.py       The planner's value types: what a layer is, what was routed, who holds which copies, and the question to solve.
split.py        The token split: which holder computes which source rank's rows of every expert.
cost.py         What a layer's step costs under a placement and a split, and what no placement can beat.
solvers/        Solvers: which copies a layer makes and who owns its experts, from a `Problem` to a `Solution`.
online/         What training asks for between steps: forecasts, copies added late, owners for the steps to come.
offline/        What is computed ahead of training: solvers played over a trace, plans, back-tests.
"""

from .cost import Bound, Cost, Solution, cost, lower_bound
from .offline.plans import SavedPlan, read_plan
from .online.calibrate import added_copies, calibrate
from .online.predict import PREDICTORS, Predictor, make_predictor, prediction_error
from .owners import Move, OwnerMap
from .solvers.baselines.hecate import hecate_owners
from .solvers.baselines.moetuner import Hops, count_hops, tune_owners
from .solvers.joint import JointSolution, solve_joint
from .solvers.registry import KEEPS_OWNERS, SOLVERS, Solver, get_solver
from .split import Split, split_exact, split_local_even
from .topology import Topology
from .traces.format import Trace, TraceMeta, TraceWriter, write_trace
from .values import ExpertLoad, LayerShape, Placement, Problem

__all__ = [
    "KEEPS_OWNERS",
    "PREDICTORS",
    "SOLVERS",
    "Bound",
    "Cost",
    "ExpertLoad",
    "Hops",
    "JointSolution",
    "LayerShape",
    "Move",
    "OwnerMap",
    "Placement",
    "Predictor",
    "Problem",
    "SavedPlan",
    "Solution",
    "Solver",
    "Split",
    "Topology",
    "Trace",
    "TraceMeta",
    "TraceWriter",
    "added_copies",
    "calibrate",
    "cost",
    "count_hops",
    "get_solver",
    "hecate_owners",
    "lower_bound",
    "make_predictor",
    "prediction_error",
    "read_plan",
    "solve_joint",
    "split_exact",
    "split_local_even",
    "tune_owners",
    "write_trace",
]
