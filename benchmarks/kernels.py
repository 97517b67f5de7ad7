"""Every kernel against torch and against this machine's own ceilings, measured interleaved in one run.

Before a case is timed, its result is compared with torch's. Ratios are the ceiling's time, or torch's best time, over the
kernel's time: 1 is equal, more is better. They are medians over rounds, with a 95 % interval (low, high). The cases are in
kernel_cases.py and kernel_memory_cases.py.
"""

from __future__ import annotations

import random
import statistics
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from functools import partial
from itertools import product
from typing import Any

import click
import numpy as np
import torch
from torch import Tensor

from .kernel_cases import Call, Case, ffn_case, layer_case, product_cases, shapes
from .kernel_memory_cases import memory_cases, router_cases, with_cold_operands
from .records import JSON_OPTION, publish, with_interval

COLUMNS = (
    "op",
    "shape",
    "dtype",
    "achieved",
    "ceiling",
    "unit",
    "ratio_to_ceiling",
    "ratio_to_ceiling_low",
    "ratio_to_ceiling_high",
    "target",
    "ratio_to_torch",
    "ratio_to_grouped_mm",
    "ratio_to_grouped_mm_low",
    "ratio_to_grouped_mm_high",
)


def measure(case: Case, device: str, rounds: int) -> dict[str, Any]:
    """Check the result, then time the kernel, the ceiling and torch's calls round by round; return the record."""
    error = case.check()
    if not error <= case.tolerance:
        raise ValueError(f"differs from torch by {error:.2e}, allowed is {case.tolerance:.0e}")
    calls = {"ours": case.ours, **{f"torch {name}": call for name, call in case.torch.items()}}
    if callable(case.ceiling):
        calls["ceiling"] = case.ceiling
    seconds = time_interleaved(calls, device, rounds)
    if not callable(case.ceiling):
        seconds["ceiling"] = [case.ceiling * 1e-6] * rounds
    median = {name: statistics.median(times) for name, times in seconds.items()}
    torch_names = [name for name in median if name.startswith("torch ")]
    best = min(torch_names, key=lambda name: median[name], default=None)
    ours = np.array(seconds["ours"])
    grouped_mm = seconds.get("torch grouped_mm")

    def rate(time_s: float) -> float:
        return time_s * 1e6 if case.unit == "us" else case.work / time_s / 1e9

    return {
        "op": case.op,
        "shape": case.shape,
        "dtype": case.dtype,
        "device": torch.cuda.get_device_name() if device == "cuda" else "cpu",
        "achieved": rate(median["ours"]),
        "achieved_min": min(map(rate, seconds["ours"])),
        "achieved_max": max(map(rate, seconds["ours"])),
        "ceiling": rate(median["ceiling"]),
        "unit": case.unit,
        **with_interval("ratio_to_ceiling", seconds["ceiling"] / ours),
        "target": case.target,
        # To the fastest of torch's calls.
        "ratio_to_torch": None if best is None else float(np.median(seconds[best] / ours)),
        "torch_is": None if best is None else best.removeprefix("torch "),
        **with_interval("ratio_to_grouped_mm", None if grouped_mm is None else grouped_mm / ours),
    }


def time_interleaved(calls: dict[str, Call], device: str, rounds: int) -> dict[str, list[float]]:
    """Seconds of each call in each round, after two rounds of warm-up; on a GPU by events."""
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    spacer = torch.empty(1 << 30 if device == "cuda" else 0, dtype=torch.uint8, device=device)
    order = list(calls.items())
    for number in range(rounds + 2):
        # Each round has its own order, so that no call always runs after the same other call.
        for name, call in random.Random(number).sample(order, len(order)):
            time_s = _time_cuda(call, spacer) if device == "cuda" else _time_cpu(call)
            if number >= 2:
                seconds[name].append(time_s)
    return seconds


def _time_cpu(call: Call) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def _time_cuda(call: Call, spacer: Tensor) -> float:
    start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    # About a millisecond of writes, during which the host queues the call: this hides host time and clears the L2 cache.
    for _ in range(3):
        spacer.zero_()
    start.record()
    call()
    stop.record()
    stop.synchronize()
    return start.elapsed_time(stop) * 1e-3


def sweep_tiles(device: str) -> list[dict[str, Any]]:
    """Time every selectable tile, through pointers and by TMA where the GPU has it, for each product and shape."""
    from ..kernels.grouped_gemm_tiles import HALF_TILES, takes_tma
    from ..kernels.grouped_gemm_triton import grouped_gemm_dgrad_triton, grouped_gemm_triton, grouped_gemm_wgrad_triton

    found = []
    for shape in shapes(device):
        N, sizes, wide = shape.num_rows, list(shape.group_sizes), 2 * shape.F
        x, dy = (torch.randn(N, width, device=device, dtype=torch.bfloat16) for width in (shape.D, wide))
        weights = list(torch.randn(len(sizes), wide, shape.D, device=device, dtype=torch.bfloat16))
        grads = list(torch.zeros(len(sizes), wide, shape.D, device=device))
        ways = [False, True] if takes_tma(x.device, x, dy, *weights) else [False]
        for tile, use_tma in product(HALF_TILES, ways):
            how: dict[str, Any] = {"tile": tile, "use_tma": use_tma}
            calls: dict[str, Call] = {
                "forward": partial(grouped_gemm_triton, x, weights, sizes, **how),
                "dgrad": partial(grouped_gemm_dgrad_triton, dy, weights, sizes, **how),
                "wgrad": partial(grouped_gemm_wgrad_triton, dy, x, sizes, grads, **how),
            }
            for name, times in time_interleaved(calls, device, 5).items():
                tflops = 2e-12 * N * shape.D * wide / statistics.median(times)
                found.append({"op": name, "shape": shape.name, **asdict(tile), "use_tma": use_tma, "tflops": tflops})
    return found


def all_cases(device: str, dtype: torch.dtype, only: str = "") -> Iterator[Case]:
    """Every case of a device, one after the other, so that a case's tensors are freed before the next.

    Skips shapes for which no `op at shape` can contain `only`.
    """
    _, _, start_of_name = only.partition(" at ")
    for shape in shapes(device):
        if not shape.name.startswith(start_of_name):
            continue
        yield from product_cases(shape, dtype, device)
        yield ffn_case(shape, dtype, device)
        yield layer_case(shape, dtype, device)
        if shape.name.endswith("balanced"):
            yield from with_cold_operands(partial(memory_cases, shape, dtype, device), shape, device)
    yield from router_cases(device)


def run(device: str, dtype: torch.dtype, rounds: int, only: str = "") -> tuple[list[dict[str, Any]], list[str]]:
    """Records and failures of the cases whose `op at shape` contains `only`; a failure costs only its own record."""
    records, failures = [], []
    for case in all_cases(device, dtype, only):
        name = f"{case.op} at {case.shape}"
        if only not in name:
            continue
        try:
            records.append(measure(case, device, rounds))
        # Whatever a kernel or its compiler raises must not lose the results of the other cases.
        except Exception as error:
            failures.append(f"{name}: {type(error).__name__}: {error}")
    return records, failures


def verdict(records: Sequence[Mapping[str, Any]]) -> str:
    """Which records miss their target, and which are slower than torch's grouped_mm, with the counts.

    A record is slower where the whole interval lies below 1.
    """
    held = [record for record in records if record["target"] is not None]
    missed = [record for record in held if record["ratio_to_ceiling"] < record["target"]]
    named = "".join(f"; {r['op']} at {r['shape']} {r['ratio_to_ceiling']:.3f} < {r['target']}" for r in missed)
    compared = [record for record in records if record["ratio_to_grouped_mm"] is not None]
    slower = [record for record in compared if record["ratio_to_grouped_mm_high"] < 1]
    behind = "".join(
        f"; {r['op']} at {r['shape']} {r['ratio_to_grouped_mm_low']:.3f} to {r['ratio_to_grouped_mm_high']:.3f}" for r in slower
    )
    return (
        f"{len(held) - len(missed)} of {len(held)} records with a target reach it{named}\n"
        f"{len(compared) - len(slower)} of {len(compared)} records with a ratio to torch's grouped_mm are not slower{behind}"
    )


@click.command("kernels", short_help="Every kernel against torch and this machine's ceilings.")
@click.option("--device", type=click.Choice(["cpu", "cuda"]), default=lambda: "cuda" if torch.cuda.is_available() else "cpu")
@click.option("--rounds", type=click.IntRange(min=1), default=15, help="Timed rounds of each case.")
@click.option("--only", default="", metavar="TEXT", help="Only cases whose 'op at shape' contains this text.")
@click.option("--threads", type=click.IntRange(min=1), default=1, help="Torch threads on the CPU.")
@click.option("--sweep", is_flag=True, help="Time every tile of the grouped products instead (GPU).")
@JSON_OPTION
def command(device: str, rounds: int, only: str, threads: int, sweep: bool, json_path: str | None) -> None:
    """Every kernel against torch and this machine's ceilings. Exit status 1 if a case fails."""
    if device == "cuda" and not torch.cuda.is_available():
        raise ValueError("--device cuda, but torch sees no GPU; use --device cpu")
    if sweep and device != "cuda":
        raise ValueError("--sweep times Triton tiles and needs --device cuda")
    torch.manual_seed(0)
    if sweep:
        publish("kernel_tiles", sweep_tiles(device), ("op", "shape", "block_m", "block_n", "use_tma", "tflops"), json_path)
        return
    if device == "cpu":
        torch.set_num_threads(threads)
    records, failures = run(device, torch.bfloat16 if device == "cuda" else torch.float32, rounds, only)
    publish("kernels", records, COLUMNS, json_path)
    if json_path != "-":
        click.echo(verdict(records))
    for failure in failures:
        click.echo(f"failed: {failure}", err=True)
    click.get_current_context().exit(1 if failures else 0)


if __name__ == "__main__":
    command()
