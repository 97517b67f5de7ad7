"""Measured machines: the rates of a `Topology` as `moesaic calibrate` found them, and the tables behind them, as a TOML file.

    schema = "moesaic-machine/1"                rank_flops_per_s   of expert products, by rank
    num_nodes, ranks_per_node                   [versions]         of the packages that were measured
    name, device, transport                     [links.*]          bytes per second of pairs of ranks and of pairs of nodes
    [rates]   by name, see RATES                [tables.*]         seconds by bytes of a message, or by rows of an expert
    [spread]  of each rate over the rounds, (largest - smallest) / median

Only schema, num_nodes, ranks_per_node and the rates of a topology must be there, so that a file can be written by hand.
"""

from __future__ import annotations

import difflib
import json
import os
import tomllib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from statistics import median
from typing import Any

from .files import replace_text
from .topology import MAX_COST, Topology

SCHEMA = "moesaic-machine/1"
_MAX_FILE_BYTES = 1 << 24
# More than the median by this factor is slow.
_SLOW = 1.2
# What differs by no more from the median is planned as equal: runs of `moesaic calibrate` differ by as much.
_NOISE = 0.05
# Bounds, beyond which seconds would leave the range of floats.
_PER_SECOND, _SECONDS = (1.0, 1e21), (0.0, 1e6)
RATES: Mapping[str, tuple[float, float]] = {
    "device_bytes_per_s": _PER_SECOND,
    "latency_s": (0.0, 10.0),
    "node_bytes_per_s": _PER_SECOND,
    "node_latency_s": (0.0, 10.0),
    "flops_per_s": _PER_SECOND,
    "half_rate_rows": (0.0, 1 << 20),
    "copy_bytes_per_s": _PER_SECOND,
    "gather_s": _SECONDS,
    "gather_adds_s": _SECONDS,
    "gather_hides": (0.0, 1.0),
}
"""Rates and their bounds. The first two are of exchanges inside nodes, the next two of exchanges between nodes; then those of
expert products; copies in a rank's own memory; the gather of one expert, what it adds to expert products beside it, and the
share of the shorter of the two that running them beside each other saves."""
_FIELDS: Mapping[str, tuple[tuple[type, ...], tuple[float, float] | None]] = {
    **dict.fromkeys(("name", "device", "transport"), ((), None)),
    "rank_flops_per_s": ((list,), _PER_SECOND),
    "rates": ((dict,), (0.0, 1e21)),
    "spread": ((dict,), (0.0, 1e21)),
    "versions": ((dict,), None),
    "links": ((dict, dict), _PER_SECOND),
    "tables": ((dict, dict, list), (0.0, 1e21)),
}


@dataclass(frozen=True, kw_only=True)
class Machine:
    """A measured machine; the module's docstring has the fields."""

    num_nodes: int
    ranks_per_node: int
    name: str = ""
    device: str = ""
    transport: str = ""
    rank_flops_per_s: Sequence[float] = ()
    rates: Mapping[str, float]
    spread: Mapping[str, float] = field(default_factory=dict)
    versions: Mapping[str, str] = field(default_factory=dict)
    links: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    tables: Mapping[str, Mapping[str, Sequence[float]]] = field(default_factory=dict)

    def topology(self, num_nodes: int, ranks_per_node: int) -> Topology:
        """The topology of such nodes, however many: rates carry over; those of single ranks and nodes only to as many.

        Raises:
            ValueError: it has links of a kind that was not measured.
        """
        rates = self.rates
        for count, what, rate in (
            (num_nodes, "nodes", "node_bytes_per_s"),
            (ranks_per_node, "ranks a node", "device_bytes_per_s"),
        ):
            if count > 1 and rate not in rates:
                raise ValueError(
                    f"the machine file has no rates.{rate} for {count} {what}: it was measured on {self.num_nodes} x "
                    f"{self.ranks_per_node} ranks (nodes x ranks a node); run `moesaic calibrate` on two or more {what}"
                )
        is_measured = (num_nodes, ranks_per_node) == (self.num_nodes, self.ranks_per_node)
        # Ranks that are alone on their nodes have the rate of the link; ranks of one node need none.
        latency_s = rates.get("node_latency_s" if num_nodes > 1 else "latency_s")
        return Topology(
            num_nodes=num_nodes,
            ranks_per_node=ranks_per_node,
            device_bytes_per_s=rates.get("device_bytes_per_s") or rates["node_bytes_per_s"],
            node_bytes_per_s=rates.get("node_bytes_per_s") or rates["device_bytes_per_s"],
            latency_s=rates["node_latency_s"] if latency_s is None else latency_s,
            flops_per_s=rates["flops_per_s"],
            half_rate_rows=round(rates["half_rate_rows"]),
            rank_costs=self.rank_costs if is_measured else (),
            node_costs=self.node_costs if is_measured else (),
        )

    @property
    def rank_costs(self) -> tuple[int, ...]:
        """`Topology.rank_costs` of the measured ranks, over the median rank; none where they differ by noise alone."""
        return _percents(_times(self.rank_flops_per_s, self.spread.get("flops_per_s", 0.0)))

    @property
    def node_costs(self) -> tuple[int, ...]:
        """`Topology.node_costs` of the measured nodes, over the slowest, which exchanges between nodes wait for; none where they
        differ by noise alone. A pair is as fast as its slower node, so a node is as fast as its fastest pair."""
        of_node = [
            [rate for pair, rate in self.links.get("nodes", {}).items() if str(node) in pair.split("-")]
            for node in range(self.num_nodes)
        ]
        if not all(of_node):
            return ()
        times = _times([max(rates) for rates in of_node], self.spread.get("node_bytes_per_s", 0.0))
        return _percents([each / max(times) for each in times])

    @property
    def gather_hides(self) -> float:
        """The share of a gather beside work that costs no time; 1 where it was not measured."""
        return self.rates.get("gather_hides", 1.0)

    @property
    def slow_ranks(self) -> dict[str, float]:
        """Ranks whose expert products are slow, such as "rank 3", and how many times the median they take."""
        return _slow({f"rank {rank}": rate for rank, rate in enumerate(self.rank_flops_per_s)})

    @property
    def slow_links(self) -> dict[str, float]:
        """Pairs that are slow, such as "nodes 0-2", and how many times the median of their kind they take."""
        return {f"{kind} {pair}": times for kind, rates in self.links.items() for pair, times in _slow(rates).items()}

    def to_toml(self) -> str:
        """The file's text."""
        return "\n".join([*_lines({"schema": SCHEMA} | asdict(self), ""), ""])


def write_machine(path: str | os.PathLike[str], machine: Machine) -> None:
    """Write a machine file, atomically."""
    replace_text(path, machine.to_toml())


def read_machine(path: str | os.PathLike[str]) -> Machine:
    """Read a machine file; ValueError with one line for an invalid one."""
    try:
        with open(path, "rb") as file:
            text = file.read(_MAX_FILE_BYTES + 1)
    except FileNotFoundError:
        raise ValueError(f"there is no machine file at {path}: write one with `moesaic calibrate -o {path}`") from None
    except OSError as error:
        raise ValueError(f"cannot read the machine file {path}: {error.strerror}") from None
    try:
        if len(text) > _MAX_FILE_BYTES:
            raise ValueError(f"it is above {_MAX_FILE_BYTES} bytes")
        return _machine_of(tomllib.loads(text.decode("utf-8")))
    except (ValueError, RecursionError) as error:
        problem = " ".join(str(error).split())[:300]
        raise ValueError(
            f"{path} is not a usable machine file: {problem}; correct it, or run `moesaic calibrate` again"
        ) from None


def topology_of(
    machine: str, num_ranks: int | None = None, *, num_nodes: int | None = None, ranks_per_node: int | None = None
) -> Topology:
    """The topology by the name of a preset or the path of a machine file, which ends in .toml; see `Topology.preset`."""
    if not machine.endswith(".toml"):
        return Topology.preset(machine, num_ranks, num_nodes=num_nodes, ranks_per_node=ranks_per_node)
    measured = read_machine(machine)
    if num_ranks is not None:
        ranks_per_node = num_ranks if measured.num_nodes == 1 else min(num_ranks, measured.ranks_per_node)
        if num_ranks % ranks_per_node:
            raise ValueError(
                f"{num_ranks} ranks do not fill nodes of {ranks_per_node}, as in {machine}; give nodes and ranks per node"
            )
        num_nodes = num_ranks // ranks_per_node
    assert num_nodes is not None and ranks_per_node is not None
    return measured.topology(num_nodes, ranks_per_node)


def _times(rates: Sequence[float], spread: float) -> list[float]:
    """Seconds over those of the median rate; 1 where they differ by noise alone."""
    times = [median(rates) / rate for rate in rates]
    return [each if abs(each - 1) > max(_NOISE, spread) else 1.0 for each in times]


def _percents(times: Sequence[float]) -> tuple[int, ...]:
    percents = tuple(min(max(round(100 * each), 1), MAX_COST) for each in times)
    return percents if set(percents) != {100} else ()


def _slow(rates: Mapping[str, float]) -> dict[str, float]:
    middle = median(rates.values()) if rates else 0.0
    return {name: middle / rate for name, rate in rates.items() if middle > _SLOW * rate}


def _lines(values: Mapping[str, Any], section: str) -> list[str]:
    """Nested values as lines of TOML: plain ones first, which look as in JSON, then a section for each mapping."""
    plain = {key: value for key, value in values.items() if not isinstance(value, Mapping)}
    lines = ["", f"[{section}]"] if section and plain else []
    lines += [f"{key} = {json.dumps(value, ensure_ascii=False, allow_nan=False)}" for key, value in plain.items()]
    for key, value in values.items():
        if isinstance(value, Mapping):
            lines += _lines(value, f"{section}.{key}" if section else key)
    return lines


def _machine_of(data: Mapping[str, Any]) -> Machine:
    """Check a parsed file; ValueError that names key and value."""
    if data.get("schema") != SCHEMA:
        raise ValueError(f"schema = {str(data.get('schema'))[:80]!r}, expected {SCHEMA!r}")
    values = {key: value for key, value in data.items() if key != "schema"}
    _check_keys("", values, [entry.name for entry in fields(Machine)])
    for key in ("num_nodes", "ranks_per_node"):
        if type(values.get(key)) is not int or not 1 <= values[key] <= 1 << 16:
            raise ValueError(f"{key} = {str(values.get(key))[:40]!r}, expected a whole number from 1 to 65536")
    for key, (nesting, bounds) in _FIELDS.items():
        if key in values:
            _check(key, values[key], nesting, bounds)
    num_ranks, given = values["num_nodes"] * values["ranks_per_node"], len(values.get("rank_flops_per_s", ()))
    if given not in (0, num_ranks):
        raise ValueError(f"rank_flops_per_s has {given} numbers, expected {num_ranks} as there are ranks")
    rates = values.get("rates", {})
    _check_keys("rates.", rates, RATES)
    for name, value in rates.items():
        _check(f"rates.{name}", value, (), RATES[name])
    inside = values["ranks_per_node"] > 1 or values["num_nodes"] == 1
    inside, between = inside or "device_bytes_per_s" in rates, values["num_nodes"] > 1 or "node_bytes_per_s" in rates
    needed = ("device_bytes_per_s", "latency_s") * inside + ("node_bytes_per_s", "node_latency_s") * between
    for name in (*needed, "flops_per_s", "half_rate_rows"):
        if name not in rates:
            raise ValueError(f"rates.{name} is missing")
    return Machine(**values)


def _check_keys(section: str, given: Iterable[str], known: Iterable[str]) -> None:
    for key in given:
        if key not in known:
            near = difflib.get_close_matches(key, known, n=1)
            raise ValueError(f"unknown key {section}{key}, {f'did you mean {section}{near[0]}?' if near else 'leave it out'}")


def _check(key: str, value: Any, nesting: tuple[type, ...], bounds: tuple[float, float] | None) -> None:
    """Raise ValueError unless a value is nested like this and holds numbers within bounds, or texts where these are None."""
    if nesting:
        if not issubclass(type(value), nesting[0]):
            raise ValueError(f"{key} = {str(value)[:40]!r}, expected a {'section' if nesting[0] is dict else 'list'}")
        for name, inner in value.items() if nesting[0] is dict else enumerate(value):
            _check(f"{key}.{name}", inner, nesting[1:], bounds)
    elif bounds is None and not isinstance(value, str):
        raise ValueError(f"{key} = {str(value)[:40]!r}, expected a text in quotes")
    elif bounds is not None and (type(value) not in (int, float) or not bounds[0] <= value <= bounds[1]):
        raise ValueError(f"{key} = {str(value)[:40]!r}, expected a number from {bounds[0]:g} to {bounds[1]:g}")
