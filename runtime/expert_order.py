"""In which order ranks compute their experts, so that token rows travel under experts that need none of them.

An expert is *at home* on a rank that computes it for tokens of its own only, as most copies are. Each rank goes through

    half of its experts at home     while the first rows come
    a first half of the others      while the second half's rows come
    the second half                 while the first half's results leave
    the other experts at home       while the last results leave

where halves are of rows: those computed at home, and those that travel for the others (dispatch_handle.py tells how). In each of
these phases experts are in the order of their ids. Every rank knows every rank's order, since it follows from the split.

Shape letters: R ranks, E experts, H parts in which rows travel, X experts of one rank.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate, pairwise

import numpy as np
import torch
from torch import Tensor

from ..kernels import on_device
from ..placement import Split

_NUM_PHASES = 4
_FIRST_AT_HOME, _FIRST_PART, _SECOND_PART, _LAST_AT_HOME = range(_NUM_PHASES)


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
    """The phase of every expert on every rank, int8 [R, E]."""

    phase_RE: np.ndarray

    @classmethod
    def of(cls, split: Split) -> ExpertOrder:
        """The order that a split gives.

        Example: a rank computes 2, 3 and 2 rows of experts 0, 1 and 2, one of expert 0's for another rank: 1, then 0, then 2.
        """
        rows_RE, travelling_RE = split.rows_RE, split.rows_RE - split.home_rows_RE
        is_at_home_RE = (travelling_RE == 0) & (rows_RE > 0)
        at_home_RE = np.where(_is_in_first_half(rows_RE * is_at_home_RE), _FIRST_AT_HOME, _LAST_AT_HOME)
        others_RE = np.where(_is_in_first_half(travelling_RE), _FIRST_PART, _SECOND_PART)
        return cls(np.where(is_at_home_RE, at_home_RE, others_RE).astype(np.int8))

    @cached_property
    def is_by_id(self) -> bool:
        """Whether every rank's order is that of the ids."""
        return bool((np.diff(self.phase_RE, axis=1) >= 0).all())

    def experts(self, rank: int, held: Sequence[int]) -> np.ndarray:
        """The experts that a rank holds, given in ascending order, in its order: int64 [X]."""
        held_X = np.array(held, np.int64)
        return held_X[np.argsort(self.phase_RE[rank, held_X], kind="stable")]

    def part_RE(self, num_parts: int) -> np.ndarray:
        """The part in which rows travel to every expert on every rank, 0 or 1; experts at home belong to the one beside them."""
        return self.phase_RE >= _SECOND_PART if num_parts == 2 else np.zeros_like(self.phase_RE)

    def by_destination(self, assignments_A: Tensor, sends_ER: np.ndarray) -> Tensor:
        """Put assignments in the order (destination, expert, token) into the order of each destination's experts."""
        if self.is_by_id:
            return assignments_A
        num_ranks, num_experts = self.phase_RE.shape
        order_RE = np.argsort(self.phase_RE, axis=1, kind="stable") + num_experts * np.arange(num_ranks)[:, None]
        return assignments_A[regroup(sends_ER.T.ravel(), order_RE.ravel(), assignments_A.device)]

    def runs(
        self, rank: int, held_X: np.ndarray, group_sizes: Sequence[int], num_parts: int, *, at_home: bool
    ) -> tuple[Run, ...]:
        """The runs of a rank that holds these experts, in its order; as many on every rank, so some may have no expert.

        One for each part. With `at_home`, which two parts ask for, experts at home are the first and the last run.
        """
        ends = np.cumsum(np.bincount(self.phase_RE[rank, held_X], minlength=_NUM_PHASES)).tolist()
        cuts = [0, *ends]
        parts: tuple[int | None, ...] = (None, 0, 1, None)
        if not at_home:
            cuts, parts = [0, ends[-1]], (0,)
        elif num_parts == 1:
            del cuts[_SECOND_PART]
            parts = (None, 0, None)
        first_rows = [0, *accumulate(group_sizes)]
        return tuple(
            Run(slice(start, stop), slice(first_rows[start], first_rows[stop]), part)
            for part, (start, stop) in zip(parts, pairwise(cuts), strict=True)
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
