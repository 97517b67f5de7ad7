"""A lower bound on a layer's seconds that counts the links: proven by counting, without an engine.

Say every rank receives at most C copies. Then a rank keeps at most its own tokens of what it owns and of its C best copies, so
the rows that must travel are known from below, and with them the busiest device and node link, which carry at least the mean.
C copies cost at least C items on a link. The least of these bounds over C = 0 ... slots bounds every placement.
Shape letters: R ranks, N nodes, E experts, M units (ranks or nodes).
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from .cost import Bound, Cost, Tally, lower_bound, price, prices_of
from .values import Problem

_PRICE_STEPS = 60


def _most_kept_by_owners(load_ME: np.ndarray, owned_M: np.ndarray) -> int:
    """Bound sum_e load[owner(e), e] over all owners with owned_M[m] experts each: Lagrange prices on a place, by subgradient.

    Any prices bound it: sum_e max_m(load - price_m) + sum_m owned_m * price_m. At most the sum of the columns' maxima.
    """
    price_M = np.zeros(owned_M.size)
    best = float(load_ME.max(axis=0).sum())
    scale = max(best / load_ME.shape[1], 1.0)
    for step in range(_PRICE_STEPS):
        reduced_ME = load_ME - price_M[:, None]
        bound = float(reduced_ME.max(axis=0).sum() + owned_M @ price_M)
        best = min(best, bound)
        wanted_M = np.bincount(reduced_ME.argmax(axis=0), minlength=owned_M.size)
        price_M += scale * (wanted_M - owned_M) / max(1, owned_M.max()) / (1 + step)
    return int(np.ceil(best - 1e-6))


def _most_kept(load_ME: np.ndarray, owner_E: np.ndarray, copies: int, owners_may_move: bool) -> np.ndarray:
    """Return the most rows every unit can keep with `copies` copies [M], all owners fixed or any."""
    sorted_ME = -np.sort(-load_ME, axis=1)
    owned_M = np.bincount(owner_E, minlength=load_ME.shape[0])
    if owners_may_move:
        return np.array([sorted_ME[m, : owned_M[m] + copies].sum() for m in range(owned_M.size)])
    own_ME = np.zeros_like(load_ME)
    own_ME[owner_E, np.arange(owner_E.size)] = load_ME[owner_E, np.arange(owner_E.size)]
    foreign_ME = -np.sort(-(load_ME - own_ME), axis=1)
    return own_ME.sum(axis=1) + foreign_ME[:, :copies].sum(axis=1)


def _least_items(load_ME: np.ndarray, owner_E: np.ndarray, copies: int, owners_may_move: bool, keep_counts: bool) -> int:
    """Return the rows that the busiest unit must send at least, with `copies` copies a unit."""
    start_M = load_ME.sum(axis=1)
    owned_M = np.bincount(owner_E, minlength=start_M.size)
    kept = int(start_M.sum())
    busiest = 0
    if keep_counts or not owners_may_move:
        kept_M = _most_kept(load_ME, owner_E, copies, owners_may_move)
        kept, busiest = int(np.minimum(kept_M, start_M).sum()), int((start_M - kept_M).max())
    if owners_may_move:
        of_owners = _most_kept_by_owners(load_ME, owned_M) if keep_counts else int(load_ME.max(axis=0).sum())
        kept = min(kept, of_owners + int(-np.sort(-load_ME, axis=1)[:, :copies].sum()))
    return max(busiest, -(-(int(start_M.sum()) - kept) // start_M.size), 0)


def _least_tally(problem: Problem, work_rows: int, copies: int, owners_may_move: bool, keep_counts: bool) -> Tally:
    """Return what the busiest rank and links have to do at least if no rank receives more than `copies` copies."""
    topology, owner_E, load_RE = problem.topology, problem.expert_to_owner_E, problem.load.load_RE
    device, node = _least_items(load_RE, owner_E, copies, owners_may_move, keep_counts), 0
    if topology.num_nodes > 1:
        load_NE = load_RE.reshape(topology.num_nodes, topology.ranks_per_node, -1).sum(axis=1)
        node_copies = min(copies * topology.ranks_per_node, problem.num_experts)
        node = _least_items(load_NE, topology.node_of_rank_R[owner_E], node_copies, owners_may_move, keep_counts)
    return Tally(work_rows, device, node, copies, 0)


def _least_work(problem: Problem, owners_may_move: bool) -> tuple[Bound, int]:
    """Return the bound that knows no links, and its rows of work."""
    base = lower_bound(problem, owners_may_move=owners_may_move)
    return base, round(base.total_s / prices_of(problem).work_row_s)


def link_bound(problem: Problem, *, owners_may_move: bool = False, keep_counts: bool = True) -> Bound:
    """Bound every placement, compute and links together; at least `lower_bound`.

    With `owners_may_move` owners are free, as many per rank as now if `keep_counts`, else any number.
    """
    base, work_rows = _least_work(problem, owners_may_move)
    bounds_s = [
        price(problem, _least_tally(problem, work_rows, copies, owners_may_move, keep_counts)).total_s
        for copies in range(problem.slots + 1)
    ]
    # Sums of rounded numbers: the least possible cost may differ from its bound in the last digits.
    return Bound(base.max_rows, max(base.total_s, min(bounds_s) * (1 - 1e-12)))


def _spent(problem: Problem, low: int, high: int, owners_may_move: bool) -> tuple[Tally, Cost]:
    """Return what placements whose busiest device moves `low` to `high` copies have to do at least, and its price."""
    _, work_rows = _least_work(problem, owners_may_move)
    least = _least_tally(problem, work_rows, min(high, problem.slots), owners_may_move, keep_counts=True)
    return least, price(problem, replace(least, device_copies=low))


def range_bound_s(problem: Problem, low: int, high: int, *, owners_may_move: bool) -> float:
    """Bound the seconds of every placement whose busiest device sends or receives `low` to `high` copies."""
    return _spent(problem, low, high, owners_may_move)[1].total_s * (1 - 1e-12)


@dataclass(frozen=True)
class Room:
    """The most work rows of a rank, rows on a device link, and owners that a device gives away or gets, within some seconds."""

    work_rows: float
    device_rows: float
    moves: int


def room_within(problem: Problem, seconds: float, low: int, high: int, *, owners_may_move: bool) -> Room:
    """Say what placements may do that cost at most `seconds` and whose busiest device moves `low` to `high` copies.

    What one stage needs at least, by the bound's count, no other stage can spend.
    """
    prices = prices_of(problem)
    least, spent = _spent(problem, low, high, owners_may_move)
    left_s = max(seconds * (1 + 1e-9) - spent.total_s, 0.0)
    dispatch_s = spent.dispatch_s + left_s - (4 * prices.latency_s if least.device_rows else 0.0)
    row_s = 4 * prices.row_bytes / prices.device_bytes_per_s
    moves_s = left_s * prices.move_horizon_steps - prices.latency_s
    moves = int(max(0.0, min(moves_s * prices.device_bytes_per_s / max(prices.state_bytes, 1e-9), problem.num_experts)))
    return Room(least.work_rows + left_s / prices.work_row_s, dispatch_s / row_s, moves)
