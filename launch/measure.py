"""Measuring a machine for `moesaic calibrate`: links, expert products, copies and gathers, on all ranks at once.

Every piece of work runs over the transport and the kernels that training uses. A round times each piece once, so that rounds are
seconds apart; a rate is the median over the rounds. Fixed seconds and seconds per unit come from the smallest and the largest
size, the ends that planners price; the tables show what lies between.
"""

from __future__ import annotations

import platform
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from .. import __version__
from ..collectives import (
    Pending,
    RowLayout,
    RowPart,
    all_to_all_rows,
    choose_transport,
    direct_gather,
    make_host_transport,
    make_transports,
    nodes_of_group,
    sparse_all_gather,
)
from ..kernels import FFNWeights, grouped_ffn, grouped_ffn_backward
from ..placement import LayerShape, Placement
from ..placement.machine import Machine

# Sizes grow until one takes long, or until a rank would send more than that in one exchange.
_MESSAGE_BYTES = [1024 * 4**i for i in range(8)]
_MOST_SENT_BYTES = 1 << 24
_EXPERT_ROWS = [4**i for i in range(7)]
# Experts of one product: together their weights are larger than most caches.
_EXPERTS = 4
# Rows per expert of the products that run beside a gather.
_ROWS_BESIDE = 64
_COPY_BYTES = 1 << 24
# Most ranks of a node whose pairs are timed one by one.
_MOST_PAIRED_RANKS = 8
_ROUNDS = (3, 9)
_MOST_REPEATS = 1024
_TIMEOUT_S = 120.0
_BACKWARD_MULTIPLIER = 3  # as `Problem` has it: forward and backward take three times the forward


def measure_machine(
    group: dist.ProcessGroup, device: torch.device, *, seconds: float = 30.0, say: Callable[[str], None] = lambda stage: None
) -> Machine:
    """Measure the machine on the ranks of a process group, in about `seconds`. Collective; the result is that of all ranks.

    Raises:
        ValueError: there is one rank, or the ranks do not fill nodes of one size in order; the same on every rank.
    """
    return _Measurement(group, device, seconds, say).measure()


@dataclass(eq=False)
class _Work:
    """What is timed; on all ranks the same number of times."""

    run: Callable[[], Any]
    repeats: int = 1
    """Runs in one timed piece, long enough for ranks that start it up to a millisecond apart."""
    seconds: list[float] = field(default_factory=list)
    """Seconds of one run on this rank, by round; the first are those of the slowest rank when it was prepared."""


class _Measurement:
    """Works by what they measure and the size; `measure` prepares them, times them in rounds, and computes rates."""

    def __init__(self, group: dist.ProcessGroup, device: torch.device, seconds: float, say: Callable[[str], None]):
        node_of_R = nodes_of_group(group)
        self.num_ranks, self.num_nodes = len(node_of_R), len(set(node_of_R))
        self.per_node = self.num_ranks // self.num_nodes
        if self.num_ranks == 1:
            raise ValueError("one rank has no links to measure: start two or more")
        if node_of_R != [rank // self.per_node for rank in range(self.num_ranks)]:
            raise ValueError(f"the ranks are on nodes {node_of_R}: start equally many on each, one node after the other")
        self.device, self.seconds, self.say = device, seconds, say
        self.transport_name = choose_transport(node_of_R, on_cuda=device.type == "cuda").name
        self.tokens, self.experts = make_transports(self.transport_name, group, num_transports=2, timeout_s=_TIMEOUT_S)
        self.control = make_host_transport(group, node_of_R, timeout_s=_TIMEOUT_S)
        self.rank, self.node = self.tokens.rank, node_of_R[self.tokens.rank]
        self.works: dict[tuple[str, int], _Work] = {}
        on_cuda = device.type == "cuda"
        self.shape = LayerShape(num_experts=_EXPERTS, top_k=1, dim=2048 if on_cuda else 512, ffn_dim=1024)
        self.dtype = torch.bfloat16 if on_cuda else torch.float32
        self.weights, self.gradients = self._experts(self.dtype), self._experts(torch.float32)

    def measure(self) -> Machine:
        """All stages."""
        self._prepare_links()
        self._prepare_ranks()
        round_s = sum(work.seconds[0] * work.repeats for work in self.works.values())
        least, most = _ROUNDS
        num_rounds = round(min(max(0.7 * self.seconds / round_s, least), most))
        for index in range(num_rounds):
            self.say(f"round {index + 1} of {num_rounds}")
            for work in self.works.values():
                work.seconds.append(self._timed(work))
        seconds_R = self._gather([s for work in self.works.values() for s in work.seconds[1:]])
        by_work = seconds_R.reshape(self.num_ranks, len(self.works), num_rounds)
        return self._machine({key: by_work[:, index] for index, key in enumerate(self.works)})

    # Phase 1: what is timed

    def _prepare_links(self) -> None:
        here = range(self.node * self.per_node, (self.node + 1) * self.per_node)
        others = [rank for rank in range(self.num_ranks) if rank not in here]
        local_rank = self.rank - here[0]
        for kind, count, peers, peer_of in (
            (
                "ranks",
                self.per_node,
                [rank for rank in here if rank != self.rank],
                lambda r: here[(r - local_rank) % self.per_node],
            ),
            ("nodes", self.num_nodes, others, lambda r: (r - self.node) % self.num_nodes * self.per_node + local_rank),
        ):
            if count == 1:
                continue
            self.say(f"links between {kind}")
            sizes = [size for size in _MESSAGE_BYTES if size * len(peers) <= _MOST_SENT_BYTES]
            self._prepare_sizes(f"{kind}_exchange", sizes, partial(self._exchange, peers))
            peers = [peer for peer in [peer_of(1)] if peer != self.rank]
            self._prepare_sizes(f"{kind}_pair", _MESSAGE_BYTES, partial(self._exchange, peers))
            size = max(size for name, size in self.works if name == f"{kind}_pair")
            if kind == "nodes" or count <= _MOST_PAIRED_RANKS:
                # In turn i, those whose numbers add up to i (modulo their count) are pairs: every pair has one turn.
                for turn in range(count):
                    peers = [peer for peer in [peer_of(turn)] if peer != self.rank]
                    self._prepare((f"{kind}_turn", turn), self._exchange(peers, size))

    def _prepare_ranks(self) -> None:
        self.say("expert products, copies and gathers")
        self._prepare_sizes("experts", _EXPERT_ROWS, self._products, least=_ROWS_BESIDE)
        source, target = (torch.zeros(_COPY_BYTES, dtype=torch.uint8, device=self.device) for _ in range(2))
        self._prepare(("copy", 0), lambda: target.copy_(source))
        products, launch = self._products(_ROWS_BESIDE), self._gather_launch()

        def beside() -> None:
            pending = launch()
            products()
            pending.wait()

        self._prepare(("products", 0), products)
        self._prepare(("gather", 0), lambda: launch().wait())
        self._prepare(("beside", 0), beside)

    def _exchange(self, peers: Sequence[int], size: int) -> Callable[[], None]:
        """A message of `size` bytes to each peer, and one from each."""
        parts = [RowPart(peer, row, 1) for row, peer in enumerate(peers)]
        layout, like = RowLayout(parts, parts), torch.empty(0, device=self.device)
        outgoing, incoming = (self.tokens.empty([len(peers), size // 4], like).fill_(1.0) for _ in range(2))
        return lambda: all_to_all_rows(self.tokens, layout, outgoing, incoming, op="calibrate").wait()

    def _products(self, rows: int) -> Callable[[], None]:
        """Forward and backward of all experts with so many rows each."""
        x_ND = torch.randn(_EXPERTS * rows, self.shape.dim, dtype=self.dtype, device=self.device)
        ones_N, sizes = torch.ones(len(x_ND), device=self.device), [rows] * _EXPERTS

        def products() -> None:
            out = grouped_ffn(x_ND, ones_N, self.weights, sizes)
            rows_N = x_ND, x_ND, out.gate_up_N2F, ones_N
            grouped_ffn_backward(*rows_N, self.weights, self.gradients, sizes, overwrite=[True] * _EXPERTS)

        return products

    def _gather_launch(self) -> Callable[[], Pending]:
        """Every rank gets an expert of the rank before it."""
        ranks, before = np.arange(self.num_ranks), (self.rank - 1) % self.num_ranks
        holders_RE = np.eye(self.num_ranks, dtype=np.bool_) | (ranks[:, None] == (ranks + 1) % self.num_ranks)
        schedule = direct_gather(Placement(ranks, holders_RE))
        copy = self._experts(self.dtype)
        owned = {self.rank: (self.weights.gate_up[0], self.weights.down[0])}
        copies = {before: (copy.gate_up[0], copy.down[0])}
        return lambda: sparse_all_gather(schedule, self.experts, owned, copies, op="gather")

    def _experts(self, dtype: torch.dtype) -> FFNWeights:
        """Weights in memory from which copies are sent."""
        D, F, like = self.shape.dim, self.shape.ffn_dim, torch.empty(0, dtype=dtype, device=self.device)

        def matrices(*shape: int) -> list[Tensor]:
            return [self.experts.empty(shape, like).fill_(0.01) for _ in range(_EXPERTS)]

        return FFNWeights(matrices(2 * F, D), matrices(D, F))

    def _prepare_sizes(
        self, name: str, sizes: Sequence[int], work_of: Callable[[int], Callable[[], None]], *, least: int = _MESSAGE_BYTES[1]
    ) -> None:
        """Works of growing size, up to `least` or the first that takes long."""
        for size in sizes:
            if self._prepare((name, size), work_of(size)) > self.seconds / 100 and size >= least:
                break

    def _prepare(self, key: tuple[str, int], run: Callable[[], Any]) -> float:
        """Warm a work up and find its repeats; return the seconds of one run on the slowest rank."""
        work = self.works[key] = _Work(run)
        run()
        while (last_s := self._last([self._timed(work)])) * work.repeats < self.seconds / 1500 and work.repeats < _MOST_REPEATS:
            work.repeats = min(_MOST_REPEATS, 8 * work.repeats, int(self.seconds / 1500 / last_s) + 1)
        work.seconds.append(last_s)
        return last_s

    # Phase 2: timing

    def _timed(self, work: _Work) -> float:
        """Seconds of one run on this rank, from a common start."""
        self.control.all_gather_ints(torch.zeros(1, dtype=torch.int64))
        start_s = time.perf_counter()
        for _ in range(work.repeats):
            work.run()
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return (time.perf_counter() - start_s) / work.repeats

    def _gather(self, seconds: Sequence[float]) -> np.ndarray:
        """Seconds of every rank, [R, n], in whole nanoseconds."""
        return self.control.all_gather_ints((torch.tensor(seconds, dtype=torch.float64) * 1e9).long() + 1).numpy() / 1e9

    def _last(self, seconds: Sequence[float]) -> float:
        return float(self._gather(seconds).max())

    # Phase 3: rates

    def _machine(self, seconds: dict[tuple[str, int], np.ndarray]) -> Machine:
        """The rates from the seconds [R, rounds] of every work."""
        sizes = {name: [size for key, size in seconds if key == name] for name, _ in seconds}
        by_size = {name: np.stack([seconds[name, size] for size in sizes[name]]) for name in sizes}
        rounds: dict[str, np.ndarray] = {}
        links: dict[str, dict[str, float]] = {}
        per_link = {"ranks": self.per_node - 1, "nodes": self.per_node * (self.num_ranks - self.per_node)}
        for kind, rate, latency in (
            ("ranks", "device_bytes_per_s", "latency_s"),
            ("nodes", "node_bytes_per_s", "node_latency_s"),
        ):
            if f"{kind}_exchange" in sizes:
                # A collective ends with its last rank.
                fixed_s, byte_s = fit(sizes[f"{kind}_exchange"], by_size[f"{kind}_exchange"].max(axis=1))
                rounds |= {rate: per_link[kind] / byte_s, latency: fixed_s}
                links[kind] = self._links(kind, seconds, sizes[f"{kind}_pair"][-1])
        experts = by_size["experts"]
        flops = _EXPERTS * _BACKWARD_MULTIPLIER * self.shape.flops_per_row
        fixed_s, row_s = fit(sizes["experts"], experts)
        rounds["flops_per_s"] = np.median(flops / row_s, axis=0)
        rounds["half_rate_rows"] = np.median(fixed_s / row_s, axis=0)
        rounds["copy_bytes_per_s"] = np.median(_COPY_BYTES / seconds["copy", 0], axis=0)
        products, gather, beside = (seconds[name, 0].max(axis=0) for name in ("products", "gather", "beside"))
        rounds |= {"gather_s": gather, "gather_adds_s": np.maximum(beside - products, 0.0)}
        rounds["gather_hides"] = hidden_share(products, gather, beside)
        of_all_ranks = {name: by_size[name].max(axis=1) for name in sizes if name.endswith(("_exchange", "_pair"))}
        of_all_ranks["experts"] = np.median(experts, axis=1)
        return Machine(
            num_nodes=self.num_nodes,
            ranks_per_node=self.per_node,
            name=platform.node(),
            device=torch.cuda.get_device_name(self.device) if self.device.type == "cuda" else "cpu",
            transport=self.transport_name,
            rank_flops_per_s=_short(flops * sizes["experts"][-1] / np.median(experts[-1], axis=-1)),
            rates={name: _short(np.median(values)) for name, values in rounds.items()},
            spread={name: _short(np.ptp(values) / (np.median(values) or 1.0), 2) for name, values in rounds.items()},
            versions={"moesaic": __version__, "torch": torch.__version__},
            links={kind: found for kind, found in links.items() if found},
            tables={
                name: {"rows" if name == "experts" else "bytes": sizes[name], "seconds": _short(np.median(values, axis=-1))}
                for name, values in of_all_ranks.items()
            },
        )

    def _links(self, kind: str, seconds: dict[tuple[str, int], np.ndarray], size: int) -> dict[str, float]:
        """Bytes per second of every pair of nodes, or of ranks of a node, named by their numbers, as in "0-1"."""
        found = {}
        for turn in (turn for name, turn in seconds if name == f"{kind}_turn"):
            seconds_NLn = seconds[f"{kind}_turn", turn].reshape(self.num_nodes, self.per_node, -1)
            # The ranks of a node are a group of their own; all nodes together are one, in which a node ends with its last rank.
            groups = seconds_NLn if kind == "ranks" else seconds_NLn.max(axis=1)[None]
            num_bytes = size if kind == "ranks" else size * self.per_node
            for group, seconds_Mn in enumerate(groups):
                first, count = group * len(seconds_Mn), len(seconds_Mn)
                for a in range(count):
                    if a < (b := (turn - a) % count):
                        found[f"{first + a}-{first + b}"] = _short(num_bytes / np.median(seconds_Mn[[a, b]].max(axis=0)))
        return found


def fit(sizes: Sequence[int], seconds: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Fixed seconds and seconds per unit through the smallest and the largest size, where seconds [sizes, ...] may be several.

    Example: 3 s for 10 units and 12 s for 100 are 2 s and 0.1 s per unit.
    """
    first, last = seconds[0], seconds[-1]
    unit_s = np.where(last > first, (last - first) / (sizes[-1] - sizes[0]), last / sizes[-1])
    return np.maximum(first - unit_s * sizes[0], 0.0), unit_s


def hidden_share(products_s: np.ndarray, gather_s: np.ndarray, beside_s: np.ndarray) -> np.ndarray:
    """The share of the shorter of two that is saved by running them beside each other.

    Example: products of 3 s and a gather of 2 s that take 3 s together save all of the gather; 4 s, half of it; 5 s, nothing.
    """
    return np.clip((products_s + gather_s - beside_s) / np.minimum(products_s, gather_s), 0.0, 1.0)


def _short(values: Any, digits: int = 5) -> Any:
    """A number, or a list of numbers, with so many significant digits."""
    return float(f"{values:.{digits}g}") if np.ndim(values) == 0 else [_short(value, digits) for value in values]
