"""Fingerprints: every bit counts, places count, strides and chunks do not, and memory is that of a chunk."""

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from moesaic.runtime.wrap.fingerprint import _CHUNK_WORDS, _factors, hash_tensors

DTYPES = (
    torch.float32,
    torch.bfloat16,
    torch.float16,
    torch.float64,
    torch.float8_e4m3fn,
    torch.complex64,
    torch.complex128,
    torch.int64,
    torch.int32,
    torch.int16,
    torch.uint8,
    torch.bool,
)


def of_bytes(data: np.ndarray, dtype: torch.dtype) -> Tensor:
    """A tensor of these bits, whatever they mean: NaNs with every payload among them."""
    return torch.frombuffer(bytearray(data.tobytes()), dtype=dtype)


def random_bytes(num_bytes: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, num_bytes, dtype=np.uint8)


def one_hash(tensor: Tensor) -> int:
    (value,) = hash_tensors([tensor])
    return value


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_bit_counts(dtype: torch.dtype) -> None:
    """Each alone, in five elements."""
    data = random_bytes(5 * dtype.itemsize)
    hashes = {one_hash(of_bytes(data, dtype))}
    for bit in range(8 * data.size):
        flipped = data.copy()
        flipped[bit // 8] ^= 1 << (bit % 8)
        hashes.add(one_hash(of_bytes(flipped, dtype)))
    assert len(hashes) == 1 + 8 * data.size


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_a_bit_counts_in_every_chunk(dtype: torch.dtype) -> None:
    """First, last and middle element, and both sides of where chunks meet; whole chunks that trade places too."""
    length = _CHUNK_WORDS // max(1, dtype.itemsize // 4)
    tensor = of_bytes(random_bytes((2 * length + 3) * dtype.itemsize), dtype)
    bits = tensor.view({2: torch.int16, 4: torch.int32, 8: torch.int64}[dtype.itemsize])
    before = one_hash(tensor)
    hashes = {before}
    places = [0, length - 1, length, length + length // 2, 2 * length - 1, 2 * length, 2 * length + 2]
    for place in places:
        bits[place] ^= 1
        hashes.add(one_hash(tensor))
        bits[place] ^= 1
    assert one_hash(tensor) == before
    traded = torch.cat([bits[length : 2 * length], bits[:length], bits[2 * length :]])
    assert len(hashes | {one_hash(traded)}) == len(places) + 2


@given(data=st.data(), dtype=st.sampled_from((torch.float64, torch.float32, torch.bfloat16)))
def test_places_count(data: st.DataObject, dtype: torch.dtype) -> None:
    """Values with few bits, whose differences are divisible by large powers of two, in another order."""
    values = data.draw(st.lists(st.sampled_from([0.0, -0.0, 1.0, -1.0, 2.0, 0.5, float("inf")]), max_size=12))
    order = data.draw(st.permutations(range(len(values))))
    tensor = torch.tensor(values, dtype=dtype)
    other = tensor[list(order)]
    same_bits = tensor.view(torch.uint8).tolist() == other.view(torch.uint8).tolist()
    assert (one_hash(tensor) == one_hash(other)) == same_bits


def test_factors_are_odd_and_differ() -> None:
    """Two places with one factor could trade their values unseen."""
    factors = _factors(_CHUNK_WORDS, torch.device("cpu"))
    assert bool((factors % 2 == 1).all())
    assert factors.unique().numel() == _CHUNK_WORDS
    assert torch.equal(_factors(100, torch.device("cpu")), factors[:100])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64, torch.complex64, torch.bool], ids=str)
def test_strides_do_not_count(dtype: torch.dtype) -> None:
    """Transposed, spread out, and one element repeated; over more than one chunk."""
    whole = torch.randn(700, 800).to(dtype)
    for view in (whole.t(), whole[::2, 1::3], whole[:, :1].expand(700, 800), whole[3]):
        assert one_hash(view) == one_hash(view.contiguous())


def test_a_value_does_not_depend_on_what_is_hashed_beside_it() -> None:
    """Tensors of no elements included."""
    tensors = [torch.randn(3), torch.randn(600_000), torch.empty(0, 4), torch.tensor(2.5)]
    assert hash_tensors(tensors) == [one_hash(tensor) for tensor in tensors]
    assert hash_tensors([]) == []


class LargestMade(TorchDispatchMode):
    """The bytes of the largest tensor that an operation makes, views left out."""

    num_bytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        known = {value.untyped_storage().data_ptr() for value in args if isinstance(value, Tensor)}
        if isinstance(result, Tensor) and result.untyped_storage().data_ptr() not in known:
            self.num_bytes = max(self.num_bytes, result.nbytes)
        return result


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_memory_is_that_of_a_chunk(dtype: torch.dtype) -> None:
    """For a tensor of many chunks, contiguous or not."""
    tensor = torch.zeros(3000, 700, dtype=dtype)
    assert tensor.nbytes > _CHUNK_WORDS * 8
    for view in (tensor, tensor.t()):
        with LargestMade() as made:
            hash_tensors([view])
        assert 0 < made.num_bytes <= 8 * _CHUNK_WORDS
