"""Placement: loads, owners, copies, the token split, cost, and the solvers. numpy only; no process group, no device."""

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
