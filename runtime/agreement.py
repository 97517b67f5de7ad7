"""What the ranks are doing must be the same on all of them: whatever they gather says so, and every rank compares.

Ranks that run different layers at one moment would otherwise exchange each other's tokens, in silence. So each gather of a
model's ranks is a frame of one size, whatever it is about: a header, then the values, then padding. Any two of them can be
compared, on every transport, and all ranks see the same headers, so all raise the same error.

    header: what is done | layer | its name | pass | forward | step | training | number of values | flags
    values: as many integers as the model's largest layer has experts; what is more follows in a gather of its own

Messages of an exchange are between two gathers, and tagged (collectives/tags.py).

Shape letters: R ranks, H numbers of a header, F of a frame, E experts.
"""

from __future__ import annotations

import os
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import IntEnum
from hashlib import sha256
from itertools import zip_longest
from typing import TYPE_CHECKING, NamedTuple
from zlib import crc32

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from ..collectives import CollectiveError, Transport
from ..kernels import on_device
from ..placement.machine import Machine, read_machine

if TYPE_CHECKING:
    from .group import RankGroup

# As many ranks of one place, and as many places, are named.
_MOST_NAMED = 8

_NOTHING = torch.empty(0, dtype=torch.int64)

# The flag of a rank where others' forwards begin: it has none left of its own.
_NONE_LEFT = 1

_AS_MANY = (
    "give every rank as many batches and micro-batches, evaluate on all ranks or on none, run the same layers and backward "
    "passes on all, and let no rank go on alone after an exception"
)


class Doing(IntEnum):
    """What ranks gather for. The numbers are unlikely as anything else, so that what is no header does not look like one."""

    FORWARD = 0x6D6F6501
    """The model's forward begins."""
    BACKWARD = 0x6D6F6506
    """The backward of a forward begins: the gradient of what it returned is there."""
    LAYER = 0x6D6F6502
    """Counts of a layer's tokens."""
    ROUTER_LOSS = 0x6D6F6503
    """Counts of all groups' tokens, for the losses of a layer's router."""
    CLIP = 0x6D6F6504
    """The gradients' norm."""
    OWNERS = 0x6D6F6505
    """Whether experts change their owner."""
    DRIFT = 0x6D6F6507
    """Whether ranks hold the same."""


@dataclass(frozen=True)
class PassId:
    """Which forward of which layer: the same on every rank."""

    layer_name: str
    number: int  # of the layer's passes in this step
    step: int
    plan: int
    is_training: bool

    @property
    def where(self) -> str:
        """Step, layer, plan and pass, for errors, profiles and the tags of messages."""
        return f"step {self.step}, {self.layer_name}, plan {self.plan}, pass {self.number}"

    def op(self, name: str) -> str:
        """The name under which traffic is counted: that of evaluation is kept apart from that of training steps."""
        return name if self.is_training else f"eval_{name}"


class Place(NamedTuple):
    """Where in the program a rank is. The header of a frame is this and the flags."""

    doing: int
    layer: int  # among the model's MoE layers; -1: none
    name: int  # the layer's name as a number, which is another where models differ
    number: int  # pass of the layer in this step
    forward: int  # of the model, counted since it was sharded
    step: int
    is_training: int
    num_values: int


HEADER_INTS = len(Place._fields) + 1
"""H: of every frame, the flags included."""


@dataclass(frozen=True, eq=False)
class Gathered:
    """What every rank gave."""

    values_Rn: Tensor
    host_Rn: np.ndarray
    """The same in the host's memory, int64."""
    flags_R: np.ndarray


class Agreement:
    """Gathers of the ranks that share a model's experts; one per model.

    Args:
        group: the ranks.
        num_experts: of every MoE layer by its name, in the model's order; the same on every rank.
    """

    def __init__(self, group: RankGroup, num_experts: Mapping[str, int]):
        self._group = group
        self._names = tuple(num_experts)
        self._layers = {name: index for index, name in enumerate(num_experts)}
        self._most_experts = max(num_experts.values(), default=0)
        self._num_forwards = 0
        self._step = 0
        self._num_passes: Counter[str] = Counter()  # of this step, by layer

    def next_pass(self, layer: str, step: int) -> int:
        """The number of the layer's pass that begins now, from 0 in every step."""
        if step != self._step:
            self._step, self._num_passes = step, Counter()
        self._num_passes[layer] += 1
        return self._num_passes[layer] - 1

    def begin_forward(self, step: int, *, is_training: bool) -> int:
        """Compare all ranks' places where the model's forward begins: `CollectiveError` if they differ, or one is absent.

        The host waits, and no device does. Returns the forward's number, from 1.
        """
        self._gather_forwards(step, is_training, flags=0)
        return self._num_forwards

    def begin_others_forward(self, step: int, *, is_training: bool) -> bool:
        """The same on a rank that has no forward of its own left: whether another rank begins one, in which this one takes part.

        False: no rank has one left.
        """
        return not self._gather_forwards(step, is_training, flags=_NONE_LEFT).flags_R.all()

    def _gather_forwards(self, step: int, is_training: bool, *, flags: int) -> Gathered:
        self._num_forwards += 1
        where = f"step {step}, the beginning of forward {self._num_forwards} ({_mode(is_training)})"
        return self._gather(self._group.control, _NOTHING, Doing.FORWARD, step, is_training=is_training, flags=flags, where=where)

    def begin_backward(self, step: int, forward: int) -> None:
        """The same at the beginning of the backward of a forward."""
        where = f"step {step}, the beginning of the backward of forward {forward}"
        self._gather(self._group.control, _NOTHING, Doing.BACKWARD, step, forward=forward, where=where)

    def gather_counts(self, counts_E: Tensor, of: PassId, *, flags: int = 0) -> Gathered:
        """Every rank's counts [R, E] of a layer's pass, and its flags."""
        return self._gather(self._group.tokens, counts_E, Doing.LAYER, of.step, of=of, flags=flags, where=of.where)

    def gather_loads(self, counts: Tensor, of: PassId) -> Gathered:
        """The counts of every replica, [R * E] each."""
        return self._gather(self._group.replicas, counts, Doing.ROUTER_LOSS, of.step, of=of, where=of.where)

    def gather(self, ranks: Transport, values: Tensor, doing: Doing, step: int) -> Gathered:
        """Values [n] of every rank, outside of any layer."""
        drift = f"the drift check after step {step}"
        where = {Doing.CLIP: "clip_grad_norm_", Doing.OWNERS: "migration", Doing.DRIFT: drift}[doing]
        return self._gather(ranks, values, doing, step, where=where)

    def _gather(
        self,
        ranks: Transport,
        values: Tensor,
        doing: Doing,
        step: int,
        *,
        of: PassId | None = None,
        forward: int | None = None,
        is_training: bool = True,
        flags: int = 0,
        where: str,
    ) -> Gathered:
        place = Place(
            doing,
            -1 if of is None else self._layers[of.layer_name],
            0 if of is None else crc32(of.layer_name.encode()),
            0 if of is None else of.number,
            self._num_forwards if forward is None else forward,
            step,
            int(is_training if of is None else of.is_training),
            values.numel(),
        )
        # Replicas gather what all ranks of their groups counted.
        room = self._most_experts * (self._group.world_size if ranks is self._group.replicas else 1)
        first, more = values[:room], values[room:]
        header = on_device(np.array([*place, flags], np.int64), values.device)
        frame = torch.cat([header, first, values.new_zeros(room - first.numel())])
        frames_RF = self._all_gather(ranks, frame, where)
        host_RF = frames_RF.cpu().numpy()
        self._compare(ranks, host_RF[:, : HEADER_INTS - 1])
        values_Rn = frames_RF[:, HEADER_INTS : HEADER_INTS + first.numel()]
        host_Rn = host_RF[:, HEADER_INTS : HEADER_INTS + first.numel()]
        if more.numel():
            more_Rn = self._all_gather(ranks, more.contiguous(), where)
            values_Rn, host_Rn = torch.cat([values_Rn, more_Rn], dim=1), np.concatenate([host_Rn, more_Rn.cpu().numpy()], axis=1)
        return Gathered(values_Rn, np.ascontiguousarray(host_Rn), host_RF[:, HEADER_INTS - 1].copy())

    def _all_gather(self, ranks: Transport, values: Tensor, where: str) -> Tensor:
        try:
            return ranks.all_gather_ints(values, where=where)
        except CollectiveError as error:
            raise CollectiveError(f"{error}; unless a rank has failed: {_AS_MANY}") from error

    def _compare(self, ranks: Transport, headers_RH: np.ndarray) -> None:
        """Raise `CollectiveError`, with the same places and cures on every rank, unless all are at one place."""
        if (headers_RH == headers_RH[0]).all():
            return
        ranks_at: dict[Place, list[int]] = defaultdict(list)
        for rank, header in enumerate(headers_RH.tolist()):
            ranks_at[Place(*header)].append(self._global_rank(ranks, rank))
        places = list(ranks_at)
        named = [f"{_named(ranks_at[place])}: {self._describe(place)}" for place in places[:_MOST_NAMED]]
        named += [f"{len(places) - _MOST_NAMED} more places"] * (len(places) > _MOST_NAMED)
        here = self._global_rank(ranks, ranks.rank)
        raise CollectiveError(
            f"rank {here}: the ranks are at different places of the program: {'; '.join(named)}. "
            f"{_capitalized(self._cures(places))}"
        )

    def _global_rank(self, ranks: Transport, rank: int) -> int:
        """A rank of a transport among all ranks of the mesh."""
        group = self._group
        replica, rank = (rank, group.rank) if ranks is group.replicas else (group.replicas.rank, rank)
        return replica * group.world_size + rank

    def _describe(self, place: Place) -> str:
        step, name = f"step {place.step}", self._name(place)
        at_layer = f"{step}, pass {place.number}, forward {place.forward} of the model ({_mode(place.is_training)})"
        texts: dict[int, str] = {
            Doing.FORWARD: f"the beginning of forward {place.forward} of the model, {step} ({_mode(place.is_training)})",
            Doing.BACKWARD: f"the beginning of the backward of forward {place.forward} of the model, {step}",
            Doing.LAYER: f"{name}, {at_layer}",
            Doing.ROUTER_LOSS: f"the router's losses of {name}, {at_layer}",
            Doing.CLIP: f"clip_grad_norm_, {step}, after forward {place.forward} of the model",
            Doing.OWNERS: f"handle.step() after {step}, where experts may change their owner",
            Doing.DRIFT: f"handle.step() after {step}, where ranks compare what they hold",
        }
        return texts.get(place.doing, f"no header of this version of moesaic ({place.doing})")

    def _name(self, place: Place) -> str:
        if not 0 <= place.layer < len(self._names) or crc32(self._names[place.layer].encode()) != place.name:
            return f"MoE layer {place.layer} (which has another name on this rank)"
        return self._names[place.layer]

    def _cures(self, places: Sequence[Place]) -> str:
        def differ(field: str) -> bool:
            return len({getattr(place, field) for place in places}) > 1

        cures = []
        if differ("doing"):
            cures.append(_AS_MANY)
        elif differ("layer") or differ("name") or differ("num_values"):
            cures.append("run the same layers on every rank: where layers are dropped at random, seed that alike on all ranks")
        if differ("is_training"):
            cures.append("call model.train() and model.eval() on all ranks alike")
        if differ("step"):
            cures.append("call handle.step() on all ranks equally often")
        if not cures:  # only the passes or forwards
            cures.append(_AS_MANY)
        return "; ".join(cures)


def check_same_layers(kinds: Mapping[str, object]) -> None:
    """Raise `ValueError`, on every rank, unless all have MoE layers of the same names and kinds, in one order.

    Collective: all ranks of the default process group call it.
    """
    texts = [f"{name} is {kind}" for name, kind in kinds.items()]
    found: list[list[str]] = [[] for _ in range(dist.get_world_size())]
    dist.all_gather_object(found, texts)
    for rank, theirs in enumerate(found):
        if theirs != found[0]:
            index, first, other = next(
                (i, a, b) for i, (a, b) in enumerate(zip_longest(found[0], theirs, fillvalue="missing")) if a != b
            )
            raise ValueError(
                f"MoE layer {index} of {max(len(found[0]), len(theirs))} differs between ranks: {first} on rank 0, "
                f"{other} on rank {rank}; build the same model on every rank"
            )


def first_problem(problem: str) -> str:
    """The problem of the first rank that has one, on every rank; empty: none has. Collective, on the default process group."""
    found = [""] * dist.get_world_size()
    dist.all_gather_object(found, problem)
    return next((text for text in found if text), "")


def agree_on_machine(machine: Machine | str | os.PathLike[str] | None) -> Machine | None:
    """The machine, read from its file on each rank. Raises `ValueError`, on every rank, unless all have the same, or none.

    Collective: all ranks of the default process group call it.
    """
    problem, text = "", ""
    try:
        machine = machine if machine is None or isinstance(machine, Machine) else read_machine(machine)
        text = machine.to_toml() if machine else ""
    except ValueError as error:
        problem = str(error)
    found: list[tuple[str, str]] = [("", "")] * dist.get_world_size()
    dist.all_gather_object(found, (problem, sha256(text.encode()).hexdigest()))
    for rank, (problem, digest) in enumerate(found):
        if problem:
            raise ValueError(problem + f" (rank {rank})")
        if digest != found[0][1]:
            raise ValueError(f"the machine of rank {rank} differs from that of rank 0; give the same machine file on every rank")
    assert machine is None or isinstance(machine, Machine)
    return machine


def _mode(is_training: int) -> str:
    return "training" if is_training else "evaluation"


def _named(ranks: Sequence[int]) -> str:
    """Example: "rank 1", "ranks 0, 2, 3"."""
    if len(ranks) == 1:
        return f"rank {ranks[0]}"
    more = f" and {len(ranks) - _MOST_NAMED} more" if len(ranks) > _MOST_NAMED else ""
    return f"ranks {', '.join(map(str, ranks[:_MOST_NAMED]))}{more}"


def _capitalized(text: str) -> str:
    return text[:1].upper() + text[1:]
