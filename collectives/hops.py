"""Schedules as arrays, the form in which schedules are built, predicted and counted.

Shape letters: R ranks, E experts, M copied experts, J (expert, copy) entries, G routes, H hops.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from itertools import pairwise

import numpy as np

from ..placement import Placement
from .schedule import Route, Schedule


@dataclass(frozen=True, eq=False)
class Copies:
    """The copied experts of a placement, ascending, and the ranks that need each of them, descending. int64 arrays.

    Example: copies of expert 0, owned by rank 0, on ranks 1 and 3: experts_M [0], owners_M [0], start_M [0, 2], ranks_J [3, 1].
    """

    num_ranks: int
    experts_M: np.ndarray
    owners_M: np.ndarray
    start_M: np.ndarray  # [M + 1]
    ranks_J: np.ndarray

    @classmethod
    def of(cls, placement: Placement) -> Copies:
        """The copies of a placement."""
        num_ranks = placement.num_ranks
        experts_M = np.flatnonzero(placement.num_replicas_E > 1)
        entries_J = np.flatnonzero(placement.copies_RE.T[experts_M, ::-1])
        start_M = np.append(0, np.cumsum(placement.num_replicas_E[experts_M] - 1))
        ranks_J = num_ranks - 1 - entries_J % num_ranks
        return cls(num_ranks, experts_M, placement.expert_to_owner_E[experts_M], start_M, ranks_J)

    @property
    def num_copies_M(self) -> np.ndarray:
        """Copies of each expert, int64 [M]."""
        return np.diff(self.start_M)

    def routes(self, src_J: np.ndarray, dst_J: np.ndarray | None = None) -> Hops:
        """One route per expert, uncut, one hop per entry; each hop goes to the entry's rank unless `dst_J` is given."""
        ones_M = np.ones(self.experts_M.size, np.int64)
        dst_J = self.ranks_J if dst_J is None else dst_J
        return Hops(self.num_ranks, self.experts_M, self.start_M, src_J, dst_J, 0 * ones_M, ones_M, ones_M)


@dataclass(frozen=True, eq=False)
class Hops:
    """The routes of a gather schedule: route g has hops start_G[g] to start_G[g + 1]. int64 arrays; see `schedule.Route`."""

    num_ranks: int
    items_G: np.ndarray
    start_G: np.ndarray  # [G + 1]
    src_H: np.ndarray
    dst_H: np.ndarray
    first_chunk_G: np.ndarray
    end_chunk_G: np.ndarray
    num_chunks_G: np.ndarray

    @classmethod
    def of(cls, schedule: Schedule) -> Hops:
        """The inverse of `schedule`, except that the direction (gather or reduce) is dropped."""
        routes = schedule.routes
        hops_H2 = np.array([hop for route in routes for hop in route.hops], np.int64).reshape(-1, 2)
        fields = [(r.item, len(r.hops), r.first_chunk, r.end_chunk, r.num_chunks) for r in routes]
        items_G, sizes_G, first_G, end_G, num_G = np.ascontiguousarray(np.array(fields, np.int64).reshape(-1, 5).T)
        start_G = np.append(0, np.cumsum(sizes_G))
        src_H, dst_H = np.ascontiguousarray(hops_H2.T)
        return cls(schedule.num_ranks, items_G, start_G, src_H, dst_H, first_G, end_G, num_G)

    def cut(self, pieces: int) -> Hops:
        """The same routes with every chunk cut into `pieces`."""
        if pieces == 1:
            return self
        return replace(
            self,
            first_chunk_G=self.first_chunk_G * pieces,
            end_chunk_G=self.end_chunk_G * pieces,
            num_chunks_G=self.num_chunks_G * pieces,
        )

    def schedule(self) -> Schedule:
        """The same routes as a `Schedule`, which the executor runs."""
        pairs = list(zip(self.src_H.tolist(), self.dst_H.tolist(), strict=True))
        fields = (self.items_G, self.first_chunk_G, self.end_chunk_G, self.num_chunks_G)
        routes = zip(*(field.tolist() for field in fields), pairwise(self.start_G.tolist()), strict=True)
        return Schedule(
            self.num_ranks, tuple(Route(item, tuple(pairs[a:b]), first, end, num) for item, first, end, num, (a, b) in routes)
        )
