"""The drift guard: state that must be equal on several ranks is compared bit by bit, every so many steps.

Replicas that have drifted apart raise no error of their own: every rank's loss stays plausible, while gradients are averaged over
models that differ. What is compared, and among which ranks:

    dense parameters and buffers   dtype, shape and requires_grad among all ranks; bits among those that hold the same part of a
                                   tensor: all ranks where it is whole, the replicas of a shard where a DTensor has some
    experts                        the same, among the owners of the same experts, one in each replica
    settings of the optimizer      learning rate, betas and the like of each dense parameter among all ranks; of experts, by layer
                                   and weight, among the ranks whose experts have the same
    step counts                    as the bits of their parameter

A check takes one exchange where nothing differs, and three where something does:

    1. sums over everything that the same ranks share: some hundred bytes a rank
    2. a record for each tensor and number: what it is, and a fingerprint of its value
    3. the text of the first record that differs, from each rank

All ranks receive the same data, so all raise the same error.

Shape letters: W ranks of the mesh in row-major order, N records of the rank that has most.
"""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from enum import IntEnum
from fnmatch import fnmatchcase
from math import prod
from weakref import WeakSet, finalize, ref

import numpy as np
import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.nn.parameter import is_lazy
from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_post_hook

from ..agreement import Agreement, Doing
from ..group import RankGroup
from .fingerprint import hash_tensors, hash_text, signed
from .optimizer_numbers import numbers_of

NamedTensors = Iterable[tuple[str, Tensor]]

_EVERYWHERE = ""  # the part of what every rank must have
_ANYWHERE = "anywhere"  # of what is compared among the ranks that have it
_MAX_PARTS = 6
_TEXT_BYTES = 1024


class DriftError(RuntimeError):
    """Ranks differ in state that must be equal on them. The same error on every rank."""


class _Kind(IntEnum):
    """What a record is about. Causes come before their effects: the error is about the first kind that differs."""

    PROPERTIES = 0
    SETTINGS = 1
    STEPS = 2
    BITS = 3


@dataclass(frozen=True)
class _Record:
    """A value, 64 bits, that must be the same on all ranks with the same `part` of the tensor called `name`."""

    kind: _Kind
    name: str
    part: str
    value: int
    text: str = ""

    @classmethod
    def of_text(cls, kind: _Kind, name: str, part: str, text: str) -> _Record:
        """The record of a value that is a text."""
        return cls(kind, name, part, hash_text(text), text)

    @property
    def identity(self) -> tuple[int, int, int]:
        """Kind, name and part, as they travel."""
        return int(self.kind), hash_text(self.name), hash_text(self.part)


class DriftGuard:
    """Compares the state that must be equal on ranks of a mesh.

    Args:
        group: the ranks, and the transports between them.
        every: steps between checks, of which there is one after the first step besides; 0: none.
        ignored: names of parameters and buffers that may differ, or patterns with `*`.
        agreement: of the ranks on what they are doing; by default that of a model without MoE layers.
    """

    def __init__(self, group: RankGroup, *, every: int, ignored: Sequence[str] = (), agreement: Agreement | None = None):
        self._group = group
        self._agreement = agreement or Agreement(group, {})
        self._num_ranks = group.world_size * group.replicas.world_size
        self._every = every if self._num_ranks > 1 else 0
        self._ignored = tuple(ignored)
        # Of the current step alone: one that is no longer used may be collected on some ranks before others.
        self._stepped: WeakSet[Optimizer] = WeakSet()
        this = ref(self)
        hook = register_optimizer_step_post_hook(
            lambda optimizer, *_: guard._stepped.add(optimizer) if (guard := this()) else None
        )
        finalize(self, hook.remove)

    def after_step(
        self, step: int, dense: NamedTensors, experts: NamedTensors, optimizer: Optimizer | None, device: torch.device
    ) -> None:
        """Check if `step`, the number of steps done, is due for it. Collective.

        Args:
            dense: the model's parameters and buffers but for experts; like `experts`, iterated over only where a check is due.
            experts: those that this rank owns, with names that hold ".experts.<number>.".
            optimizer: is checked beside those that stepped since the last call; None: only those are.
            device: that the transports take integers on.

        Raises:
            DriftError: something differs. On every rank.
        """
        optimizers = {*self._stepped, *([] if optimizer is None else [optimizer])}
        self._stepped.clear()
        if self._every and (step == 1 or step % self._every == 0):
            watched = self._watched(dense), self._watched(experts)
            records = [*self._tensor_records(*watched), *self._optimizer_records(*watched, optimizers)]
            self._compare(step, records, device)

    def _watched(self, tensors: NamedTensors) -> list[tuple[str, Tensor]]:
        """Without names to be ignored, second names of tied tensors, and parameters that have no shape yet."""
        distinct: dict[int, tuple[str, Tensor]] = {}
        for name, tensor in tensors:
            if not is_lazy(tensor) and not any(fnmatchcase(name, pattern) for pattern in self._ignored):
                distinct.setdefault(id(tensor), (name, tensor))
        return list(distinct.values())

    @property
    def _owned_part(self) -> str:
        """The part of an expert: the shard that the rank is of its replica."""
        return f"{self._group.rank}/{self._group.world_size}"

    @property
    def _has_replicas(self) -> bool:
        return self._group.replicas.world_size > 1

    def _tensor_records(self, dense: Sequence[tuple[str, Tensor]], experts: Sequence[tuple[str, Tensor]]) -> list[_Record]:
        """Properties and bits."""
        records, held = [], []
        for name, tensor in dense:
            records.append(_Record.of_text(_Kind.PROPERTIES, name, _EVERYWHERE, _properties(tensor)))
            part, num_parts = _part_of(tensor)
            if num_parts < self._num_ranks:  # else no other rank has this part
                held += [(inner, part, memory) for inner, memory in _memory_of(name, tensor)]
        for name, tensor in experts if self._has_replicas else ():
            records.append(_Record.of_text(_Kind.PROPERTIES, name, self._owned_part, _properties(tensor)))
            held += [(inner, self._owned_part, memory) for inner, memory in _memory_of(name, tensor)]
        hashes = hash_tensors([memory for _, _, memory in held])
        return records + [_Record(_Kind.BITS, name, part, value) for (name, part, _), value in zip(held, hashes, strict=True)]

    def _optimizer_records(
        self, dense: Sequence[tuple[str, Tensor]], experts: Sequence[tuple[str, Tensor]], optimizers: Iterable[Optimizer]
    ) -> Iterator[_Record]:
        """Settings and step counts of each parameter, in whatever groups they are: a rank without experts needs none for them."""
        settings, steps = numbers_of(optimizers)
        for name, tensor in dense:
            if id(tensor) in settings:
                yield _Record.of_text(_Kind.SETTINGS, name, _EVERYWHERE, settings[id(tensor)])
            if id(tensor) in steps:
                yield _Record.of_text(_Kind.STEPS, name, _EVERYWHERE, steps[id(tensor)])
        of_weights: dict[str, set[str]] = defaultdict(set)
        for name, tensor in experts:
            if id(tensor) in settings:
                of_weights[re.sub(r"\.experts\.\d+\.", ".experts.*.", name)].add(settings[id(tensor)])
            if id(tensor) in steps and self._has_replicas:
                yield _Record.of_text(_Kind.STEPS, name, self._owned_part, steps[id(tensor)])
        for name, texts in of_weights.items():
            if len(texts) == 1:  # else they differ by expert on purpose
                yield _Record.of_text(_Kind.SETTINGS, name, _ANYWHERE, *texts)

    def _compare(self, step: int, records: Sequence[_Record], device: torch.device) -> None:
        # Phase 1: whether something differs
        summaries_WS = self._from_all(self._summary(records), device, step)
        if _agree(summaries_WS):
            return

        # Phase 2: what
        rows = np.zeros((summaries_WS[:, 0].max(), 4), np.int64)
        for row, record in zip(rows, records, strict=False):
            row[:] = (*record.identity, record.value)
        rows_WN4 = self._from_all(rows.ravel().tolist(), device, step).reshape(self._num_ranks, -1, 4)
        values_of: dict[tuple[int, int, int], dict[int, int]] = defaultdict(dict)
        for rank, (rows, num_records) in enumerate(zip(rows_WN4, summaries_WS[:, 0], strict=True)):
            for kind, name, part, value in rows[:num_records].tolist():
                values_of[kind, name, part][rank] = value
        different = [identity for identity, value_of in values_of.items() if self._differs(identity, value_of)]
        if not different:
            return

        # Phase 3: the texts of the first difference
        first = min(different, key=lambda identity: identity[0])
        text = next((f"{record.name}\n{record.text}" for record in records if record.identity == first), "")
        texts = [row.tobytes().rstrip(b"\0").decode(errors="ignore") for row in self._from_all(_packed(text), device, step)]
        raise DriftError(self._message(step, first, values_of[first], texts, different))

    def _summary(self, records: Sequence[_Record]) -> list[int]:
        """The number of records and of parts, then what stands for each part and a sum of its values.

        A value that changes alone changes the sum: factors are odd, which have inverses mod 2^64.
        """
        sums = dict.fromkeys((_EVERYWHERE, *([self._owned_part] if self._has_replicas else [])), 0)
        for record in records:
            if record.part != _ANYWHERE:
                sums[record.part] = sums.get(record.part, 0) + record.value * (hash_text(record.name) | 1)
        # Ranks may own experts of different layers, whose settings are mostly the same.
        if anywhere := {record.value for record in records if record.part == _ANYWHERE}:
            sums[_ANYWHERE] = sum(anywhere)
        pairs = [(hash_text(part), signed(total)) for part, total in sums.items()][:_MAX_PARTS]
        pairs += [(0, 0)] * (_MAX_PARTS - len(pairs))
        return [len(records), len(sums), *(number for pair in pairs for number in pair)]

    def _from_all(self, numbers: Sequence[int], device: torch.device, step: int) -> np.ndarray:
        """As many numbers from every rank of the mesh: int64 [W, n]."""
        here = torch.tensor(numbers, dtype=torch.int64, device=device)
        in_replica = self._agreement.gather(self._group.tokens, here, Doing.DRIFT, step)
        everywhere = self._agreement.gather(self._group.replicas, in_replica.values_Rn.flatten(), Doing.DRIFT, step)
        return everywhere.host_Rn.reshape(self._num_ranks, -1)

    def _differs(self, identity: tuple[int, int, int], value_of: Mapping[int, int]) -> bool:
        return len(set(value_of.values())) > 1 or len(value_of) < len(self._expected(identity, value_of))

    def _expected(self, identity: tuple[int, int, int], value_of: Mapping[int, int]) -> Sequence[int]:
        """The ranks that must have what these have."""
        kind, _, part = identity
        if part == hash_text(_EVERYWHERE):
            return range(self._num_ranks)
        if kind == _Kind.PROPERTIES:  # of an expert: one rank in each replica
            return range(min(value_of) % self._group.world_size, self._num_ranks, self._group.world_size)
        return sorted(value_of)

    def _message(
        self,
        step: int,
        identity: tuple[int, int, int],
        value_of: Mapping[int, int],
        texts: Sequence[str],
        different: Sequence[tuple[int, int, int]],
    ) -> str:
        kind, expected = _Kind(identity[0]), self._expected(identity, value_of)
        ((usual, _),) = Counter(value_of.values()).most_common(1)
        a = next(rank for rank, value in value_of.items() if value == usual)
        others = [rank for rank in expected if value_of.get(rank) != usual]
        b = others[0]
        name, _, text_a = texts[a].partition("\n")
        text_b = texts[b].partition("\n")[2] if b in value_of else None
        num_tensors = len({key for of, key, _ in different if of in (_Kind.PROPERTIES, _Kind.BITS)})
        num_stepped = len({key for of, key, _ in different if of in (_Kind.SETTINGS, _Kind.STEPS)})
        return (
            f"ranks have drifted apart by step {step}: {_difference(kind, name, (a, text_a), (b, text_b))} of the mesh "
            f"({len(others)} of {len(expected)} ranks differ from rank {a}); in all {num_tensors} tensors differ, and the "
            f"optimizer's numbers for {num_stepped} parameters. {_CURES[kind]}. Name what differs on purpose in "
            "runtime.check_replicas_except"
        )


def _difference(kind: _Kind, name: str, here: tuple[int, str], there: tuple[int, str | None]) -> str:
    """What differs between two ranks, each with what it has in words; None where it has nothing."""
    (a, text_a), (b, text_b) = here, there
    if kind == _Kind.BITS:
        return f"the values of {name!r} differ between ranks {a} and {b}"
    if kind == _Kind.PROPERTIES:
        return f"{name!r} is {text_a} on rank {a} and {text_b or 'missing'} on rank {b}"
    if text_b is None:
        return f"an optimizer stepped {name!r} on rank {a} and none did on rank {b}"
    if kind == _Kind.STEPS:
        return f"the optimizer has counted {text_a} steps of {name!r} on rank {a} and {text_b} on rank {b}"
    lines_a, lines_b = text_a.split("\n"), text_b.split("\n")
    only_a, only_b = ([line for line in x if line not in y] for x, y in ((lines_a, lines_b), (lines_b, lines_a)))
    return f"the optimizer's settings for {name!r} have {_listed(only_a)} on rank {a} and {_listed(only_b)} on rank {b}"


def _listed(lines: Sequence[str]) -> str:
    return ", ".join(lines) or "fewer values"


_CURES = {
    _Kind.PROPERTIES: "Build, convert, freeze and tie the model alike on all ranks",
    _Kind.SETTINGS: "Give all ranks the same optimizer and schedule, by numbers that are the same on all of them, and let no "
    "rank skip a step alone",
    _Kind.STEPS: "A rank has skipped a step alone, or taken one more: decide that by numbers that are the same on all of them "
    "(torch.amp.GradScaler on the handle's parameters does)",
    _Kind.BITS: "Likely causes: gradients that each rank clipped or scaled by numbers of its own "
    "(use handle.clip_grad_norm_, or torch's); dense gradients that nothing averages (use DDP or FSDP2); a step that one rank "
    "skipped alone; a learning rate that was another on one rank; weights set on one rank only (initialize and load them "
    "alike on all); a buffer that follows each rank's own tokens",
}


def _agree(summaries_WS: np.ndarray) -> bool:
    """Whether ranks have the same sums for the parts that they share; also False where there are too many parts to compare."""
    sums: dict[int, int] = {}
    for _, num_parts, *pairs in summaries_WS.tolist():
        for part, total in zip(pairs[: 2 * num_parts : 2], pairs[1::2], strict=False):
            if num_parts > _MAX_PARTS or sums.setdefault(part, total) != total:
                return False
    return True


def _packed(text: str) -> list[int]:
    """A text as integers, cut or filled up to one length."""
    packed: list[int] = np.frombuffer(text.encode()[:_TEXT_BYTES].ljust(_TEXT_BYTES, b"\0"), np.int64).tolist()
    return packed


def _properties(tensor: Tensor) -> str:
    grad = "requires_grad" if tensor.requires_grad else "no requires_grad"
    return f"{str(tensor.dtype).removeprefix('torch.')} {list(tensor.shape)} with {grad}"


def _part_of(tensor: Tensor) -> tuple[str, int]:
    """Which part of a tensor this rank holds, and of how many. Ranks that replicate a shard hold the same part."""
    if not isinstance(tensor, DTensor):
        return _EVERYWHERE, 1
    mesh = tensor.device_mesh
    coordinate = mesh.get_coordinate()
    if coordinate is None:
        return "none, outside of its mesh", 0
    places = zip(coordinate, mesh.shape, tensor.placements, strict=True)
    shards = [(place, size) for place, size, placement in places if size > 1 and not placement.is_replicate()]
    return ",".join(f"{place}/{size}" for place, size in shards), prod(size for _, size in shards)


def _memory_of(name: str, tensor: Tensor) -> Iterator[tuple[str, Tensor]]:
    """The plain tensors that a tensor is made of on this rank: itself, a DTensor's shard, those that a subclass wraps.

    None on the meta device. Of sparse tensors only the properties are compared.
    """
    tensor = tensor.detach()
    if isinstance(tensor, DTensor):
        tensor = tensor.to_local()
    flatten = getattr(tensor, "__tensor_flatten__", None)
    if flatten is not None:
        for attribute in flatten()[0]:
            yield from _memory_of(f"{name}.{attribute}", getattr(tensor, attribute))
    elif not tensor.is_meta and tensor.layout is torch.strided:
        yield name, tensor
