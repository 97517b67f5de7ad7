"""Operands as views of more memory, which holds NaN beside them: dense ones, and every other way that they come."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from hypothesis import strategies as st
from torch import Tensor

# The last two dimensions of an operand as a view of more memory.
LAYOUTS: dict[str, Callable[[int, int], tuple[tuple[int, int], Callable[[Tensor], Tensor]]]] = {
    "dense": lambda n, w: ((n, w), lambda m: m),
    "some of more rows": lambda n, w: ((n + 3, w), lambda m: m[..., 2 : 2 + n, :]),
    "every other row": lambda n, w: ((2 * n, w), lambda m: m[..., ::2, :]),
    "columns of wider rows": lambda n, w: ((n, w + 3), lambda m: m[..., 1 : 1 + w]),
    "every other column": lambda n, w: ((n, 2 * w), lambda m: m[..., ::2]),
    "transposed": lambda n, w: ((w, n), lambda m: m.mT),
}


def placed(values: Tensor, layout: str) -> tuple[Tensor, Tensor]:
    """Memory that holds NaN besides a view of it, and this view, which holds the values."""
    shape, view_of = LAYOUTS[layout](*values.shape[-2:])
    memory = torch.full((*values.shape[:-2], *shape), torch.nan)
    return memory, view_of(memory).copy_(values)


def placed_matrices(values_GOI: Tensor, layout: str, is_stacked: bool) -> tuple[Tensor, Tensor | list[Tensor]]:
    """The same for matrices, one after the other or each in memory that others follow."""
    memory, view = placed(values_GOI, layout)
    return memory, view if is_stacked else list(view)


# Rows that the compiled routine takes, and matrices: one contiguous block each, all of them together where they are stacked.
PLAIN_ROWS = ["dense", "some of more rows", "every other row", "columns of wider rows"]
PLAIN_MATRICES = [("dense", False), ("dense", True), ("some of more rows", False)]


def row_layouts(*names: str, plain: Sequence[str] = PLAIN_ROWS) -> st.SearchStrategy[dict[str, str]]:
    """A layout for each: half the time only plain ones."""
    return st.one_of(st.fixed_dictionaries(dict.fromkeys(names, st.sampled_from(kinds))) for kinds in (plain, list(LAYOUTS)))


def matrix_layouts(*names: str) -> st.SearchStrategy[dict[str, tuple[str, bool]]]:
    """A layout for each, and whether it is stacked: half the time only plain ones."""
    every = st.tuples(st.sampled_from(list(LAYOUTS)), st.booleans())
    kinds = st.sampled_from(PLAIN_MATRICES), every
    return st.one_of(st.fixed_dictionaries(dict.fromkeys(names, kind)) for kind in kinds)
