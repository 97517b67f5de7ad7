"""Throughput of one MoE layer's training step across node counts: on real nodes, on emulated ones, or predicted.

    torchrun --nnodes 4 --nproc-per-node 8 ... -m moesaic.benchmarks.scaling --nodes 1,2,4      real
    moesaic bench scaling --nodes 1,2,4 --link-mbit 200                                         emulated
    moesaic bench scaling --mode simulated --machine h100 --ranks-per-node 8 --nodes 1,2,4,8    simulated

The layer, its routing and its policies are those of `moesaic bench step`; every rank has the same number of tokens.

real        Under torchrun: each count of nodes on the first nodes of the job, while the others wait.
emulated    Nodes are network namespaces joined by links of `link_mbit`; every rank is limited to the same share of a core, so
            that no rank uses the time of another. Everything else is real: processes, transports, weights, bytes.
simulated   No processes: placements from the load of the previous step, priced on the load of the step itself by the cost model
            (placement/cost.py) for a machine of `Topology.preset` or a machine file.

In each mode planners price with a machine file, if --machine names one.

efficiency is the throughput per rank, relative to the balanced ideal on the fewest nodes of the table.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

import click
import torch
import torch.distributed as dist

from ..placement import Topology
from ..placement.machine import read_machine, topology_of
from . import cpu_share
from .network import RANK_ENVIRONMENT, run_on_nodes
from .ranks import Rank, run_on_ranks
from .records import JSON_OPTION, publish
from .scaling_model import simulate
from .step import StepCase, layer_options, measure, records_of

COLUMNS = (
    "mode",
    "nodes",
    "ranks",
    "policy",
    "tokens_per_s",
    "ratio_to_static",
    "ratio_to_ideal",
    "ratio_to_ideal_low",
    "ratio_to_ideal_high",
    "efficiency",
    "max_over_mean",
    "copies",
    "exposed_comm_share",
)
MODES = ("auto", "real", "emulated", "simulated")
# The share of the machine's cores for all emulated ranks; the rest is for the links and the system.
_USED_CORES = 0.8
_TIMEOUT = timedelta(hours=1)


@dataclass(frozen=True, kw_only=True)
class ScalingCase:
    """The layer to measure, on each count of nodes, ascending; `layer.ranks` is set per count."""

    mode: str
    nodes: tuple[int, ...]
    ranks_per_node: int
    link_mbit: float
    machine: str
    layer: StepCase

    def on(self, nodes: int) -> StepCase:
        """The layer on this many nodes."""
        return replace(self.layer, ranks=nodes * self.ranks_per_node)

    @property
    def world_size(self) -> int:
        """Ranks on the most nodes."""
        return self.nodes[-1] * self.ranks_per_node


def run(case: ScalingCase) -> list[dict[str, Any]] | None:
    """Measure a case, one record per node count and policy; None on all ranks of a real job but the first.

    Raises:
        ValueError: the job is smaller than the case, or this machine cannot emulate nodes.
    """
    topologies = [_topology(case, nodes) for nodes in case.nodes]
    if case.mode == "simulated":
        device = read_machine(case.machine).device if _is_file(case) else case.machine
        bytes_per_element = 4 if device == "cpu" else 2
        return _records(
            case,
            [simulate(case.on(n), t, bytes_per_element) for n, t in zip(case.nodes, topologies, strict=True) if t is not None],
        )
    if case.mode == "real":
        by_count = _real(case)
    else:
        by_count = _emulated(case)
    if by_count is None:
        return None
    return _records(case, [records_of(case.on(nodes), measured) for nodes, measured in zip(case.nodes, by_count, strict=True)])


def _records(case: ScalingCase, tables: Sequence[Sequence[dict[str, Any]]]) -> list[dict[str, Any]]:
    (ideal,) = (record for record in tables[0] if record["policy"] == "ideal")
    per_rank = ideal["tokens_per_s"] / ideal["ranks"]
    return [
        {
            **record,
            "mode": case.mode,
            "nodes": nodes,
            "ranks_per_node": case.ranks_per_node,
            "link_mbit": case.link_mbit if case.mode == "emulated" else None,
            "machine": case.machine if case.mode == "simulated" or _is_file(case) else None,
            "efficiency": record["tokens_per_s"] / record["ranks"] / per_rank,
        }
        for nodes, table in zip(case.nodes, tables, strict=True)
        for record in table
    ]


def _is_file(case: ScalingCase) -> bool:
    return case.machine.endswith(".toml")


def _topology(case: ScalingCase, nodes: int) -> Topology | None:
    """What planners price with: a machine file, the simulated preset, or the emulated links; None: what real ranks find."""
    if case.mode == "simulated" or _is_file(case):
        return topology_of(case.machine, num_nodes=nodes, ranks_per_node=case.ranks_per_node)
    if case.mode == "real":
        return None
    cpu = Topology.preset("cpu", num_nodes=nodes, ranks_per_node=case.ranks_per_node)
    return replace(cpu, node_bytes_per_s=case.link_mbit * 1e6 / 8, flops_per_s=cpu.flops_per_s * _cores_per_rank(case))


def _cores_per_rank(case: ScalingCase) -> float:
    return min(1.0, _USED_CORES * len(os.sched_getaffinity(0)) / case.world_size)


def _real(case: ScalingCase) -> list[list[dict[str, Any]]] | None:
    try:
        store, rank, world_size = next(dist.rendezvous("env://"))
    except ValueError as error:
        raise ValueError(f"--mode real needs the variables that torchrun sets: {error}") from None
    if world_size < case.world_size:
        raise ValueError(
            f"--nodes {case.nodes[-1]} of {case.ranks_per_node} ranks are {case.world_size} ranks, the job has {world_size}; "
            "start more, or give fewer"
        )
    device = torch.device("cpu")
    if torch.cuda.is_available():
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
        torch.cuda.set_device(device)
    return _in_turn(case, Rank(rank, store), world_size, device)


def _in_turn(case: ScalingCase, this: Rank, world_size: int, device: torch.device) -> list[list[dict[str, Any]]] | None:
    """Measure every node count in turn, on the first ranks; return the measurements of all ranks on rank 0."""
    this.store.set_timeout(_TIMEOUT)
    measured = []
    for nodes in case.nodes:
        ranks = nodes * case.ranks_per_node
        if this.rank < ranks:
            with this.process_group(ranks, name=f"{nodes} nodes", device=device.type):
                own = measure(this.rank, case.on(nodes), topology=_topology(case, nodes), device=device)
                per_rank: list[Any] = [None] * ranks
                dist.all_gather_object(per_rank, own)
                measured.append(per_rank)
        _barrier(f"after {nodes} nodes", this.store, world_size)
    return measured if this.rank == 0 else None


def _barrier(name: str, store: dist.Store, world_size: int) -> None:
    """Wait for all ranks, also those outside the process group."""
    if store.add(f"{name}: count", 1) == world_size:
        store.set(name, "all")
    store.wait([name])


def _emulated(case: ScalingCase) -> list[list[dict[str, Any]]] | None:
    try:
        shares = cpu_share.CpuShares(case.world_size, _cores_per_rank(case))
    except OSError as error:
        raise ValueError(f"--mode emulated needs control groups that limit the CPU: {error}") from None
    with shares:
        groups = [shares.folder(rank) for rank in range(case.world_size)]
        first, *_ = run_on_ranks(
            partial(_emulated_rank, case, groups),
            case.world_size,
            lambda command: run_on_nodes(command, case.world_size, case.nodes[-1], case.link_mbit * 1e6, RANK_ENVIRONMENT),
        )
    return first


def _emulated_rank(case: ScalingCase, groups: Sequence[Path], this: Rank) -> list[list[dict[str, Any]]] | None:
    # Compile what is compiled at first use before this rank is slowed down.
    with this.process_group(case.world_size, name="rehearsal"):
        measure(this.rank, replace(case.on(case.nodes[-1]), hidden=16, ffn=16, tokens=64, rounds=1))
    cpu_share.enter(groups[this.rank])
    return _in_turn(case, this, case.world_size, torch.device("cpu"))


def _counts(text: str) -> tuple[int, ...]:
    parts = [part.strip() for part in text.split(",")]
    if not all(part.isdecimal() and int(part) for part in parts):
        raise ValueError(f"--nodes has {text!r}; give whole numbers of 1 or more, separated by commas")
    return tuple(sorted({int(part) for part in parts}))


@click.command("scaling", short_help="Throughput across node counts: real, emulated or simulated nodes.")
@click.option("--mode", type=click.Choice(MODES), default="auto", help="auto: real under torchrun, else emulated.")
@click.option("--nodes", default="1,2,4", help="Numbers of nodes, separated by commas.")
@click.option("--ranks-per-node", type=click.IntRange(min=1), help="By default the ranks that torchrun started per node, else 1.")
@click.option("--link-mbit", type=click.FloatRange(min=0.1), default=200.0, help="Rate of an emulated node's link.")
@click.option("--machine", default="h100", help="The machine to simulate (cpu, a100, h100, b200), or a file to price with.")
@layer_options(hidden=256, ffn=512, tokens=1024, rounds=9)
@JSON_OPTION
def command(
    mode: str,
    nodes: str,
    ranks_per_node: int | None,
    link_mbit: float,
    machine: str,
    json_path: str | None,
    **layer: Any,
) -> None:
    """Throughput of one MoE layer's training step by node count and placement policy."""
    launched = int(os.environ.get("WORLD_SIZE", "1")) > 1
    if mode == "auto":
        mode = "real" if launched else "emulated"
    case = ScalingCase(
        mode=mode,
        nodes=_counts(nodes),
        ranks_per_node=ranks_per_node or int(os.environ.get("LOCAL_WORLD_SIZE", "1")),
        link_mbit=link_mbit,
        machine=machine,
        layer=StepCase(ranks=1, **layer),
    )
    records = run(case)
    if records is not None:
        publish("scaling", records, COLUMNS, json_path)


if __name__ == "__main__":
    # Under its own name, by which the ranks of emulated nodes find their function.
    from moesaic.benchmarks.scaling import command as scaling

    scaling()
