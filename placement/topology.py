"""The planner's model of the machine: nodes, ranks per node, link rates, matrix rate, how ranks and nodes differ."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from dataclasses import dataclass, fields
from functools import cached_property
from types import MappingProxyType

import numpy as np

from .content import check_positive_int, check_seconds, read_only


@dataclass(frozen=True)
class Rates:
    """Rates of one device and of one node, per direction.

    device_bytes_per_s: of one rank, inside its node.
    node_bytes_per_s: of all ranks of a node together, to and from other nodes.
    flops_per_s: of one rank on large expert groups (reachable, not the data sheet's peak).
    half_rate_rows: rows of one expert at which its matrix products run at half of `flops_per_s`.
    """

    ranks_per_node: int
    device_bytes_per_s: float
    node_bytes_per_s: float
    latency_s: float
    flops_per_s: float
    half_rate_rows: int


# Rows: all-to-all fits over 8 GPUs (alpha, beta) of aiconfigurator's NCCL tables for the device links and latencies; network
# cards of the usual 8-GPU machines (p4d-like A100 at 2 x 400 Gb/s as in LAER-MoE, one 400 Gb/s card per H100); reachable bf16
# rates from ml-engineering's MAMF table; half_rate_rows fitted to the GEMM efficiency table (H100: 0.41 of the peak at 256 rows,
# 0.59 at 512, 0.79 at 8192), which also equals the cost of reading the weights from memory once: flops_per_s / memory rate. cpu:
# one thread a rank, fp32, links through the memory or the loopback of one host.
_PRESETS: Mapping[str, Rates] = MappingProxyType(
    {
        "cpu": Rates(64, 1e9, 1.25e9, 2e-4, 6e10, 16),
        "a100": Rates(8, 237e9, 100e9, 14.2e-6, 271e12, 150),
        "h100": Rates(8, 371e9, 400e9, 7.8e-6, 794e12, 200),
        "b200": Rates(8, 666e9, 400e9, 10.6e-6, 1745e12, 220),
    }
)
# In percent: what is slower still is planned as ten times as slow. Keeps sums of costs within int64 up to 1e14 rows a rank.
MAX_COST = 1000


def least_limit(cost_R: np.ndarray, rows: int) -> int:
    """The smallest cost within which ranks together compute so many rows: sum(limit // cost_R) >= rows.

    Compiled routines use this same function. Example: ranks of cost 1 and 2 compute 4 + 2 rows within a cost of 4.
    """
    mean_rows = -(-rows // cost_R.size)
    low, high = mean_rows * cost_R.min(), mean_rows * cost_R.max()
    while low < high:
        middle = low + (high - low) // 2
        if (middle // cost_R).sum() >= rows:
            high = middle
        else:
            low = middle + 1
    return low


@dataclass(frozen=True)
class Topology:
    """Ranks in node-major order: rank r is on node r // ranks_per_node. `Rates` describes the rates.

    rank_costs: seconds of a row on every rank, in percent of those by `flops_per_s`; none where all ranks are equally fast.
    node_costs: seconds of a byte on the link of every node, in percent of those by `node_bytes_per_s`; none where all are equal.
    """

    num_nodes: int
    ranks_per_node: int
    device_bytes_per_s: float
    node_bytes_per_s: float
    latency_s: float
    flops_per_s: float
    half_rate_rows: int = 200
    rank_costs: tuple[int, ...] = ()
    node_costs: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        check_positive_int("num_nodes", self.num_nodes)
        check_positive_int("ranks_per_node", self.ranks_per_node)
        if self.num_ranks > 1 << 16:
            raise ValueError(
                f"{self.num_nodes} nodes x {self.ranks_per_node} ranks is {self.num_ranks} ranks; at most 65536 are supported"
            )
        for name in ("device_bytes_per_s", "node_bytes_per_s", "flops_per_s"):
            check_seconds(name, getattr(self, name), positive=True)
        check_seconds("latency_s", self.latency_s)
        check_positive_int("half_rate_rows", self.half_rate_rows, minimum=0)
        for name, count in (("rank_costs", self.num_ranks), ("node_costs", self.num_nodes)):
            costs = tuple(check_positive_int(name, cost) for cost in getattr(self, name))
            object.__setattr__(self, name, costs)
            if len(costs) not in (0, count):
                raise ValueError(f"{name} has {len(costs)} numbers for {count} {name[:4]}s; give one for each, or none")
            if max(costs, default=0) > MAX_COST:
                raise ValueError(f"{name} has {max(costs)} percent, at most {MAX_COST} are supported; give less")

    @property
    def num_ranks(self) -> int:
        """Ranks over all nodes."""
        return self.num_nodes * self.ranks_per_node

    def __getstate__(self) -> dict[str, object]:
        """The fields alone: unpickled arrays could be written to, and compiled routines tell such arrays from others."""
        return {field.name: getattr(self, field.name) for field in fields(self)}

    @property
    def cost_unit(self) -> int:
        """The cost of a row on a rank that runs at `flops_per_s`."""
        return 100 if self.rank_costs else 1

    @cached_property
    def cost_R(self) -> np.ndarray:
        """Cost of a row on every rank, int64 [R], read-only. Planners minimise the largest product of cost and rows."""
        return read_only(np.array(self.rank_costs or [1] * self.num_ranks, dtype=np.int64))

    @property
    def node_unit(self) -> int:
        """The cost of an item on the link of a node with `node_bytes_per_s`."""
        return 100 if self.node_costs else 1

    @cached_property
    def node_cost_N(self) -> np.ndarray:
        """Cost of an item on the link of every node, int64 [N], read-only."""
        return read_only(np.array(self.node_costs or [1] * self.num_nodes, dtype=np.int64))

    @property
    def least_cost(self) -> int:
        """Cost of a row on the fastest rank."""
        return min(self.rank_costs, default=1)

    def least_limit(self, rows: int) -> int:
        """Return the smallest cost within which all ranks together compute so many rows."""
        return int(least_limit(self.cost_R, rows)) if self.rank_costs else -(-rows // self.num_ranks)

    def over_mean(self, cost: int, rows: int) -> float:
        """Return the cost of the busiest rank over that of every rank if all ended together; 1.0 without rows."""
        return cost * float((1 / self.cost_R).sum()) / rows if rows else 1.0

    def max_over_mean(self, rows_R: np.ndarray) -> float:
        """Return `over_mean` of such rows per rank: where all ranks are as fast, rows of the busiest over the mean rank."""
        return self.over_mean(int((self.cost_R * rows_R).max()), int(rows_R.sum()))

    @cached_property
    def node_of_rank_R(self) -> np.ndarray:
        """Node of every rank, int64 [R], read-only."""
        nodes_R = np.arange(self.num_ranks, dtype=np.int64) // self.ranks_per_node
        nodes_R.setflags(write=False)
        return nodes_R

    @classmethod
    def preset(
        cls, name: str, num_ranks: int | None = None, *, num_nodes: int | None = None, ranks_per_node: int | None = None
    ) -> Topology:
        """Build a topology from a named machine (cpu, a100, h100, b200) and either a rank count or both node numbers.

        With only `num_ranks`, each node has as many ranks as the preset's machine has GPUs (8); a CPU host holds all ranks.
        """
        if name not in _PRESETS:
            near = difflib.get_close_matches(str(name), _PRESETS, n=1)
            raise ValueError(
                f"unknown topology preset {name!r}; "
                + (f"did you mean {near[0]!r}?" if near else f"known: {', '.join(_PRESETS)}")
            )
        rates = _PRESETS[name]
        if num_ranks is not None:
            if num_nodes is not None or ranks_per_node is not None:
                raise ValueError("give num_ranks, or num_nodes with ranks_per_node, not both")
            check_positive_int("num_ranks", num_ranks)
            ranks_per_node = num_ranks if name == "cpu" else min(num_ranks, rates.ranks_per_node)
            if num_ranks % ranks_per_node:
                raise ValueError(
                    f"{num_ranks} ranks do not fill {name} nodes of {ranks_per_node}; give num_nodes and ranks_per_node"
                )
            num_nodes = num_ranks // ranks_per_node
        elif num_nodes is None or ranks_per_node is None:
            raise ValueError("give num_ranks, or num_nodes with ranks_per_node")
        return cls(
            num_nodes=num_nodes,
            ranks_per_node=ranks_per_node,
            device_bytes_per_s=rates.device_bytes_per_s,
            node_bytes_per_s=rates.node_bytes_per_s,
            latency_s=rates.latency_s,
            flops_per_s=rates.flops_per_s,
            half_rate_rows=rates.half_rate_rows,
        )

    @classmethod
    def parse(cls, text: str, preset: str = "h100") -> Topology:
        """Read "2x8" (nodes x ranks per node) or "8" (one node), with the rates of a preset."""
        num_nodes, ranks_per_node = parse_nodes(text)
        return cls.preset(preset, num_nodes=num_nodes, ranks_per_node=ranks_per_node)


def parse_nodes(text: str) -> tuple[int, int]:
    """Read "2x8" (nodes x ranks per node) or "8" (one node) as nodes and ranks per node."""
    parts = text.lower().split("x") if isinstance(text, str) else []
    if len(parts) not in (1, 2) or not all(part.strip().isascii() and part.strip().isdigit() and len(part) < 8 for part in parts):
        raise ValueError(f"topology {text!r} is not NODESxRANKS; write for example 2x8")
    numbers = [int(part) for part in parts]
    return (numbers[0], numbers[1]) if len(numbers) == 2 else (1, numbers[0])
