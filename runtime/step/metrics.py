"""What a step looked like, over all layers and layer by layer: load balance with and without copies, copies, bytes, planning."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

import numpy as np

from ...collectives import SCHEDULES, LinkCounts
from ...jit import run_seconds
from ...placement import ExpertLoad, Problem, Solution, Solver, Topology
from .planning import Plan

# What a rank may wait for: copies of experts, the reduce of their gradients, and routed tokens (with the gathered loads).
EXPOSED = ("gather", "reduce", "tokens")


class LayerCounters:
    """Sums over the training passes of one layer since the step began. The same on every rank, but for the seconds."""

    def __init__(self, topology: Topology) -> None:
        self._topology = topology
        self.reset()

    def reset(self) -> None:
        """Start a new step."""
        self.exposed_s = dict.fromkeys(EXPOSED, 0.0)
        self.num_forwards = 0
        self.num_copies = 0
        self.num_added = 0
        self.num_gathers = dict.fromkeys(SCHEDULES, 0)
        self.gather_busiest_bytes = 0
        self.gather_bound_bytes = 0
        self.gather_cross_node_bytes = 0
        self.load_RE: np.ndarray | None = None  # as the routers chose
        self.kept_RE: np.ndarray | None = None  # without what was dropped
        self.plan_s = 0.0
        self.solve_s = 0.0
        # Sums, not lists: a layer that is trained without a handle never closes a step.
        self._imbalance = 0.0
        self._imbalance_static = 0.0
        self._prediction_error = 0.0
        self._num_predicted = 0

    @contextmanager
    def planning(self) -> Iterator[None]:
        """The body places copies or splits a load; its time counts as `plan_s`."""
        start_s = run_seconds()
        yield
        self.plan_s += run_seconds() - start_s

    def timed(self, solver: Solver) -> Solver:
        """The same solver, whose time counts as `solve_s`."""

        def solve(problem: Problem) -> Solution:
            start_s = run_seconds()
            solution = solver(problem)
            self.solve_s += run_seconds() - start_s
            return solution

        return solve

    def count(self, plan: Plan, load: ExpertLoad, kept: ExpertLoad, prediction_error: float | None = None) -> None:
        """Take in one forward: the load that the routers chose, what was kept of it, and how wrong its forecast was."""
        assert plan.split is not None
        owned_rows_R = np.bincount(plan.placement.expert_to_owner_E, weights=kept.totals_E, minlength=kept.num_ranks)
        self.num_forwards += 1
        self.num_copies += plan.placement.num_copies
        self.num_added += plan.num_added
        self.num_gathers[plan.schedule_name] += plan.placement.num_copies > 0
        self.gather_busiest_bytes += plan.gather_account.bound.busiest_bytes
        self.gather_bound_bytes += plan.gather_account.bound.rank_bytes
        self.gather_cross_node_bytes += plan.gather_account.bytes.cross_node
        if prediction_error is not None:
            self._prediction_error += prediction_error
            self._num_predicted += 1
        self.load_RE = load.load_RE if self.load_RE is None else self.load_RE + load.load_RE
        self.kept_RE = kept.load_RE if self.kept_RE is None else self.kept_RE + kept.load_RE
        self._imbalance += self._topology.max_over_mean(plan.split.rows_RE.sum(axis=1))
        self._imbalance_static += self._topology.max_over_mean(owned_rows_R)

    def summary(self) -> dict[str, float]:
        """Means over the step's forwards, the step's seconds; see `step_metrics` for the keys."""
        assert self.load_RE is not None and self.kept_RE is not None and self.num_forwards
        errors = {"prediction_error": self._prediction_error / self._num_predicted} if self._num_predicted else {}
        gamma = gamma_eff(self.load_RE.sum(axis=0))
        return {
            "max_over_mean": self._imbalance / self.num_forwards,
            "max_over_mean_static": self._imbalance_static / self.num_forwards,
            "expert_max_over_mean": max_over_mean(self.load_RE.sum(axis=0)),
            "copies_per_layer": self.num_copies / self.num_forwards,
            "copies_calibrated": self.num_added / self.num_forwards,
            **{f"gathers_{name}": count / self.num_forwards for name, count in self.num_gathers.items()},
            "gather_busiest_bytes": self.gather_busiest_bytes / self.num_forwards,
            "gather_bound_bytes": self.gather_bound_bytes / self.num_forwards,
            "gather_cross_node_bytes": self.gather_cross_node_bytes / self.num_forwards,
            "dead_experts": float(np.count_nonzero(self.load_RE.sum(axis=0) == 0)),
            "dropped_share": 1.0 - self.kept_RE.sum() / max(self.load_RE.sum(), 1),
            "plan_s": self.plan_s,
            "solve_s": self.solve_s,
            **errors,
            **({} if gamma is None else {"gamma_eff": gamma}),
        }


def max_over_mean(counts: np.ndarray) -> float:
    """The busiest over the mean, 1.0 when nothing was counted."""
    total = float(counts.sum())
    return float(counts.max()) * counts.size / total if total else 1.0


def gamma_eff(counts_E: np.ndarray) -> float | None:
    """The effective congestion coefficient of a layer's routing: our reconstruction of arXiv 2604.04230, not its estimator.

    The paper takes routing as a congestion game. We read it so: an expert of quality q that gets the share m of the assignments
    is worth q - gamma m to tokens, and in equilibrium m_e = exp(q_e - gamma m_e) / Z. Then q_e = log m_e + gamma m_e, up to a
    constant. Loads do not show qualities; we take their standard deviation over experts to be 1, which leaves the gamma with

        var(log m) + 2 gamma cov(log m, m) + gamma^2 var(m) = 1.

    It rises as loads become even: where they nearly are, gamma = E (1 / std(E m) - 1), a softmax of temperature 1 + gamma / E.
    0: the loads differ more than such qualities do. None: all experts with tokens, which alone are counted, have as many. Read it
    as a trend.

    Example: loads 3, 1 are shares 0.75, 0.25 of experts whose qualities are 2 apart: log 3 + gamma / 2 = 2, gamma = 1.80.
    """
    share_E = counts_E[counts_E > 0] / max(counts_E.sum(), 1)
    if not share_E.size or share_E.min() == share_E.max():
        return None
    log_E = np.log(share_E)
    log_E, share_E = log_E - log_E.mean(), share_E - share_E.mean()
    log_variance, covariance, variance = (a @ b / a.size for a, b in ((log_E, log_E), (log_E, share_E), (share_E, share_E)))
    return max(math.sqrt(max(covariance**2 + variance * (1.0 - log_variance), 0.0)) - covariance, 0.0) / variance


def exposed_metrics(layers: Mapping[str, LayerCounters]) -> dict[str, float]:
    """Seconds of the step in which this rank did nothing but wait for others, on the host's clock.

    exposed_gather_s, exposed_reduce_s, exposed_tokens_s   for copies, for their gradients, for routed tokens; all layers
    exposed_s/<layer>                                      the three together, for one layer
    """
    exposed = {name: counters.exposed_s for name, counters in layers.items()}
    total = {f"exposed_{what}_s": sum(seconds[what] for seconds in exposed.values()) for what in EXPOSED}
    return total | {f"exposed_s/{name}": sum(seconds.values()) for name, seconds in exposed.items()}


def step_metrics(layers: Sequence[LayerCounters], bytes_by_op: Mapping[str, LinkCounts]) -> dict[str, float]:
    """One step as flat numbers: means over the MoE layers that ran, but for seconds, which are sums.

    max_over_mean          routed tokens of the busiest rank over the mean rank, as computed (with copies); for ranks of different
                           speed, seconds of the busiest rank over the seconds if all ended together
    max_over_mean_static   the same had every expert stayed on its owner: plain expert parallelism on the same routing
    expert_max_over_mean   the busiest expert over the mean expert
    gamma_eff              effective congestion coefficient, our reconstruction (see `gamma_eff`), where experts' loads differ
    copies_per_layer       copies made, over all ranks
    copies_calibrated      those of them that calibration added for the exact load
    prediction_error       share of the assignments that were predicted for another expert, where anything was predicted
    gathers_<schedule>     share of the layers' forwards whose copies travelled by that schedule
    gather_busiest_bytes   bytes that the busiest rank sends or receives in one gather, by the schedule
    gather_bound_bytes     what no schedule goes below: copies received by one rank, or distinct experts sent by one owner
    gather_cross_node_bytes  bytes of one gather, all ranks together, that leave a node, by the schedule
    dead_experts           experts that got no token in the step
    dropped_share          share of the assignments that were dropped for capacity
    plan_s, solve_s        seconds this rank placed copies and split loads, and the part of them that the solver took; without
                           what compiling took
    bytes_<op>             bytes that this rank sent in training: gather, calibrate, regather, reduce, describe, dispatch,
                           combine, the two backwards, and replicate, the averaging of gradients over replicas
    cross_node_bytes_<op>  the part of them that left the node
    """
    summaries = [counters.summary() for counters in layers if counters.num_forwards]
    keys = [key for key in (summaries[0] if summaries else ()) if all(key in summary for summary in summaries)]
    metrics = {key: (np.sum if key.endswith("_s") else np.mean)([s[key] for s in summaries]).item() for key in keys}
    trained = {op: counts for op, counts in sorted(bytes_by_op.items()) if not op.startswith("eval_")}
    metrics |= {f"bytes_{op}": float(counts.same_node + counts.cross_node) for op, counts in trained.items()}
    return metrics | {f"cross_node_bytes_{op}": float(counts.cross_node) for op, counts in trained.items()}
