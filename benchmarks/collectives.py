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

import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from subprocess import DEVNULL
from typing import Any

import numpy as np

from ..collectives.lifetime import start
from ..collectives.transports.mpi import MPIRUN_ENVIRONMENT, NO_MPI, find_mpirun
from .collectives_rank import COPY, MPI_OWN, CollectivesCase, measure
from .network import RANK_ENVIRONMENT, run_on_nodes, wait_for
from .ranks import run_on_ranks
from .records import with_range

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


def run(case: CollectivesCase) -> tuple[list[dict[str, Any]], dict[str, str]]:
    """Measure a case; return the records, and the transports that this machine lacks, each with the reason."""
    unavailable = {name: reason for name in case.transports if (reason := why_not(name, case))}
    present = replace(case, transports=tuple(name for name in case.transports if name not in unavailable))
    _check_memory(case)
    return _records(present, run_on_ranks(partial(measure, present), case.ranks, partial(_launch, present))), unavailable


def why_not(transport: str, case: CollectivesCase) -> str:
    """The reason why a transport cannot be measured; empty if it can."""
    if transport == "shm" and case.nodes > 1:
        return "the ranks are on several nodes"
    if transport in ("shm", "hierarchical") and sys.platform != "linux":
        return "it needs Linux"
    if transport == "mpi":
        if find_mpirun() is None:
            return NO_MPI
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


def _launch(case: CollectivesCase, program: Sequence[str]) -> None:
    if "mpi" not in case.transports:
        run_on_nodes(program, case.ranks, case.nodes, case.link_bits_per_s, RANK_ENVIRONMENT)
        return
    mpirun = find_mpirun()
    assert mpirun is not None
    # mpirun gives every rank a terminal, on which libraries may print control codes; standard output is for records only.
    env = os.environ | RANK_ENVIRONMENT | MPIRUN_ENVIRONMENT
    wait_for([start([mpirun, "-n", str(case.ranks), *program], env=env, stdout=DEVNULL)])


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
                    **with_range("seconds", times),
                    **with_range("gb_per_s", rates),
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
