"""Ranks as real processes on several nodes of one machine, with links of a given rate between the nodes."""

import functools
import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest

from moesaic.benchmarks.network import Network, Node, why_not
from tests.helpers.ranks import RankPool


@dataclass(frozen=True)
class _Seat:
    """Where each rank sits: ranks fill the nodes in order, as a launcher places them."""

    nodes: tuple[Node, ...]
    ranks_per_node: int

    def take(self, rank: int) -> None:
        self.nodes[rank // self.ranks_per_node].enter()
        os.environ |= {"LOCAL_RANK": str(rank % self.ranks_per_node), "LOCAL_WORLD_SIZE": str(self.ranks_per_node)}


class Cluster:
    """`num_nodes` nodes with `ranks_per_node` ranks each, in one Gloo process group; a context manager.

    The calling test is skipped, with a line that says what is missing, where this machine cannot make a `Network`.
    """

    def __init__(self, num_nodes: int, ranks_per_node: int, *, bits_per_s: float):
        skip_without_network()
        self.world_size = num_nodes * ranks_per_node
        self.network = Network(num_nodes, bits_per_s=bits_per_s)
        try:
            self._pool = RankPool(self.world_size, _Seat(tuple(self.network.nodes), ranks_per_node).take)
        except BaseException:
            self.network.close()
            raise

    def run(self, body: Callable[..., Any], *args: Any) -> list[Any]:
        """Run `body(rank, *args)`, a top-level function, on every rank; return the results in rank order."""
        return self._pool.run(body, *args)

    def __enter__(self) -> "Cluster":
        return self

    def __exit__(self, *exc: object) -> None:
        self._pool.stop()
        self.network.close()


@functools.cache
def _why_not() -> str:
    return why_not()


def skip_without_network() -> None:
    """Skip the calling test on a machine that cannot make namespaces and links."""
    reason = _why_not()
    if reason:
        pytest.skip(f"no network of namespaces here: {reason}")
