from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numba import carray, cfunc, types
from torch import Tensor

from moesaic.kernels import SwigluGrads, bags_of, gather_rows, sum_rows, swiglu, swiglu_backward
from moesaic.kernels.cpu import threads
from moesaic.kernels.cpu.threads import NUM_ROWS, OWN, pointer_to, run_rows, take_rows, task_at
from tests.helpers.nan import poisoned_empty
from tests.helpers.ranks import run_ranks

_team_size = types.ExternalFunction("omp_get_num_threads", types.int32())


@cfunc("void(voidptr)")
def count_visits(pointer):  # type: ignore[no-untyped-def]
    """Add one to the count of every row; remember how many threads there are."""
    task = task_at(pointer, 2)
    visits = carray(pointer_to(task[OWN]), task[NUM_ROWS], np.int64)
    first, stop = take_rows(task)
    while first < stop:
        for row in range(first, stop):
            visits[row] += 1
        task[OWN + 1] = _team_size()
        first, stop = take_rows(task)


@pytest.fixture(autouse=True)
def _threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@given(st.integers(0, 5000), st.integers(0, 1 << 17), st.integers(1, 4))
@settings(max_examples=60)
def test_every_row_is_taken_once_by_as_many_threads_as_torch_has(num_rows: int, row_bytes: int, num_threads: int) -> None:
    """More than 64 KiB take all of torch's threads."""
    torch.set_num_threads(num_threads)
    visits = np.zeros(num_rows, dtype=np.int64)
    team_size = run_rows(count_visits, num_rows, row_bytes, visits.ctypes.data, 0)
    assert visits.tolist() == [1] * num_rows
    num_chunks = -(-num_rows // max(1, 65536 // max(1, row_bytes)))
    assert team_size == (num_threads if num_chunks > 1 else min(num_chunks, 1))


def everything(num_threads: int) -> dict[str, Tensor]:
    """The outputs of all compiled routines, over memory that held NaN, on rows enough for several chunks."""
    torch.set_num_threads(num_threads)
    torch.manual_seed(0)
    N, M, D = 1500, 700, 130
    results = {}
    with poisoned_empty():
        for dtype in (torch.float32, torch.float64, torch.bfloat16):
            x_MD, rows_ND, row_ids_N = torch.randn(M, D).to(dtype), torch.randn(N, D).to(dtype), torch.randint(0, M, (N,))
            bags = bags_of(row_ids_N, M)
            wide = torch.empty(N, D + 3, dtype=dtype)  # rows that don't touch
            results[f"gather {dtype}"] = gather_rows(x_MD[:300], row_ids_N, beside=x_MD[300:], out=wide[:, :D])
            results[f"sum {dtype}"] = sum_rows(rows_ND, bags)
            results[f"gather past the end {dtype}"] = wide[:, D:]
        for dtype in (torch.float32, torch.bfloat16):
            gate_up, dh, weights = torch.randn(N, 2 * D).to(dtype), torch.randn(N, D).to(dtype), torch.rand(N)
            results[f"swiglu {dtype}"] = swiglu(gate_up, weights)
            grads: SwigluGrads = swiglu_backward(dh, gate_up, weights)
            assert grads.drow_weights_N is not None
            results |= {
                f"dgate_up {dtype}": grads.dgate_up_N2F,
                f"dweights {dtype}": grads.drow_weights_N,
                f"h {dtype}": grads.h_NF,
            }
    return results


def assert_same_bits(actual: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    for name, tensor in expected.items():
        assert torch.equal(actual[name].nan_to_num(nan=1e4), tensor.nan_to_num(nan=1e4)), name
        assert bool(tensor.isnan().any()) == ("past the end" in name), name


@pytest.mark.parametrize("num_threads", [2, 3])
def test_threads_change_no_bit(num_threads: int) -> None:
    assert_same_bits(everything(num_threads), everything(1))


def test_torch_on_another_pool_means_one_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    expected = everything(2)
    monkeypatch.setattr(threads, "_gomp_parallel", lambda: None)
    visits = np.zeros(100, dtype=np.int64)
    assert run_rows(count_visits, 100, 1 << 16, visits.ctypes.data, 0) == 1
    assert_same_bits(everything(2), expected)


def _everything_on_two_threads(rank: int) -> list[Tensor]:
    return list(everything(2).values())


def test_forked_ranks_start_threads_of_their_own() -> None:
    expected = everything(1)
    for results in run_ranks(2, _everything_on_two_threads):
        assert_same_bits(dict(zip(expected, results, strict=True)), expected)
