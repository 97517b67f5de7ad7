"""MoETuner's two integer programs (arXiv 2502.06643): balanced clusters of experts per layer, then clusters to ranks.

Stage 1, per layer: clusters of equal numbers of experts (a cardinality constraint that the paper's text lacks and without which
the result degenerates), minimising the sum of |cluster load - mean|. Stage 2: one cluster per rank and layer, minimising per pair
of layers the slowest flow between two ranks. The paper's program over all layers is quadratic; here every layer's assignment is
solved exactly given its neighbours, in sweeps over the layers until no sweep improves the result. The mean flow is added, because
with the slowest flow alone almost all assignments tie. Shape letters: L layers, E experts, R ranks (as many clusters).
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from time import perf_counter

import numpy as np

from ...content import as_counts, check_seconds
from ...cost import Solution, evaluate
from ...owners import OwnerMap
from ...topology import Topology
from ...values import Placement, Problem
from .permutation import by_load

# The tolerance of the paper's own solver runs.
_RELATIVE_GAP = 0.025
_MOST_SWEEPS = 6


@dataclass(frozen=True)
class Hops:
    """Shares of the tokens that change the rank, and the node, between one layer's expert and the next layer's."""

    off_rank: float
    off_node: float


def count_hops(owners: OwnerMap, pair_counts_LEE: np.ndarray, topology: Topology) -> Hops:
    """Evaluate an owner map on pair counts [L - 1, E, E]; zero shares without counts."""
    total = int(pair_counts_LEE.sum())
    if not total:
        return Hops(0.0, 0.0)
    stays_rank = stays_node = 0
    for layer, pairs_EE in enumerate(pair_counts_LEE):
        before_E, after_E = owners.expert_to_owner_LE[layer], owners.expert_to_owner_LE[layer + 1]
        stays_rank += int(pairs_EE[before_E[:, None] == after_E[None, :]].sum())
        node_R = topology.node_of_rank_R
        stays_node += int(pairs_EE[node_R[before_E][:, None] == node_R[after_E][None, :]].sum())
    return Hops(1 - stays_rank / total, 1 - stays_node / total)


def cluster_experts(totals_E: np.ndarray, sizes_R: np.ndarray, start_E: np.ndarray, time_limit_s: float) -> np.ndarray:
    """Stage 1 for one layer: return the cluster of every expert, int64 [E], with sizes_R[c] experts in cluster c.

    `start_E` is a feasible clustering; it is kept if the engine finds nothing better in time.
    """
    import pulp

    from ..engines import minimise

    mean = max(totals_E.sum() / sizes_R.size, 1.0)
    experts, clusters = range(totals_E.size), range(sizes_R.size)
    program = pulp.LpProblem("clusters", pulp.LpMinimize)
    member = program.add_variable_dicts("member", (experts, clusters), 0, 1, cat=pulp.LpBinary)
    off = [program.add_variable(f"off_mean_{c}", 0) for c in clusters]
    program += pulp.lpSum(off), "imbalance"
    for e in experts:
        program.addConstraint(pulp.lpSum(member[e][c] for c in clusters) == 1, f"one_cluster_{e}")
        for c in clusters:
            member[e][c].setInitialValue(int(start_E[e] == c))
    for c in clusters:
        load = pulp.lpSum(float(totals_E[e]) / mean * member[e][c] for e in experts)
        program.addConstraint(off[c] >= load - totals_E.sum() / sizes_R.size / mean, f"above_{c}")
        program.addConstraint(off[c] >= totals_E.sum() / sizes_R.size / mean - load, f"below_{c}")
        program.addConstraint(pulp.lpSum(member[e][c] for e in experts) == int(sizes_R[c]), f"size_{c}")
    minimise(program, "highs", time_limit_s, _RELATIVE_GAP)
    found_EC = np.array([[member[e][c].varValue or 0.0 for c in clusters] for e in experts])
    found_E = found_EC.argmax(axis=1)

    def imbalance(cluster_E: np.ndarray) -> float:
        return float(np.abs(np.bincount(cluster_E, weights=totals_E, minlength=sizes_R.size) - mean).sum())

    is_whole = np.abs(found_EC - np.round(found_EC)).max() < 1e-4
    fits = is_whole and (np.bincount(found_E, minlength=sizes_R.size) == sizes_R).all()
    return found_E if fits and imbalance(found_E) < imbalance(start_E) else start_E


def best_assignment(slowest_CR: np.ndarray, mean_CR: np.ndarray, sizes_fit_CR: np.ndarray) -> np.ndarray:
    """Return the rank of every cluster that minimises max(slowest) + sum(mean), one cluster per rank."""
    import pulp

    from ..engines import minimise

    # Any scale will do if all flows are zero.
    unit = max(float(slowest_CR.max()), float(mean_CR.max())) or 1.0
    pairs = [(int(c), int(r)) for c, r in np.argwhere(sizes_fit_CR)]
    program = pulp.LpProblem("assignment", pulp.LpMinimize)
    at = {(c, r): program.add_variable(f"at_{c}_{r}", 0, 1, cat=pulp.LpBinary) for c, r in pairs}
    worst = program.add_variable("slowest", 0)
    program += worst + pulp.lpSum(float(mean_CR[c, r]) / unit * at[c, r] for c, r in pairs), "seconds"
    for i in range(slowest_CR.shape[0]):
        own = [(c, r) for c, r in pairs if c == i]
        program.addConstraint(pulp.lpSum(at[pair] for pair in own) == 1, f"one_rank_{i}")
        program.addConstraint(pulp.lpSum(at[pair] for pair in pairs if pair[1] == i) == 1, f"one_cluster_{i}")
        program.addConstraint(worst >= pulp.lpSum(float(slowest_CR[pair]) / unit * at[pair] for pair in own), f"slowest_{i}")
    minimise(program, "highs", 10.0, 1e-6)
    rank_C = np.zeros(slowest_CR.shape[0], dtype=np.int64)
    for c, r in pairs:
        if (at[c, r].varValue or 0.0) > 0.5:
            rank_C[c] = r
    assert np.bincount(rank_C, minlength=rank_C.size).max() == 1, "the assignment program has a solution: every cluster its rank"
    return rank_C


@dataclass(frozen=True)
class _Flows:
    """Seconds of every flow between a layer's clusters and its neighbour's ranks."""

    flow_LCC: np.ndarray
    seconds_per_row_RR: np.ndarray

    def seconds(self, layer: int, rank_C: np.ndarray, next_rank_C: np.ndarray) -> np.ndarray:
        """Return [C, C]: seconds of the flow from each cluster of `layer` to each of the next."""
        return self.flow_LCC[layer] * self.seconds_per_row_RR[np.ix_(rank_C, next_rank_C)]

    def objective(self, ranks_LC: np.ndarray) -> float:
        """Return the sum over layer pairs of slowest plus mean flow."""
        parts = [self.seconds(layer, ranks_LC[layer], ranks_LC[layer + 1]) for layer in range(len(self.flow_LCC))]
        return float(sum(part.max() + part.mean() for part in parts))

    def around(self, layer: int, ranks_LC: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return slowest and mean flow [C, R] of every cluster of `layer` on every rank, with the neighbouring layers fixed."""
        num_clusters = ranks_LC.shape[1]
        slowest_CR, mean_CR = np.zeros((num_clusters, num_clusters)), np.zeros((num_clusters, num_clusters))
        for pair, neighbour in ((layer - 1, layer - 1), (layer, layer + 1)):
            if not 0 <= pair < len(self.flow_LCC):
                continue
            flow_CN = self.flow_LCC[pair] if neighbour > layer else self.flow_LCC[pair].T
            part_CNR = flow_CN[:, :, None] * self.seconds_per_row_RR[ranks_LC[neighbour]][None, :, :]
            slowest_CR = np.maximum(slowest_CR, part_CNR.max(axis=1))
            mean_CR += part_CNR.sum(axis=1) / num_clusters**2
        return slowest_CR, mean_CR


def _seconds_per_row(topology: Topology) -> np.ndarray:
    """Return the relative seconds of a row between two ranks: 0 on one rank; across nodes by the rank's share of the link."""
    node_R = topology.node_of_rank_R
    across = np.where(
        node_R[:, None] == node_R[None, :], 1 / topology.device_bytes_per_s, topology.ranks_per_node / topology.node_bytes_per_s
    )
    np.fill_diagonal(across, 0.0)
    return across


def tune_owners(loads_LE: np.ndarray, pair_counts_LEE: np.ndarray, topology: Topology, *, time_limit_s: float = 10.0) -> OwnerMap:
    """Run both stages over all layers; `time_limit_s` bounds stage 1 of every layer.

    loads_LE: tokens per layer and expert, int [L, E]. pair_counts_LEE: tokens from expert i of a layer to expert j of the next,
    int [L - 1, E, E]. Numbers of experts of a layer per rank differ by at most one.
    """
    loads_LE, pairs_LEE = as_counts("loads_LE", loads_LE, ndim=2), np.asarray(pair_counts_LEE)
    num_layers, num_experts = loads_LE.shape
    if pairs_LEE.shape != (num_layers - 1, num_experts, num_experts):
        expected = (num_layers - 1, num_experts, num_experts)
        raise ValueError(f"pair_counts must be {expected} for loads {loads_LE.shape}, got {pairs_LEE.shape}")
    check_seconds("time_limit_s", time_limit_s, positive=True)
    num_ranks = topology.num_ranks
    contiguous = OwnerMap.contiguous(num_layers, num_experts, num_ranks).expert_to_owner_LE
    clusters_LE, sizes_LC = np.empty_like(loads_LE), np.empty((num_layers, num_ranks), dtype=np.int64)
    for layer, totals_E in enumerate(loads_LE):
        sizes_LC[layer] = np.bincount(contiguous[layer], minlength=num_ranks)
        start_E = by_load(totals_E, contiguous[layer], num_ranks, keep_on_tie=False)
        clusters_LE[layer] = cluster_experts(totals_E, sizes_LC[layer], start_E, time_limit_s)
    flow_LCC = np.zeros((num_layers - 1, num_ranks, num_ranks))
    for layer, pairs_EE in enumerate(pairs_LEE):
        np.add.at(flow_LCC[layer], (clusters_LE[layer][:, None], clusters_LE[layer + 1][None, :]), pairs_EE)
    ranks_LC = _place_clusters(_Flows(flow_LCC, _seconds_per_row(topology)), sizes_LC)
    return OwnerMap(np.take_along_axis(ranks_LC, clusters_LE, axis=1), num_ranks)


def _place_clusters(flows: _Flows, sizes_LC: np.ndarray) -> np.ndarray:
    """Stage 2: return the rank of every cluster [L, C]; every rank keeps its number of experts per layer."""
    num_layers, num_ranks = sizes_LC.shape
    ranks_LC = np.tile(np.arange(num_ranks), (num_layers, 1))
    best = flows.objective(ranks_LC)
    order = [*range(num_layers), *range(num_layers - 2, 0, -1)]
    for _ in range(_MOST_SWEEPS):
        before = best
        for layer in order:
            slowest_CR, mean_CR = flows.around(layer, ranks_LC)
            changed_LC = ranks_LC.copy()
            changed_LC[layer] = best_assignment(slowest_CR, mean_CR, sizes_LC[layer][:, None] == sizes_LC[layer][None, :])
            objective = flows.objective(changed_LC)
            if objective < best * (1 - 1e-9):
                ranks_LC, best = changed_LC, objective
        if best >= before * (1 - 1e-3):
            break
    return ranks_LC


def solve(problem: Problem, *, time_limit_s: float = 10.0) -> Solution:
    """Run stage 1 for one layer. A single layer has no flows for stage 2: each cluster goes where most of its experts are."""
    start = perf_counter()
    current_E, num_ranks = problem.expert_to_owner_E, problem.num_ranks
    sizes_R = np.bincount(current_E, minlength=num_ranks)
    first_E = by_load(problem.load.totals_E, current_E, num_ranks, keep_on_tie=True)
    cluster_E = cluster_experts(problem.load.totals_E, sizes_R, first_E, time_limit_s)
    moved_CR = np.ones((num_ranks, num_ranks)) * sizes_R[:, None]
    np.subtract.at(moved_CR, (cluster_E, current_E), 1.0)
    rank_C = best_assignment(np.zeros_like(moved_CR), moved_CR, sizes_R[:, None] == sizes_R[None, :])
    moved = dataclasses.replace(problem, expert_to_owner_E=rank_C[cluster_E])
    placement = Placement.owners_only(moved.expert_to_owner_E, num_ranks)
    return evaluate(problem, placement, start, "moetuner", owners_may_move=True)
