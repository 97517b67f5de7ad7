"""A lower bound on a layer's seconds that counts the links: proven by counting, without an engine.

Say every rank receives at most C copies. Then a rank keeps at most its own tokens of what it owns and of its C best copies, so
the rows that must travel are known from below, and with them the busiest device and node link, which carry at least the mean.
C copies cost at least C items on a link. The least of these bounds over C = 0 ... slots bounds every placement.
Shape letters: R ranks, N nodes, E experts, M units (ranks or nodes).
"""

from __future__ import annotations

import numpy as np

from .cost import Bound, lower_bound, prices_of, seconds_of
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


def link_bound(problem: Problem, *, owners_may_move: bool = False, keep_counts: bool = True) -> Bound:
    """Bound every placement, compute and links together; at least `lower_bound`.

    With `owners_may_move` owners are free, as many per rank as now if `keep_counts`, else any number.
    """
    base = lower_bound(problem, owners_may_move=owners_may_move)
    topology, prices = problem.topology, prices_of(problem)
    work_rows = round(base.total_s / prices.work_row_s)
    load_RE, owner_E = problem.load.load_RE, problem.expert_to_owner_E
    load_NE = load_RE.reshape(topology.num_nodes, topology.ranks_per_node, -1).sum(axis=1)
    owner_node_E = topology.node_of_rank_R[owner_E]
    bounds = []
    for copies in range(problem.slots + 1):
        device = _least_items(load_RE, owner_E, copies, owners_may_move, keep_counts)
        node_copies = min(copies * topology.ranks_per_node, problem.num_experts)
        node = _least_items(load_NE, owner_node_E, node_copies, owners_may_move, keep_counts) if topology.num_nodes > 1 else 0
        bounds.append(sum(seconds_of(prices, work_rows, device, node, copies, 0, 0, 0)))
    # Sums of rounded numbers: the least possible cost may differ from its bound in the last digits.
    return Bound(base.max_rows, max(base.total_s, min(bounds) * (1 - 1e-12)))
