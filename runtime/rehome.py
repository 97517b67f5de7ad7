"""Re-homing: experts change their owner between steps; weights, gradients and optimizer state go along.

Ranks keep their numbers of experts, so that no parameter changes its shape: what leaves a rank is as much as what arrives, and
the moves fall apart into cycles in which every rank gives one row away and receives another into its place. A few cycles
at a time travel together, so that memory stays bounded. The idea of moving homes between steps is MoETuner's placement
(arXiv 2502.06643) put to work in training; what may move is the whole state, so later losses do not change.

Shape letters: B rows of this rank, L layers, E experts.
"""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..collectives import Buffer, Transport
from ..placement import Move, OwnerMap
from .bank import Bank
from .state import has_rows

# Rows of one tensor that a rank has on their way at once.
_ROWS_IN_FLIGHT = 4


@dataclass(frozen=True)
class Round:
    """Moves that travel together: each rank gives away as many rows as it receives."""

    moves: tuple[Move, ...]


def rounds_of(current: OwnerMap, wanted: OwnerMap, *, rows_in_flight: int = _ROWS_IN_FLIGHT) -> list[Round]:
    """The moves from one owner map to another in rounds in which no rank gives or takes more than `rows_in_flight` experts.

    Every round is made of cycles. Deterministic.

    Raises:
        ValueError: some rank would own another number of experts than now.
    """
    before_R, after_R = current.num_rows_R, wanted.num_rows_R
    for rank, (before, after) in enumerate(zip(before_R.tolist(), after_R.tolist(), strict=False)):
        if before != after:
            raise ValueError(f"rank {rank} owns {before} experts and would own {after}; re-homing keeps every rank's number")
    rounds: list[list[Move]] = []
    given: list[Counter[int]] = []  # rows that each rank gives away in a round
    for cycle in _cycles(current.moves_to(wanted)):
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
    """Moves as cycles that visit a rank at most once: the destination of each is the source of the next."""
    leaving: dict[int, list[Move]] = defaultdict(list)
    for move in reversed(moves):
        leaving[move.src].append(move)
    cycles = []
    for rank in sorted(leaving):
        while leaving[rank]:
            path: list[Move] = []
            position = {rank: 0}
            while True:
                move = leaving[path[-1].dst if path else rank].pop()
                path.append(move)
                if move.dst in position:
                    # The path closed on itself; what came before the loop goes on from there.
                    start = position[move.dst]
                    cycles.append(path[start:])
                    path = path[:start]
                    position = {rank: 0} | {m.dst: i + 1 for i, m in enumerate(path)}
                    if not path:
                        break
                else:
                    position[move.dst] = len(path)
    return cycles


def row_tensors(bank: Bank, optimizer: torch.optim.Optimizer | None) -> list[Tensor]:
    """Everything that has one row per expert of the bank: weights, gradients, and the optimizer's state.

    Raises:
        ValueError: a piece of optimizer state that is neither one number nor has the bank's rows, see `state.has_rows`;
            an optimizer without the bank's parameters, or one whose update of an expert depends on which others lie beside it.
    """
    if optimizer is not None and bank.is_trainable:
        _check_holds(bank, optimizer)
    tensors: list[Tensor] = []
    for parameter in bank.parameters():
        tensors.append(parameter.detach())
        if parameter.grad is not None:
            tensors.append(parameter.grad)
        for field, value in optimizer.state.get(parameter, {}).items() if optimizer is not None else ():
            if isinstance(value, Tensor) and has_rows(value, parameter, field):
                tensors.append(value)
    return tensors


def _check_holds(bank: Bank, optimizer: torch.optim.Optimizer) -> None:
    kind, held = type(optimizer).__name__, {id(p) for group in optimizer.param_groups for p in group["params"]}
    for name, parameter in bank.named_parameters():
        if id(parameter) not in held:
            raise ValueError(
                f"{kind} does not hold the experts' {name}, so its state could not follow them; "
                "give the optimizer that was built from handle.parameter_groups()"
            )
    if isinstance(optimizer, torch.optim.Adafactor):
        raise ValueError(
            f"{kind} scales each update by norms over all experts of a rank, which change with their owners; "
            "use an optimizer that updates every expert alone, or do not re-home"
        )


@torch.no_grad()
def migrate(bank: Bank, tensors: Sequence[Tensor], wanted: OwnerMap, transport: Transport, *, where: str = "") -> int:
    """Make `wanted` the bank's owner map: move the rows of `tensors` to their new owners. Collective.

    Returns the bytes that this rank sent. Buffers take at most a few rows of one tensor at a time.
    """
    rank, sent_bytes = transport.rank, 0
    rounds = rounds_of(bank.owners, wanted)
    rows = dict(bank.rows)
    for round_ in rounds:
        leaving = [m for m in round_.moves if m.src == rank]
        arriving = [m for m in round_.moves if m.dst == rank]
        places = [rows.pop((m.layer, m.expert)) for m in leaving]
        rows |= {(m.layer, m.expert): place for m, place in zip(arriving, places, strict=True)}
        for tensor in tensors:
            outgoing = [tensor[place] for place in places]
            incoming = [torch.empty_like(buffer) for buffer in outgoing]
            transport.exchange(
                [Buffer(buffer, m.dst) for buffer, m in zip(outgoing, leaving, strict=True)],
                [Buffer(buffer, m.src) for buffer, m in zip(incoming, arriving, strict=True)],
                op="rehome",
                where=where,
            ).wait()
            for place, buffer in zip(places, incoming, strict=True):
                tensor[place] = buffer
            sent_bytes += sum(buffer.nbytes for buffer in outgoing)
    bank.adopt(wanted, rows)
    return sent_bytes


def bytes_to_move(current: OwnerMap, wanted: OwnerMap, row_bytes: int) -> int:
    """Bytes that the busiest rank gives away."""
    counts = [0] * current.num_ranks
    for move in current.moves_to(wanted):
        counts[move.src] += 1
    return max(counts, default=0) * row_bytes


def bytes_per_row(tensors: Sequence[Tensor]) -> int:
    """Bytes of one expert in all tensors together."""
    return sum(tensor.element_size() * math.prod(tensor.shape[1:]) for tensor in tensors)
