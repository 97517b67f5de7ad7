"""One MoE layer's training step on R processes of one machine, by placement policy.

The policies run interleaved, round by round, on the same weights, tokens and routing; ratios are medians over the rounds, with
a 95 % interval (low, high) beside them. Expert popularity follows a Zipf law, expert e before expert e + 1, so that the
contiguous owner map puts the hot experts on rank 0; or a round is a step of a workload (placement/traces/workloads.py), and the
medians are over means of four rounds. The `ideal` policy is static placement under a perfectly balanced routing of equal cost, of
as many tokens on every rank; the floor is the bare matrix products of one rank at perfect balance, on all ranks at once.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import resource
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import click
import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh

from ..collectives.lifetime import end_with_parent, first_failure
from ..placement import Topology
from ..placement.machine import topology_of
from ..placement.solvers.baselines.hecate import solve as hecate
from ..placement.traces.workloads import Workload
from ..runtime import DebugConfig, Handle, MoELayer, Router, RouterConfig, Routing, RuntimeConfig, shard_experts
from ..runtime.routing.router import TopKRouter, balanced_ids
from ..runtime.step.metrics import EXPOSED
from .network import RANK_ENVIRONMENT, Node, linked_nodes
from .records import median_interval

POLICIES: dict[str, RuntimeConfig] = {
    "static": RuntimeConfig(policy="static", slots=0, shard_dense=False),
    # Hecate as published: the hottest experts on every rank, as many as there are slots, and the even split over copies.
    "hecate": RuntimeConfig(policy="hecate", debug=DebugConfig(split="local_even", calibrate="never"), shard_dense=False),
    "quota": RuntimeConfig(policy="quota", shard_dense=False),
    "balance": RuntimeConfig(policy="balance", shard_dense=False),
    "auto": RuntimeConfig(policy="auto", shard_dense=False),
    "ideal": RuntimeConfig(policy="static", slots=0, shard_dense=False),
}
COLUMNS = (
    "policy",
    "tokens_per_s",
    "ratio_to_static",
    "ratio_to_static_low",
    "ratio_to_static_high",
    "ratio_to_ideal",
    "ratio_to_ideal_low",
    "ratio_to_ideal_high",
    "ratio_to_floor",
    "experts_ratio_to_floor",
    "max_over_mean",
    "copies",
    "bytes_cross_rank",
    "exposed_comm_share",
)
WORKLOAD_COLUMNS = ("workload", *COLUMNS, "step_s", "seconds_over_w0", "spread")
OPTIMIZERS: dict[str, Callable[..., torch.optim.Optimizer]] = {"sgd": torch.optim.SGD, "adamw": torch.optim.AdamW}
Command = TypeVar("Command", bound=Callable[..., Any])
# Rounds cycle through this many routings, so that a policy must predict and cannot just repeat the last load.
NUM_ROUTINGS = 4
# Rounds of a workload whose mean counts as one: every so many hold one burst of w7.
ROUNDS_PER_BLOCK = 4
# Whose outputs are compared; the last is the first move of w6 and the first burst of w7.
WARM_UP_ROUNDS = 4


@dataclass(frozen=True, kw_only=True)
class StepCase:
    """The layer and its load. `tokens` are per rank, the mean over ranks. `workload`: in place of `skew`, one of `WORKLOADS`."""

    ranks: int
    experts: int
    hidden: int
    ffn: int
    tokens: int
    top_k: int
    skew: float
    slots: int
    rounds: int
    optimizer: str = "sgd"
    workload: str | None = None
    machine: str = ""
    """A machine file to price with; empty: the preset of the device."""
    nodes: int = 1
    """Network namespaces that the ranks fill in order."""
    link_mbit: float = 200.0
    """Rate of a node's link, where there are several."""

    def __post_init__(self) -> None:
        if self.ranks % self.nodes:
            raise ValueError(f"--ranks is {self.ranks} on --nodes {self.nodes}; give a multiple of the nodes")
        if self.top_k > self.experts:
            raise ValueError(f"--top-k is {self.top_k} with {self.experts} experts; it must be from 1 to {self.experts}")


class GivenRouter(Router):
    """A softmax router that computes its scores and then returns given experts."""

    def __init__(self, router: TopKRouter, routings: list[Tensor]):
        super().__init__()
        self.router = router
        self.routings = routings
        self.round = 0

    def forward(self, x_TD: Tensor, topk_ids_TK: Tensor | None = None) -> Routing:
        """The routing of the current round."""
        scored = self.router(x_TD)
        ids_TK = self.routings[self.round % len(self.routings)]
        assert scored.logits_TE is not None
        return Routing(ids_TK, scored.logits_TE.gather(1, ids_TK).softmax(dim=-1), scored.logits_TE)


def layer_options(hidden: int, ffn: int, tokens: int, rounds: int) -> Callable[[Command], Command]:
    """The command line options of a StepCase's layer, with these defaults."""
    at_least_one, not_negative = click.IntRange(min=1), click.FloatRange(min=0)
    options = (
        click.option("--experts", type=at_least_one, default=16, show_default=True),
        click.option("--hidden", type=at_least_one, default=hidden, show_default=True, help="Model dim D."),
        click.option("--ffn", type=at_least_one, default=ffn, show_default=True, help="Expert ffn dim F."),
        click.option("--tokens", type=at_least_one, default=tokens, show_default=True, help="Tokens per rank."),
        click.option("--top-k", type=at_least_one, default=2, show_default=True),
        click.option("--skew", type=not_negative, default=1.2, show_default=True, help="Zipf exponent of expert popularity."),
        click.option("--slots", type=click.IntRange(min=0), default=2, show_default=True, help="Copies a rank may hold."),
        click.option("--rounds", type=at_least_one, default=rounds, show_default=True, help="Timed steps of each policy."),
    )

    def decorate(command: Command) -> Command:
        for option in reversed(options):
            command = option(command)
        return command

    return decorate


def zipf_ids(tokens: int, experts: int, top_k: int, skew: float, seed: int) -> Tensor:
    """K different experts per token, drawn without replacement with odds (e + 1) ** -skew: int64 [T, K].

    Gumbel top-k (Kool et al., arXiv 1903.06059): the K largest of log-odds plus Gumbel noise are such a draw.
    """
    generator = torch.Generator().manual_seed(seed)
    log_odds_E = -skew * torch.arange(1, experts + 1).log()
    noise_TE = -torch.empty(tokens, experts).exponential_(generator=generator).log()
    return (log_odds_E + noise_TE).topk(top_k, dim=-1).indices


def run(case: StepCase) -> list[dict[str, Any]]:
    """Measure a case; one record per policy."""
    if case.machine:  # refused here, and not by every rank
        topology_of(case.machine, num_nodes=case.nodes, ranks_per_node=case.ranks // case.nodes)
    os.environ |= RANK_ENVIRONMENT
    # Ranks are forked from one process that has imported what they need.
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__])
    with ExitStack() as stack:
        folder = stack.enter_context(tempfile.TemporaryDirectory())
        nodes = linked_nodes(stack, case.nodes, case.link_mbit * 1e6)
        of_R = [nodes[rank * case.nodes // case.ranks] if nodes else None for rank in range(case.ranks)]
        processes = [context.Process(target=_rank, args=(rank, node, case, folder)) for rank, node in enumerate(of_R)]
        for process in processes:
            process.start()
            stack.callback(process.join)
            stack.callback(process.kill)
        if status := first_failure([partial(getattr, process, "exitcode") for process in processes]):
            raise RuntimeError(f"a rank of the benchmark ended with {status}")
        return records_of(case, json.loads((Path(folder) / "measured.json").read_text(encoding="utf-8")))


def _rank(rank: int, node: Node | None, case: StepCase, folder: str) -> None:
    end_with_parent()  # the process that it is forked from, which ends with the benchmark
    if node is not None:
        node.enter()
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo",
        store=dist.FileStore(str(Path(folder) / "store"), case.ranks),
        rank=rank,
        world_size=case.ranks,
        timeout=timedelta(seconds=300),
    )
    measured = measure(rank, case)
    per_rank: list[Any] = [None] * case.ranks
    dist.all_gather_object(per_rank, measured)
    if rank == 0:
        # A file, not a pipe: the parent waits for the ranks to end and does not read, so a full pipe would block them forever.
        (Path(folder) / "measured.json").write_text(json.dumps(per_rank), encoding="utf-8")
    dist.destroy_process_group()


class _Policy:
    """One policy's layer, optimizer and counters on this rank."""

    def __init__(self, name: str, rank: int, case: StepCase, topology: Topology | None, device: torch.device):
        torch.manual_seed(0)
        config = replace(POLICIES[name], check_replicas_every=0)  # the routers, which do not choose, are not averaged
        if config.slots:
            config = replace(config, slots=case.slots)
        routings = [ids_TK.to(device) for ids_TK in _routings(name, rank, case)]
        scores = TopKRouter(case.hidden, case.experts, case.top_k, RouterConfig(aux_loss_coef=0.0))
        self.router = GivenRouter(scores, routings)
        layer = MoELayer(case.hidden, case.ffn, case.experts, case.top_k, router=self.router)
        self.model = nn.ModuleDict({"moe": layer}).to(device)
        mesh = init_device_mesh(device.type, (case.ranks,))
        solver = partial(hecate, degree=case.slots) if name == "hecate" else None
        machine = case.machine or None
        self.handle: Handle = shard_experts(
            self.model, mesh=mesh, config=config, topology=topology, machine=machine, solver=solver
        )
        self.layer = layer
        self.optimizer = OPTIMIZERS[case.optimizer](self.model.parameters(), lr=1e-4, fused=True)
        self.handle.telemetry.clock.enabled = True
        self.seconds: list[float] = []
        self.metrics: list[dict[str, float]] = []
        generator, shape = torch.Generator().manual_seed(rank), (len(routings[0]), case.hidden)
        self.x_TD = torch.randn(shape, generator=generator).to(device).requires_grad_()
        self.dy_TD = (torch.randn(shape, generator=generator) / case.tokens).to(device)

    def step(self, round_index: int) -> Tensor:
        self.router.round = round_index
        y_TD = self.layer(self.x_TD)
        y_TD.backward(self.dy_TD)
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.handle.step()
        return y_TD.detach()


def _routings(name: str, rank: int, case: StepCase) -> list[Tensor]:
    """The routings of one rank, which rounds take in turn."""
    T, E, K = case.tokens, case.experts, case.top_k
    seeds = [1000 * rank + i for i in range(NUM_ROUTINGS)]
    if name == "ideal":
        return [balanced_ids(T, E, K, seed=seed) for seed in seeds]
    if case.workload is None:
        return [zipf_ids(T, E, K, case.skew, seed) for seed in seeds]
    workload = Workload(name=case.workload, num_ranks=case.ranks, num_experts=E, top_k=K, tokens_per_rank=T)
    return [torch.from_numpy(workload.topk_ids(rank, step)) for step in range(WARM_UP_ROUNDS + case.rounds)]


def measure(rank: int, case: StepCase, *, topology: Topology | None = None, device: torch.device | None = None) -> dict[str, Any]:
    """Measure a case on this rank of the default process group, on the CPU if no `device` is given. Collective.

    `topology` describes the machine to the planner; see `shard_experts`. The results of all ranks, in rank order, are the input
    of `records_of`.
    """
    device = device or torch.device("cpu")
    policies = {name: _Policy(name, rank, case, topology, device) for name in POLICIES}
    floor = _floor(case, device)
    floor_seconds: list[float] = []
    names = list(policies)
    for round_index in range(WARM_UP_ROUNDS + case.rounds):
        is_timed = round_index >= WARM_UP_ROUNDS
        outputs: dict[str, Tensor] = {}
        # Each round starts with another policy, so that no policy always runs after the same other one.
        for name in names[round_index % len(names) :] + names[: round_index % len(names)]:
            policy = policies[name]
            if round_index == WARM_UP_ROUNDS:
                policy.handle.telemetry.clock.seconds.clear()
            policy.x_TD.grad = None
            seconds, outputs[name] = _timed(partial(policy.step, round_index), device)
            if is_timed:
                policy.seconds.append(seconds)
                policy.metrics.append(policy.handle.metrics())
        if not is_timed:
            # With copies or without, the layers have trained the same steps and must give the same outputs.
            for name in outputs.keys() - {"static", "ideal"}:
                torch.testing.assert_close(outputs[name], outputs["static"], rtol=1e-4, atol=1e-4)
        else:
            floor_seconds.append(_timed(floor, device)[0])
    return {
        "seconds": {name: policy.seconds for name, policy in policies.items()},
        "metrics": {name: policy.metrics for name, policy in policies.items()},
        "stage_s": {
            name: {k: v / case.rounds for k, v in p.handle.telemetry.clock.seconds.items()} for name, p in policies.items()
        },
        "floor": floor_seconds,
        "peak_rss_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024),
    }


def _timed(work: Callable[[], Any], device: torch.device) -> tuple[float, Any]:
    """Seconds from a common start until the last rank is done, and the result of `work`."""
    dist.barrier()
    start = time.perf_counter()
    result = work()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    dist.barrier()
    return time.perf_counter() - start, result


def _floor(case: StepCase, device: torch.device) -> Callable[[], None]:
    """The six matrix products of a SwiGLU expert step, for all routed tokens of a balanced rank at once, into ready buffers."""
    N, D, F = case.tokens * case.top_k, case.hidden, case.ffn
    random = partial(torch.randn, device=device)
    x, h, gate_up = random(N, D), random(N, F), random(N, 2 * F)
    w_gate_up, w_down = random(2 * F, D), random(D, F)
    dw_gate_up, dw_down = torch.empty_like(w_gate_up), torch.empty_like(w_down)

    def products() -> None:
        torch.mm(x, w_gate_up.t(), out=gate_up)
        torch.mm(h, w_down.t(), out=x)
        torch.mm(x, w_down, out=h)
        torch.mm(x.t(), h, out=dw_down)
        torch.mm(gate_up, w_gate_up, out=x)
        torch.mm(gate_up.t(), x, out=dw_gate_up)
        for tensor in (x, h, gate_up):
            tensor.fill_(0.5)  # keeps the numbers finite from round to round

    return products


def records_of(case: StepCase, per_rank: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """One record per policy, from the results of `measure` on every rank.

    exposed_comm_share is the share of a step that ranks wait on average: for copies, their gradients, routed tokens, or slower
    ranks.
    """
    first_rounds = np.arange(0, case.rounds, ROUNDS_PER_BLOCK if case.workload else 1)
    num_rounds = np.diff([*first_rounds, case.rounds])

    def slowest_rank(seconds_of_R: list[list[float]]) -> np.ndarray:
        return np.add.reduceat(np.max(seconds_of_R, axis=0), first_rounds) / num_rounds

    seconds = {name: slowest_rank([m["seconds"][name] for m in per_rank]) for name in POLICIES}
    floor = slowest_rank([m["floor"] for m in per_rank])
    records = []
    for name in POLICIES:
        tokens_per_s = case.ranks * case.tokens / seconds[name]
        stage_s = {k: float(np.mean([m["stage_s"][name].get(k, 0.0) for m in per_rank])) for k in per_rank[0]["stage_s"][name]}
        metrics = [step for m in per_rank for step in m["metrics"][name]]
        ratios = {"static": seconds["static"] / seconds[name], "ideal": seconds["ideal"] / seconds[name]}
        intervals = {other: median_interval(ratio.tolist()) for other, ratio in ratios.items()}
        records.append(
            {
                "policy": name,
                **asdict(case),
                "tokens_per_s": float(np.median(tokens_per_s)),
                "tokens_per_s_min": float(tokens_per_s.min()),
                "tokens_per_s_max": float(tokens_per_s.max()),
                "ratio_to_static": float(np.median(ratios["static"])),
                "ratio_to_static_low": intervals["static"][0],
                "ratio_to_static_high": intervals["static"][1],
                "ratio_to_ideal": float(np.median(ratios["ideal"])),
                "ratio_to_ideal_low": intervals["ideal"][0],
                "ratio_to_ideal_high": intervals["ideal"][1],
                "ratio_to_floor": float(np.median(floor / seconds[name])),
                "experts_ratio_to_floor": float(np.median(floor)) / stage_s["experts"],
                "max_over_mean": float(np.mean([step["max_over_mean"] for step in metrics])),
                "copies": float(np.mean([step["copies_per_layer"] for step in metrics])),
                "bytes_cross_rank": sum(v for s in metrics for k, v in s.items() if k.startswith("bytes_")) / case.rounds,
                "exposed_comm_share": _exposed_share(per_rank, name),
                "peak_rss_bytes": max(m["peak_rss_bytes"] for m in per_rank),
                "step_s": float(np.median(seconds[name])),
                "stage_s": stage_s,
                "floor_s": float(np.median(floor)),
            }
        )
    return records


def add_spread(records: list[dict[str, Any]]) -> None:
    """Add what a policy's steps take over its steps of w0, and the most of that over the workloads, its spread.

    Steps of different workloads are compared by their ratios to the ideal, which was measured in the same rounds.
    """
    balanced = {record["policy"]: record["ratio_to_ideal"] for record in records if record["workload"] == "w0"}
    for record in records:
        record["seconds_over_w0"] = balanced[record["policy"]] / record["ratio_to_ideal"]
    for record in records:
        record["spread"] = max(r["seconds_over_w0"] for r in records if r["policy"] == record["policy"])


def _exposed_share(per_rank: list[dict[str, Any]], name: str) -> float:
    waits = [
        sum(step[f"exposed_{what}_s"] for what in EXPOSED) / seconds
        for measured in per_rank
        for step, seconds in zip(measured["metrics"][name], measured["seconds"][name], strict=True)
    ]
    return float(np.mean(waits))
