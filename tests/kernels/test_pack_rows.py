from __future__ import annotations

import pytest
import torch

from moesaic.kernels import Bags, accumulate_rows, bags_of, pack_rows


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_pack_copies_listed_rows_with_a_cast(dtype: torch.dtype) -> None:
    bank, row_ids_N = torch.randn(5, 7, 9), torch.tensor([3, 0, 3])
    expected = torch.stack([bank[3], bank[0], bank[3]]).to(dtype)
    assert torch.equal(pack_rows(bank, row_ids_N, dtype=dtype), expected)
    out = torch.empty(3, 7, 9, dtype=dtype)
    assert pack_rows(bank, row_ids_N, out=out) is out
    assert torch.equal(out, expected)
    assert torch.equal(pack_rows(bank.transpose(1, 2), row_ids_N, dtype=dtype), expected.transpose(1, 2))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_accumulate_adds_in_order_and_leaves_the_rest(dtype: torch.dtype) -> None:
    bank, buffer = torch.randn(4, 7, 9), torch.randn(3, 7, 9).to(dtype)
    bank[0] = float("nan")
    start = bank.clone()
    accumulate_rows(bank, bags_of(torch.tensor([2, 1, 2]), 4), buffer, alpha=0.5)
    assert bank[0].isnan().all()
    assert torch.equal(bank[3], start[3])
    assert torch.equal(bank[1], start[1] + 0.5 * buffer[1].float())
    assert torch.equal(bank[2], (start[2] + 0.5 * buffer[0].float()) + 0.5 * buffer[2].float())


def test_accumulate_follows_the_order_the_bag_gives() -> None:
    bank, buffer = torch.zeros(1, 1), torch.tensor([[1e8], [1.0], [-1e8]])
    bags = Bags(torch.tensor([0, 2, 1], dtype=torch.int32), torch.tensor([0, 3], dtype=torch.int32))
    accumulate_rows(bank, bags, buffer)
    assert bank.item() == 1.0


def test_no_rows() -> None:
    bank = torch.randn(2, 3)
    assert pack_rows(bank, torch.zeros(0, dtype=torch.int64)).shape == (0, 3)
    start = bank.clone()
    accumulate_rows(bank, bags_of(torch.zeros(0, dtype=torch.int64), 2), torch.randn(0, 3))
    assert torch.equal(bank, start)


def test_shapes_that_do_not_fit_are_named() -> None:
    with pytest.raises(ValueError, match=r"must hold 2 rows of \(3,\)"):
        pack_rows(torch.randn(4, 3), torch.tensor([0, 1]), out=torch.empty(3, 3))
    with pytest.raises(ValueError, match=r"3 bags and a buffer \(1, 3\) do not fit a bank \(4, 3\)"):
        accumulate_rows(torch.randn(4, 3), bags_of(torch.tensor([0]), 3), torch.randn(1, 3))
