"""Owners of all layers together: any number of a layer's experts per rank, the same rows per rank over all layers.

The objective is the sum over layers of the cost model's seconds plus the hops: a token routed to expert i of a layer and expert j
of the next needs no message if both are on one rank, and none across nodes if both are on one node. The problem decomposes: a
search exchanges owners inside a layer, or in opposite directions in two layers, which keeps every rank's number of bank rows;
then each layer gets its copies separately, first those of `quota` or of the experts to which most tokens of a node go, then by a
search from there. In the search for owners an expert with more rows than the mean rank counts as the mean rank, because copies
will take the rest. The bound is the sum of the layers' bounds with free owners (bounds.py) and without hops, so it holds for
every owner map. Shape letters: L layers, E experts, R ranks.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from time import perf_counter

import numpy as np

from ..content import as_counts, check_seconds
from ..cost import Solution, cost, prices_of, solution
from ..owners import OwnerMap
from ..split import split_exact
from ..values import Placement, Problem
from . import quota
from .bounds import link_bound

_MOST_PROPOSALS = 20_000_000
_PROPOSALS_PER_STATE = 40
_LEAST_PROPOSALS = 20_000
# Proposals per layer: minimum, maximum, and per (expert, rank) pair. Each takes time in proportion to these pairs.
_LEAST_COPY_PROPOSALS, _MOST_COPY_PROPOSALS, _COPY_PROPOSALS_PER_STATE = 4000, 40_000, 4
_MOST_COPY_PAIRS = 200_000_000
_COLD = 1e-5
# Small problems have high barriers for their size; they are searched twice, first from a high temperature.
_HOT, _HOT_SMALL, _SMALL_STATES = 1e-3, 0.3, 4096


@dataclass(frozen=True)
class JointSolution:
    """Owners and, per layer, copies with cost and bound. `hops_s`: seconds of the hops between ranks or nodes.

    total_s: layers and hops. bound_s: lower bound over all owner maps. gap: (total - bound) / total. seconds: the solver's time.
    """

    owners: OwnerMap
    layers: tuple[Solution, ...]
    hops_s: float
    total_s: float
    bound_s: float
    gap: float
    seconds: float


def _check(problems: Sequence[Problem], pair_counts_LEE: np.ndarray | None, rows_R: np.ndarray | None) -> None:
    if not problems:
        raise ValueError("a joint placement needs at least one layer, got none; give one problem per layer")
    first = problems[0]
    for layer, problem in enumerate(problems):
        # But the work ahead of layers may differ: it hides copies, which each layer gets separately.
        if (problem.topology, problem.num_experts) != (first.topology, first.num_experts) or (
            prices_of(problem)._replace(overlap_s=first.overlap_s) != prices_of(first)
        ):
            raise ValueError(f"layer {layer} differs from layer 0 in machine, shape or prices; give layers of one model")
    expected = (len(problems) - 1, first.num_experts, first.num_experts)
    if pair_counts_LEE is not None and pair_counts_LEE.shape != expected:
        raise ValueError(f"pair_counts must be {expected}, got {pair_counts_LEE.shape}; count every pair of neighbouring layers")
    if pair_counts_LEE is not None and pair_counts_LEE.size and pair_counts_LEE.min() < 0:
        raise ValueError(f"pair_counts must not be negative, got {int(pair_counts_LEE.min())}")
    if rows_R is None:
        return
    rows, total = as_counts("rows_per_rank", rows_R, ndim=1), len(problems) * first.num_experts
    if rows.size != first.num_ranks or rows.min() < 0 or rows.sum() != total:
        raise ValueError(
            f"rows_per_rank must be {first.num_ranks} numbers of at least 0 that sum to {total} experts, "
            f"got {rows.size} that sum to {int(rows.sum())}"
        )


def _greedy(totals_LE: np.ndarray, rows_R: np.ndarray, cost_R: np.ndarray) -> np.ndarray:
    """Assign experts, per layer and largest first, to the rank with free bank rows that ends first; return the owners [L, E]."""
    num_layers = totals_LE.shape[0]
    free_R, owner_LE = rows_R.copy(), np.empty_like(totals_LE)
    for layer, totals_E in enumerate(totals_LE):
        load_R = np.zeros(rows_R.size, dtype=np.int64)
        # Each rank's bank rows are spread over the layers, so that none runs out early.
        room_R = free_R - (rows_R * (num_layers - 1 - layer)) // num_layers
        for expert in np.argsort(-totals_E, kind="stable"):
            open_R = np.flatnonzero(room_R > 0)
            if not open_R.size:
                open_R = np.flatnonzero(free_R)
            end_R = cost_R[open_R] * (load_R[open_R] + totals_E[expert])
            rank = int(open_R[np.lexsort((-free_R[open_R], end_R))[0]])
            owner_LE[layer, expert] = rank
            load_R[rank] += totals_E[expert]
            room_R[rank] -= 1
            free_R[rank] -= 1
    return owner_LE


def _capped(problem: Problem) -> np.ndarray:
    """Return load_ER with every expert above the mean rank scaled down to it, if copies can take the rest."""
    load_ER = problem.load.load_ER
    mean = problem.load.total // problem.num_ranks
    if not problem.slots:
        return load_ER
    totals_E = np.maximum(problem.load.totals_E, 1)
    # Exact: quotients of integers below 2**53 rounded down, the same on every machine.
    return np.where(totals_E[:, None] > mean, (load_ER.astype(np.float64) * mean / totals_E[:, None]).astype(np.int64), load_ER)


def _hop_rates(problem: Problem, hop_weight: float) -> tuple[float, float]:
    """Return the seconds that a row sent to another rank, and to another node, adds to the mean device link and node link."""
    topology, row_bytes = problem.topology, problem.shape.row_bytes
    rank_s = hop_weight * row_bytes / topology.device_bytes_per_s / problem.num_ranks
    return rank_s, hop_weight * row_bytes / topology.node_bytes_per_s / topology.num_nodes


def _hops_s(owner_LE: np.ndarray, pairs_LEE: np.ndarray, problem: Problem, hop_weight: float) -> float:
    rank_s, node_s = _hop_rates(problem, hop_weight)
    node_LE = problem.topology.node_of_rank_R[owner_LE]
    off_rank = off_node = 0
    for layer, pairs_EE in enumerate(pairs_LEE):
        off_rank += int(pairs_EE[owner_LE[layer][:, None] != owner_LE[layer + 1][None, :]].sum())
        off_node += int(pairs_EE[node_LE[layer][:, None] != node_LE[layer + 1][None, :]].sum())
    return rank_s * off_rank + node_s * off_node


def _search(
    problems: Sequence[Problem],
    pairs_LEE: np.ndarray,
    rows_R: np.ndarray,
    hop_weight: float,
    effort: float,
) -> np.ndarray:
    """Anneal from the cheaper of the current owners, if they have those rows, and a greedy start; return the owners [L, E]."""
    from .anneal_owners_numba import Layers, anneal

    first = problems[0]
    load_LER = np.stack([_capped(problem) for problem in problems])
    current_LE = np.stack([problem.expert_to_owner_E for problem in problems])
    rank_s, node_s = _hop_rates(first, hop_weight)
    layers = Layers(
        load_LER,
        load_LER.sum(axis=2),
        current_LE,
        pairs_LEE,
        np.ascontiguousarray(pairs_LEE.transpose(0, 2, 1)),
        first.topology.cost_R,
        first.topology.node_cost_N,
        first.topology.ranks_per_node,
        first.topology.half_rate_rows,
        rank_s,
        node_s,
        prices_of(first),
    )
    starts = [_greedy(layers.totals_LE, rows_R, layers.cost_R)]
    if (np.bincount(current_LE.ravel(), minlength=rows_R.size) == rows_R).all():
        starts.insert(0, current_LE.copy())
    owner_LE = min(starts, key=lambda owners: _owned_s(problems, owners) + _hops_s(owners, pairs_LEE, first, hop_weight))
    proposals = min(max(_PROPOSALS_PER_STATE * owner_LE.size * first.num_ranks, _LEAST_PROPOSALS), _MOST_PROPOSALS)
    for hot in [_HOT_SMALL, _HOT] if owner_LE.size * first.num_ranks <= _SMALL_STATES else [_HOT]:
        searched_LE = owner_LE.copy()
        if anneal(layers, searched_LE, int(proposals * effort), True, hot, _COLD) < 0:
            owner_LE = searched_LE
    return owner_LE


def _owned_s(problems: Sequence[Problem], owner_LE: np.ndarray) -> float:
    """Return the layers' summed seconds without copies."""
    placements = [Placement.owners_only(owner_E, problems[0].num_ranks) for owner_E in owner_LE]
    return sum(_cost_s(problem, placement) for problem, placement in zip(problems, placements, strict=True))


def _cost_s(problem: Problem, placement: Placement) -> float:
    return cost(problem, placement, split_exact(problem.load, placement, problem.topology)).total_s


def _spread(problem: Problem, owner_E: np.ndarray) -> Placement:
    """Copy to every node (to every rank of a single node) the experts to which most of its tokens go, on its idlest ranks."""
    num_ranks, topology = problem.num_ranks, problem.topology
    per_unit = topology.ranks_per_node if topology.num_nodes > 1 else 1
    load_UE = problem.load.load_RE.reshape(num_ranks // per_unit, per_unit, -1).sum(axis=1)
    unit_E = owner_E // per_unit
    foreign_UE = np.where(unit_E == np.arange(load_UE.shape[0])[:, None], 0, load_UE)
    first_UE = np.argsort(-foreign_UE, axis=1, kind="stable")[:, : per_unit * problem.slots]
    copied_UE = np.zeros(load_UE.shape, dtype=np.bool_)
    np.put_along_axis(copied_UE, first_UE, np.take_along_axis(foreign_UE, first_UE, axis=1) > 0, axis=1)
    rows_E = np.where(copied_UE, 0, load_UE).sum(axis=0)
    rows_R = np.bincount(owner_E, weights=rows_E, minlength=num_ranks)
    free_R, copies = np.full(num_ranks, problem.slots), []
    for unit, experts in enumerate(first_UE):
        inside = np.arange(unit * per_unit, (unit + 1) * per_unit)
        for expert in experts[copied_UE[unit, experts]]:
            rank = inside[np.lexsort(((topology.cost_R * rows_R)[inside], free_R[inside] == 0))[0]]
            copies.append((expert, rank))
            free_R[rank] -= 1
            rows_R[rank] += load_UE[unit, expert]
    return Placement.with_copies(owner_E, num_ranks, np.array(copies, dtype=np.int64).reshape(-1, 2).T)


def _with_copies(problem: Problem, owner_E: np.ndarray) -> Placement:
    by_seconds = quota.solve(dataclasses.replace(problem, expert_to_owner_E=owner_E)).placement
    return min((by_seconds, _spread(problem, owner_E)), key=lambda placement: _cost_s(problem, placement))


def _finish(problem: Problem, placement: Placement, effort: float) -> Solution:
    """Search for cheaper copies of one layer under these owners; the bound of the result holds for any owners."""
    start = perf_counter()
    if problem.slots and problem.num_ranks > 1:
        from .anneal_copies_numba import improve

        states = problem.num_experts * problem.num_ranks
        proposals = min(max(_COPY_PROPOSALS_PER_STATE * states, _LEAST_COPY_PROPOSALS), _MOST_COPY_PROPOSALS)
        proposals = min(proposals, _MOST_COPY_PAIRS // states)
        placement = improve(problem, placement, move_owners=False, proposals=max(1, int(proposals * effort)))
    seconds = cost(problem, placement, split_exact(problem.load, placement, problem.topology))
    bound = link_bound(problem, owners_may_move=True, keep_counts=False)
    return solution(placement, seconds, bound, perf_counter() - start, "joint")


def solve(problem: Problem) -> Solution:
    """Choose the owners and copies of a single layer; every rank keeps its number of experts."""
    return solve_joint([problem]).layers[0]


def solve_joint(
    problems: Sequence[Problem],
    *,
    pair_counts_LEE: np.ndarray | None = None,
    rows_per_rank_R: np.ndarray | None = None,
    hop_weight: float = 1.0,
    effort: float = 1.0,
    on_layer: Callable[[], None] = lambda: None,
) -> JointSolution:
    """Choose the owners of all layers, then every layer's copies; never costlier than the current owners with their copies.

    problems: one per layer, of one machine and model. pair_counts_LEE: tokens from expert i of a layer to expert j of the next,
    int [L - 1, E, E]. rows_per_rank_R: experts that every rank owns over all layers, by default the present numbers. hop_weight
    scales the hops, 0 ignores them. effort scales the search. on_layer is called after each layer's copies. Deterministic.

    With other `rows_per_rank_R` than the present numbers the result may cost more than the current owners, which then
    are not feasible.
    """
    start = perf_counter()
    _check(problems, pair_counts_LEE, rows_per_rank_R)
    check_seconds("hop_weight", hop_weight)
    check_seconds("effort", effort, positive=True)
    first, num_experts = problems[0], problems[0].num_experts
    current_LE = np.stack([problem.expert_to_owner_E for problem in problems])
    now_R = np.bincount(current_LE.ravel(), minlength=first.num_ranks)
    rows_R = now_R if rows_per_rank_R is None else as_counts("rows_per_rank", rows_per_rank_R, ndim=1)
    has_hops = pair_counts_LEE is not None and pair_counts_LEE.size > 0 and hop_weight > 0
    pairs_LEE = (
        np.ascontiguousarray(pair_counts_LEE, dtype=np.int64) if has_hops else np.zeros((0, num_experts, num_experts), int)
    )
    candidates = [current_LE] if (now_R == rows_R).all() else []
    if first.num_ranks > 1:
        candidates.append(_search(problems, pairs_LEE, rows_R, hop_weight, effort))
    answers = []
    for owner_LE in candidates:
        placements = [_with_copies(problem, owner_E) for problem, owner_E in zip(problems, owner_LE, strict=True)]
        hops_s = _hops_s(owner_LE, pairs_LEE, first, hop_weight)
        layers_s = sum(_cost_s(problem, placement) for problem, placement in zip(problems, placements, strict=True))
        answers.append((layers_s + hops_s, hops_s, placements, owner_LE))
    _, hops_s, placements, owner_LE = min(answers, key=lambda answer: answer[0])
    layers = []
    for problem, placement in zip(problems, placements, strict=True):
        layers.append(_finish(problem, placement, effort))
        on_layer()
    total_s = sum(layer.cost.total_s for layer in layers) + hops_s
    bound_s = min(sum(layer.bound.total_s for layer in layers), total_s)
    gap = 1 - bound_s / total_s if total_s else 0.0
    owners = OwnerMap(owner_LE, first.num_ranks)
    return JointSolution(owners, tuple(layers), hops_s, total_s, bound_s, gap, perf_counter() - start)
