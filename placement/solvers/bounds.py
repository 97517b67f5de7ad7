"""A lower bound on a layer's seconds that includes the links: proven by counting, without an integer program.

Suppose every device sends and receives at most C copies. Then a rank keeps at most its own tokens of the experts it owns and of
its C best copies, which bounds the rows that must be sent from below, and so the busiest device link, which carries at least the
mean; some rank computes at least 1 / (1 + C) of the largest expert; and C copies cost C items on a link. The same holds for node
links and the largest number c of experts that copies bring to a node, at most C for each of its ranks. The smallest of these
bounds over all C and c bounds every placement. Shape letters: R ranks, N nodes, E experts, M units (ranks or nodes).
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from ..cost import Bound, Tally, lower_bound, price, prices_of
from ..values import Problem

_PRICE_STEPS = 60


def _most_kept_by_owners(load_ME: np.ndarray, owned_M: np.ndarray) -> int:
    """Bound sum_e load[owner(e), e] over all owners with owned_M[m] experts each, by Lagrange multipliers (subgradient steps).

    Any multipliers give a bound: sum_e max_m(load - price_m) + sum_m owned_m * price_m. It is at most the sum of the column
    maxima.
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


def _best_sums(load_ME: np.ndarray, most: int) -> np.ndarray:
    """Return the sums of every unit's 0 ... `most` largest loads [M, most + 1]."""
    sums_ME = np.pad(-np.sort(-load_ME, axis=1).cumsum(axis=1), ((0, 0), (1, 0)))
    return sums_ME[:, np.minimum(np.arange(most + 1), load_ME.shape[1])]


def _most_kept(load_ME: np.ndarray, owner_E: np.ndarray, copies: int, owners_may_move: bool) -> np.ndarray:
    """Return the most rows every unit can keep with 0 ... `copies` copies [M, copies + 1], all owners fixed or any."""
    owned_M = np.bincount(owner_E, minlength=load_ME.shape[0])
    if owners_may_move:
        sums_MN = _best_sums(load_ME, int(owned_M.max()) + copies)
        return np.take_along_axis(sums_MN, owned_M[:, None] + np.arange(copies + 1), axis=1)
    own_ME = np.where(owner_E == np.arange(owned_M.size)[:, None], load_ME, 0)
    return own_ME.sum(axis=1, keepdims=True) + _best_sums(load_ME - own_ME, copies)


def _least_rows(load_ME: np.ndarray, owner_E: np.ndarray, copies: int, owners_may_move: bool, keep_counts: bool) -> np.ndarray:
    """Return the fewest rows that the busiest unit must send or receive, with 0 ... `copies` copies per unit [copies + 1]."""
    start_M = load_ME.sum(axis=1)
    total, num_units = int(start_M.sum()), start_M.size
    kept_C, busiest_C = np.full(copies + 1, total), np.zeros(copies + 1, dtype=np.int64)
    if keep_counts or not owners_may_move:
        kept_MC = _most_kept(load_ME, owner_E, copies, owners_may_move)
        kept_C = np.minimum(kept_MC, start_M[:, None]).sum(axis=0)
        busiest_C = (start_M[:, None] - kept_MC).max(axis=0)
    if owners_may_move:
        owned_M = np.bincount(owner_E, minlength=num_units)
        of_owners = _most_kept_by_owners(load_ME, owned_M) if keep_counts else int(load_ME.max(axis=0).sum())
        kept_C = np.minimum(kept_C, of_owners + _best_sums(load_ME, copies).sum(axis=0))
        # A unit needs no copy of its own experts: beside one load per expert, at most the largest, copies keep other loads.
        others_ME = load_ME.copy()
        others_ME[load_ME.argmax(axis=0), np.arange(load_ME.shape[1])] = 0
        most_others_C = _best_sums(others_ME.reshape(1, -1), copies * num_units)[0, ::num_units]
        kept_C = np.minimum(kept_C, int(load_ME.max(axis=0).sum()) + most_others_C)
    return np.maximum(np.maximum(busiest_C, -((kept_C - total) // num_units)), 0)


@dataclass(frozen=True)
class _Least:
    """Minimum work of every placement, and minimum rows on device and node links by the number of copies received there."""

    problem: Problem
    base: Bound
    device_rows_C: np.ndarray
    node_rows_C: np.ndarray

    @classmethod
    def of(cls, problem: Problem, *, owners_may_move: bool, keep_counts: bool) -> _Least:
        topology, owner_E, load_RE = problem.topology, problem.expert_to_owner_E, problem.load.load_RE
        device_rows_C = _least_rows(load_RE, owner_E, problem.slots, owners_may_move, keep_counts)
        node_rows_C = np.zeros(1, dtype=np.int64)
        if topology.num_nodes > 1:
            load_NE = load_RE.reshape(topology.num_nodes, topology.ranks_per_node, -1).sum(axis=1)
            most = min(problem.slots * topology.ranks_per_node, problem.num_experts)
            node_rows_C = _least_rows(load_NE, topology.node_of_rank_R[owner_E], most, owners_may_move, keep_counts)
        return cls(problem, lower_bound(problem, owners_may_move=owners_may_move), device_rows_C, node_rows_C)

    def tallies(self, low: int, high: int | None) -> list[Tally]:
        """The minimum tallies for a range of copies, see `least_tallies`."""
        problem, topology = self.problem, self.problem.topology
        work_rows = round(self.base.total_s / prices_of(problem).work_row_s)
        received = problem.slots if high is None else min(high, problem.slots)
        if high is not None:
            largest = -(-int(problem.load.totals_E.max()) // (1 + high))
            work_rows = max(work_rows, largest + topology.half_rate_rows * (largest > 0))
        device_rows = int(self.device_rows_C[received])
        node_rows = self.node_rows_C[: received * topology.ranks_per_node + 1]
        return [Tally(work_rows, device_rows, int(rows), low, node_copies) for node_copies, rows in enumerate(node_rows)]

    def bound_s(self, low: int, high: int | None) -> float:
        """Bound the seconds of those placements."""
        # Sums of rounded numbers: the smallest possible cost may differ from its bound in the last digits.
        return min(price(self.problem, tally).total_s for tally in self.tallies(low, high)) * (1 - 1e-12)


def link_bound(problem: Problem, *, owners_may_move: bool = False, keep_counts: bool = True) -> Bound:
    """Bound every placement, compute and links together; at least `lower_bound`.

    With `owners_may_move` owners are free: with the present number of experts per rank if `keep_counts`, else any number.
    """
    least = _Least.of(problem, owners_may_move=owners_may_move, keep_counts=keep_counts)
    most = problem.num_ranks - 1 if problem.slots else 0
    ranges = [(copies, copies) for copies in range(most + 1)] + ([(most + 1, None)] if problem.slots else [])
    return Bound(least.base.max_rows, max(least.base.total_s, min(least.bound_s(*span) for span in ranges)))


def least_tallies(problem: Problem, low: int, high: int | None, *, owners_may_move: bool = False) -> list[Tally]:
    """Minimum tallies of placements whose busiest device sends or receives `low` to `high` copies; None: any number.

    One tally for each largest number of experts that copies bring to a node; the last has the fewest rows.
    """
    return _Least.of(problem, owners_may_move=owners_may_move, keep_counts=True).tallies(low, high)


def range_bound_s(problem: Problem, low: int, high: int | None, *, owners_may_move: bool) -> float:
    """Bound the seconds of every placement whose busiest device sends or receives `low` to `high` copies; None: any number."""
    return _Least.of(problem, owners_may_move=owners_may_move, keep_counts=True).bound_s(low, high)


@dataclass(frozen=True)
class Room:
    """Maximum work rows of a rank, rows on a device link, and owner moves from or to a device, within a number of seconds."""

    work_rows: float
    device_rows: float
    moves: int


def room_within(problem: Problem, seconds: float, low: int, high: int | None, *, owners_may_move: bool) -> Room:
    """Limits of placements that cost at most `seconds` and whose busiest device sends or receives `low` to `high` copies.

    The minimum seconds of each stage, by the bound, are not available to the other stages.
    """
    prices = prices_of(problem)
    # Each stage by itself: the rows of the most copies to a node, the node copies of none.
    least = replace(least_tallies(problem, low, high, owners_may_move=owners_may_move)[-1], node_copies=0)
    spent = price(problem, least)
    left_s = max(seconds * (1 + 1e-9) - spent.total_s, 0.0)
    dispatch_s = spent.dispatch_s + left_s - (4 * prices.latency_s if least.device_rows else 0.0)
    row_s = 4 * prices.row_bytes / prices.device_bytes_per_s
    moves_s = left_s * prices.move_horizon_steps - prices.latency_s
    moves = int(max(0.0, min(moves_s * prices.device_bytes_per_s / max(prices.state_bytes, 1e-9), problem.num_experts)))
    return Room(least.work_rows + left_s / prices.work_row_s, dispatch_s / row_s, moves)
