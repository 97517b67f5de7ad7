from __future__ import annotations

import pytest
import torch
from torch import Tensor

from moesaic.kernels import Bags, bags_of, gather_rows, sum_rows
from moesaic.kernels.permute import _offsets_by_counting, _offsets_by_search

SIZES = [(1, 1, 1), (7, 3, 5), (63, 129, 7), (129, 63, 64), (1025, 300, 33)]  # N, M, D
DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]


def naive_gather(x_MD: Tensor, row_ids_N: Tensor) -> Tensor:
    rows_ND = torch.zeros(len(row_ids_N), x_MD.shape[1], dtype=torch.float64)
    for n, m in enumerate(row_ids_N.tolist()):
        rows_ND[n] = x_MD[m].double()
    return rows_ND


def naive_sum(rows_ND: Tensor, bags: list[list[int]], dtype: torch.dtype) -> Tensor:
    x_MD = torch.zeros(len(bags), rows_ND.shape[1], dtype=dtype)
    for m, bag in enumerate(bags):
        for n in bag:
            x_MD[m] += rows_ND[n].to(dtype)
    return x_MD


def naive_bags(row_ids_N: Tensor, num_rows: int) -> list[list[int]]:
    bags: list[list[int]] = [[] for _ in range(num_rows)]
    for n, m in enumerate(row_ids_N.tolist()):
        bags[m].append(n)
    return bags


def as_lists(bags: Bags) -> list[list[int]]:
    return [bags.indices[a:b].tolist() for a, b in zip(bags.offsets[:-1], bags.offsets[1:], strict=True)]


@pytest.mark.parametrize("N,M,D", SIZES)
def test_bags_group_positions_in_ascending_order(N: int, M: int, D: int) -> None:
    row_ids_N = torch.randint(0, M, (N,))
    assert as_lists(bags_of(row_ids_N, M)) == naive_bags(row_ids_N, M)
    assert as_lists(bags_of(row_ids_N.int(), M)) == naive_bags(row_ids_N, M)


@pytest.mark.parametrize("N,M,D", SIZES)
def test_both_ways_to_the_offsets_agree(N: int, M: int, D: int) -> None:
    row_ids_N = torch.randint(0, M, (N,))
    assert torch.equal(_offsets_by_search(row_ids_N.sort().values, M), _offsets_by_counting(row_ids_N, M))
    assert _offsets_by_search(row_ids_N[:0], M).tolist() == [0] * (M + 1)


def test_bags_of_the_documented_example() -> None:
    bags = bags_of(torch.tensor([2, 0, 2]), 3)
    assert bags.indices.tolist() == [1, 0, 2]
    assert bags.offsets.tolist() == [0, 1, 1, 3]
    assert bags.num_bags == 3


def test_bags_without_rows_and_without_bags() -> None:
    assert as_lists(bags_of(torch.zeros(0, dtype=torch.int64), 3)) == [[], [], []]
    assert bags_of(torch.zeros(0, dtype=torch.int64), 0).num_bags == 0


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("N,M,D", SIZES)
def test_gather_copies_rows_exactly(N: int, M: int, D: int, dtype: torch.dtype) -> None:
    x_MD, row_ids_N = torch.randn(M, D, dtype=dtype), torch.randint(0, M, (N,))
    expected = naive_gather(x_MD, row_ids_N).to(dtype)
    assert torch.equal(gather_rows(x_MD, row_ids_N), expected)
    out = torch.empty(N, D, dtype=dtype)
    assert gather_rows(x_MD, row_ids_N, out=out) is out
    assert torch.equal(out, expected)
    assert torch.equal(gather_rows(x_MD.t().contiguous().t(), row_ids_N), expected)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("N,M,D", SIZES)
def test_sum_adds_each_bag_in_order_in_fp32(N: int, M: int, D: int, dtype: torch.dtype) -> None:
    """Equal to a loop that adds in fp32 (fp64 for fp64) and rounds once, to a nearest value (ties may go either way)."""
    rows_ND, row_ids_N = torch.randn(N, D, dtype=dtype), torch.randint(0, M, (N,))
    bags = bags_of(row_ids_N, M)
    exact = naive_sum(rows_ND, naive_bags(row_ids_N, M), torch.float64 if dtype == torch.float64 else torch.float32)
    smallest_error = (exact.to(dtype) - exact).abs()
    out = torch.empty(M, D, dtype=dtype)
    assert sum_rows(rows_ND, bags, out=out) is out
    for x_MD in (out, sum_rows(rows_ND, bags), sum_rows(rows_ND.t().contiguous().t(), bags)):
        assert torch.equal((x_MD - exact).abs(), smallest_error)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("N,M,D", SIZES)
def test_rows_beside_others_are_read_as_if_they_followed(N: int, M: int, D: int, dtype: torch.dtype) -> None:
    x_MD, rows_ND, row_ids_N = torch.randn(M, D, dtype=dtype), torch.randn(N, D, dtype=dtype), torch.randint(0, M, (N,))
    bags = bags_of(row_ids_N, M)
    for part in (0, M // 2, M):
        for beside in (x_MD[part:], x_MD[part:].t().contiguous().t()):
            out = torch.full((N, D), torch.nan, dtype=dtype)
            assert gather_rows(x_MD[:part], row_ids_N, beside=beside, out=out) is out
            assert torch.equal(out, x_MD[row_ids_N])
    for part in (0, N // 2, N):
        out = torch.full((M, D), torch.nan, dtype=dtype)
        assert sum_rows(rows_ND[:part], bags, beside=rows_ND[part:], out=out) is out
        assert torch.equal(out, sum_rows(rows_ND, bags))


def test_rows_beside_others_must_be_like_them() -> None:
    x_MD, ids_N = torch.randn(3, 4), torch.tensor([0, 4])
    with pytest.raises(ValueError, match=r"beside must have rows like .* torch.float32 \(4,\) on cpu, got torch.float64 \(4,\)"):
        gather_rows(x_MD, ids_N, beside=torch.randn(2, 4, dtype=torch.float64))
    with pytest.raises(ValueError, match=r"goes from 0 to 4; ids must be in \[0, 4\)"):
        gather_rows(x_MD, ids_N, beside=x_MD[:1])
    with pytest.raises(ValueError, match="rows 0 to 4, but there are 4 rows"):
        sum_rows(x_MD, bags_of(torch.zeros(5, dtype=torch.int64), 1), beside=x_MD[:1])
    with pytest.raises(ValueError, match=r"out must be torch.float32 \(2, 4\)"):
        gather_rows(x_MD, ids_N, beside=x_MD, out=torch.empty(3, 4))


@pytest.mark.parametrize("ids", [[0, 3], [-1, 0]], ids=str)
@pytest.mark.parametrize("dtype", [torch.int64, torch.int32], ids=str)
def test_ids_that_name_no_row_are_refused(ids: list[int], dtype: torch.dtype) -> None:
    """Nothing outside the rows is read, with none at all either."""
    row_ids_N = torch.tensor(ids, dtype=dtype)
    with pytest.raises(ValueError, match=rf"goes from {ids[0]} to {ids[1]}; ids must be in \[0, 3\)"):
        gather_rows(torch.randn(2, 4), row_ids_N, beside=torch.randn(1, 4))
    with pytest.raises(ValueError, match=r"ids must be in \[0, 0\)"):
        gather_rows(torch.randn(0, 4), row_ids_N, beside=torch.randn(0, 4))
    bags = Bags(row_ids_N.int(), torch.tensor([0, 2], dtype=torch.int32))
    with pytest.raises(ValueError, match=f"rows {ids[0]} to {ids[1]}, but there are 3 rows"):
        sum_rows(torch.randn(3, 4), bags)


@pytest.mark.parametrize("offsets", [[0, 3], [-1, 2]], ids=str)
def test_offsets_that_name_no_index_are_refused(offsets: list[int]) -> None:
    bags = Bags(torch.tensor([0, 1], dtype=torch.int32), torch.tensor(offsets, dtype=torch.int32))
    with pytest.raises(ValueError, match=f"offsets go from {offsets[0]} to {offsets[1]}, but there are 2 indices; use bags_of"):
        sum_rows(torch.randn(3, 4), bags)


def test_sum_follows_the_order_the_bag_gives() -> None:
    """1e8 + 1 - 1e8 is 0 or 1 in fp32, depending on the order."""
    rows_ND = torch.tensor([[1e8], [1.0], [-1e8]])
    offsets = torch.tensor([0, 3], dtype=torch.int32)
    assert sum_rows(rows_ND, Bags(torch.tensor([0, 1, 2], dtype=torch.int32), offsets)).item() == 0.0
    assert sum_rows(rows_ND, Bags(torch.tensor([0, 2, 1], dtype=torch.int32), offsets)).item() == 1.0


def test_sum_into_given_memory_equals_a_new_one() -> None:
    rows_ND, row_ids_N = torch.randn(200, 16384), torch.randint(0, 150, (200,))
    bags = bags_of(row_ids_N, 150)
    assert torch.equal(sum_rows(rows_ND, bags, out=torch.empty(150, 16384)), sum_rows(rows_ND, bags))


def test_sum_of_one_row_each_is_a_permutation() -> None:
    rows_ND, row_ids_N = torch.randn(65, 9), torch.randperm(65)
    bags = bags_of(row_ids_N, 65)
    for x_MD in (sum_rows(rows_ND, bags), sum_rows(rows_ND, bags, out=torch.empty(65, 9))):
        assert torch.equal(x_MD[row_ids_N], rows_ND)


@pytest.mark.parametrize("num_bags", [0, 3])
def test_sum_without_rows_is_zero(num_bags: int) -> None:
    bags = bags_of(torch.zeros(0, dtype=torch.int64), num_bags)
    rows_ND = torch.randn(0, 5)
    assert torch.equal(sum_rows(rows_ND, bags), torch.zeros(num_bags, 5))
    assert torch.equal(sum_rows(rows_ND, bags, out=torch.empty(num_bags, 5)), torch.zeros(num_bags, 5))


@pytest.mark.parametrize("N,M,D", SIZES)
def test_gather_and_sum_are_transposes(N: int, M: int, D: int) -> None:
    """<gather(x), r> == <x, sum(r)> for random x and r."""
    x_MD, rows_ND = torch.randn(M, D, dtype=torch.float64), torch.randn(N, D, dtype=torch.float64)
    row_ids_N = torch.randint(0, M, (N,))
    left = (gather_rows(x_MD, row_ids_N) * rows_ND).sum()
    right = (x_MD * sum_rows(rows_ND, bags_of(row_ids_N, M))).sum()
    torch.testing.assert_close(left, right, rtol=1e-12, atol=1e-12)


def test_sum_twice_is_bitwise_equal() -> None:
    rows_ND, bags = torch.randn(1025, 33), bags_of(torch.randint(0, 63, (1025,)), 63)
    assert torch.equal(sum_rows(rows_ND, bags), sum_rows(rows_ND, bags))


def test_row_ids_out_of_range_are_named() -> None:
    with pytest.raises(ValueError, match="reaches 4, but num_rows is 3"):
        bags_of(torch.tensor([0, 4]), 3)
