"""The choice of a schedule, by predicted time."""

from dataclasses import dataclass

from ...placement import LayerShape, Placement, Topology
from ..hops import Copies
from ..schedule import Schedule
from .chunks import Candidate, with_best_chunks
from .direct import direct_hops
from .element_sharded import element_sharded_hops
from .hierarchical import hierarchical_hops
from .relay import best_relay

# Ties go to the first of these: the schedule with the fewest messages.
SCHEDULES = ("direct", "relay", "hierarchical", "element_sharded")


@dataclass(frozen=True)
class ScheduleChoice:
    """The chosen gather schedule, and the predicted seconds of each candidate, in the order of `SCHEDULES`."""

    name: str
    schedule: Schedule
    candidates_s: tuple[tuple[str, float], ...]


def make_schedule(name: str, placement: Placement, topology: Topology, item_bytes: int) -> Schedule:
    """The gather schedule of that name for items of `item_bytes`.

    Raises:
        ValueError: no schedule has that name.
    """
    return _candidate(name, Copies.of(placement), topology, item_bytes).hops.schedule()


def _candidate(name: str, copies: Copies, topology: Topology, item_bytes: int) -> Candidate:
    if name == "relay":
        return best_relay(copies, topology, item_bytes)
    if name == "direct":
        hops = direct_hops(copies)
    elif name == "hierarchical":
        hops = hierarchical_hops(copies, topology.ranks_per_node)
    elif name == "element_sharded":
        hops = element_sharded_hops(copies)
    else:
        raise ValueError(f"unknown schedule {name!r}; choose one of {', '.join(SCHEDULES)}")
    return with_best_chunks(hops, topology, item_bytes)


def choose_schedule(placement: Placement, topology: Topology, shape: LayerShape) -> ScheduleChoice:
    """The schedule with the smallest predicted time; the same on every rank, because the prediction is a pure function.

    All kinds route an expert with one copy the same way, so the direct schedule is returned at once unless some expert has two
    copies.
    """
    copies = Copies.of(placement)
    names = SCHEDULES if copies.num_copies_M.max(initial=0) > 1 else ("direct",)
    candidates = {name: _candidate(name, copies, topology, shape.expert_bytes) for name in names}
    best = min(candidates, key=lambda name: candidates[name].seconds)
    seconds = tuple((name, candidates.get(name, candidates["direct"]).seconds) for name in SCHEDULES)
    return ScheduleChoice(best, candidates[best].hops.schedule(), seconds)
