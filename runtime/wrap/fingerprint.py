"""Fingerprints of tensors and texts: 64 bits that are equal where the contents are, to the last bit.

A tensor's words w_0, w_1, ... of 32 bits or fewer, in logical order, become the sum of w_i m_i mod 2^64 over a chunk, with odd
m_i; chunks become a polynomial in an odd number. One word that changes alone changes the result, since odd numbers have inverses
mod 2^64. Any other change is missed with a probability of about 2^-32 (multilinear hashing, arXiv 1202.4961).
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from hashlib import blake2b

import torch
from torch import Tensor

# Words that are hashed at once, in 2 MiB of products: little enough for a core's caches, and more work for a GPU than its launch.
_CHUNK_WORDS = 1 << 18
_INTS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def hash_tensors(tensors: Sequence[Tensor]) -> list[int]:
    """The fingerprint of each plain tensor's bits, the host waiting once for each device. Dtype and shape are not part of it."""
    of_device: dict[torch.device, list[int]] = defaultdict(list)
    for index, tensor in enumerate(tensors):
        of_device[tensor.device].append(index)
    hashes = [0] * len(tensors)
    for device, indices in of_device.items():
        most = max(tensors[index].nbytes for index in indices)
        factors = _factors(min(max(most, 1), _CHUNK_WORDS), device)
        found = torch.stack([_hash_tensor(tensors[index], factors) for index in indices]).tolist()
        for index, value in zip(indices, found, strict=True):
            hashes[index] = value
    return hashes


def _hash_tensor(tensor: Tensor, factors: Tensor) -> Tensor:
    """An int64 scalar on the tensor's device."""
    total: Tensor | None = None
    for words in _chunks(tensor):
        part = (words * factors[: words.numel()]).sum()
        total = part if total is None else total * _GOLDEN + part
    return factors.new_zeros(()) if total is None else total


def _chunks(tensor: Tensor) -> Iterator[Tensor]:
    """A tensor's words in logical order, whatever its strides; copied, chunk by chunk, where it is not contiguous."""
    if tensor.is_complex():
        tensor = torch.view_as_real(tensor)
    elements = tensor.view(_INTS[tensor.element_size()])
    length = _CHUNK_WORDS // max(1, tensor.element_size() // 4)
    for first in range(0, elements.numel(), length):
        last = min(first + length, elements.numel())
        if elements.is_contiguous():
            chunk = elements.view(-1)[first:last]
        else:
            chunk = elements.take(torch.arange(first, last, device=tensor.device))
        yield chunk.view(torch.int32) if chunk.dtype == torch.int64 else chunk


def signed(number: int) -> int:
    """A number mod 2^64, as int64 holds it."""
    return (number + (1 << 63)) % (1 << 64) - (1 << 63)


# Odd, and 5 mod 8: the differences of its powers have few factors of two, so that chunks in another order show.
_GOLDEN = signed(0x9E3779B97F4A7C15)


def _factors(count: int, device: torch.device) -> Tensor:
    """Odd pseudo-random numbers, int64, always the same (the finalizer of SplitMix64)."""
    x = torch.arange(1, count + 1, dtype=torch.int64, device=device) * _GOLDEN
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
        x = (x ^ (x >> shift)) * signed(factor)
    return (x ^ (x >> 31)) | 1


def hash_text(text: str) -> int:
    """The fingerprint of a text."""
    return int.from_bytes(blake2b(text.encode(), digest_size=8).digest(), "little", signed=True)
