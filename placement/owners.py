"""The owner map: (layer, expert) -> (rank, bank row), immutable.

Shape letters: L layers, E experts, R ranks.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

from .content import ByContent, as_counts, check_ids, check_positive_int, freeze


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
        rows_R = np.bincount(self.expert_to_owner_LE.ravel(), minlength=self.num_ranks).astype(np.int64)
        rows_R.setflags(write=False)
        return rows_R

    @cached_property
    def expert_to_row_LE(self) -> np.ndarray:
        """Bank row of every expert at its owner, int64 [L, E], read-only."""
        owner_N = self.expert_to_owner_LE.ravel()
        order_N = np.argsort(owner_N, kind="stable")
        first_row_R = np.cumsum(self.num_rows_R) - self.num_rows_R
        row_N = np.empty(owner_N.size, dtype=np.int64)
        row_N[order_N] = np.arange(owner_N.size) - first_row_R[owner_N[order_N]]
        row_LE = row_N.reshape(self.expert_to_owner_LE.shape)
        row_LE.setflags(write=False)
        return row_LE

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

    def to_dict(self) -> dict[str, Any]:
        """Return a JSON-serialisable value."""
        return {"num_ranks": self.num_ranks, "expert_to_owner": self.expert_to_owner_LE.tolist()}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> OwnerMap:
        """Rebuild a map from the value of `to_dict`; ValueError for anything else."""
        if not isinstance(data, Mapping) or set(data) != {"num_ranks", "expert_to_owner"}:
            raise ValueError("an owner map is {num_ranks, expert_to_owner}; got something else")
        rows = data["expert_to_owner"]
        if not isinstance(rows, list) or not rows or not all(isinstance(row, list) and len(row) == len(rows[0]) for row in rows):
            raise ValueError("expert_to_owner must be a list of layers of equal length")
        return cls(np.array(rows), data["num_ranks"])
