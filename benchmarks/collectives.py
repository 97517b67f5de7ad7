"""Collectives between processes of one machine, over transports and schedules: `moesaic bench collectives`.

    all_to_all     every rank sends `bytes` to every other rank
    sparse_gather  rank 0 owns one expert of `bytes`, every other rank gets a copy
    sparse_reduce  its transpose: contributions of `bytes` from every other rank are summed at rank 0
    token_rows     every rank sends `bytes` of tokens to all ranks and back, directly and node by node; only on request

All variants of one size are timed round by round in one run, each round starting with another variant. Two baselines run beside
the transports: MPI's own collective (Alltoallv, Bcast, Reduce), and a plain memory copy of the bytes that a rank receives, by all
processes at once. Copies and collectives repeat between the same buffers, so both find them in the caches where these are
large enough. The copies never wait for each other, which favours them: with more ranks than cores, those that run have the caches
to themselves. So beside the all-to-all over shared memory runs a copy in step: after each copy the ranks exchange one number over
that transport, which is about the least that an exchange of the same bytes can cost. The bound is the busiest receiver's bytes at
the rate of the free copy; between nodes, whose links have a rate (network.py), the busiest link's bytes at that rate.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from importlib.util import find_spec
from pathlib import Path
from subprocess import DEVNULL
from typing import Any

import numpy as np

from ..collectives import SCHEDULES, TRANSPORTS
from ..collectives.lifetime import start
from ..placement import Topology
from .network import RANK_ENVIRONMENT, run_on_nodes, wait_for
from .routed_tokens import crossing_bytes

OPS = ("all_to_all", "sparse_gather", "sparse_reduce")
TOKEN_OP = "token_rows"
# The baselines, under the key `transport`.
COPY, COPY_IN_STEP, MPI_OWN = "memory copy", "memory copy in step", "mpi4py"
COLUMNS = (
    "op",
    "transport",
    "schedule",
    "ranks",
    "nodes",
    "bytes",
    "gb_per_s",
    "gb_per_s_min",
    "gb_per_s_max",
    "ratio_to_gloo",
    "ratio_to_copy",
    "ratio_to_mpi",
    "ratio_to_bound",
)


@dataclass(frozen=True, kw_only=True)
class CollectivesCase:
    """The variants and sizes of one run."""

    ops: tuple[str, ...]
    ranks: int
    nodes: int
    link_bits_per_s: float
    """Rate of each node's link, each direction; unused with one node."""
    sizes: tuple[int, ...]
    transports: tuple[str, ...]
    schedules: tuple[str, ...]
    rounds: int

    def __post_init__(self) -> None:
        for name, known in (("ops", (*OPS, TOKEN_OP)), ("transports", TRANSPORTS), ("schedules", SCHEDULES)):
            wrong = [value for value in getattr(self, name) if value not in known]
            if wrong:
                raise ValueError(f"--{name} has {wrong[0]!r}; choose from {', '.join(known)}")
        if self.ranks % self.nodes:
            raise ValueError(f"--ranks {self.ranks} does not divide over --nodes {self.nodes}; give a multiple")
        if any(size < 4 or size % 4 for size in self.sizes):
            raise ValueError(f"--sizes has {min(self.sizes)} bytes; tensors are fp32, so give multiples of 4")

    def to_json(self) -> str:
        """For `from_json` in another process."""
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str) -> CollectivesCase:
        """The inverse of `to_json`."""
        fields: dict[str, Any] = json.loads(text)
        values: dict[str, Any] = {key: tuple(value) if isinstance(value, list) else value for key, value in fields.items()}
        return cls(**values)

    def received_bytes(self, op: str, size: int) -> int:
        """The bytes that the busiest rank must receive under any schedule; sums may be formed on the way."""
        if op == TOKEN_OP:
            return 2 * size * (self.ranks - 1)
        return size * (self.ranks - 1) if op == "all_to_all" else size

    def link_bytes(self, op: str, size: int) -> int:
        """The bytes that must cross the busiest link between nodes, in its busier direction."""
        inside = self.ranks // self.nodes
        if op == TOKEN_OP:
            return crossing_bytes(self.topology(), size)
        return size * inside * (self.ranks - inside) if op == "all_to_all" else size

    def topology(self) -> Topology:
        """The machine as described to a planner."""
        topology = Topology.preset("cpu", num_nodes=self.nodes, ranks_per_node=self.ranks // self.nodes)
        return topology if self.nodes == 1 else replace(topology, node_bytes_per_s=self.link_bits_per_s / 8)


@dataclass(frozen=True)
class Unavailable:
    """A transport that is left out, and the reason."""

    name: str
    reason: str


def run(case: CollectivesCase) -> tuple[list[dict[str, Any]], list[Unavailable]]:
    """Measure a case; return the records, and the transports that this machine lacks."""
    unavailable = []
    for name in case.transports:
        reason = why_not(name, case)
        if reason:
            unavailable.append(Unavailable(name, reason))
    left_out = {u.name for u in unavailable}
    present = replace(case, transports=tuple(name for name in case.transports if name not in left_out))
    _check_memory(case)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "case.json").write_text(present.to_json(), encoding="utf-8")
        _run_ranks(present, folder)
        measured = [json.loads((folder / f"rank-{r}.json").read_text(encoding="utf-8")) for r in range(case.ranks)]
    return _records(present, measured), unavailable


def why_not(transport: str, case: CollectivesCase) -> str:
    """The reason why a transport cannot be measured; empty if it can."""
    if transport == "shm" and case.nodes > 1:
        return "the ranks are on several nodes"
    if transport in ("shm", "hierarchical") and sys.platform != "linux":
        return "it needs Linux"
    if transport == "mpi":
        if find_spec("mpi4py") is None or _mpirun() is None:
            return "mpi4py and mpirun are not installed: pip install 'moesaic[mpi]'"
        if case.nodes > 1:
            return "mpirun does not start ranks in network namespaces"
    return ""


def _check_memory(case: CollectivesCase) -> None:
    """Raise ValueError unless the buffers fit: per rank and peer one to send, one to receive, and two for the memory copy."""
    largest = max(case.sizes)
    needed = 4 * case.ranks**2 * largest
    available = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    if needed > available:
        raise ValueError(
            f"{case.ranks} ranks with {largest} bytes need {needed / 2**30:.1f} GiB, {available / 2**30:.1f} GiB are free: "
            "give smaller --sizes or fewer --ranks"
        )


def _mpirun() -> str | None:
    beside = Path(sys.executable).with_name("mpirun")
    return str(beside) if beside.exists() else shutil.which("mpirun")


def _run_ranks(case: CollectivesCase, folder: Path) -> None:
    program = [sys.executable, "-m", "moesaic.benchmarks.collectives_rank", str(folder)]
    env = os.environ | RANK_ENVIRONMENT
    if "mpi" in case.transports:
        mpirun = _mpirun()
        assert mpirun is not None
        env |= {
            "OMPI_ALLOW_RUN_AS_ROOT": "1",
            "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1",
            "PRTE_MCA_rmaps_default_mapping_policy": ":oversubscribe",
            "PRTE_MCA_hwloc_default_binding_policy": "none",
        }
        # mpirun gives every rank a terminal, on which libraries may print control codes; standard output is for records only.
        wait_for([start([mpirun, "-n", str(case.ranks), *program], env=env, stdout=DEVNULL)])
        return
    run_on_nodes(program, case.ranks, case.nodes, case.link_bits_per_s, env)


def _records(case: CollectivesCase, measured: Sequence[Mapping[str, Mapping[str, Sequence[float]]]]) -> list[dict[str, Any]]:
    records = []
    for key in measured[0]:
        op, size = key.rsplit(" ", 1)
        # A collective ends with its last rank.
        seconds = {name: np.max([m[key][name] for m in measured], axis=0) for name in measured[0][key]}
        bound_s = _bound_s(case, op, int(size), seconds[COPY])
        for name, times in seconds.items():
            transport, _, schedule = name.partition("/")
            rates = case.received_bytes(op, int(size)) / times / 1e9
            records.append(
                {
                    "op": op,
                    "transport": transport,
                    "schedule": schedule or None,
                    "ranks": case.ranks,
                    "nodes": case.nodes,
                    "link_bits_per_s": case.link_bits_per_s if case.nodes > 1 else None,
                    "bytes": int(size),
                    "rounds": case.rounds,
                    "seconds": float(np.median(times)),
                    "seconds_min": float(times.min()),
                    "seconds_max": float(times.max()),
                    "gb_per_s": float(np.median(rates)),
                    "gb_per_s_min": float(rates.min()),
                    "gb_per_s_max": float(rates.max()),
                    "ratio_to_gloo": _ratio(seconds.get("c10d/direct"), times),
                    "ratio_to_copy": _ratio(seconds[COPY], times),
                    "ratio_to_mpi": _ratio(seconds.get(MPI_OWN), times),
                    "ratio_to_bound": _ratio(bound_s, times),
                }
            )
    return records


def _bound_s(case: CollectivesCase, op: str, size: int, copy_s: np.ndarray) -> np.ndarray:
    if case.nodes == 1:
        return copy_s
    return np.full_like(copy_s, 8 * case.link_bytes(op, size) / case.link_bits_per_s)


def _ratio(other_s: np.ndarray | None, times: np.ndarray) -> float | None:
    """Speed relative to `other_s`, the median over rounds."""
    return None if other_s is None else float(np.median(other_s / times))
