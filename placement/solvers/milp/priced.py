"""The token split that the cost model likes best, as an integer program. Import this module lazily: it imports PuLP and HiGHS.

`split_exact` gives the busiest rank the fewest rows. In seconds that is not quite the best: a group costs its rank
`half_rate_rows` rows on top, so ranks with more groups should compute fewer, and a few rows more than the mean may be worth it
where they save the busiest link; an owner may even leave all rows of an expert to its copies, which saves it the group. Here the
cost model's compute and dispatch are minimised together, over fractional rows that are rounded afterwards. The program leaves
out the latency of dispatch, which every split pays but the one that sends no row; that one is priced beside the program's. It
takes tens of milliseconds: for plans solved ahead, not for a step. Shape letters: R ranks, E experts, M replicated experts, J
(expert, holder) entries.
"""

from __future__ import annotations

from math import inf

import numpy as np
import pulp

from ... import split_numba
from ...cost import cost, prices_of
from ...split import Replicated, Split, split_exact, split_local_even
from ...values import Placement, Problem
from ..engines import minimise

_RELATIVE_GAP = 1e-5


def _rounded(rows_J: np.ndarray, start_M: np.ndarray, totals_M: np.ndarray) -> np.ndarray:
    """Round every expert's rows to integers with its exact total: down, then up where the fractions were largest."""
    whole_J = np.floor(rows_J + 1e-6).astype(np.int64)
    for begin, end, total in zip(start_M[:-1], start_M[1:], totals_M, strict=True):
        missing = int(total) - int(whole_J[begin:end].sum())
        order = np.argsort(whole_J[begin:end] - rows_J[begin:end], kind="stable")
        # The program's tolerance may cost or add a row or two.
        for k in range(abs(missing)):
            j = begin + int(order[k % order.size] if missing > 0 else np.argmax(whole_J[begin:end]))
            whole_J[j] += 1 if missing > 0 else -1
    return whole_J


def _minimise(
    problem: Problem, placement: Placement, table: Replicated, time_limit_s: float, below_s: float
) -> np.ndarray | None:
    """Solve the program; return the fractional rows of every (expert, holder) entry.

    None if compute and dispatch cannot be below `below_s`, or if the time was too short to say.
    """
    topology, load_RE, totals_E = problem.topology, problem.load.load_RE, problem.load.totals_E
    ranks, node_R, owner_E = range(problem.num_ranks), topology.node_of_rank_R, placement.expert_to_owner_E
    unit = max(problem.load.total / problem.num_ranks, 1.0)
    single = np.flatnonzero(placement.num_replicas_E == 1)
    holds_R, stays_R = [pulp.lpSum([]) for _ in ranks], [pulp.lpSum([]) for _ in ranks]
    stays_N = [pulp.lpSum([]) for _ in range(topology.num_nodes)]
    half_rate = topology.half_rate_rows / unit
    groups_R = np.bincount(owner_E[single], weights=totals_E[single] > 0, minlength=problem.num_ranks)
    group_rows_R = [pulp.lpSum([half_rate * count]) for count in groups_R]
    for expert in single:
        owner, node = owner_E[expert], node_R[owner_E[expert]]
        holds_R[owner] += totals_E[expert] / unit
        stays_R[owner] += load_RE[owner, expert] / unit
        stays_N[node] += load_RE[node_R == node, expert].sum() / unit
    program = pulp.LpProblem("split", pulp.LpMinimize)
    rows = []
    for m, expert in enumerate(table.experts_M):
        holders = table.ranks_J[table.start_M[m] : table.start_M[m + 1]].tolist()
        at = {r: program.add_variable(f"rows_{expert}_{r}", 0) for r in holders}
        rows += list(at.values())
        program.addConstraint(pulp.lpSum(at.values()) == totals_E[expert] / unit, f"all_rows_{expert}")
        kept = program.add_variable(f"kept_{expert}", 0, 1, pulp.LpBinary)
        program.addConstraint(at[int(owner_E[expert])] <= totals_E[expert] / unit * kept, f"kept_rows_{expert}")
        for r in holders:
            own = program.add_variable(f"own_{expert}_{r}", 0, load_RE[r, expert] / unit)
            program.addConstraint(own <= at[r], f"own_rows_{expert}_{r}")
            holds_R[r] += at[r]
            stays_R[r] += own
            group_rows_R[r] += (kept if r == owner_E[expert] else 1) * (half_rate * bool(totals_E[expert]))
        for node in {int(node_R[r]) for r in holders} if topology.num_nodes > 1 else ():
            own = program.add_variable(f"own_node_{expert}_{node}", 0, load_RE[node_R == node, expert].sum() / unit)
            program.addConstraint(
                own <= pulp.lpSum(at[r] for r in holders if node_R[r] == node), f"own_node_rows_{expert}_{node}"
            )
            stays_N[node] += own
    busiest, link = program.add_variable("busiest_rows", 0), program.add_variable("link_rows", 0)
    prices = prices_of(problem)
    row_s, work_row_s = 4 * prices.row_bytes / prices.device_bytes_per_s, prices.work_row_s * topology.least_cost
    scale = max(work_row_s, row_s)
    seconds = busiest * (work_row_s / scale) + link * (row_s / scale)
    program += seconds, "seconds"
    if below_s < inf:
        program.addConstraint(seconds <= below_s / (scale * unit), "cutoff")
    cost_R = (topology.cost_R / topology.least_cost).tolist()
    for r in ranks:
        program.addConstraint(busiest >= cost_R[r] * (holds_R[r] + group_rows_R[r]), f"busiest_{r}")
        program.addConstraint(link >= load_RE[r].sum() / unit - stays_R[r], f"sent_{r}")
        program.addConstraint(link >= holds_R[r] - stays_R[r], f"received_{r}")
    slower_N = (prices.device_bytes_per_s / prices.node_bytes_per_s * topology.node_cost_N).tolist()
    for n in range(topology.num_nodes if topology.num_nodes > 1 else 0):
        inside = np.flatnonzero(node_R == n)
        program.addConstraint(link >= (load_RE[inside].sum() / unit - stays_N[n]) * slower_N[n], f"sent_node_{n}")
        program.addConstraint(link >= (pulp.lpSum(holds_R[r] for r in inside) - stays_N[n]) * slower_N[n], f"received_node_{n}")
    outcome = minimise(program, "highs", time_limit_s, _RELATIVE_GAP)
    if outcome.is_interrupted:
        raise KeyboardInterrupt
    if not outcome.has_solution:
        return None
    return np.array([max(variable.varValue or 0.0, 0.0) for variable in rows]) * unit


def _split_of(problem: Problem, placement: Placement, table: Replicated, fractional_J: np.ndarray) -> Split:
    """Return a split with about so many rows of every (expert, holder) entry, rounded."""
    rows_J = _rounded(fractional_J, table.start_M, problem.load.totals_E[table.experts_M])
    per_node = problem.topology.ranks_per_node
    segments_4G = split_numba.decompose(problem.load.load_ER, table.experts_M, table.start_M, table.ranks_J, rows_J, per_node)
    segments_4G[0] = table.experts_M[segments_4G[0]]
    return Split(problem.load, placement, segments_4G)


def split_priced(problem: Problem, placement: Placement, time_limit_s: float = 10.0, below_s: float = inf) -> Split:
    """Split the load so that the cost model's seconds are least; never dearer than `split_exact`, which is returned on a tie.

    After `time_limit_s` the best split so far is the answer. Where no split costs less than `below_s`, counting what a group of
    rows costs for every copy, any split may be the answer: one that leaves a copy empty and is below by less than that is missed.
    """
    exact = split_exact(problem.load, placement, problem.topology)
    exact_cost = cost(problem, placement, exact)
    table = Replicated.of(placement)
    if not table.experts_M.size:
        return exact
    copies_s = exact_cost.gather_s + exact_cost.reduce_s + exact_cost.move_s
    splits = [exact]
    if not ((problem.load.load_RE > 0) & ~placement.replicas_RE).any():
        splits.append(split_local_even(problem.load, placement, problem.topology))  # every rank holds all that it needs
    fractional_J = _minimise(problem, placement, table, time_limit_s, below_s - copies_s)
    if fractional_J is not None:
        splits.append(_split_of(problem, placement, table, fractional_J))
    return min(splits, key=lambda split: cost(problem, placement, split).total_s)
