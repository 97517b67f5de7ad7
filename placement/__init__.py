"""Placement: loads, owners, copies, the token split, cost, solvers. Imports numpy only; no process group, no device.

content.py      Shared parts of the value types: read-only arrays, equality by content, argument checks with one-line errors.
files.py        Atomic file replacement, one-line errors of the file system, and file digests.
topology.py     The planner's model of the machine: nodes, ranks per node, link rates, matrix rate, how ranks and nodes differ.
owners.py       The owner map: (layer, expert) -> (rank, bank row), immutable.
traces/         Traces: recorded and generated expert loads, on disk and as streams.
machine.py      Measured machines: the rates of a `Topology` as `moesaic calibrate` found them, and the tables behind them, as a
                TOML file.
split_numba.py  Compiled integer routines of the exact split.
values.py       The planner's value types: layer shape, expert load, placement, and the problem of one layer.
split.py        The token split: for every expert, how many rows of each source rank each holder computes.
cost.py         The cost of a layer's step under a placement and a split, and a lower bound over all placements.
solvers/        Solvers: from a `Problem`, the layer's copies and owners as a `Solution`.
online/         Placement during training: forecasts, copies added once the load is known, migration proposals.
offline/        Placement offline, on recorded traces: the policy simulator, plans solved ahead, back-tests of predictors.
"""

from .cost import Bound, Cost, Solution, cost, lower_bound
from .offline.plans import SavedPlan, read_plan
from .online.calibrate import CalibrationSwitch, added_copies, calibrate, unhedged_if_calibrated
from .online.choose import SolverChoice
from .online.predict import PREDICTORS, Predictor, make_predictor, prediction_error
from .owners import Move, OwnerMap
from .solvers.baselines.moetuner import Hops, count_hops, tune_owners
from .solvers.joint import JointSolution, solve_joint
from .solvers.registry import KEEPS_OWNERS, SOLVERS, Solver, get_solver, policy_solvers
from .split import Split, split_exact, split_local_even
from .topology import Topology
from .traces.format import Trace, TraceMeta, TraceWriter, write_trace
from .values import ExpertLoad, LayerShape, Placement, Problem

__all__ = [
    "KEEPS_OWNERS",
    "PREDICTORS",
    "SOLVERS",
    "Bound",
    "CalibrationSwitch",
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
    "SolverChoice",
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
    "lower_bound",
    "make_predictor",
    "policy_solvers",
    "prediction_error",
    "read_plan",
    "solve_joint",
    "split_exact",
    "split_local_even",
    "tune_owners",
    "unhedged_if_calibrated",
    "write_trace",
]
