"""The cost of a layer's step under a placement and a split, and a lower bound over all placements.

All paths are maxima over devices and over node links, never sums over devices. The model:
    compute_s  = multiplier * max_r(cost_r * (rows_r + half_rate_rows * groups_r)) * flops_per_row / flops_per_s
    dispatch_s = 4 * (latency_s + row_bytes * max(busiest device / device rate, busiest node link / node rate))
    gather_s, reduce_s = the same for copies and their gradients, minus the time hidden under `overlap_s`
The 4 counts dispatch and combine, forward and backward. cost_r is 1 where all ranks are as fast (`Topology.rank_costs`).
groups_r is the number of experts that have rows on rank r: a group of n rows runs at the rate flops_per_s * n / (n +
half_rate_rows), which fits measured H100 GEMM efficiencies (0.41 of the peak at 256 rows, 0.59 at 512, 0.79 at 8192) within 0.06
from 256 rows up. The backward pass hides about twice what the forward hides (Hecate, section 4), so the second gather and the
reduce share 2 * overlap_s.
"""

from __future__ import annotations

from dataclasses import dataclass
from time import perf_counter
from typing import NamedTuple

import numpy as np

from .split import Split, split_exact
from .topology import Topology
from .values import Placement, Problem


@dataclass(frozen=True)
class Cost:
    """Predicted seconds of one layer's step by stage; `move_s` is the change of owners, amortised over its horizon."""

    compute_s: float
    dispatch_s: float
    gather_s: float
    reduce_s: float
    move_s: float

    @property
    def total_s(self) -> float:
        """Sum of the stages."""
        return self.compute_s + self.dispatch_s + self.gather_s + self.reduce_s + self.move_s


@dataclass(frozen=True)
class Bound:
    """Lower bounds over all placements of the problem: rows of the busiest rank, times `Topology.cost_R`, and seconds."""

    max_rows: int
    total_s: float


@dataclass(frozen=True)
class Solution:
    """A solver's answer. `gap` is (cost - bound) / cost in seconds, in [0, 1]; `seconds` is the time the solver took.

    `split` is the split of the problem's load that `cost` assumes, if it is not the exact split (milp/priced.py).
    """

    placement: Placement
    cost: Cost
    bound: Bound
    gap: float
    seconds: float
    solver: str
    split: Split | None = None


@dataclass(frozen=True)
class Tally:
    """The integer counts from which a cost is computed.

    work_rows: max over ranks of (rows + half_rate_rows * groups) * `Topology.cost_R`. The others count rows, copies and moves of
    owners that the busiest device, and the busiest node link (times `Topology.node_cost_N`), sends or receives; moves are those
    of the mean device, if the problem says so.
    """

    work_rows: int
    device_rows: int
    node_rows: int
    device_copies: int
    node_copies: int
    device_moves: float = 0
    node_moves: float = 0


def _busiest(flow_RR: np.ndarray, topology: Topology) -> tuple[int, int]:
    """Return the largest number of items that one device, and one node link (times its cost), sends or receives."""
    own_R = np.diagonal(flow_RR)
    device = max(int((flow_RR.sum(axis=1) - own_R).max()), int((flow_RR.sum(axis=0) - own_R).max()))
    if topology.num_nodes == 1:
        return device, 0
    nodes, per_node = topology.num_nodes, topology.ranks_per_node
    flow_NN = flow_RR.reshape(nodes, per_node, -1).sum(axis=1).reshape(nodes, nodes, per_node).sum(axis=2)
    busiest_N = np.maximum(flow_NN.sum(axis=1), flow_NN.sum(axis=0)) - np.diagonal(flow_NN)
    return device, int((topology.node_cost_N * busiest_N).max())


def _busiest_of_pairs(src: np.ndarray, dst: np.ndarray, topology: Topology) -> tuple[int, int]:
    """The same for items that each go from one rank, `src`, to another."""
    device = max(int(np.bincount(ranks, minlength=1).max()) for ranks in (src, dst))
    if topology.num_nodes == 1:
        return device, 0
    src_node, dst_node = topology.node_of_rank_R[src], topology.node_of_rank_R[dst]
    is_across = src_node != dst_node
    sent_N, received_N = (np.bincount(nodes[is_across], minlength=topology.num_nodes) for nodes in (src_node, dst_node))
    return device, int((topology.node_cost_N * np.maximum(sent_N, received_N)).max())


def _busiest_copies(placement: Placement, topology: Topology) -> tuple[int, int]:
    ranks, experts = np.nonzero(placement.copies_RE)
    return _busiest_of_pairs(placement.expert_to_owner_E[experts], ranks, topology)


def tally(problem: Problem, placement: Placement, split: Split) -> Tally:
    """Count the work of the busiest rank and the traffic of the busiest links. Owners send every copy directly."""
    topology = problem.topology
    groups_R = np.count_nonzero(split.rows_RE, axis=1)
    work_rows = int((topology.cost_R * (split.rows_R + topology.half_rate_rows * groups_R)).max())
    moved = np.flatnonzero(problem.expert_to_owner_E != placement.expert_to_owner_E)
    before, after = problem.expert_to_owner_E[moved], placement.expert_to_owner_E[moved]
    rows, copies = _busiest(split.flow_RR, topology), _busiest_copies(placement, topology)
    moves = (moved.size / problem.num_ranks, 0) if problem.mean_moves else _busiest_of_pairs(before, after, topology)
    return Tally(work_rows, rows[0], rows[1], copies[0], copies[1], moves[0], moves[1])


class Prices(NamedTuple):
    """A problem's rates as plain numbers, bytes and seconds, for `seconds_of`: of rows and items that cost 1."""

    work_row_s: float
    row_bytes: float
    expert_bytes: float
    gradient_bytes: float
    state_bytes: float
    device_bytes_per_s: float
    node_bytes_per_s: float
    latency_s: float
    overlap_s: float
    gathers: float
    move_horizon_steps: float
    mean_moves: bool


def prices_of(problem: Problem) -> Prices:
    """Return the rates of a problem for `seconds_of`."""
    topology, shape = problem.topology, problem.shape
    return Prices(
        work_row_s=problem.backward_multiplier * shape.flops_per_row / topology.flops_per_s / topology.cost_unit,
        row_bytes=float(shape.row_bytes),
        expert_bytes=float(shape.expert_bytes),
        gradient_bytes=float(shape.gradient_bytes),
        state_bytes=shape.parameters_per_expert * 4 * float(problem.state_multiplier),
        device_bytes_per_s=float(topology.device_bytes_per_s),
        node_bytes_per_s=float(topology.node_bytes_per_s) * topology.node_unit,
        latency_s=float(topology.latency_s),
        overlap_s=float(problem.overlap_s),
        gathers=float(problem.gathers),
        move_horizon_steps=float(problem.move_horizon_steps),
        mean_moves=problem.mean_moves,
    )


def seconds_of(
    prices: Prices,
    work_rows: int,
    device_rows: int,
    node_rows: int,
    device_copies: int,
    node_copies: int,
    device_moves: float,
    node_moves: float,
) -> tuple[float, float, float, float, float]:
    """Convert the counts of a `Tally` to the seconds of `Cost`, field by field. The model's formulas are written only here.

    Plain arithmetic on numbers, so that compiled searches use this same function.
    """
    row_device_s, row_node_s = 1 / prices.device_bytes_per_s, 1 / prices.node_bytes_per_s
    rows = max(device_rows * row_device_s, node_rows * row_node_s)
    copies = max(device_copies * row_device_s, node_copies * row_node_s)
    moves = max(device_moves * row_device_s, node_moves * row_node_s)
    dispatch = prices.latency_s + prices.row_bytes * rows if device_rows else 0.0
    gather = prices.latency_s + prices.expert_bytes * copies if device_copies else 0.0
    reduce = prices.latency_s + prices.gradient_bytes * copies if device_copies else 0.0
    move = (0.0 if prices.mean_moves else prices.latency_s) + prices.state_bytes * moves if device_moves else 0.0
    regather = gather * (prices.gathers - 1)
    room = 2 * prices.overlap_s
    return (
        prices.work_row_s * work_rows,
        4 * dispatch,
        max(0.0, gather - prices.overlap_s) + max(0.0, regather - room),
        max(0.0, reduce - max(0.0, room - regather)),
        move / prices.move_horizon_steps,
    )


def price(problem: Problem, counts: Tally) -> Cost:
    """Convert counts to seconds."""
    rows, copies, moves = (
        (counts.work_rows, counts.device_rows, counts.node_rows),
        (counts.device_copies, counts.node_copies),
        (counts.device_moves, counts.node_moves),
    )
    return Cost(*seconds_of(prices_of(problem), *rows, *copies, *moves))


def exposed_gather_s(problem: Problem, placement: Placement) -> float:
    """Predict the seconds of one gather of a placement's copies without overlap."""
    device_copies, node_copies = _busiest_copies(placement, problem.topology)
    prices = prices_of(problem)._replace(overlap_s=0.0, gathers=1.0)
    return seconds_of(prices, 0, 0, 0, device_copies, node_copies, 0, 0)[2]


def cost(problem: Problem, placement: Placement, split: Split) -> Cost:
    """Predict the seconds of one layer's step (the module's docstring has the model)."""
    return price(problem, tally(problem, placement, split))


def _least_rows(problem: Problem) -> int:
    """Return the smallest cost Z that satisfies a necessary condition of every placement with these owners and slots.

    A rank computes at most z_r = Z // cost_r rows, and at most its own and those of its `slots` largest foreign experts. All
    together compute the total.
    """
    owned_R, cost_R, totals_E = problem.owned_rows_R, problem.topology.cost_R, problem.load.totals_E
    low, high = problem.topology.least_limit(problem.load.total), int((cost_R * owned_R).max())
    largest = int(np.sort(totals_E)[max(totals_E.size - problem.slots, 0) :].sum())

    def fits(limit: int) -> bool:
        return int(np.minimum(limit // cost_R, owned_R + largest).sum()) >= problem.load.total

    if not problem.slots or fits(low):
        return low if problem.slots else high
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if fits(middle) else (middle + 1, high)
    return low


def lower_bound(problem: Problem, *, owners_may_move: bool = False) -> Bound:
    """Bound every placement from below: by the mean rank's work, and by Hall's condition on the slots for fixed owners.

    If owners may move, only the mean is a bound (one rank could own the busiest expert and nothing else), and without slots the
    busiest expert itself.
    """
    topology, totals_E = problem.topology, problem.load.totals_E
    if owners_may_move:
        max_rows = topology.least_limit(problem.load.total)
        if not problem.slots:
            max_rows = max(max_rows, int(totals_E.max()) * topology.least_cost)
    else:
        max_rows = _least_rows(problem)
    groups = int(np.count_nonzero(totals_E))
    mean_work = topology.least_limit(problem.load.total + topology.half_rate_rows * groups)
    busy = max_rows + (topology.half_rate_rows * topology.least_cost if max_rows else 0)
    none = Tally(max(mean_work, busy), 0, 0, 0, 0)
    return Bound(max_rows, price(problem, none).total_s)


def solution(placement: Placement, cost: Cost, bound: Bound, seconds: float, solver: str) -> Solution:
    """Build a solver's answer, with its gap."""
    gap = max(0.0, 1.0 - bound.total_s / cost.total_s) if cost.total_s > 0 else 0.0
    return Solution(placement, cost, bound, gap, seconds, solver)


def evaluate(problem: Problem, placement: Placement, start: float, solver: str, *, owners_may_move: bool = False) -> Solution:
    """Price a solver's placement under the exact split; `start` is the solver's perf_counter at its beginning."""
    seconds = cost(problem, placement, split_exact(problem.load, placement, problem.topology))
    bound = lower_bound(problem, owners_may_move=owners_may_move)
    return solution(placement, seconds, bound, perf_counter() - start, solver)
