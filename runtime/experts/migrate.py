"""Migration: experts change their owner between steps; weights, gradients and optimizer state go along.

Every rank keeps its number of experts, so that no parameter changes its shape: as many experts leave a rank as arrive, and the
moves decompose into cycles in which every rank sends one expert and receives another into its row. A few cycles at a time
travel together, so that memory stays bounded. MoETuner (arXiv 2502.06643) has the idea of new owners between steps; here the
whole state of an expert migrates, so later losses do not change.

Parameters stay in the optimizer's parameter groups and get the weights and the state of another expert. So an expert only
replaces one that is trained alike: frozen or not, with equal settings of its parameter group, with optimizer state of the same
form. Cycles of experts that are trained differently are left out of a migration.

Shape letters: B rows of this rank, L layers, E experts.
"""

from __future__ import annotations

import functools
import hashlib
import logging
from collections import Counter, defaultdict
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ...collectives import Buffer, Transport
from ...placement import Move, OwnerMap, Topology
from .._compat import plain_parts
from .bank import Bank

logger = logging.getLogger("moesaic.migration")

# Experts of one rank whose tensors of one kind are on their way at once.
_ROWS_IN_FLIGHT = 4


@dataclass(frozen=True)
class Round:
    """Moves that travel together: each rank sends as many experts as it receives."""

    moves: tuple[Move, ...]


def rounds_of(
    current: OwnerMap, wanted: OwnerMap, *, rows_in_flight: int = _ROWS_IN_FLIGHT, kinds_LE: np.ndarray | None = None
) -> list[Round]:
    """The moves from one owner map to another in rounds in which no rank sends or receives more than `rows_in_flight` experts.

    Every round is made of cycles. With `kinds_LE`, a number for each expert, a cycle has experts of one kind, and moves that no
    such cycle holds are left out. Deterministic.

    Raises:
        ValueError: some rank would own another number of experts than now.
    """
    before_R, after_R = current.num_rows_R, wanted.num_rows_R
    for rank, (before, after) in enumerate(zip(before_R.tolist(), after_R.tolist(), strict=False)):
        if before != after:
            raise ValueError(f"rank {rank} owns {before} experts and would own {after}; migration keeps every rank's number")
    by_kind: dict[int, list[Move]] = defaultdict(list)
    for move in current.moves_to(wanted):
        by_kind[0 if kinds_LE is None else int(kinds_LE[move.layer, move.expert])].append(move)
    rounds: list[list[Move]] = []
    given: list[Counter[int]] = []  # experts that each rank sends in a round
    for kind in sorted(by_kind):
        for cycle in _cycles(by_kind[kind]):
            ranks = Counter(move.src for move in cycle)
            fitting = (i for i, counts in enumerate(given) if all(counts[rank] < rows_in_flight for rank in ranks))
            index = next(fitting, len(rounds))
            if index == len(rounds):
                rounds.append([])
                given.append(Counter())
            rounds[index] += cycle
            given[index] += ranks
    return [Round(tuple(moves)) for moves in rounds]


def _cycles(moves: Sequence[Move]) -> list[list[Move]]:
    """Moves as cycles that visit a rank at most once: the destination of each is the source of the next. Others are left out."""
    leaving: dict[int, list[Move]] = defaultdict(list)
    for move in reversed(moves):
        leaving[move.src].append(move)
    cycles = []
    for rank in sorted(leaving):
        path: list[Move] = []
        position = {rank: 0}
        while path or leaving[rank]:
            here = path[-1].dst if path else rank
            if not leaving[here]:
                # Nothing leaves where the last move arrives: no cycle holds it.
                position.pop(path.pop().dst)
                continue
            move = leaving[here].pop()
            path.append(move)
            if move.dst in position:
                # The path closed on itself; what came before the loop goes on from there.
                start = position[move.dst]
                cycles.append(path[start:])
                path = path[:start]
                position = {rank: 0} | {m.dst: i + 1 for i, m in enumerate(path)}
            else:
                position[move.dst] = len(path)
    return cycles


def owners_after(current: OwnerMap, rounds: Iterable[Round]) -> OwnerMap:
    """The owner map once these moves are made."""
    owners_LE = current.expert_to_owner_LE.copy()
    for round_ in rounds:
        for move in round_.moves:
            owners_LE[move.layer, move.expert] = move.dst
    return OwnerMap(owners_LE, current.num_ranks)


@dataclass(frozen=True, eq=False)
class ExpertState:
    """Everything that goes along with an expert of one row."""

    tensors: list[Tensor]
    """Weights, gradients and state in their shape, as plain tensors, in place."""
    numbers: list[tuple[Any, Any]]
    """State that is one number, as (mapping or tensor, key or None)."""
    kind: int
    """The same for experts that can take each other's row."""

    @property
    def nbytes(self) -> int:
        """Bytes that travel."""
        return sum(tensor.nbytes for tensor in self.tensors) + 8 * len(self.numbers)


def expert_states(bank: Bank, optimizer: torch.optim.Optimizer | None) -> list[ExpertState]:
    """By row: what goes along with the expert.

    Raises:
        ValueError: a piece of optimizer state that is neither a number nor a tensor; an optimizer without an expert's parameters.
    """
    groups: dict[int, int] = {}  # by a parameter's id
    for index, group in enumerate(() if optimizer is None else optimizer.param_groups):
        groups |= dict.fromkeys(map(id, group["params"]), _digest(_settings(group, index)))
    digest = functools.cache(_digest)  # most experts are of a few kinds
    return [_state_of(bank, row, optimizer, groups, digest) for row in range(len(bank.experts))]


def _state_of(
    bank: Bank, row: int, optimizer: torch.optim.Optimizer | None, groups: Mapping[int, int], digest: Callable[[Hashable], int]
) -> ExpertState:
    tensors: list[Tensor] = []
    numbers: list[tuple[Any, Any]] = []
    kind: list[Hashable] = []
    for name in bank.weight_names:
        parameter = bank.experts[row].parameter(name)
        if optimizer is not None and parameter.requires_grad and id(parameter) not in groups:
            raise ValueError(
                f"{type(optimizer).__name__} does not hold the experts' {name}, so its state could not follow them; "
                "give the optimizer that was built from handle.parameter_groups()"
            )
        tensors.append(parameter.detach())
        kind.append((name, parameter.requires_grad, groups.get(id(parameter), 0), parameter.grad is not None))
        if parameter.grad is not None:
            tensors.append(parameter.grad.as_subclass(Tensor))
        fields: dict[str, Any] = {} if optimizer is None else optimizer.state.get(parameter, {})
        for field in sorted(fields):
            value = fields[field]
            if isinstance(value, Tensor):
                parts = plain_parts(value)
                kind.append((field, tuple((part.shape, part.dtype) for part in parts)))
                for part in parts:
                    if part.numel() == 1:
                        numbers.append((part, None))
                    else:
                        tensors.append(part)
            elif isinstance(value, (bool, int, float)):
                kind.append((field, type(value).__name__))
                numbers.append((fields, field))
            else:
                raise ValueError(
                    f"optimizer state {field!r} of {type(optimizer).__name__} is a {type(value).__name__}, which cannot follow "
                    "an expert; use an optimizer whose state is tensors and numbers"
                )
    return ExpertState(tensors, numbers, digest(tuple(kind)))


def _settings(group: Mapping[str, Any], index: int) -> list[tuple[str, str]]:
    """The settings of a parameter group, but for what it holds. A scheduler may give groups that are equal now others later."""
    values = {key: value for key, value in group.items() if key not in ("params", "param_names")}
    if "initial_lr" in group:
        values["index"] = index
    return sorted((key, repr(value.item() if isinstance(value, Tensor) else value)) for key, value in values.items())


def _digest(value: Any) -> int:
    """A number for a value, the same in every process: what `repr` shows of it, hashed."""
    return int.from_bytes(hashlib.sha256(repr(value).encode()).digest()[:7], "big")


@torch.no_grad()
def migrate(
    bank: Bank, optimizer: torch.optim.Optimizer | None, wanted: OwnerMap, transport: Transport, *, where: str = ""
) -> int:
    """Make `wanted` the bank's owner map, as far as experts can take each other's rows: move their states. Collective.

    Returns the bytes that this rank sent. Buffers take at most one tensor of a few experts at a time.

    Raises:
        ValueError: some rank would own another number of experts than now; see also `expert_states`. Nothing has migrated then.
    """
    current, rank, sent_bytes = bank.owners, transport.rank, 0
    rounds_of(current, wanted)
    for layer in range(current.num_layers):
        bank.claim(layer)
    states = expert_states(bank, optimizer)
    kinds_LE = _gathered_kinds(bank, states, transport, where)
    rounds = rounds_of(current, wanted, kinds_LE=kinds_LE)
    num_left = len(current.moves_to(wanted)) - sum(len(round_.moves) for round_ in rounds)
    if num_left and rank == 0:
        logger.warning(
            "%s: %d of %d experts stay: those whose place they would take are trained otherwise (frozen, another parameter "
            "group, or other optimizer state)",
            where or "migration",
            num_left,
            len(current.moves_to(wanted)),
        )
    rows = dict(bank.rows)
    for round_ in rounds:
        leaving = [m for m in round_.moves if m.src == rank]
        arriving = [m for m in round_.moves if m.dst == rank]
        free = [rows.pop((m.layer, m.expert)) for m in leaving]
        given = list(free)
        taken = []
        for move in arriving:
            kind = int(kinds_LE[move.layer, move.expert])
            place = next(row for row in free if states[row].kind == kind)
            free.remove(place)
            taken.append(place)
            rows[move.layer, move.expert] = place
        sent_bytes += _exchange(
            [(states[row], m.dst) for row, m in zip(given, leaving, strict=True)],
            [(states[row], m.src) for row, m in zip(taken, arriving, strict=True)],
            bank,
            transport,
            where,
        )
    bank.adopt(owners_after(current, rounds), rows)
    return sent_bytes


def _gathered_kinds(bank: Bank, states: Sequence[ExpertState], transport: Transport, where: str) -> np.ndarray:
    """The kind of every expert, int64 [L, E]. Collective."""
    owners_LE = bank.owners.expert_to_owner_LE
    mine_LE = np.zeros(owners_LE.shape, np.int64)
    for pair, row in bank.rows.items():
        mine_LE[pair] = states[row].kind
    mine = torch.from_numpy(mine_LE.ravel()).to(bank.device)
    kinds = transport.all_gather_ints(mine, where=where or "migration").cpu().numpy().reshape(-1, *owners_LE.shape)
    return np.take_along_axis(kinds, owners_LE[None], axis=0)[0]


def _exchange(
    leaving: Sequence[tuple[ExpertState, int]],
    arriving: Sequence[tuple[ExpertState, int]],
    bank: Bank,
    transport: Transport,
    where: str,
) -> int:
    """Send the states of experts to ranks, and receive others in their places; see `migrate`. Returns the bytes sent.

    Tensor by tensor. What differs from expert to expert in the number of tensors is of another kind, but a round may mix kinds.
    """
    device, sent_bytes = bank.device, 0
    most = max((len(state.tensors) for state, _ in leaving), default=0)
    numbers = [(_packed(state, device), dst) for state, dst in leaving]
    packed = [torch.empty(len(state.numbers), dtype=torch.float64, device=device) for state, _ in arriving]
    for index in range(most):
        # Contiguous: messages are bytes, and ranks may hold a tensor in different orders.
        outgoing = [
            (s.tensors[index].to(device, copy=True, memory_format=torch.contiguous_format), dst)
            for s, dst in leaving
            if index < len(s.tensors)
        ]
        incoming = [
            (torch.empty_like(s.tensors[index], device=device, memory_format=torch.contiguous_format), src, s.tensors[index])
            for s, src in arriving
            if index < len(s.tensors)
        ]
        transport.exchange(
            [Buffer(buffer, dst) for buffer, dst in outgoing],
            [Buffer(buffer, src) for buffer, src, _ in incoming],
            op="migrate",
            where=where,
        ).wait()
        for buffer, _, target in incoming:
            target.copy_(buffer)
        sent_bytes += sum(buffer.nbytes for buffer, _ in outgoing)
    sends = [Buffer(buffer, dst) for buffer, dst in numbers if buffer.numel()]
    recvs = [Buffer(buffer, src) for buffer, (_, src) in zip(packed, arriving, strict=True) if buffer.numel()]
    transport.exchange(sends, recvs, op="migrate", where=where).wait()
    for buffer, (state, _) in zip(packed, arriving, strict=True):
        for number, (holder, key) in zip(buffer.tolist(), state.numbers, strict=True):
            if key is None:
                holder.fill_(number)
            else:
                holder[key] = type(holder[key])(number)
    return sent_bytes + sum(buffer.nbytes for buffer, _ in numbers)


def _packed(state: ExpertState, device: torch.device) -> Tensor:
    """The numbers of a state, fp64, which holds integers up to 2**53 exactly."""
    values = [float(holder.item() if key is None else holder[key]) for holder, key in state.numbers]
    return torch.tensor(values, dtype=torch.float64, device=device)


def bytes_to_migrate(current: OwnerMap, wanted: OwnerMap, row_bytes: int, topology: Topology) -> float:
    """Bytes that the busiest rank sends, or that would take it as long as the busiest link between nodes takes for its own."""
    return row_bytes * current.most_sent(wanted, topology)


def bytes_per_expert(states: Sequence[ExpertState]) -> int:
    """Bytes of the largest state of an expert."""
    return max((state.nbytes for state in states), default=0)
