"""What the ranks of one host tell each other through shared memory: which messages lie where, which were taken.

Every rank has one control segment that all others map. It alone writes its own rings of posted messages and its own marks
of what it took from others; the only word that others write there is its doorbell, a semaphore. A rank that waits yields
its core to whoever can run for a moment, and then sleeps on its doorbell.
"""

from __future__ import annotations

import ctypes
import os
import select
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .shm_memory import Segment, create_segment, open_segment

RING = 512
MAX_SEGMENTS = 64
MAX_INTS = 4096
_DOORBELL_BYTES = 64  # a sem_t has 32 on 64-bit Linux
_SPIN_S = 200e-6
_LIVENESS_S = 0.2


@dataclass(frozen=True, slots=True)
class Address:
    """How peers find a rank's control segment."""

    pid: int
    fd: int
    nbytes: int


class _Control:
    """The views on one rank's control segment: int64 words, and the doorbell behind them."""

    def __init__(self, segment: Segment, world_size: int):
        self.segment = segment
        words = segment.memory[_DOORBELL_BYTES:].cast("q")
        sizes = (1, 1, 2 * MAX_SEGMENTS, 2, 2 * MAX_INTS, world_size, 3 * world_size * RING, world_size * RING)
        parts, start = [], 0
        for size in sizes:
            parts.append(words[start : start + size])
            start += size
        self.is_waiting, self.num_segments, self.segments, self.board_number, board, self.posted, self.ring, self.taken = parts
        self.boards = torch.frombuffer(board, dtype=torch.int64).view(2, MAX_INTS)
        self.doorbell = ctypes.c_void_p(segment.address)

    @staticmethod
    def nbytes(world_size: int) -> int:
        return _DOORBELL_BYTES + 8 * (4 + 2 * MAX_SEGMENTS + 2 * MAX_INTS + world_size + 4 * world_size * RING)


@dataclass(slots=True)
class Letter:
    """One message as its sender described it."""

    segment: int
    offset: int
    nbytes: int


class Mailbox:
    """This rank's control segment and its view of everybody else's."""

    def __init__(self, rank: int, world_size: int):
        self.rank = rank
        self.world_size = world_size
        self._libc = ctypes.CDLL(None, use_errno=True)
        self._has_clock = hasattr(self._libc, "sem_clockwait")
        self._fence = threading.Lock()
        self._own = _Control(create_segment(_Control.nbytes(world_size)), world_size)
        if self._libc.sem_init(self._own.doorbell, 1, 0) != 0:
            raise OSError(ctypes.get_errno(), "sem_init")
        self._peers = [peer for peer in range(world_size) if peer != rank]
        self._controls: list[_Control] = []
        self._pids: list[int] = []
        self._opened: list[list[Segment]] = [[] for _ in range(world_size)]
        self._num_posted = [0] * world_size
        self._taken: list[tuple[int, int]] = []  # places and marks that the next `notify` writes
        self._alive = select.poll()
        self._pidfds: dict[int, int] = {}

    @property
    def address(self) -> Address:
        """What peers need to `connect`."""
        segment = self._own.segment
        return Address(os.getpid(), segment.fd, segment.nbytes)

    def connect(self, addresses: Sequence[Address]) -> None:
        """Map every peer's control segment; `addresses` in rank order. Raises `OSError` for a peer of another host."""
        self._pids = [address.pid for address in addresses]
        for peer, address in enumerate(addresses):
            if peer == self.rank:
                self._controls.append(self._own)
                continue
            self._controls.append(_Control(open_segment(address.pid, address.fd, address.nbytes), self.world_size))
            self._pidfds[os.pidfd_open(address.pid)] = peer
        for pidfd in self._pidfds:
            self._alive.register(pidfd, select.POLLIN)

    def publish(self, segment: Segment) -> None:
        """Let peers find a new data segment by its number, the count of those published before."""
        number = self._own.num_segments[0]
        if number == MAX_SEGMENTS:
            raise MemoryError(f"rank {self.rank} has {number} shared segments, the most there can be")
        self._own.segments[2 * number] = segment.fd
        self._own.segments[2 * number + 1] = segment.nbytes
        self._order()
        self._own.num_segments[0] = number + 1

    def address_of(self, peer: int, letter: Letter) -> int:
        """Where the bytes of a message from `peer` lie in this process's memory."""
        opened = self._opened[peer]
        while len(opened) <= letter.segment:
            fd, nbytes = self._controls[peer].segments[2 * len(opened) : 2 * len(opened) + 2]
            opened.append(open_segment(self._pids[peer], fd, nbytes))
        return opened[letter.segment].address + letter.offset

    def has_room(self, peer: int, number: int) -> bool:
        """Whether message `number` to `peer` can be posted: rings hold so many that were not taken."""
        return number < RING or self.was_taken(peer, number - RING)

    def post(self, peer: int, number: int, letter: Letter) -> None:
        """Describe the next message to `peer`, who can see it after the next `notify`."""
        self._num_posted[peer] = number + 1
        start = 3 * (peer * RING + number % RING)
        ring = self._own.ring
        ring[start] = letter.segment
        ring[start + 1] = letter.offset
        ring[start + 2] = letter.nbytes

    def was_taken(self, peer: int, number: int) -> bool:
        """Whether `peer` has read this rank's message of that number."""
        return self._controls[peer].taken[self.rank * RING + number % RING] > number

    def has_posted(self, peer: int, number: int) -> bool:
        """Whether `peer` has posted its message of that number to this rank."""
        return self._controls[peer].posted[self.rank] > number

    def letter(self, peer: int, number: int) -> Letter:
        """The message of that number from `peer`, posted and not taken."""
        start = 3 * (self.rank * RING + number % RING)
        return Letter(*self._controls[peer].ring[start : start + 3])

    def take(self, peer: int, number: int) -> None:
        """This rank has read that message: after the next `notify`, `peer` may reuse what lies behind it."""
        self._taken.append((peer * RING + number % RING, number + 1))

    def show(self, number: int, values: Tensor) -> None:
        """Show everyone an int64 [n] tensor under `number`. Boards are two deep: all must have read `number` - 2."""
        self._own.boards[number % 2, : values.numel()] = values
        self._order()
        self._own.board_number[number % 2] = number
        self.notify(self._peers)

    def shown(self, peer: int, number: int) -> bool:
        """Whether `peer`'s board shows `number`."""
        return self._controls[peer].board_number[number % 2] == number

    def board(self, peer: int, number: int) -> Tensor:
        """The integers on `peer`'s board under `number`, int64 [MAX_INTS], in place; what follows those shown is old."""
        return self._controls[peer].boards[number % 2]

    def notify(self, peers: Iterable[int]) -> None:
        """Let `peers` see what was posted to them and taken from them, and wake those that sleep."""
        own = self._own
        self._order()  # what the words below speak of comes first
        for peer in peers:
            own.posted[peer] = self._num_posted[peer]
        for slot, mark in self._taken:
            own.taken[slot] = mark
        self._taken.clear()
        self._order()  # a peer that goes to sleep now has seen them, or is seen waiting
        for peer in peers:
            control = self._controls[peer]
            if control.is_waiting[0]:
                self._libc.sem_post(control.doorbell)

    def wait(self, is_done: Callable[[], bool], needed: Callable[[], set[int]], deadline_s: float) -> bool:
        """Sleep until `is_done`, or until `time.monotonic()` passes `deadline_s`; returns whether it is done.

        Gives up early when a peer that is still `needed` is gone.
        """
        if is_done():
            return True
        spin_until_s = time.monotonic() + _SPIN_S
        while time.monotonic() < spin_until_s:
            os.sched_yield()
            if is_done():
                return True
        try:
            while True:
                self._own.is_waiting[0] = 1
                self._order()
                if is_done():
                    return True
                now_s = time.monotonic()
                if now_s >= deadline_s:
                    return False
                if not self._sleep(min(_LIVENESS_S, deadline_s - now_s)) and self.gone() & needed():
                    return is_done()
        finally:
            self._own.is_waiting[0] = 0

    def gone(self) -> set[int]:
        """Peers whose process has ended."""
        return {self._pidfds[pidfd] for pidfd, _ in self._alive.poll(0)}

    def _sleep(self, seconds: float) -> bool:
        """Wait for the doorbell; False after `seconds`."""
        until_s = (time.monotonic() if self._has_clock else time.time()) + seconds
        limit = ctypes.byref(_Timespec(int(until_s), int(until_s % 1 * 1e9)))
        if self._has_clock:
            return bool(self._libc.sem_clockwait(self._own.doorbell, time.CLOCK_MONOTONIC, limit) == 0)
        return bool(self._libc.sem_timedwait(self._own.doorbell, limit) == 0)

    def _order(self) -> None:
        """Make what this thread wrote visible before what it writes or reads next: a lock's acquire is a full barrier."""
        with self._fence:
            pass


class _Timespec(ctypes.Structure):
    _fields_ = (("tv_sec", ctypes.c_long), ("tv_nsec", ctypes.c_long))
