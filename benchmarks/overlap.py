"""Exposed communication with overlap and without, between nodes whose links have a given rate.

    moesaic bench overlap --nodes 2 --link-mbit 200 --profile FOLDER

A small transformer of attention and MoE layers trains in two modes, on the same weights and tokens: as usual, and with
`DebugConfig.overlap` off, which waits for every collective right after its launch. Every rank holds copies of another node's
experts, so the bytes are the same in every step. The modes alternate step by step; the result is the wait of the rank that waited
longest. Copies and their gradients travel under attention, routed tokens under shared experts (`--shared-ffn`).
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from datetime import timedelta
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
from ..runtime import DebugConfig, Handle, MoELayer, RuntimeConfig, shard_experts
from .network import RANK_ENVIRONMENT, run_on_nodes
from .records import JSON_OPTION, publish

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


def _rank(folder: Path) -> None:
    """Measure the case in `folder` on this rank."""
    case = OverlapCase(**json.loads((folder / "case.json").read_text(encoding="utf-8")))
    torch.set_num_threads(1)
    rank = int(os.environ["RANK"])
    store = dist.FileStore(str(folder / "store"), case.ranks)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=case.ranks, timeout=timedelta(seconds=120))
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
    (folder / f"rank-{rank}.json").write_text(json.dumps(measured), encoding="utf-8")
    dist.barrier()
    dist.destroy_process_group()


def run(case: OverlapCase, folder: Path) -> list[dict[str, Any]]:
    """Measure a case, one record per mode; a profile of one step per mode and rank stays in `folder`."""
    (folder / "case.json").write_text(json.dumps(asdict(case)), encoding="utf-8")
    program = [sys.executable, "-m", "moesaic.benchmarks.overlap", "--as-rank", str(folder)]
    run_on_nodes(program, case.ranks, case.nodes, case.link_mbit * 1e6, RANK_ENVIRONMENT)
    per_rank = [json.loads((folder / f"rank-{r}.json").read_text(encoding="utf-8")) for r in range(case.ranks)]
    for name in ("case.json", "store", *(f"rank-{r}.json" for r in range(case.ranks))):
        (folder / name).unlink(missing_ok=True)
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
        medians |= {f"{key}_min": float(longest[key].min()), f"{key}_max": float(longest[key].max())}
    return medians


@click.command("overlap", short_help="Exposed communication between nodes, with overlap and without.")
@click.option("--nodes", type=click.IntRange(min=1), default=2, show_default=True, help="Network namespaces with links.")
@click.option("--ranks-per-node", type=click.IntRange(min=1), default=1, show_default=True)
@click.option("--link-mbit", type=click.FloatRange(min=0.1), default=200.0, show_default=True, help="Rate of a node's link.")
@click.option("--layers", type=click.IntRange(min=1), default=4, show_default=True)
@click.option("--hidden", type=click.IntRange(min=1), default=128, show_default=True, help="Model dim D.")
@click.option("--ffn", type=click.IntRange(min=1), default=256, show_default=True, help="Expert ffn dim F.")
@click.option("--shared-ffn", type=click.IntRange(min=0), default=0, show_default=True, help="Shared experts' ffn dim; 0: none.")
@click.option("--heads", type=click.IntRange(min=1), default=4, show_default=True)
@click.option("--experts", type=click.IntRange(min=1), default=8, show_default=True)
@click.option("--top-k", type=click.IntRange(min=1), default=2, show_default=True)
@click.option("--tokens", type=click.IntRange(min=1), default=2048, show_default=True, help="Tokens per rank, one sequence.")
@click.option("--slots", type=click.IntRange(min=1), default=2, show_default=True, help="Copies that a rank holds per layer.")
@click.option("--rounds", type=click.IntRange(min=1), default=9, show_default=True, help="Timed steps of each mode.")
@click.option("--profile", "folder", metavar="FOLDER", help="Keep a profile of one step of each mode and rank.")
@JSON_OPTION
@click.option("--as-rank", "rank_folder", hidden=True)
def command(folder: str | None, json_path: str | None, rank_folder: str | None, **given: Any) -> None:
    """Seconds that ranks wait for copies, gradients and routed tokens, with overlap and without."""
    if rank_folder is not None:
        _rank(Path(rank_folder))
        return
    with tempfile.TemporaryDirectory() as temporary:
        kept = Path(folder or temporary)
        kept.mkdir(parents=True, exist_ok=True)
        publish("overlap", run(OverlapCase(**given), kept), COLUMNS, json_path)


if __name__ == "__main__":
    command()
