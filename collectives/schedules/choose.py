"""The choice of a schedule, by predicted time."""

from dataclasses import dataclass

from ...placement import LayerShape, Placement, Topology
from ..account import Loads
from ..hops import Copies, Hops
from ..schedule import Schedule
from .direct import direct_hops
from .element_sharded import element_sharded_hops
from .hierarchical import hierarchical_hops
from .relay import relay_hops

# In the order in which ties are decided: the one with the fewest messages first.
SCHEDULES = ("direct", "relay", "hierarchical", "element_sharded")


@dataclass(frozen=True)
class ScheduleChoice:
    """The gather schedule that was chosen, and the predicted seconds of each candidate, in the order of `SCHEDULES`."""

    name: str
    schedule: Schedule
    candidates_s: tuple[tuple[str, float], ...]

    def explain(self) -> str:
        """One line. Example: relay: predicted relay 1.3 ms, direct 4.1 ms."""
        ordered = sorted(self.candidates_s, key=lambda candidate: (candidate[0] != self.name, candidate[1]))
        return f"{self.name}: predicted " + ", ".join(f"{name} {seconds * 1e3:.3g} ms" for name, seconds in ordered)


def make_schedule(name: str, placement: Placement, topology: Topology, item_bytes: int) -> Schedule:
    """The gather schedule of that name for items of `item_bytes`.

    Raises:
        ValueError: no schedule has that name.
    """
    return _make_hops(name, Copies.of(placement), topology, item_bytes).schedule()


def _make_hops(name: str, copies: Copies, topology: Topology, item_bytes: int) -> Hops:
    if name == "direct":
        return direct_hops(copies)
    if name == "relay":
        return relay_hops(copies, topology, item_bytes)
    if name == "hierarchical":
        return hierarchical_hops(copies, topology, item_bytes)
    if name == "element_sharded":
        return element_sharded_hops(copies, topology, item_bytes)
    raise ValueError(f"unknown schedule {name!r}; choose one of {', '.join(SCHEDULES)}")


def choose_schedule(placement: Placement, topology: Topology, shape: LayerShape) -> ScheduleChoice:
    """The schedule that is predicted to be fastest; the same on every rank, since the prediction is a pure function.

    An expert with one copy travels alike in all of them, so without an expert that has two the direct schedule is taken at once.
    """
    copies, item_bytes = Copies.of(placement), shape.expert_bytes
    needs_choice = copies.num_copies_M.max(initial=0) > 1
    hops = {name: _make_hops(name, copies, topology, item_bytes) for name in (SCHEDULES if needs_choice else ("direct",))}
    seconds = {name: Loads.of(candidate, topology, item_bytes).seconds(topology) for name, candidate in hops.items()}
    best = min(seconds, key=lambda name: seconds[name])
    candidates = tuple((name, seconds.get(name, seconds["direct"])) for name in SCHEDULES)
    return ScheduleChoice(best, hops[best].schedule(), candidates)
