"""A lower bound on a layer's seconds that includes the links: proven by counting, without an integer program.

Suppose every device sends and receives at most C copies. Then a rank keeps at most its own tokens of the experts it owns and of
its C best copies, which bounds the rows that must be sent from below, and so the busiest device link, which carries at least the
mean; some rank computes at least 1 / (1 + C) of the largest expert; and C copies cost C items on a link. The same holds for node
links and the largest number c of experts that copies bring to a node, at most C for each of its ranks. The smallest of these
bounds over all C and c bounds every placement. Shape letters: R ranks, N nodes, E experts, M units (ranks or nodes).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from math import inf

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

    def tallies(self, low: int, high: int | None, moves: int = 0) -> list[Tally]:
        """The minimum tallies for a range of copies, see `least_tallies`. So many of the problem's slots are for `moves`."""
        problem, topology = self.problem, self.problem.topology
        work_rows = round(self.base.total_s / prices_of(problem).work_row_s)
        received = problem.slots if high is None else min(high + moves, problem.slots)
        if high is not None:
            largest = -(-int(problem.load.totals_E.max()) // (1 + high))
            work_rows = max(work_rows, (largest + topology.half_rate_rows * (largest > 0)) * topology.least_cost)
        device_rows = int(self.device_rows_C[received])
        least = min(topology.node_costs, default=1)
        node_rows = self.node_rows_C[: received * topology.ranks_per_node + 1]
        return [
            Tally(
                work_rows,
                device_rows,
                int(rows) * least,
                low,
                max(0, received_by_node - moves * topology.ranks_per_node) * least,
                moves,
            )
            for received_by_node, rows in enumerate(node_rows)
        ]

    def bound_s(self, low: int, high: int | None, moves: int = 0) -> float:
        """Bound the seconds of those placements."""
        # Sums of rounded numbers: the smallest possible cost may differ from its bound in the last digits.
        return min(price(self.problem, tally).total_s for tally in self.tallies(low, high, moves)) * (1 - 1e-12)


class _Moves:
    """What moves of a layer's owners can bring at most, by their number over all ranks.

    Without copies, a rank with more work rows than a number T has to hand experts on: in m moves at most its m largest, and if it
    keeps its number of experts it takes the m smallest of the others back. What such ranks have above T, the others must take, up
    to T each: in m moves at most the m largest of the others, less their own m smallest. So T needs some number of moves. And a
    move keeps at most as many more rows on their source ranks as its expert has on the best of them.
    """

    def __init__(self, least: _Least, keep_counts: bool):
        problem = self._problem = least.problem
        self._least, self._keep_counts = least, keep_counts
        load_RE, owner_E, totals_E = problem.load.load_RE, problem.expert_to_owner_E, problem.load.totals_E
        work_E = totals_E + problem.topology.half_rate_rows * (totals_E > 0)
        self._work_R = np.zeros(problem.num_ranks, dtype=np.int64)
        np.add.at(self._work_R, owner_E, work_E)
        pairs = [self._handed_and_taken(work_E, owner_E == rank) for rank in range(problem.num_ranks)]
        most = max(sums.size for pair in pairs for sums in pair)
        self._handed_RM, self._taken_RM = np.array(
            [[np.pad(sums, (0, most - sums.size), mode="edge") for sums in pair] for pair in pairs]
        ).transpose(1, 0, 2)
        owned_E = load_RE[owner_E, np.arange(owner_E.size)]
        own_RE = np.where(owner_E == np.arange(problem.num_ranks)[:, None], load_RE, 0)
        kept_RC = own_RE.sum(axis=1, keepdims=True) + _best_sums(load_RE - own_RE, problem.slots)
        self._kept_C = np.minimum(kept_RC, load_RE.sum(axis=1, keepdims=True)).sum(axis=0)
        # An expert that moved away may be copied back, where there are copies: its former owner loses nothing then.
        more_2E = np.stack([np.maximum(load_RE.max(axis=0) - owned_E, 0), (load_RE - own_RE).max(axis=0)])
        self._more_2M = _best_sums(more_2E, owner_E.size)

    def _handed_and_taken(self, work_E: np.ndarray, is_own_E: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The most work that a rank gives up, and the most that it takes in, in 0, 1, ... moves."""
        own, others = np.sort(work_E[is_own_E]), np.sort(work_E[~is_own_E])
        if self._keep_counts:
            most = min(own.size, others.size)
            pair = own[::-1][:most] - others[:most], others[::-1][:most] - own[:most]
        else:
            pair = own[::-1], others[::-1]
        handed, taken = (np.maximum.accumulate(np.pad(gains.cumsum(), (1, 0))) for gains in pair)
        return handed, taken

    def _needed(self, most_work: int) -> float:
        """The fewest moves with which no rank has more work, times its cost; infinite where none suffice."""
        excess_R = self._work_R - most_work // self._problem.topology.cost_R
        is_above_R = excess_R > 0
        enough_RM = self._handed_RM[is_above_R] >= excess_R[is_above_R, None]
        taken_RM = np.minimum(self._taken_RM[~is_above_R], -excess_R[~is_above_R, None])
        # What a rank takes in m moves grows less with every move, so the largest steps come first.
        taken_M = np.pad(-np.sort(-np.diff(taken_RM, axis=1).ravel()), (1, 0)).cumsum()
        excess = int(excess_R[is_above_R].sum())
        if not enough_RM.any(axis=1).all() or taken_M[-1] < excess:
            return inf
        handed, taken = int(enough_RM.argmax(axis=1).sum()), int((taken_M >= excess).argmax())
        return handed + taken if self._keep_counts else max(handed, taken)

    def _least_work(self, base: int) -> Iterator[int]:
        """Yield the least work of the busiest rank, times its cost, after 0, 1, ... moves; no less than `base`."""
        high = max(int((self._problem.topology.cost_R * self._work_R).max()), base)
        for moves in range(self._problem.num_experts + 1):
            low = base
            while low < high:
                middle = (low + high) // 2
                low, high = (low, middle) if self._needed(middle) <= moves else (middle + 1, high)
            yield high

    def bound_s(self, ranges: Sequence[tuple[int, int | None]], free_s: float) -> float:
        """Bound the seconds of placements with these numbers of copies; at least `free_s`, with moves that cost nothing."""
        problem, best_s = self._problem, inf
        base = round(self._least.base.total_s / prices_of(problem).work_row_s)
        for moves, work in enumerate(self._least_work(base)):
            of_moves = Tally(0, 0, 0, 0, 0, moves / problem.num_ranks)
            if best_s <= (free_s + price(problem, of_moves).total_s) * (1 - 1e-12):
                break  # more moves cost too much
            best_s = min(best_s, *(self._with_moves_s(moves, work, low, high) for low, high in ranges))
        return max(free_s, best_s)

    def _with_moves_s(self, moves: int, work: int, low: int, high: int | None) -> float:
        """Bound the seconds of placements after so many moves, the busiest rank's work at least `work` without copies."""
        problem = self._problem
        copies = problem.slots if high is None else min(high, problem.slots)
        kept = int(self._kept_C[copies] + self._more_2M[min(copies, 1), moves])
        rows = max(0, -((kept - problem.load.total) // problem.num_ranks))
        return min(
            price(
                problem,
                replace(
                    least,
                    work_rows=max(least.work_rows, work if high == 0 else 0),
                    device_rows=max(least.device_rows, rows),
                    device_moves=moves / problem.num_ranks,
                ),
            ).total_s
            for least in self._least.tallies(low, high)
        ) * (1 - 1e-12)


def link_bound(problem: Problem, *, owners_may_move: bool = False, keep_counts: bool = True) -> Bound:
    """Bound every placement, compute and links together; at least `lower_bound`.

    With `owners_may_move` owners are free: with the present number of experts per rank if `keep_counts`, else any number. Where
    the numbers stay, moves count: a rank that takes in m experts keeps no more rows than m further copies would let it keep.
    Where the problem counts the mean rank's moves, they count in either case; see `_Moves`.
    """
    least = _Least.of(problem, owners_may_move=owners_may_move, keep_counts=keep_counts)
    most = problem.num_ranks - 1 if problem.slots else 0
    ranges: list[tuple[int, int | None]] = [(copies, copies) for copies in range(most + 1)]
    if problem.slots:
        ranges.append((most + 1, None))
    free_s = max(least.base.total_s, min(least.bound_s(*span) for span in ranges))
    if owners_may_move and problem.mean_moves:
        return Bound(least.base.max_rows, _Moves(least, keep_counts).bound_s(ranges, free_s))
    if not (owners_may_move and keep_counts):
        return Bound(least.base.max_rows, free_s)
    bound_s = inf
    for moves in range(problem.num_experts):
        moved_s = (free_s + price(problem, Tally(0, 0, 0, 0, 0, moves)).total_s) * (1 - 1e-12)
        if bound_s <= moved_s:
            break  # more moves cost too much
        stayed = _Least.of(replace(problem, slots=problem.slots + moves), owners_may_move=False, keep_counts=True)
        bound_s = min(bound_s, max(moved_s, min(stayed.bound_s(low, high, moves) for low, high in ranges)))
    return Bound(least.base.max_rows, max(free_s, bound_s))


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
    """Maximum `Tally.work_rows`, rows on a device link, and owner moves from or to a device, within a number of seconds."""

    work_rows: float
    device_rows: float
    moves: float


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
    moves_s = left_s * prices.move_horizon_steps - (0.0 if prices.mean_moves else prices.latency_s)
    moves = max(0.0, min(moves_s * prices.device_bytes_per_s / max(prices.state_bytes, 1e-9), problem.num_experts))
    unit = problem.num_ranks if prices.mean_moves else 1
    return Room(least.work_rows + left_s / prices.work_row_s, dispatch_s / row_s, int(moves * unit) / unit)
