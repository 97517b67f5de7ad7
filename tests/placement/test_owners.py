"""The owner map: rows, contiguous blocks and moves."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from moesaic.placement import Move, OwnerMap


def test_contiguous_example():
    """The remainder rotates with the layer: 5 experts on 3 ranks."""
    owners = OwnerMap.contiguous(3, 5, 3)
    assert owners.expert_to_owner_LE.tolist() == [[0, 0, 1, 1, 2], [0, 0, 1, 2, 2], [0, 1, 1, 2, 2]]
    assert owners.num_rows_R.tolist() == [5, 5, 5]
    assert owners.rows_of(1) == [(0, 2), (0, 3), (1, 2), (2, 1), (2, 2)]


def test_contiguous_is_array_split_when_it_divides():
    assert OwnerMap.contiguous(1, 8, 4).expert_to_owner_LE.tolist() == [[0, 0, 1, 1, 2, 2, 3, 3]]


@given(st.integers(1, 6), st.integers(1, 9), st.integers(1, 7))
def test_contiguous_is_even(num_layers, num_experts, num_ranks):
    """Blocks are contiguous, and sizes differ by at most one in a layer and over all layers; a rank may own nothing."""
    owners = OwnerMap.contiguous(num_layers, num_experts, num_ranks)
    for owner_E in owners.expert_to_owner_LE:
        assert (np.diff(owner_E) >= 0).all()
        counts_R = np.bincount(owner_E, minlength=num_ranks)
        assert counts_R.max() - counts_R.min() <= 1
    assert owners.num_rows_R.max() - owners.num_rows_R.min() <= 1


@given(st.data())
def test_rows_are_a_bijection(data):
    num_layers, num_experts, num_ranks = (data.draw(st.integers(1, 5)) for _ in range(3))
    rng = np.random.default_rng(data.draw(st.integers(0, 1000)))
    owners = OwnerMap(rng.integers(0, num_ranks, (num_layers, num_experts)), num_ranks)
    for rank in range(num_ranks):
        rows = owners.rows_of(rank)
        assert rows == sorted(rows)
        assert len(rows) == owners.num_rows_R[rank]
        for layer, expert in rows:
            assert owners.expert_to_owner_LE[layer, expert] == rank


def test_moves():
    before, after = OwnerMap(np.array([[0, 1], [1, 0]]), 2), OwnerMap(np.array([[0, 0], [1, 1]]), 2)
    assert before.moves_to(after) == [Move(0, 1, 1, 0), Move(1, 1, 0, 1)]
    assert before.moves_to(before) == []


@pytest.mark.parametrize(
    "owners, num_ranks, message",
    [
        ([[0, 2]], 2, "holds 2, but there are 2 ranks: use 0 to 1"),
        ([[0, -1]], 2, "holds -1"),
        ([[0.5, 1.0]], 2, "must hold integers"),
        ([[0]], 0, "num_ranks must be an integer of at least 1, got 0"),
    ],
)
def test_wrong_owners(owners, num_ranks, message):
    with pytest.raises(ValueError, match=message):
        OwnerMap(np.array(owners), num_ranks)


def test_moves_need_matching_maps():
    with pytest.raises(ValueError, match="1 layers x 2 experts on 2 ranks to 1 x 3 on 2"):
        OwnerMap.contiguous(1, 2, 2).moves_to(OwnerMap.contiguous(1, 3, 2))
