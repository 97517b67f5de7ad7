"""A profile of training steps as one Chrome trace: what this rank computed, and what overlapped its communication.

Open the file in ui.perfetto.dev. The tracks of torch's profiler show ops, this package's stages (`moesaic::...`) and the modules'
forwards; tracks of their own show every collective from its launch to its arrival, and inside it the part that was waited for.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook

from ...collectives import Span, Traffic

# A profiler range that ties the profiler's clock to that of the spans.
_CLOCK = "moesaic::clock"
# Thread numbers of the tracks: above any that the system gives.
_FIRST_TRACK = 1 << 30


@contextmanager
def profiled(path: Path, traffic: Mapping[str, Traffic], rank: int) -> Iterator[None]:
    """Profile the body and write the trace to `path`, whole or not at all. `traffic` is recorded, by names for its tracks."""
    activities = [torch.profiler.ProfilerActivity.CPU]
    if torch.cuda.is_available():
        activities.append(torch.profiler.ProfilerActivity.CUDA)
    for part in traffic.values():
        part.spans = []
    try:
        with torch.profiler.profile(activities=activities) as profiler:
            clock_s = time.perf_counter()
            with torch.profiler.record_function(_CLOCK):
                pass
            with _module_ranges():
                yield
        spans = {name: part.spans or [] for name, part in traffic.items()}
    finally:
        for part in traffic.values():
            part.spans = None
    unfinished = path.with_name(path.name + ".part")
    profiler.export_chrome_trace(str(unfinished))
    document = json.loads(unfinished.read_text(encoding="utf-8"))
    events = document["traceEvents"]
    clock_us = next(event["ts"] for event in events if event.get("name") == _CLOCK)
    events += communication_events(spans, rank, pid=os.getpid(), offset_us=clock_us - clock_s * 1e6)
    unfinished.write_text(json.dumps(document), encoding="utf-8")
    unfinished.replace(path)


def communication_events(spans: Mapping[str, Sequence[Span]], rank: int, *, pid: int, offset_us: float) -> list[dict[str, Any]]:
    """Trace events of collectives: a track for each name, and more where collectives of one name are in flight together."""
    events: list[dict[str, Any]] = [_meta("process_name", pid, 0, f"rank {rank}")]
    track = _FIRST_TRACK
    for name, of_name in spans.items():
        free_from_s: list[float] = []  # by track
        for span in sorted(of_name, key=lambda span: span.launched_s):
            index = next((i for i, free_s in enumerate(free_from_s) if free_s <= span.launched_s), len(free_from_s))
            if index == len(free_from_s):
                free_from_s.append(0.0)
                events.append(_meta("thread_name", pid, track + index, f"communication: {name}"))
            free_from_s[index] = span.arrived_s
            waited_s = max(0.0, min(span.wait_to_s, span.arrived_s) - span.wait_from_s)
            parts = [(span.op, span.launched_s, span.arrived_s)]
            if waited_s:
                parts.append((f"{span.op}, waited for", span.wait_from_s, span.wait_from_s + waited_s))
            events += [
                {
                    "ph": "X",
                    "cat": "communication",
                    "name": label,
                    "pid": pid,
                    "tid": track + index,
                    "ts": from_s * 1e6 + offset_us,
                    "dur": (to_s - from_s) * 1e6,
                    "args": {"where": span.where, "waited_ms": 1e3 * waited_s},
                }
                for label, from_s, to_s in parts
            ]
        track += len(free_from_s)
    return events


def _meta(kind: str, pid: int, tid: int, name: str) -> dict[str, Any]:
    return {"ph": "M", "name": kind, "pid": pid, "tid": tid, "args": {"name": name}}


@contextmanager
def _module_ranges() -> Iterator[None]:
    """A profiler range around the forward of every module, named after its class."""
    open_ranges: list[torch.profiler.record_function] = []

    def before(module: nn.Module, inputs: Any) -> None:
        open_ranges.append(torch.profiler.record_function(type(module).__name__))
        open_ranges[-1].__enter__()

    def after(module: nn.Module, inputs: Any, output: Any) -> None:
        open_ranges.pop().__exit__(None, None, None)

    hooks = register_module_forward_pre_hook(before), register_module_forward_hook(after, always_call=True)
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
