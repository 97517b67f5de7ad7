"""What the exact planner starts from and betters: heuristics, annealing from them, and the cheapest split of what they find.

Every step takes the time at which it must end, as the planner has a time limit.
"""

from __future__ import annotations

import dataclasses
import itertools
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from math import inf
from time import perf_counter
from typing import Self

import numpy as np

from ...cost import Cost, cost, prices_of
from ...split import Split, split_exact
from ...values import Placement, Problem
from .. import balance, joint, quota, static
from ..baselines import eplb, flexmoe, hecate, laer, permutation

# Proposals of the two searches in ten seconds; fewer where there are fewer states to visit.
_OWNER_PROPOSALS, _COPY_PROPOSALS = 1_500_000, 400_000
# Proposals between two looks at the clock in the first, and of one of the many runs of the second.
_OWNER_PIECE_PROPOSALS, _COPY_RUN_PROPOSALS = 10_000, 10_000
# Temperatures at both ends of the first, as shares of the mean layer's seconds.
_HOT, _COLD = 1e-2, 1e-5
# Numbers of slots that copies are searched under, and answers whose best split is worth an integer program.
_MOST_BUDGETS, _MOST_PRICED = 4, 8
# Seconds for the cheapest split of one of them.
_MOST_SPLIT_S = 10.0


@dataclasses.dataclass(frozen=True)
class Candidate:
    """A placement with its cheapest split known, and what they cost."""

    placement: Placement
    split: Split
    cost: Cost


def candidate_of(problem: Problem, placement: Placement, end: float = inf, below_s: float = inf) -> Candidate:
    """Price a placement under the cheapest split found before perf_counter reaches `end`.

    Where no split seems to cost less than `below_s`, the answer may be priced under any; see `split_priced`.
    """
    from .priced import split_priced

    left_s = min(end - perf_counter(), _MOST_SPLIT_S)
    if left_s > 0:
        split = split_priced(problem, placement, left_s, below_s)
    else:
        split = split_exact(problem.load, placement, problem.topology)
    return Candidate(placement, split, cost(problem, placement, split))


def _exact_s(problem: Problem, placement: Placement) -> float:
    return cost(problem, placement, split_exact(problem.load, placement, problem.topology)).total_s


def cheapest(
    problem: Problem, found: Iterable[tuple[float, Placement]], end: float = inf, best: Candidate | None = None
) -> Candidate:
    """Return the cheapest of `best` and of answers that come with their seconds under the exact split.

    Those whose best split is worth an integer program get one, the cheapest first; the exact split has to do when perf_counter
    reaches `end`.
    """
    seconds = {placement: seconds for seconds, placement in found}
    for placement in sorted(seconds, key=lambda placement: seconds[placement])[:_MOST_PRICED]:
        candidate = candidate_of(problem, placement, end, best.cost.total_s if best else inf)
        best = candidate if best is None or candidate.cost.total_s < best.cost.total_s else best
    assert best is not None
    return best


def best_heuristic(problem: Problem, end: float = inf) -> Candidate:
    """Return the best placement of the heuristics that keep the current owners."""
    solvers = (static.solve, quota.solve, balance.solve, hecate.solve, laer.solve, flexmoe.solve)
    placements = [solve(problem).placement for solve in solvers]
    return cheapest(problem, ((_exact_s(problem, placement), placement) for placement in placements), end)


def best_owner_heuristic(problem: Problem, best: Candidate, end: float = inf) -> Candidate:
    """Return the cheapest of `best` and of the placements of heuristics that change owners."""
    placements, owned_R = [], np.bincount(problem.expert_to_owner_E, minlength=problem.num_ranks)
    for solve_owners in (permutation.solve_lpt, permutation.solve_smartmoe, eplb.solve, eplb.solve_hierarchical):
        placed = solve_owners(problem).placement
        # EPLB packs copies first and may leave a rank with another number of experts to own, which is not allowed here.
        if (np.bincount(placed.expert_to_owner_E, minlength=problem.num_ranks) == owned_R).all():
            moved = dataclasses.replace(problem, expert_to_owner_E=placed.expert_to_owner_E)
            placements += [placed, quota.solve(moved).placement]
    return cheapest(problem, ((_exact_s(problem, placement), placement) for placement in placements), end, best)


def best_joint(problem: Problem, best: Candidate, effort: float, end: float = inf, starts: Sequence[Placement] = ()) -> Candidate:
    """Return the cheapest of `best`, of `starts`, and of what `joint` chooses for the layer, whether or not that moves owners."""
    placement = joint.solve_joint([problem], effort=effort).layers[0].placement
    return cheapest(problem, [(_exact_s(problem, start), start) for start in (placement, *starts)], end, best)


def search_owners(
    problem: Problem, owner_E: np.ndarray, proposals: int, run: int = 0, is_over: Callable[[], bool] = lambda: False
) -> np.ndarray:
    """Return the best owners that an annealing without copies reached from `owner_E`; it ends early where `is_over`.

    One long run finds more than several short ones. Every piece of it starts from the best so far; another `run` draws otherwise.
    """
    from ..anneal_owners_numba import Layers, anneal

    no_pairs = np.zeros((0, problem.num_experts, problem.num_experts), dtype=np.int64)
    layers = Layers(
        problem.load.load_ER[None],
        problem.load.totals_E[None],
        problem.expert_to_owner_E[None],
        no_pairs,
        no_pairs,
        problem.topology.cost_R,
        problem.topology.node_cost_N,
        problem.topology.ranks_per_node,
        problem.topology.half_rate_rows,
        0.0,
        0.0,
        prices_of(problem),
    )
    owner_LE, pieces = owner_E[None].copy(), -(-proposals // _OWNER_PIECE_PROPOSALS)
    temperatures = np.geomspace(_HOT, _COLD, pieces + 1)
    for piece in range(pieces):
        draws = run * pieces + piece
        anneal(layers, owner_LE, proposals // pieces, False, temperatures[piece], temperatures[piece + 1], draws)
        if is_over():
            break
    return owner_LE[0]


def _owner_proposals(problem: Problem, effort: float) -> int:
    return max(1, int(min(_OWNER_PROPOSALS, 2000 * problem.num_experts * problem.num_ranks) * effort))


def _without_copies(problem: Problem, owner_E: np.ndarray) -> tuple[float, Placement]:
    placement = Placement.owners_only(owner_E, problem.num_ranks)
    return _exact_s(problem, placement), placement


def _search_copies(
    problem: Problem, owner_SE: Sequence[np.ndarray], move_owners: bool, effort: float, search: int = 0
) -> Iterator[tuple[float, Placement]]:
    """Yield answers of many short searches with their seconds under the exact split.

    Every other `search` starts from `quota` or from `balance`, over each of the given owners, and each makes other draws. A price
    that counts the busiest rank and link only is rugged: short runs from other draws, and under fewer slots, find more than one
    long run.
    """
    from ..anneal_copies_numba import improve

    states = problem.num_experts * problem.num_ranks
    proposals = int(min(_COPY_PROPOSALS * 512 / max(states, 512), 200 * states) * effort)
    budgets = [dataclasses.replace(problem, slots=slots) for slots in range(1, min(problem.slots, _MOST_BUDGETS) + 1)]
    runs = max(1, proposals // (_COPY_RUN_PROPOSALS * len(budgets) * len(owner_SE)))
    solve_copies = (quota.solve, balance.solve)[search % 2]
    for budget, owner_E in itertools.product(budgets, owner_SE):
        start = solve_copies(dataclasses.replace(budget, expert_to_owner_E=owner_E)).placement
        for run in range(search * runs, (search + 1) * runs):
            placement = improve(budget, start, move_owners=move_owners, proposals=min(proposals, _COPY_RUN_PROPOSALS), run=run)
            yield _exact_s(problem, placement), placement


class SearchOn:
    """Searches for better copies on and on in a thread of its own, beside the engine, which leaves the other cores alone.

    Not `is_on`: finds nothing, in no time.
    """

    def __init__(self, problem: Problem, owner_SE: Sequence[np.ndarray], move_owners: bool, effort: float, *, is_on: bool = True):
        self._problem, self._owner_SE, self._move_owners, self._effort = problem, owner_SE, move_owners, effort
        self._is_on = is_on and problem.slots > 0 and problem.num_ranks > 1
        self._found: deque[tuple[float, Placement]] = deque()
        self._is_over = threading.Event()
        self._pool = ThreadPoolExecutor(1)
        self._searching = self._pool.submit(self._search)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self._is_over.set()
        try:
            self._searching.result()
        finally:
            self._pool.shutdown()

    def take(self, best: Candidate, end: float) -> Candidate:
        """Return the cheapest of `best` and of the answers since the last time, priced until perf_counter reaches `end`."""
        return cheapest(self._problem, [self._found.popleft() for _ in range(len(self._found))], end, best)

    def _search(self) -> None:
        problem, first_E = self._problem, self._owner_SE[0]
        for search in itertools.count(1) if self._is_on else ():
            if self._move_owners:
                proposals = _owner_proposals(problem, self._effort)
                owner_E = search_owners(problem, first_E, proposals, search, self._is_over.is_set)
                self._found.append(_without_copies(problem, owner_E))
                if self._is_over.is_set():
                    return
            for answer in _search_copies(problem, self._owner_SE, self._move_owners, self._effort, search):
                self._found.append(answer)
                if self._is_over.is_set():
                    return


def search(
    problem: Problem, best: Candidate, move_owners: bool, effort: float, *, end: float, price_end: float
) -> tuple[Candidate, list[np.ndarray]]:
    """Return the cheapest of `best` and of searches from it, and the owners that they started from.

    `effort` 1 searches for about two seconds where no owner may move. No run but the first starts after `end`; answers are
    priced until `price_end`.
    """
    owner_SE = [best.placement.expert_to_owner_E]
    found: list[tuple[float, Placement]] = []
    if move_owners and problem.num_ranks > 1:
        proposals = _owner_proposals(problem, effort)
        owner_SE.append(search_owners(problem, owner_SE[0], proposals, is_over=lambda: perf_counter() >= end))
        found.append(_without_copies(problem, owner_SE[1]))
    if problem.slots and problem.num_ranks > 1:
        for answer in _search_copies(problem, owner_SE, move_owners, effort):
            found.append(answer)
            if perf_counter() >= end:
                break
    return cheapest(problem, found, price_end, best), owner_SE
