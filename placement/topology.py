"""The planner's model of the machine: nodes, ranks per node, link rates, matrix rate."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from types import MappingProxyType

import numpy as np

from .content import check_positive_int, check_seconds


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


@dataclass(frozen=True)
class Topology:
    """Ranks in node-major order: rank r is on node r // ranks_per_node. `Rates` describes the rates."""

    num_nodes: int
    ranks_per_node: int
    device_bytes_per_s: float
    node_bytes_per_s: float
    latency_s: float
    flops_per_s: float
    half_rate_rows: int = 200

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

    @property
    def num_ranks(self) -> int:
        """Ranks over all nodes."""
        return self.num_nodes * self.ranks_per_node

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
        parts = text.lower().split("x") if isinstance(text, str) else []
        if len(parts) not in (1, 2) or not all(
            part.strip().isascii() and part.strip().isdigit() and len(part) < 8 for part in parts
        ):
            raise ValueError(f"topology {text!r} is not NODESxRANKS; write for example 2x8")
        numbers = [int(part) for part in parts]
        num_nodes, ranks_per_node = numbers if len(numbers) == 2 else (1, numbers[0])
        return cls.preset(preset, num_nodes=num_nodes, ranks_per_node=ranks_per_node)
