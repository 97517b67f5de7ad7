"""The quota planner in plain Python: the specification of its compiled routines, and the oracle of their test.

export     ranks above a threshold give rows of their largest experts to ranks below it, one copy a gift
threshold  the smallest that an export reaches; somewhat higher ones need fewer copies
cheapest   of these exports and of no copies at all, by the cost model under the exact split
localize   further copies that keep tokens on their rank or node, where they save more dispatch than they cost
balance    the copies of that planner instead, where they cost less
"""

from __future__ import annotations

from collections import Counter
from typing import NamedTuple

import numpy as np

from ..cost import Tally, cost, lower_bound, prices_of, tally
from ..split import split_exact
from ..values import Placement, Problem
from . import balance
from .quota import plans_to_try

Copies = list[tuple[int, int]]
"""(expert, rank) of every copy, in the order in which they are made."""


class Limit(NamedTuple):
    """Most copies on a device's link and on a node's (times its cost), and the seconds of dispatch that one copy must save."""

    per_device: int
    per_node: int
    saved_s: float


def quota_reference(problem: Problem) -> Placement:
    """What `quota` answers."""
    plans = plans_to_try(problem, prices_of(problem)).T.tolist()
    threshold = smallest_threshold(problem, min_rows=plans[0][0])
    exports = [export(problem, threshold + threshold * rise // 32, min_rows) for min_rows, rise in plans]
    seconds, best = cheapest(problem, [[], *(copies for copies in exports if copies)])
    counts = counts_of(problem, best)
    if problem.slots and counts.device_rows:
        rates = row_seconds(problem, counts)
        further = [localize(problem, best, limit, plans[0][0], *rates) for limit in limits_to_try(problem, counts)]
        more_seconds, more = cheapest(problem, further)
        best = more if more_seconds < seconds else best
    if problem.slots:
        balanced = list(map(tuple, balance.copies_for(problem, problem.load.totals_E[None]).T.tolist()))
        # The first of equals is kept, however many copies it has.
        best = min([best, balanced], key=lambda copies: cheapest(problem, [copies])[0])
    return placed(problem, best)


def placed(problem: Problem, copies: Copies) -> Placement:
    """The present owners, with these copies."""
    return Placement.with_copies(problem.expert_to_owner_E, problem.num_ranks, np.array(copies, np.int64).reshape(-1, 2).T)


def cheapest(problem: Problem, plans: list[Copies]) -> tuple[float, Copies]:
    """The plan of fewest seconds, of equals the one of fewest copies, then the first; and its seconds."""

    def price(copies: Copies) -> tuple[float, int]:
        placement = placed(problem, copies)
        return cost(problem, placement, split_exact(problem.load, placement, problem.topology)).total_s, len(copies)

    best = min(plans, key=price)
    return price(best)[0], best


def counts_of(problem: Problem, copies: Copies) -> Tally:
    """Rows and copies of the busiest rank and links."""
    placement = placed(problem, copies)
    return tally(problem, placement, split_exact(problem.load, placement, problem.topology))


def busiest_first(problem: Problem) -> list[int]:
    """The ranks by what the rows of their experts cost them, most first."""
    return sorted(range(problem.num_ranks), key=lambda rank: -problem.owned_rows_R[rank] * problem.topology.cost_R[rank])


def export(problem: Problem, threshold: int, min_rows: int) -> Copies | None:
    """Bring every rank to a cost of `threshold` by copies that take at least `min_rows` each; None where that fails."""
    owner_E, totals_E, node_R = problem.expert_to_owner_E, problem.load.totals_E, problem.topology.node_of_rank_R
    room_R, slots_R = (threshold // problem.topology.cost_R - problem.owned_rows_R).tolist(), [problem.slots] * problem.num_ranks
    copies: Copies = []
    for rank in busiest_first(problem):
        excess = -room_R[rank]
        for expert in sorted(np.flatnonzero(owner_E == rank).tolist(), key=lambda expert: -totals_E[expert]):
            left = int(totals_E[expert])
            while excess > 0 and left >= min_rows:
                rows = min(max(excess, min_rows), left)
                hosts = [r for r in range(problem.num_ranks) if room_R[r] > 0 and slots_R[r] and (expert, r) not in copies]
                # The one that takes most of the rows; then one of the same node, then the one with most room.
                host = max(hosts, key=lambda r: (min(rows, room_R[r]), node_R[r] == node_R[rank], room_R[r]), default=None)
                if host is None or (taken := min(rows, room_R[host])) < min_rows:
                    break
                copies.append((expert, host))
                room_R[host], slots_R[host] = room_R[host] - taken, slots_R[host] - 1
                left, excess = left - taken, excess - taken
        if excess > 0:
            return None
    return copies


def smallest_threshold(problem: Problem, min_rows: int) -> int:
    """The smallest threshold that `export` reaches, within 1/400 of the mean rank: steps that double, then bisection."""
    low = bound = lower_bound(problem).max_rows
    high, step = int((problem.topology.cost_R * problem.owned_rows_R).max()), 0
    tolerance = max(problem.load.total // problem.num_ranks // 400, 1) * problem.topology.least_cost
    while bound + step < high:
        if export(problem, bound + step, min_rows) is not None:
            high = bound + step
        else:
            low, step = bound + step + 1, max(2 * step, tolerance)
    while high - low > tolerance:
        middle = (low + high) // 2
        low, high = (middle + 1, high) if export(problem, middle, min_rows) is None else (low, middle)
    return high


def limits_to_try(problem: Problem, counts: Tally) -> list[Limit]:
    """Two budgets of further copies, the second where the first leaves slots unused.

    Copies that hide under other work, or beside the busiest link's copies, must save one small group of rows; others their bytes
    as well.
    """
    prices, topology = prices_of(problem), problem.topology
    device, node, num_copies = prices.device_bytes_per_s, prices.node_bytes_per_s, problem.num_ranks * problem.slots
    group_s = prices.work_row_s * topology.half_rate_rows * topology.least_cost
    bytes_s = (prices.gathers * prices.expert_bytes + prices.gradient_bytes) / device
    beside_s = prices.expert_bytes * max(counts.device_copies / device, counts.node_copies / node)
    behind = ((prices.gathers - 1) * prices.expert_bytes + prices.gradient_bytes) / prices.expert_bytes
    under_s = min(prices.overlap_s - prices.latency_s, (2 * prices.overlap_s - prices.gathers * prices.latency_s) / behind)
    hidden = max(beside_s, under_s, 0.0) / prices.expert_bytes * (1 + 1e-9)
    node_slots = problem.slots * topology.ranks_per_node * int(topology.node_cost_N.max())
    per_node = int(min(hidden * node, topology.num_nodes * node_slots))
    hiding = Limit(int(min(hidden * device, num_copies)), per_node, group_s)
    shown = Limit(counts.device_copies + problem.slots, counts.node_copies + node_slots, group_s + bytes_s)
    is_tight = hiding.per_device < problem.slots or (topology.num_nodes > 1 and hiding.per_node < node_slots)
    return [hiding, shown] if is_tight else [hiding]


def row_seconds(problem: Problem, counts: Tally) -> tuple[float, float]:
    """Seconds of dispatch that one row costs on its rank's link, and on its node's where node links are the slowest, else 0.

    All ranks of a node relieve its link together.
    """
    prices = prices_of(problem)
    row_s, node_row_s = 4 * prices.row_bytes / prices.device_bytes_per_s, 4 * prices.row_bytes / prices.node_bytes_per_s
    is_node = counts.node_rows * node_row_s > counts.device_rows * row_s
    return row_s, node_row_s * problem.topology.ranks_per_node if is_node else 0.0


def localize(problem: Problem, copies: Copies, limit: Limit, min_rows: int, row_s: float, node_row_s: float) -> Copies:
    """Ranks take turns, busiest first; each copies the expert that saves it most dispatch, within the limit.

    A copy keeps its rank's own tokens on the rank, at least `min_rows`; if it is its node's first, also the node's in the node.
    """
    owner_E, node_R, load_RE = problem.expert_to_owner_E.tolist(), problem.topology.node_of_rank_R, problem.load.load_RE
    load_NE, copies = load_RE.reshape(-1, problem.topology.ranks_per_node, problem.num_experts).sum(axis=1), list(copies)
    cost_N = problem.topology.node_cost_N
    for turn in range(min(limit.per_device, problem.slots)):
        for rank in busiest_first(problem):
            if sum(host == rank for _, host in copies) > turn:
                continue
            node, holders = node_R[rank], [*enumerate(owner_E), *copies]
            sent_R = Counter(owner_E[e] for e, _ in copies)
            left_N = Counter(node_R[owner_E[e]] for e, host in copies if node_R[owner_E[e]] != node_R[host])
            entered_N = Counter(node_R[host] for e, host in copies if node_R[owner_E[e]] != node_R[host])
            best, best_s = None, limit.saved_s
            for expert, owner in enumerate(owner_E):
                owner_node = node_R[owner]
                is_first = all(e != expert or node_R[host] != node for e, host in holders)
                saved_s = load_RE[rank, expert] * row_s + (load_NE[node, expert] * node_row_s * cost_N[node] if is_first else 0.0)
                on_links = max((entered_N[node] + 1) * cost_N[node], (left_N[owner_node] + 1) * cost_N[owner_node])
                has_node_link = owner_node == node or on_links <= limit.per_node
                is_open = sent_R[owner] < limit.per_device and has_node_link and (expert, rank) not in holders
                if saved_s > best_s and is_open:
                    best, best_s = expert, saved_s
            if best is not None and load_RE[rank, best] >= min_rows:
                copies.append((best, rank))
    return copies
