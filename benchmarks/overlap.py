"""Exposed communication with overlap and without, between nodes whose links have a given rate.

    moesaic bench overlap --nodes 2 --link-mbit 200 --profile FOLDER

A small transformer of attention and MoE layers trains in two modes, on the same weights and tokens: as usual, and with
`DebugConfig.overlap` off, which waits for every collective right after its launch. Every rank holds copies of another node's
experts, so the bytes are the same in every step. The modes alternate step by step; the result is the wait of the rank that waited
longest. Copies and their gradients travel under attention, routed tokens under shared experts (`--shared-ffn`).
"""

from __future__ import annotations

import tempfile
import time
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import click
import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh

from ..placement import OwnerMap, Placement
from ..placement.machine import topology_of
from ..runtime import DebugConfig, Handle, MoELayer, RuntimeConfig, shard_experts
from .network import RANK_ENVIRONMENT, run_on_nodes
from .ranks import Rank, run_on_ranks
from .records import JSON_OPTION, MACHINE_OPTION, publish, with_range

MODES: dict[str, DebugConfig] = {
    "overlap": DebugConfig(),
    "no overlap": DebugConfig(overlap=False),
}
COLUMNS = (
    "mode",
    "step_s",
    "step_s_min",
    "step_s_max",
    "exposed_gather_s",
    "exposed_reduce_s",
    "exposed_s",
    "ratio_to_no_overlap",
    "exposed_tokens_s",
    "ratio_tokens",
    "ratio_with_tokens",
)
_WARM_UP_STEPS = 2


@dataclass(frozen=True, kw_only=True)
class OverlapCase:
    """One benchmark. Every rank has one sequence of `tokens`, and copies of `slots` experts of another rank per layer."""

    nodes: int
    ranks_per_node: int
    link_mbit: float
    layers: int
    hidden: int
    ffn: int
    shared_ffn: int
    heads: int
    experts: int
    top_k: int
    tokens: int
    slots: int
    rounds: int
    machine: str = ""

    @property
    def ranks(self) -> int:
        """Processes."""
        return self.nodes * self.ranks_per_node


class Attention(nn.Module):
    """Causal self-attention over one sequence [T, D], residual."""

    def __init__(self, dim: int, heads: int):
        super().__init__()
        self.heads = heads
        self.norm = nn.RMSNorm(dim)
        self.qkv = nn.Linear(dim, 3 * dim, bias=False)
        self.out = nn.Linear(dim, dim, bias=False)

    def forward(self, x_TD: Tensor) -> Tensor:
        """[T, D] to [T, D]."""
        q, k, v = self.qkv(self.norm(x_TD)).view(x_TD.shape[0], 3, self.heads, -1).permute(1, 2, 0, 3)[:, None]
        y_HTC = F.scaled_dot_product_attention(q, k, v, is_causal=True)[0]
        return x_TD + self.out(y_HTC.transpose(0, 1).reshape(x_TD.shape))


class SharedExpert(nn.Module):
    """A SwiGLU expert for every token."""

    def __init__(self, dim: int, ffn_dim: int):
        super().__init__()
        self.gate_up = nn.Linear(dim, 2 * ffn_dim, bias=False)
        self.down = nn.Linear(ffn_dim, dim, bias=False)

    def forward(self, x_TD: Tensor) -> Tensor:
        """[T, D] to [T, D]."""
        gate, up = self.gate_up(x_TD).chunk(2, dim=-1)
        return self.down(F.silu(gate) * up)


class Block(nn.Module):
    """Attention, then the MoE layer."""

    def __init__(self, case: OverlapCase):
        super().__init__()
        self.attention = Attention(case.hidden, case.heads)
        shared = SharedExpert(case.hidden, case.shared_ffn) if case.shared_ffn else None
        self.moe = MoELayer(case.hidden, case.ffn, case.experts, case.top_k, shared=shared)

    def forward(self, x_TD: Tensor) -> Tensor:
        """[T, D] to [T, D]."""
        x_TD = self.attention(x_TD)
        return x_TD + self.moe(x_TD)


class _Run:
    """One mode on this rank."""

    def __init__(self, case: OverlapCase, debug: DebugConfig):
        torch.manual_seed(0)
        self.model = nn.Sequential(*(Block(case) for _ in range(case.layers)))
        owners = OwnerMap.contiguous(case.layers, case.experts, case.ranks).expert_to_owner_LE
        self.handle: Handle = shard_experts(
            self.model,
            mesh=init_device_mesh("cpu", (case.ranks,)),
            config=RuntimeConfig(slots=case.slots, shard_dense=False, check_replicas_every=0, debug=debug),
            machine=case.machine or None,
            placements=[_copies_of_next(owners_E, case) for owners_E in owners],
        )
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=1e-3)

    def step(self, x_TD: Tensor) -> float:
        dist.barrier()
        start_s = time.perf_counter()
        loss = self.model(x_TD).square().mean() + self.handle.aux_loss()
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.handle.step()
        return time.perf_counter() - start_s


def _copies_of_next(owners_E: np.ndarray, case: OverlapCase) -> Placement:
    """Every rank holds the first experts of a rank of the next node, or of the next rank: all links carry equal bytes."""
    replicas_RE = Placement.owners_only(owners_E, case.ranks).replicas_RE.copy()
    ranks_away = case.ranks_per_node if case.nodes > 1 else 1
    for rank in range(case.ranks):
        next_rank = (rank + ranks_away) % case.ranks
        replicas_RE[rank, np.flatnonzero(owners_E == next_rank)[: case.slots]] = True
    return Placement(owners_E, replicas_RE)


def measure(case: OverlapCase, folder: Path, this: Rank) -> dict[str, list[dict[str, float]]]:
    """Seconds of every step of each mode on this rank; a profile of one more step goes to `folder`."""
    with this.process_group(case.ranks, timeout_s=120):
        return _measure(case, folder, this.rank)


def _measure(case: OverlapCase, folder: Path, rank: int) -> dict[str, list[dict[str, float]]]:
    runs = {mode: _Run(case, debug) for mode, debug in MODES.items()}
    x_TD = torch.randn(case.tokens, case.hidden, generator=torch.Generator().manual_seed(rank))
    measured: dict[str, list[dict[str, float]]] = {mode: [] for mode in MODES}
    for step in range(_WARM_UP_STEPS + case.rounds):
        for mode, run in runs.items():
            seconds = run.step(x_TD)
            if step >= _WARM_UP_STEPS:
                metrics = run.handle.metrics()
                measured[mode].append({"step_s": seconds} | {key: metrics[key] for key in metrics if key.startswith("exposed_")})
    first, *others = (torch.cat([p.detach().flatten() for p in run.model.parameters()]) for run in runs.values())
    assert all(torch.equal(first, other) for other in others), "the modes have trained different weights"
    for mode, run in runs.items():
        with run.handle.telemetry.profile(folder / f"{mode.replace(',', '').replace(' ', '-')}-rank-{rank}.json"):
            run.step(x_TD)
    return measured


def run(case: OverlapCase, folder: Path) -> list[dict[str, Any]]:
    """Measure a case, one record per mode; a profile of one step per mode and rank stays in `folder`."""
    if case.machine:
        topology_of(case.machine, num_nodes=case.nodes, ranks_per_node=case.ranks_per_node)  # refused here, and not by every rank
    per_rank = run_on_ranks(
        partial(measure, case, folder.absolute()),
        case.ranks,
        lambda command: run_on_nodes(command, case.ranks, case.nodes, case.link_mbit * 1e6, RANK_ENVIRONMENT),
    )
    values = {mode: _medians([measured[mode] for measured in per_rank]) for mode in MODES}
    off = values["no overlap"]
    return [
        {
            "mode": mode,
            **asdict(case),
            **values[mode],
            "ratio_to_no_overlap": values[mode]["exposed_s"] / off["exposed_s"],
            "ratio_tokens": values[mode]["exposed_tokens_s"] / off["exposed_tokens_s"],
            "ratio_with_tokens": values[mode]["exposed_with_tokens_s"] / off["exposed_with_tokens_s"],
        }
        for mode in MODES
    ]


def _medians(per_rank: list[list[dict[str, float]]]) -> dict[str, float]:
    """The median over steps of the longest wait of any rank, with the range of some keys."""
    for step in (step for steps in per_rank for step in steps):
        step["exposed_s"] = step["exposed_gather_s"] + step["exposed_reduce_s"]
        step["exposed_with_tokens_s"] = step["exposed_s"] + step["exposed_tokens_s"]
    longest = {key: np.max([[step[key] for step in steps] for steps in per_rank], axis=0) for key in per_rank[0][0]}
    medians = {key: float(np.median(seconds)) for key, seconds in longest.items()}
    for key in ("step_s", "exposed_s", "exposed_tokens_s"):
        medians |= with_range(key, longest[key])
    return medians


@click.command("overlap", short_help="Exposed communication between nodes, with overlap and without.")
@click.option("--nodes", type=click.IntRange(min=1), default=2, help="Network namespaces with links.")
@click.option("--ranks-per-node", type=click.IntRange(min=1), default=1)
@click.option("--link-mbit", type=click.FloatRange(min=0.1), default=200.0, help="Rate of a node's link.")
@click.option("--layers", type=click.IntRange(min=1), default=4)
@click.option("--hidden", type=click.IntRange(min=1), default=128, help="Model dim D.")
@click.option("--ffn", type=click.IntRange(min=1), default=256, help="Expert ffn dim F.")
@click.option("--shared-ffn", type=click.IntRange(min=0), default=0, help="Shared experts' ffn dim; 0: none.")
@click.option("--heads", type=click.IntRange(min=1), default=4)
@click.option("--experts", type=click.IntRange(min=1), default=8)
@click.option("--top-k", type=click.IntRange(min=1), default=2)
@click.option("--tokens", type=click.IntRange(min=1), default=2048, help="Tokens per rank, one sequence.")
@click.option("--slots", type=click.IntRange(min=1), default=2, help="Copies that a rank holds per layer.")
@click.option("--rounds", type=click.IntRange(min=1), default=9, help="Timed steps of each mode.")
@click.option("--profile", "folder", metavar="FOLDER", help="Keep a profile of one step of each mode and rank.")
@MACHINE_OPTION
@JSON_OPTION
def command(folder: str | None, json_path: str | None, **given: Any) -> None:
    """Seconds that ranks wait for copies, gradients and routed tokens, with overlap and without."""
    with tempfile.TemporaryDirectory() as temporary:
        kept = Path(folder or temporary)
        kept.mkdir(parents=True, exist_ok=True)
        publish("overlap", run(OverlapCase(**given), kept), COLUMNS, json_path)
