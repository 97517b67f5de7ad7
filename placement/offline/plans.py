"""Plan files: one JSON file per plan, written atomically and validated when read.

Keys: `schema`, `model` (TraceMeta's sizes), `topology` (the fields of `Topology`; files of older versions have no `rank_costs`
and `node_costs`), `slots`, `solver`, `objective`, `bound`, `gap`, `seconds`, `moves`, `trace_digest`, `scale` (1 where it is
missing), and `layers`: per layer `owners` (the owner of every expert) and `copies` (pairs of expert and rank). Seconds
throughout. A topology may also stand alone in a JSON file.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np

from ..content import check_positive_int, check_seconds
from ..files import replace_text
from ..owners import OwnerMap
from ..topology import Topology
from ..traces.format import TraceMeta
from ..values import Placement

SCHEMA = "moesaic-plan/1"
# Limits the memory for a damaged file: parsed JSON takes about 30 times its size.
_MAX_FILE_BYTES = 1 << 24
# Most ranks of offline tools: flows between ranks are dense tables.
MAX_RANKS = 2048
# Limits of plausible rates; beyond them seconds would leave the range of floats.
_RATES = (1.0, 1e21)
_MAX_LATENCY_S = 10.0
_MAX_HALF_RATE_ROWS = 1 << 20
_PLAN_KEYS = (
    *("schema", "model", "topology", "slots", "solver", "objective", "bound", "gap", "seconds", "moves", "trace_digest"),
    "layers",
)
_MODEL_KEYS = ("num_layers", "num_experts", "top_k", "dim", "ffn_dim", "num_matrices")


@dataclass(frozen=True)
class SavedPlan:
    """A placement of every layer, with its model, machine and predicted cost.

    meta: the model's sizes and ranks. objective_s, bound_s: predicted seconds of a step over all layers, and a lower bound over
    all plans. seconds: the solver's time. moves: owners that differ from the initial ones. trace_digest: of the trace file that
    the plan was solved on. scale: tokens for which a recorded token stood.
    """

    meta: TraceMeta
    topology: Topology
    slots: int
    solver: str
    objective_s: float
    bound_s: float
    gap: float
    seconds: float
    moves: int
    trace_digest: str
    layers: tuple[Placement, ...]
    scale: int = 1

    def __post_init__(self) -> None:
        for name in ("objective_s", "bound_s", "gap", "seconds"):
            check_seconds(name, getattr(self, name))
        check_positive_int("slots", self.slots, minimum=0)
        check_positive_int("moves", self.moves, minimum=0)
        check_positive_int("scale", self.scale)
        if self.meta.num_ranks != self.topology.num_ranks:
            raise ValueError(f"the plan is for {self.meta.num_ranks} ranks, its topology has {self.topology.num_ranks}")
        if len(self.layers) != self.meta.num_layers:
            raise ValueError(f"the plan places {len(self.layers)} layers of {self.meta.num_layers}")
        for index, placement in enumerate(self.layers):
            if placement.replicas_RE.shape != (self.meta.num_ranks, self.meta.num_experts):
                raise ValueError(
                    f"layer {index} places [R, E] = {placement.replicas_RE.shape}, "
                    f"the plan is for {(self.meta.num_ranks, self.meta.num_experts)}"
                )
            copies_R = placement.copies_RE.sum(axis=1)
            if copies_R.max() > self.slots:
                rank = int(copies_R.argmax())
                raise ValueError(f"layer {index} puts {copies_R[rank]} copies on rank {rank}, the plan has {self.slots} slots")

    @property
    def owners(self) -> OwnerMap:
        """The owner map over all layers."""
        return OwnerMap(np.stack([placement.expert_to_owner_E for placement in self.layers]), self.meta.num_ranks)

    @property
    def num_copies(self) -> int:
        """Copies over all layers and ranks."""
        return sum(placement.num_copies for placement in self.layers)

    def check_model(self, meta: TraceMeta, of_what: str) -> None:
        """Raise ValueError unless the plan has the layers, experts, top-k, sizes and ranks of `meta`; a size of 0 is unknown."""
        for name in ("num_layers", "num_experts", "top_k", "dim", "ffn_dim", "num_ranks"):
            mine, theirs = getattr(self.meta, name), getattr(meta, name)
            if mine != theirs and (name not in ("dim", "ffn_dim") or (mine and theirs)):
                raise ValueError(f"the plan is for {name} {mine}, {of_what} has {theirs}; solve one with `moesaic place solve`")

    def to_json(self) -> str:
        """Return the file's text."""
        document = {
            "schema": SCHEMA,
            "model": {name: getattr(self.meta, name) for name in _MODEL_KEYS},
            "topology": asdict(self.topology),
            "slots": self.slots,
            "solver": self.solver,
            "objective": self.objective_s,
            "bound": self.bound_s,
            "gap": self.gap,
            "seconds": self.seconds,
            "moves": self.moves,
            "trace_digest": self.trace_digest,
            "scale": self.scale,
            "layers": [_layer_to_dict(placement) for placement in self.layers],
        }
        return json.dumps(document, allow_nan=False) + "\n"

    def write(self, path: str | os.PathLike[str]) -> None:
        """Write the file atomically."""
        replace_text(path, self.to_json())


def read_plan(path: str | os.PathLike[str]) -> SavedPlan:
    """Read a plan file; ValueError with one line for an invalid one."""
    data = _read_json(path, "plan")
    try:
        return _plan_of(data)
    except (ValueError, TypeError, OverflowError) as error:
        raise ValueError(f"{path} is not a usable plan: {_short(error)}") from None


def read_topology(path: str | os.PathLike[str]) -> Topology:
    """Read a topology file: a JSON object with the fields of `Topology`; ValueError with one line for an invalid one."""
    data = _read_json(path, "topology")
    try:
        return _topology_of(data)
    except (ValueError, TypeError, OverflowError) as error:
        raise ValueError(f"{path} is not a usable topology: {_short(error)}") from None


def _short(error: Exception) -> str:
    return str(error)[:300]


def _read_json(path: str | os.PathLike[str], what: str) -> Any:
    def refuse(constant: str) -> float:
        raise ValueError(f"it holds {constant}")

    path = Path(path)
    try:
        with open(path, "rb") as file:
            text = file.read(_MAX_FILE_BYTES + 1)
    except FileNotFoundError:
        raise ValueError(f"there is no {what} at {path}") from None
    except OSError as error:
        raise ValueError(f"cannot read the {what} {path}: {error.strerror}") from None
    if len(text) > _MAX_FILE_BYTES:
        raise ValueError(f"{path} is above {_MAX_FILE_BYTES} bytes, no {what} is")
    try:
        return json.loads(text, parse_constant=refuse)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not a usable {what}: it cannot be read as JSON ({_short(error)})") from None


def _object(data: Any, name: str, keys: Sequence[str]) -> Mapping[str, Any]:
    if not isinstance(data, dict):
        raise ValueError(f"{name} is a {type(data).__name__}, not an object")
    missing = [key for key in keys if key not in data]
    if missing:
        raise ValueError(f"{name} has no {missing[0]!r}")
    return data


def _number(data: Mapping[str, Any], name: str, low: float, high: float) -> float:
    value = data[name]
    if isinstance(value, bool) or not isinstance(value, int | float) or not low <= value <= high:
        raise ValueError(f"{name} must be a number from {low:g} to {high:g}, got {str(value)[:40]!r}")
    return float(value)


def _topology_of(data: Any) -> Topology:
    names = [field.name for field in fields(Topology) if not field.name.endswith("_costs")]
    values = _object(data, "the topology", names)
    for name in ("num_nodes", "ranks_per_node"):
        check_positive_int(name, values[name])
    num_ranks = values["num_nodes"] * values["ranks_per_node"]
    if num_ranks > MAX_RANKS:
        raise ValueError(f"the topology has {str(num_ranks)[:30]} ranks; at most {MAX_RANKS} are supported offline")
    rates = {name: _number(values, name, *_RATES) for name in ("device_bytes_per_s", "node_bytes_per_s", "flops_per_s")}
    return Topology(
        num_nodes=values["num_nodes"],
        ranks_per_node=values["ranks_per_node"],
        latency_s=_number(values, "latency_s", 0.0, _MAX_LATENCY_S),
        half_rate_rows=int(_number(values, "half_rate_rows", 0, _MAX_HALF_RATE_ROWS)),
        rank_costs=values.get("rank_costs", ()),
        node_costs=values.get("node_costs", ()),
        **rates,
    )


def _plan_of(data: Any) -> SavedPlan:
    values = _object(data, "the plan", ("schema",))
    if values["schema"] != SCHEMA:
        raise ValueError(f"its schema is {str(values['schema'])[:80]!r}, not {SCHEMA!r}")
    values = _object(data, "the plan", _PLAN_KEYS)
    topology = _topology_of(values["topology"])
    model = _object(values["model"], "model", _MODEL_KEYS)
    meta = TraceMeta(**{name: model[name] for name in _MODEL_KEYS}, num_ranks=topology.num_ranks)
    layers = values["layers"]
    if not isinstance(layers, list) or len(layers) != meta.num_layers:
        raise ValueError(f"layers must list {meta.num_layers} layers")
    for name in ("solver", "trace_digest"):
        if not isinstance(values[name], str) or len(values[name]) > 200:
            raise ValueError(f"{name} must be a short text")
    return SavedPlan(
        meta=meta,
        topology=topology,
        slots=check_positive_int("slots", values["slots"], minimum=0),
        solver=values["solver"],
        objective_s=_number(values, "objective", 0.0, 1e300),
        bound_s=_number(values, "bound", 0.0, 1e300),
        gap=_number(values, "gap", 0.0, 1.0),
        seconds=_number(values, "seconds", 0.0, 1e300),
        moves=check_positive_int("moves", values["moves"], minimum=0),
        trace_digest=values["trace_digest"],
        scale=check_positive_int("scale", values.get("scale", 1)),
        layers=tuple(_layer_of(layer, index, meta) for index, layer in enumerate(layers)),
    )


def _layer_to_dict(placement: Placement) -> dict[str, Any]:
    ranks, experts = np.nonzero(placement.copies_RE)
    return {
        "owners": placement.expert_to_owner_E.tolist(),
        "copies": sorted([expert, rank] for expert, rank in zip(experts.tolist(), ranks.tolist(), strict=True)),
    }


def _layer_of(data: Any, index: int, meta: TraceMeta) -> Placement:
    values = _object(data, f"layer {index}", ("owners", "copies"))
    owners, copies = values["owners"], values["copies"]
    if not isinstance(owners, list) or len(owners) != meta.num_experts:
        raise ValueError(f"layer {index}: owners must list {meta.num_experts} ranks")
    if not isinstance(copies, list) or not all(isinstance(pair, list) and len(pair) == 2 for pair in copies):
        raise ValueError(f"layer {index}: copies must be pairs of expert and rank")
    for value, limit, what in (
        *((rank, meta.num_ranks, "ranks") for rank in owners),
        *((expert, meta.num_experts, "experts") for expert, _ in copies),
        *((rank, meta.num_ranks, "ranks") for _, rank in copies),
    ):
        if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value < limit:
            raise ValueError(f"layer {index} names {str(value)[:40]!r}, but there are {limit} {what}")
    replicas_RE = np.zeros((meta.num_ranks, meta.num_experts), dtype=np.bool_)
    replicas_RE[owners, np.arange(meta.num_experts)] = True
    for expert, rank in copies:
        if replicas_RE[rank, expert]:
            raise ValueError(f"layer {index} puts expert {expert} on rank {rank} twice")
        replicas_RE[rank, expert] = True
    return Placement(np.array(owners), replicas_RE)
