"""The choice of a schedule, by predicted time."""

from dataclasses import dataclass

from ...placement import LayerShape, Placement, Topology
from ..account import predicted_s
from ..schedule import Schedule
from .direct import direct_gather
from .element_sharded import element_sharded_gather
from .hierarchical import hierarchical_gather
from .relay import relay_gather

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
    if name == "direct":
        return direct_gather(placement)
    if name == "relay":
        return relay_gather(placement, topology, item_bytes)
    if name == "hierarchical":
        return hierarchical_gather(placement, topology, item_bytes)
    if name == "element_sharded":
        return element_sharded_gather(placement, topology, item_bytes)
    raise ValueError(f"unknown schedule {name!r}; choose one of {', '.join(SCHEDULES)}")


def choose_schedule(placement: Placement, topology: Topology, shape: LayerShape) -> ScheduleChoice:
    """The schedule that is predicted to be fastest; the same on every rank, since the prediction is a pure function.

    An expert with one copy travels alike in all of them, so without an expert that has two the direct schedule is taken at once.
    """
    direct = direct_gather(placement)
    seconds = predicted_s(direct, topology, shape.expert_bytes)
    if placement.num_experts == 0 or int(placement.num_replicas_E.max()) <= 2:
        return ScheduleChoice("direct", direct, tuple((name, seconds) for name in SCHEDULES))
    schedules = {name: make_schedule(name, placement, topology, shape.expert_bytes) for name in SCHEDULES}
    candidates = tuple((name, predicted_s(schedule, topology, shape.expert_bytes)) for name, schedule in schedules.items())
    best, _ = min(candidates, key=lambda candidate: candidate[1])
    return ScheduleChoice(best, schedules[best], candidates)
