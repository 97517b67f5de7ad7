"""Memory that the ranks of one host share: anonymous files, mapped where they are needed.

Every segment is a memfd: it has no name in any file system, so it is gone when the last process that maps it is, however
that process ended. A peer finds it as `/proc/<pid>/fd/<fd>` of its owner, which is open as long as the owner lives.
"""

from __future__ import annotations

import math
import mmap
import os
import weakref
from collections import defaultdict, deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

_FIRST_SEGMENT_BYTES = 8 << 20
_ALIGNMENT = 64
_SMALL_BYTES = 4 << 10


@dataclass(frozen=True, eq=False)
class Segment:
    """A shared anonymous file, mapped here."""

    fd: int  # in the process that made it
    memory: memoryview
    address: int

    @property
    def nbytes(self) -> int:
        """Bytes mapped."""
        return self.memory.nbytes


def create_segment(nbytes: int) -> Segment:
    """A new segment of this process, filled with zeros."""
    fd = os.memfd_create("moesaic", os.MFD_CLOEXEC)
    os.ftruncate(fd, nbytes)
    return _map(fd, fd, nbytes)


def open_segment(pid: int, fd: int, nbytes: int) -> Segment:
    """Another process's segment. Raises `OSError` if that process is gone or is not ours to look at."""
    here = os.open(f"/proc/{pid}/fd/{fd}", os.O_RDWR | os.O_CLOEXEC)
    try:
        return _map(here, fd, nbytes)
    finally:
        os.close(here)


def _map(here: int, fd: int, nbytes: int) -> Segment:
    memory = memoryview(mmap.mmap(here, nbytes))
    return Segment(fd, memory, torch.frombuffer(memory, dtype=torch.uint8).data_ptr())


def close_at_end(owner: object, fds: Sequence[int]) -> None:
    """Close files, also those that join the list, once their owner is garbage-collected. A process closes all as it ends."""

    def close() -> None:
        for fd in fds:
            os.close(fd)

    weakref.finalize(owner, close).atexit = False


class Arena:
    """Tensors of this process that its peers can read where they lie.

    Blocks come in few sizes and are kept for the next tensor of their size: fresh pages cost far more than copies. The
    memory goes back to the system when the arena and its tensors, here and at the peers, are no more.

    Args:
        publish: called with every new segment before a tensor lies in it.
    """

    def __init__(self, publish: Callable[[Segment], None]):
        self._publish = publish
        self._segments: list[Segment] = []
        self._fds: list[int] = []
        close_at_end(self, self._fds)
        self._used = 0  # bytes of the newest segment that blocks were cut from
        self._free: dict[int, deque[tuple[int, int]]] = defaultdict(deque)

    @property
    def nbytes(self) -> int:
        """Bytes of all segments."""
        return sum(segment.nbytes for segment in self._segments)

    def empty(self, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        """A tensor with undefined content; its block is free again when its storage dies."""
        count = math.prod(shape)
        if not count:
            return torch.empty(tuple(shape), dtype=dtype)
        size = _block_bytes(count * dtype.itemsize)
        free = self._free[size]
        try:
            # Finalizers may put blocks back at any moment, on any thread: only atomic operations on the queue.
            number, offset = free.popleft()
        except IndexError:
            number, offset = self._cut(size)
        block = self._segments[number].memory[offset : offset + size]
        tensor = torch.frombuffer(block, dtype=dtype, count=count).view(tuple(shape))
        weakref.finalize(block, free.append, (number, offset)).atexit = False
        return tensor

    def _cut(self, size: int) -> tuple[int, int]:
        if not self._segments or self._used + size > self._segments[-1].nbytes:
            # Doubling keeps the number of segments, and so of open files and mappings, small.
            segment = create_segment(max(_FIRST_SEGMENT_BYTES, size, self.nbytes))
            self._publish(segment)
            self._segments.append(segment)
            self._fds.append(segment.fd)
            self._used = 0
        offset, self._used = self._used, self._used + size
        return len(self._segments) - 1, offset


def _block_bytes(nbytes: int) -> int:
    """The size of the block for `nbytes`: multiples of 64 bytes when small, then four sizes to each doubling."""
    step = _ALIGNMENT if nbytes <= _SMALL_BYTES else 1 << ((nbytes - 1).bit_length() - 3)
    return -(-nbytes // step) * step
