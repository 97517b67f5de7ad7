"""The owner map: (layer, expert) -> (rank, bank row), immutable.

Shape letters: L layers, E experts, R ranks.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from .content import ByContent, as_counts, check_ids, check_positive_int, freeze, read_only
from .topology import Topology


@dataclass(frozen=True)
class Move:
    """One expert changes its owner from rank `src` to rank `dst`."""

    layer: int
    expert: int
    src: int
    dst: int


@dataclass(frozen=True, eq=False)
class OwnerMap(ByContent):
    """Owner of every expert of every layer: `expert_to_owner_LE` int64 [L, E].

    The experts that a rank owns are numbered in (layer, expert) order; the number is the expert's row in the rank's bank.
    """

    expert_to_owner_LE: np.ndarray
    num_ranks: int

    def __post_init__(self) -> None:
        owner_LE = as_counts("expert_to_owner_LE", self.expert_to_owner_LE, ndim=2)
        check_positive_int("num_ranks", self.num_ranks)
        check_ids("expert_to_owner_LE", owner_LE, self.num_ranks, "ranks")
        freeze(self, "expert_to_owner_LE", owner_LE)

    @property
    def num_layers(self) -> int:
        """MoE layers."""
        return int(self.expert_to_owner_LE.shape[0])

    @property
    def num_experts(self) -> int:
        """Experts per layer."""
        return int(self.expert_to_owner_LE.shape[1])

    @cached_property
    def num_rows_R(self) -> np.ndarray:
        """Experts every rank owns over all layers, int64 [R], read-only."""
        return read_only(np.bincount(self.expert_to_owner_LE.ravel(), minlength=self.num_ranks).astype(np.int64))

    def rows_of(self, rank: int) -> list[tuple[int, int]]:
        """Return the (layer, expert) pairs that `rank` owns, in bank row order."""
        if not 0 <= rank < self.num_ranks:
            raise ValueError(f"rank {rank} is not one of the owner map's {self.num_ranks} ranks: use 0 to {self.num_ranks - 1}")
        layers, experts = np.nonzero(self.expert_to_owner_LE == rank)
        return list(zip(layers.tolist(), experts.tolist(), strict=True))

    @classmethod
    def contiguous(cls, num_layers: int, num_experts: int, num_ranks: int) -> OwnerMap:
        """Assign every rank a contiguous block of each layer's experts; block sizes differ by at most one.

        The ranks with one expert more rotate with the layer, so that totals over layers also differ by at most one.

        Example: 2 layers, 5 experts, 3 ranks: owners [0, 0, 1, 1, 2] and [0, 0, 1, 2, 2].
        """
        check_positive_int("num_layers", num_layers)
        check_positive_int("num_experts", num_experts)
        check_positive_int("num_ranks", num_ranks)
        base, extra = divmod(num_experts, num_ranks)
        ranks_R = np.arange(num_ranks)
        rows = []
        for layer in range(num_layers):
            takes_extra_R = (ranks_R - layer * extra) % num_ranks < extra
            rows.append(np.repeat(ranks_R, base + takes_extra_R))
        return cls(np.stack(rows), num_ranks)

    def moves_to(self, other: OwnerMap) -> list[Move]:
        """Return the moves that turn this map into `other`, in (layer, expert) order."""
        mine, theirs = self.expert_to_owner_LE, other.expert_to_owner_LE
        if mine.shape != theirs.shape or self.num_ranks != other.num_ranks:
            raise ValueError(
                f"cannot move from {mine.shape[0]} layers x {mine.shape[1]} experts on {self.num_ranks} ranks to "
                f"{theirs.shape[0]} x {theirs.shape[1]} on {other.num_ranks}; give maps of one model and world size"
            )
        layers, experts = np.nonzero(mine != theirs)
        pairs = zip(layers.tolist(), experts.tolist(), strict=True)
        return [Move(layer, expert, int(mine[layer, expert]), int(theirs[layer, expert])) for layer, expert in pairs]

    def most_sent(self, other: OwnerMap, topology: Topology) -> float:
        """Return the experts that the busiest rank sends to turn this map into `other`.

        Where the busiest link between nodes takes longer for its own, as many as a rank would send in that time.
        """
        sent_R, crossed_N = Counter[int](), Counter[int]()
        for move in self.moves_to(other):
            src_node, dst_node = (rank // topology.ranks_per_node for rank in (move.src, move.dst))
            sent_R[move.src] += 1
            crossed_N[src_node] += src_node != dst_node
        slower = topology.device_bytes_per_s / topology.node_bytes_per_s / topology.node_unit
        link = max((count * int(topology.node_cost_N[node]) for node, count in crossed_N.items()), default=0)
        return max(max(sent_R.values(), default=0), slower * link)
