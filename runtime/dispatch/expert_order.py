"""In which order ranks compute their experts, so that token rows travel under experts that need none of them.

An expert is *at home* on a rank that computes it for tokens of its own only, as copies often are where few ranks share one. With
rows in two parts each rank goes through

    half of its experts at home     while the first rows come
    a first half of the others      while the second half's rows come
    the second half                 while the first half's results leave
    the other experts at home       while the last results leave

where halves are of rows: those computed at home, and those that travel for the others (dispatch_handle.py tells how). In each of
these phases experts are in the order of their ids, as they are all where rows travel in one part. Every rank knows every rank's
order, since it follows from the split.

Shape letters: R ranks, E experts, X experts of one rank, N its assignments.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise

import numpy as np
import torch
from torch import Tensor

from ...kernels import on_device
from ...placement import Split

_NUM_PHASES = 4
_FIRST_AT_HOME, _FIRST_PART, _SECOND_PART, _LAST_AT_HOME = range(_NUM_PHASES)
# Below one row in so many at home there is next to nothing to hide under, while two more runs cost their launches.
_AT_HOME_OF = 32


@dataclass(frozen=True)
class Run:
    """Groups of rows that the expert stage computes in one go.

    Args:
        groups: which of the rank's experts, in its order.
        rows: their slot-major rows.
        part: the part in which rows travel that these need; None: the run is at home.
    """

    groups: slice
    rows: slice
    part: int | None

    @property
    def num_groups(self) -> int:
        """How many; none where a rank has no expert of a phase."""
        return int(self.groups.stop - self.groups.start)


@dataclass(frozen=True, eq=False)
class ExpertOrder:
    """The phase of every expert on every rank, int8 [R, E], and in how many parts, 1 or 2, rows travel."""

    phase_RE: np.ndarray
    num_parts: int
    has_home: bool  # whether a phase at home has an expert, on any rank

    @classmethod
    def of(cls, split: Split, num_parts: int) -> ExpertOrder:
        """The order that a split gives.

        Example: in two parts, a rank computes 2, 3 and 2 rows of experts 0, 1 and 2, one of expert 0's for another rank; it
        computes 1, then 0, then 2.
        """
        rows_RE = split.rows_RE
        if num_parts == 1:
            return cls(np.full(rows_RE.shape, _FIRST_PART, np.int8), num_parts, has_home=False)
        travelling_RE = rows_RE - split.home_rows_RE
        at_home_RE = np.where(travelling_RE == 0, rows_RE, 0)
        phase_RE = np.where(_is_in_first_half(travelling_RE), _FIRST_PART, _SECOND_PART)
        has_home = bool(_AT_HOME_OF * at_home_RE.sum() >= rows_RE.sum() > 0)
        if has_home:
            half_RE = np.where(_is_in_first_half(at_home_RE), _FIRST_AT_HOME, _LAST_AT_HOME)
            phase_RE = np.where(at_home_RE > 0, half_RE, phase_RE)
        return cls(phase_RE.astype(np.int8), num_parts, has_home)

    def experts(self, rank: int, held: Sequence[int]) -> np.ndarray:
        """The experts that a rank holds, given in ascending order, in its order: int64 [X]."""
        held_X = np.array(held, np.int64)
        return held_X[np.argsort(self.phase_RE[rank, held_X], kind="stable")]

    @property
    def part_RE(self) -> np.ndarray:
        """The part in which rows travel to every expert on every rank, 0 or 1; experts at home belong to the one beside them."""
        return self.phase_RE // _SECOND_PART

    def by_destination(self, assignments_A: Tensor, sends_ER: np.ndarray) -> Tensor:
        """Put assignments in the order (destination, expert, token) into the order of each destination's experts."""
        if not self.has_home:
            return assignments_A
        num_ranks, num_experts = self.phase_RE.shape
        order_RE = np.argsort(self.phase_RE, axis=1, kind="stable") + num_experts * np.arange(num_ranks)[:, None]
        return assignments_A[regroup(sends_ER.T.ravel(), order_RE.ravel(), assignments_A.device)]

    def by_id(self, received_RX: np.ndarray, experts_X: np.ndarray, device: torch.device) -> Tensor | None:
        """The gather index that puts a rank's assignments (source, expert in its order, token) into the order of expert ids.

        None where they are. Sums over a token's experts follow it, so that their bits do not depend on other ranks' tokens.
        """
        if not self.has_home:
            return None
        num_ranks, num_here = received_RX.shape
        order_RX = np.argsort(experts_X) + num_here * np.arange(num_ranks)[:, None]
        return regroup(received_RX.ravel(), order_RX.ravel(), device)

    def runs(self, rank: int, experts_X: np.ndarray, group_sizes: Sequence[int]) -> tuple[Run, ...]:
        """The runs of a rank, whose experts are in its order; as many on every rank, so some may have no expert."""
        ends = np.cumsum(np.bincount(self.phase_RE[rank, experts_X], minlength=_NUM_PHASES)).tolist()
        first_rows = [0, *accumulate(group_sizes)]
        parts = [(_FIRST_PART, 0), (_SECOND_PART, 1)][: self.num_parts]
        phases: list[tuple[int, int | None]] = (
            [(_FIRST_AT_HOME, None), *parts, (_LAST_AT_HOME, None)] if self.has_home else [*parts]
        )
        bounds = [0, *(ends[phase] for phase, _ in phases)]
        return tuple(
            Run(slice(start, stop), slice(first_rows[start], first_rows[stop]), part)
            for (start, stop), (_, part) in zip(pairwise(bounds), phases, strict=True)
        )


def _is_in_first_half(rows_RE: np.ndarray) -> np.ndarray:
    """Which experts' rows come first when each rank's are cut, between two experts, where about half of them are on either side.

    Example: 5, 1 and 4 rows are cut behind the 5.
    """
    up_to_RE = rows_RE.cumsum(axis=1)
    return 2 * up_to_RE - rows_RE <= up_to_RE[:, -1:]


def regroup(sizes_S: np.ndarray, order_S: np.ndarray, device: torch.device) -> Tensor:
    """Put consecutive segments of these sizes into another order: the gather index, int64.

    Example: segments of 1, 2 and 1 elements are 0, then 1 2, then 3; in the order [2, 1, 0] that is [3, 1, 2, 0].
    """
    starts_S, order_S = np.cumsum(sizes_S) - sizes_S, order_S[sizes_S[order_S] > 0]
    sizes = sizes_S[order_S]
    shifts = starts_S[order_S] - (np.cumsum(sizes) - sizes)
    total = int(sizes.sum())
    shifts_N = torch.repeat_interleave(on_device(shifts, device), on_device(sizes, device), output_size=total)
    return shifts_N + torch.arange(total, device=device)
