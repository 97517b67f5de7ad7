"""The planner's value types: layer shape, expert load, placement, and the problem of one layer.

Shape letters: E experts, R ranks. All values are immutable, checked once, and compared and hashed by content.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np

from .content import MAX_TOTAL, ByContent, as_counts, check_ids, check_positive_int, check_seconds, freeze, read_only
from .topology import Topology


@dataclass(frozen=True)
class LayerShape:
    """Sizes of one MoE layer.

    bytes_per_element: of rows and copies as sent; gradients are reduced in fp32 by default. row_share: how much of a row
    an assignment to another rank sends, where a token is sent once to a rank that has several of its experts. trained_share:
    gradients of an expert over its weights, in numbers; few where only low-rank adapters are trained.
    """

    num_experts: int
    top_k: int
    dim: int
    ffn_dim: int
    num_matrices: int = 3
    bytes_per_element: int = 4
    gradient_bytes_per_element: int = 4
    row_share: float = 1.0
    trained_share: float = 1.0

    def __post_init__(self) -> None:
        for name in ("num_experts", "top_k", "dim", "ffn_dim", "num_matrices", "bytes_per_element", "gradient_bytes_per_element"):
            check_positive_int(name, getattr(self, name))
        if self.top_k > self.num_experts:
            raise ValueError(f"top_k {self.top_k} is above num_experts {self.num_experts}; lower top_k")
        if not 0 < self.row_share <= 1:
            raise ValueError(f"row_share must be above 0 and at most 1, got {self.row_share!r}")
        if not self.trained_share > 0:
            raise ValueError(f"trained_share must be above 0, got {self.trained_share!r}")

    @cached_property
    def parameters_per_expert(self) -> int:
        """Weights of one expert."""
        return self.num_matrices * self.dim * self.ffn_dim

    @cached_property
    def expert_bytes(self) -> int:
        """Bytes of one copy of an expert as sent."""
        return self.parameters_per_expert * self.bytes_per_element

    @cached_property
    def gradient_bytes(self) -> int:
        """Bytes of one copy's gradient as reduced."""
        return max(round(self.parameters_per_expert * self.gradient_bytes_per_element * self.trained_share), 1)

    @cached_property
    def row_bytes(self) -> int:
        """Bytes that one assignment to another rank sends."""
        return max(round(self.dim * self.bytes_per_element * self.row_share), 1)

    @cached_property
    def flops_per_row(self) -> int:
        """Forward FLOPs of one assignment (token, expert)."""
        return 2 * self.parameters_per_expert


@dataclass(frozen=True, eq=False)
class ExpertLoad(ByContent):
    """Assignments counted per source rank and expert: `load_RE` int64 [R, E]."""

    load_RE: np.ndarray

    def __post_init__(self) -> None:
        load_RE = as_counts("load_RE", self.load_RE, ndim=2)
        if load_RE.min() < 0:
            raise ValueError(
                f"load_RE must not be negative, got {int(load_RE.min())}; count assignments per source rank and expert"
            )
        if float(load_RE.max()) * load_RE.size > MAX_TOTAL and load_RE.sum(dtype=np.float64) > MAX_TOTAL:
            raise ValueError(
                f"load_RE sums to {load_RE.sum(dtype=np.float64):.3g} assignments, above {MAX_TOTAL}; check its dtype"
            )
        freeze(self, "load_RE", load_RE)

    @property
    def num_ranks(self) -> int:
        """Source ranks."""
        return int(self.load_RE.shape[0])

    @property
    def num_experts(self) -> int:
        """Experts of the layer."""
        return int(self.load_RE.shape[1])

    @cached_property
    def totals_E(self) -> np.ndarray:
        """Assignments of every expert over all source ranks, int64 [E], read-only."""
        return read_only(self.load_RE.sum(axis=0))

    @cached_property
    def load_ER(self) -> np.ndarray:
        """The load by expert and source rank, int64 [E, R], contiguous, read-only."""
        return read_only(np.ascontiguousarray(self.load_RE.T))

    @cached_property
    def total(self) -> int:
        """All assignments."""
        return int(self.totals_E.sum())


@dataclass(frozen=True, eq=False)
class Placement(ByContent):
    """The owner and all holders of every expert of one layer in one step.

    expert_to_owner_E: int64 [E], the rank that owns the weights. replicas_RE: bool [R, E], all holders, owners included.
    """

    expert_to_owner_E: np.ndarray
    replicas_RE: np.ndarray

    def __post_init__(self) -> None:
        owner_E = as_counts("expert_to_owner_E", self.expert_to_owner_E, ndim=1)
        replicas_RE = np.asarray(self.replicas_RE)
        if replicas_RE.dtype != np.bool_ or replicas_RE.ndim != 2 or replicas_RE.shape[1:] != owner_E.shape:
            shape = f"{replicas_RE.dtype} {replicas_RE.shape}"
            raise ValueError(f"replicas_RE must be bool [R, {owner_E.size}] to match expert_to_owner_E, got {shape}")
        check_ids("expert_to_owner_E", owner_E, replicas_RE.shape[0], "ranks")
        held_E = replicas_RE[owner_E, np.arange(owner_E.size)]
        if not held_E.all():
            expert = int(np.argmin(held_E))
            raise ValueError(f"replicas_RE leaves out expert {expert} at its owner, rank {owner_E[expert]}; include every owner")
        freeze(self, "expert_to_owner_E", owner_E)
        freeze(self, "replicas_RE", np.array(replicas_RE, order="C"))

    @property
    def num_ranks(self) -> int:
        """Ranks."""
        return int(self.replicas_RE.shape[0])

    @property
    def num_experts(self) -> int:
        """Experts of the layer."""
        return int(self.replicas_RE.shape[1])

    @cached_property
    def num_replicas_E(self) -> np.ndarray:
        """Holders of every expert, the owner included, int64 [E], read-only."""
        return read_only(self.replicas_RE.sum(axis=0, dtype=np.int64))

    @cached_property
    def copies_RE(self) -> np.ndarray:
        """Temporary copies: holders except owners, bool [R, E], read-only."""
        copies_RE = self.replicas_RE.copy()
        copies_RE[self.expert_to_owner_E, np.arange(self.num_experts)] = False
        return read_only(copies_RE)

    @property
    def num_copies(self) -> int:
        """Temporary copies over all ranks."""
        return int(self.num_replicas_E.sum()) - self.num_experts

    @classmethod
    def owners_only(cls, expert_to_owner_E: np.ndarray, num_ranks: int) -> Placement:
        """Build the placement without copies: plain expert parallelism."""
        owner_E = as_counts("expert_to_owner_E", expert_to_owner_E, ndim=1)
        check_ids("expert_to_owner_E", owner_E, check_positive_int("num_ranks", num_ranks), "ranks")
        return cls.with_copies(owner_E, num_ranks, np.empty((2, 0), dtype=np.int64))

    @classmethod
    def with_copies(cls, expert_to_owner_E: np.ndarray, num_ranks: int, copies_2C: np.ndarray) -> Placement:
        """Build the placement of these owners with copies as (expert, rank) columns, int64 [2, C]."""
        replicas_RE = np.zeros((num_ranks, expert_to_owner_E.size), dtype=np.bool_)
        replicas_RE[expert_to_owner_E, np.arange(expert_to_owner_E.size)] = True
        replicas_RE[copies_2C[1], copies_2C[0]] = True
        return cls(expert_to_owner_E, replicas_RE)

    @classmethod
    def everywhere(cls, expert_to_owner_E: np.ndarray, num_ranks: int) -> Placement:
        """Build the placement with every expert on every rank."""
        owner_E = as_counts("expert_to_owner_E", expert_to_owner_E, ndim=1)
        return cls(owner_E, np.ones((check_positive_int("num_ranks", num_ranks), owner_E.size), dtype=np.bool_))


@dataclass(frozen=True, eq=False)
class Problem(ByContent):
    """The problem of one layer: which copies to make for this load, these owners and this machine.

    slots: maximum number of copies per rank. gathers: 1 when copies are kept until backward, 2 when they are materialized again.
    overlap_s: seconds of other work before the layer that hide its gather. backward_multiplier: expert FLOPs of a step over those
    of a forward (3, or 4 with recompute). min_rows_per_copy: fewest rows that a solver may move to a copy, None for its own
    choice. move_horizon_steps: steps over which a change of owner is amortised. state_multiplier: bytes moved when an expert
    changes its owner, over the bytes of its fp32 weights (3 with both Adam moments). forecast_error: expected total variation
    distance, 0 to 1, of the actual load from `load`; 0 where the load is exact. scenarios_SE: int64 [S, E], assignments of every
    expert in loads that may come instead, such as recorded ones; None without. mean_moves: moves are made with those of other
    layers, so the mean rank's count, without latency; else the busiest rank's.
    """

    load: ExpertLoad
    expert_to_owner_E: np.ndarray
    topology: Topology
    shape: LayerShape
    slots: int
    gathers: int = 1
    overlap_s: float = 0.0
    backward_multiplier: int = 3
    min_rows_per_copy: int | None = None
    move_horizon_steps: int = 100
    state_multiplier: float = 3.0
    forecast_error: float = 0.0
    scenarios_SE: np.ndarray | None = None
    mean_moves: bool = False

    def __post_init__(self) -> None:
        owner_E = as_counts("expert_to_owner_E", self.expert_to_owner_E, ndim=1)
        num_ranks, num_experts = self.load.load_RE.shape
        if num_ranks != self.topology.num_ranks:
            raise ValueError(f"the load counts {num_ranks} ranks, the topology has {self.topology.num_ranks}; give matching ones")
        if num_experts != self.shape.num_experts:
            raise ValueError(
                f"the load counts {num_experts} experts, the shape says {self.shape.num_experts}; give matching ones"
            )
        if owner_E.size != num_experts:
            raise ValueError(
                f"expert_to_owner_E names {owner_E.size} owners for {num_experts} experts; give one owner per expert"
            )
        check_ids("expert_to_owner_E", owner_E, num_ranks, "ranks")
        check_positive_int("slots", self.slots, minimum=0)
        if self.gathers not in (1, 2):
            raise ValueError(f"gathers must be 1 (copies are kept) or 2 (materialized again), got {self.gathers!r}")
        check_seconds("overlap_s", self.overlap_s)
        check_positive_int("backward_multiplier", self.backward_multiplier)
        if self.min_rows_per_copy is not None:
            check_positive_int("min_rows_per_copy", self.min_rows_per_copy)
        check_positive_int("move_horizon_steps", self.move_horizon_steps)
        check_seconds("state_multiplier", self.state_multiplier)
        if not 0 <= self.forecast_error <= 1:
            raise ValueError(f"forecast_error must be a distance from 0 to 1, got {self.forecast_error!r}")
        freeze(self, "expert_to_owner_E", owner_E)
        if self.scenarios_SE is not None:
            scenarios_SE = as_counts("scenarios_SE", self.scenarios_SE, ndim=2)
            if scenarios_SE.shape[1] != num_experts or scenarios_SE.min() < 0:
                raise ValueError(
                    f"scenarios_SE is {scenarios_SE.shape}, with {scenarios_SE.min()} as its least count; "
                    f"give counts of at least 0 for {num_experts} experts"
                )
            freeze(self, "scenarios_SE", scenarios_SE)

    @property
    def num_ranks(self) -> int:
        """Ranks."""
        return self.load.num_ranks

    @property
    def num_experts(self) -> int:
        """Experts of the layer."""
        return self.load.num_experts

    @cached_property
    def owned_rows_R(self) -> np.ndarray:
        """Rows that every rank computes without copies, int64 [R], read-only."""
        # Weights of bincount are float64: exact, because a load's total stays below 2**53.
        rows_N = np.bincount(self.expert_to_owner_E, weights=self.load.totals_E, minlength=self.num_ranks)
        return read_only(rows_N.astype(np.int64))
