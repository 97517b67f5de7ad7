"""The stages of a step: profiler ranges, and optional clocks for the break-down that benchmarks print."""

import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager

import torch

# In the order of the data flow.
STAGES = ("route", "plan", "materialize", "dispatch", "experts", "combine", "reduce")


class StageClock:
    """Seconds spent in each stage on this rank, forward and backward together, when it is on.

    Host time: on CUDA it shows what the host waited for, and a profiler shows the rest.
    """

    def __init__(self) -> None:
        self.enabled = False
        self.seconds: dict[str, float] = defaultdict(float)
        self.completed: tuple[str, str] | None = None
        """The stage that this rank completed last, and its place: step, layer and plan."""

    @contextmanager
    def stage(self, name: str, where: str = "") -> Iterator[None]:
        """Run the body under the profiler range `moesaic::<name>(<where>)`."""
        assert name in STAGES, name
        with torch.profiler.record_function(f"moesaic::{name}({where})"):
            if not self.enabled:
                yield
                return
            start = time.perf_counter()
            yield
            self.seconds[name] += time.perf_counter() - start
