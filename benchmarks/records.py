"""Output of benchmarks: flat records as a table or as JSON, with the machine and the commit; intervals of medians."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import platform
import subprocess
from collections.abc import Mapping, Sequence
from math import comb
from pathlib import Path
from typing import Any

import click
import numpy as np
import torch

from ..placement.files import writable
from ..placement.offline import records as printed

JSON_OPTION = click.option(
    "--json",
    "json_path",
    metavar="FILE",
    help="Write the records as JSON; - for standard output.",
    callback=lambda context, option, path: writable(path),
)

MACHINE_OPTION = click.option(
    "--machine", metavar="FILE", default="", help="Price with the rates that `moesaic calibrate` wrote."
)


def describe_machine() -> dict[str, Any]:
    """Processor, cores, system, GPU and versions."""
    machine: dict[str, Any] = {
        "processor": _processor(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "system": platform.system(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "numpy": np.__version__,
    }
    if importlib.util.find_spec("triton") is not None:
        machine["triton"] = importlib.metadata.version("triton")
    if torch.cuda.is_available():
        machine["gpu"] = torch.cuda.get_device_name()
        machine["cuda"] = torch.version.cuda
    return machine


def commit_of_source() -> str:
    """The commit of the package's source, with `+changes` if the tree differs from it; empty outside a git checkout."""
    folder = Path(__file__).resolve().parent.parent

    def git(*words: str) -> str:
        done = subprocess.run(["git", "-C", str(folder), *words], capture_output=True, text=True, check=False)
        return done.stdout.strip() if done.returncode == 0 else ""

    commit = git("rev-parse", "--short=12", "HEAD")
    return f"{commit}+changes" if commit and git("status", "--porcelain", "--untracked-files=no") else commit


def publish(name: str, records: Sequence[Mapping[str, Any]], columns: Sequence[str], json_path: str | None) -> None:
    """Print and write records by `placement.offline.records.publish`, with the machine and the commit."""
    schema = f"moesaic.bench.{name}/1"
    printed.publish(schema, records, columns, json_path, machine=describe_machine(), commit=commit_of_source())


def median_interval(values: Sequence[float]) -> tuple[float, float]:
    """A 95 % confidence interval of the median between two of the values, without assuming a distribution.

    A value lies below the true median with probability one half, so the number of such values is binomial; the interval drops the
    most order statistics on either side with a tail of at most 2.5 % (David and Nagaraja, Order Statistics, section 7.1). Fewer
    than six values give their whole range.
    """
    ordered, n = sorted(values), len(values)
    tail, cut = 0.0, 0
    while (tail := tail + comb(n, cut) / 2**n) <= 0.025:
        cut += 1
    first = max(cut - 1, 0)
    return ordered[first], ordered[n - 1 - first]


def with_interval(key: str, values: Sequence[float] | np.ndarray | None) -> dict[str, float | None]:
    """The median under `key`, and the ends of its `median_interval` under `key`_low and _high; None without values."""
    if values is None:
        return dict.fromkeys((key, f"{key}_low", f"{key}_high"))
    low, high = median_interval([float(value) for value in values])
    return {key: float(np.median(values)), f"{key}_low": low, f"{key}_high": high}


def with_range(key: str, values: Sequence[float] | np.ndarray) -> dict[str, float]:
    """The median under `key`, and the smallest and largest value under `key`_min and _max."""
    return {key: float(np.median(values)), f"{key}_min": float(min(values)), f"{key}_max": float(max(values))}


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text(encoding="utf-8", errors="replace").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()
