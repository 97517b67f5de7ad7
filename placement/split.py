"""The token split: for every expert, how many rows of each source rank each holder computes.

Shape letters: R ranks, E experts, M replicated experts, J (expert, holder) entries, G segments.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np

from .content import ByContent, freeze, read_only
from .topology import Topology
from .values import ExpertLoad, Placement


@dataclass(frozen=True, eq=False)
class Split(ByContent):
    """An integer split of a load over a placement; built by `split_exact` or `split_local_even`.

    Experts with one holder are described by their load alone. For the replicated ones, segments_4G int64 [4, G] holds columns of
    (expert, source rank, destination rank, rows), a (source, destination) pair at most once per expert, rows above 0. rows_RE
    int64 [R, E]: rows that rank r computes for expert e.
    """

    load: ExpertLoad
    placement: Placement
    segments_4G: np.ndarray

    def __post_init__(self) -> None:
        load_shape, placed_shape = self.load.load_RE.shape, self.placement.replicas_RE.shape
        if load_shape != placed_shape:
            raise ValueError(f"the load is [R, E] = {load_shape}, the placement {placed_shape}; give matching ones")
        segments_4G = np.array(self.segments_4G, dtype=np.int64, order="C")
        assert segments_4G.shape[:-1] == (4,)
        freeze(self, "segments_4G", segments_4G)

    @cached_property
    def _is_single_E(self) -> np.ndarray:
        return self.placement.num_replicas_E == 1

    @cached_property
    def rows_RE(self) -> np.ndarray:
        """Rows computed on rank r for expert e, int64 [R, E], read-only."""
        num_ranks, num_experts = self.placement.replicas_RE.shape
        expert_G, _, dst_G, rows_G = self.segments_4G
        # Weights of bincount are float64: exact, because a load's total stays below 2**53.
        rows_N = np.bincount(dst_G * num_experts + expert_G, weights=rows_G, minlength=num_ranks * num_experts)
        rows_RE = rows_N.astype(np.int64).reshape(num_ranks, num_experts)
        single = np.flatnonzero(self._is_single_E)
        rows_RE[self.placement.expert_to_owner_E[single], single] = self.load.totals_E[single]
        return read_only(rows_RE)

    @cached_property
    def rows_R(self) -> np.ndarray:
        """Rows computed on every rank, int64 [R], read-only."""
        return read_only(self.rows_RE.sum(axis=1))

    @cached_property
    def flow_RR(self) -> np.ndarray:
        """Rows of source rank s that rank d computes, over all experts, int64 [R, R], read-only."""
        from .split_numba import flow

        owner_E = self.placement.expert_to_owner_E
        return read_only(flow(self.segments_4G, self.load.load_ER, owner_E, self._is_single_E))

    def sends(self, src: int) -> np.ndarray:
        """Return the rows of source rank `src` by expert and destination rank, int64 [E, R]."""
        num_ranks, num_experts = self.placement.replicas_RE.shape
        sends_ER = np.zeros((num_experts, num_ranks), dtype=np.int64)
        single = np.flatnonzero(self._is_single_E)
        sends_ER[single, self.placement.expert_to_owner_E[single]] = self.load.load_RE[src, single]
        expert_G, _, dst_G, rows_G = self.segments_4G[:, self.segments_4G[1] == src]
        sends_ER[expert_G, dst_G] = rows_G
        return sends_ER

    def recvs(self, dst: int) -> np.ndarray:
        """Return the rows that rank `dst` computes by source rank and expert, int64 [R, E]."""
        recvs_RE = np.zeros(self.placement.replicas_RE.shape, dtype=np.int64)
        owned = np.flatnonzero(self._is_single_E & (self.placement.expert_to_owner_E == dst))
        recvs_RE[:, owned] = self.load.load_RE[:, owned]
        expert_G, src_G, _, rows_G = self.segments_4G[:, self.segments_4G[2] == dst]
        recvs_RE[src_G, expert_G] = rows_G
        return recvs_RE

    @property
    def max_rows(self) -> int:
        """Rows of the busiest rank."""
        return int(self.rows_R.max())

    @property
    def max_over_mean(self) -> float:
        """Rows of the busiest rank over the mean rank; 1.0 when there are none."""
        return self.max_rows * self.placement.num_ranks / self.load.total if self.load.total else 1.0

    @property
    def off_rank(self) -> int:
        """Rows computed on another rank than their source."""
        return self.load.total - int(np.trace(self.flow_RR))

    def off_node(self, topology: Topology) -> int:
        """Return the rows computed on another node than their source's."""
        node_R = topology.node_of_rank_R
        return int(self.flow_RR[node_R[:, None] != node_R[None, :]].sum())


@dataclass(frozen=True)
class Replicated:
    """The replicated experts of a placement as the sparse table that split_numba.py describes."""

    experts_M: np.ndarray
    start_M: np.ndarray
    ranks_J: np.ndarray

    @classmethod
    def of(cls, placement: Placement) -> Replicated:
        """Build the table of a placement."""
        experts_M = np.flatnonzero(placement.num_replicas_E > 1)
        _, ranks_J = np.nonzero(placement.replicas_RE.T[experts_M])
        start_M = np.zeros(experts_M.size + 1, dtype=np.int64)
        np.cumsum(placement.num_replicas_E[experts_M], out=start_M[1:])
        return cls(experts_M, start_M, ranks_J)


def _check(load: ExpertLoad, placement: Placement, topology: Topology) -> None:
    if load.load_RE.shape != placement.replicas_RE.shape:
        raise ValueError(
            f"the load is [R, E] = {load.load_RE.shape}, the placement {placement.replicas_RE.shape}; give matching ones"
        )
    if topology.num_ranks != load.num_ranks:
        raise ValueError(f"the load counts {load.num_ranks} ranks, the topology has {topology.num_ranks}; give matching ones")


def _no_segments() -> np.ndarray:
    return np.empty((4, 0), dtype=np.int64)


def split_exact(load: ExpertLoad, placement: Placement, topology: Topology) -> Split:
    """Split the load over the holders so that the busiest rank ends as early as an integer split allows.

    The search starts from the most local split and moves rows along shortest paths only; each holder then computes its own tokens
    first, its node's next, the rest last. Deterministic: integer arithmetic, ties by index. The optimum of
    max(cost_R * rows_R) is exact (split_numba.level); it is a bipartite flow problem as in MicroMoE's and LPLB's linear programs.
    """
    _check(load, placement, topology)
    table = Replicated.of(placement)
    if not table.experts_M.size:
        return Split(load, placement, _no_segments())
    # Imported here so that importing the package compiles nothing.
    from . import split_numba

    num_ranks = load.num_ranks
    rows_R = np.zeros(num_ranks, dtype=np.int64)
    single = np.flatnonzero(placement.num_replicas_E == 1)
    np.add.at(rows_R, placement.expert_to_owner_E[single], load.totals_E[single])
    rows_J = np.zeros(table.ranks_J.size, dtype=np.int64)
    cost_R = topology.cost_R
    lower_bound = max(topology.least_limit(load.total), int((cost_R * rows_R).max()))
    owner_E, per_node = placement.expert_to_owner_E, topology.ranks_per_node
    split_numba.prefer_local(load.load_ER, table.experts_M, table.start_M, table.ranks_J, owner_E, per_node, rows_J, rows_R)
    split_numba.level(table.start_M, table.ranks_J, cost_R, rows_J, rows_R, lower_bound)
    segments_4G = split_numba.decompose(load.load_ER, table.experts_M, table.start_M, table.ranks_J, rows_J, per_node)
    segments_4G[0] = table.experts_M[segments_4G[0]]
    return Split(load, placement, segments_4G)


def split_local_even(load: ExpertLoad, placement: Placement, topology: Topology) -> Split:
    """Split each expert by itself, as Hecate and LAER-MoE do.

    A source rank that holds the expert keeps its tokens; else the holders of its node share them evenly; else all holders do.
    The remainder goes to the first holders.
    """
    _check(load, placement, topology)
    table = Replicated.of(placement)
    if not table.experts_M.size:
        return Split(load, placement, _no_segments())
    # Imported here so that importing the package compiles nothing.
    from . import split_numba

    segments_4G = split_numba.share_evenly(load.load_ER, table.experts_M, table.start_M, table.ranks_J, topology.ranks_per_node)
    segments_4G[0] = table.experts_M[segments_4G[0]]
    return Split(load, placement, segments_4G)
