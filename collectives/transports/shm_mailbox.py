"""How the ranks of one node find each other's memory, sleep until something happens there, and detect ranks that are gone."""

from __future__ import annotations

import ctypes
import os
import select
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from torch import Tensor

from .shm_memory import Segment, close_at_end, create_segment, open_segment

# How often a rank that sleeps sees to it that its peers are alive.
_LIVENESS_S = 0.2
# How long it takes a process that has given up its files to be no more, at most.
_ENDING_S = 2.0


@dataclass(frozen=True, slots=True)
class Address:
    """How peers find a rank's control segment."""

    pid: int
    fd: int
    nbytes: int


class Mailbox:
    """This rank's control segment and its view of every other rank's; `shm_control` defines what lies in them.

    Attributes:
        control: the module `shm_control`, which is loaded, and compiled where that never happened, with the first mailbox.
        controls_R: where every rank's control segment lies here, int64.
        bases_RG: where every rank's data segments lie here, int64; 0 for those that are not mapped.
        own_G2: where this rank's own lie, and their bytes, int64; zeros for those that there are not.
    """

    def __init__(self, rank: int, world_size: int):
        from . import shm_control

        self.control = shm_control
        self.rank = rank
        self.controls_R = np.zeros(world_size, np.int64)
        self.bases_RG = np.zeros((world_size, shm_control.MAX_SEGMENTS), np.int64)
        self.own_G2 = np.zeros((shm_control.MAX_SEGMENTS, 2), np.int64)
        self._own = shm_control.Control(create_segment(shm_control.Control.nbytes(world_size)))
        self._libc = ctypes.CDLL(None, use_errno=True)
        self._has_clock = hasattr(self._libc, "sem_clockwait")
        if self._libc.sem_init(self._own.doorbell, 1, 0) != 0:
            raise OSError(ctypes.get_errno(), "sem_init")
        self._controls: list[shm_control.Control] = []
        self._pids: list[int] = []
        self._opened: list[list[Segment]] = [[] for _ in range(world_size)]
        self._alive = select.poll()
        self._pidfds: dict[int, int] = {}
        self._fds = [self._own.segment.fd]
        close_at_end(self, self._fds)

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
            else:
                self._controls.append(self.control.Control(open_segment(address.pid, address.fd, address.nbytes)))
                self._fds.append(os.pidfd_open(address.pid))
                self._pidfds[self._fds[-1]] = peer
            self.controls_R[peer] = self._controls[peer].segment.address
        for pidfd in self._pidfds:
            self._alive.register(pidfd, select.POLLIN)

    def publish(self, segment: Segment) -> None:
        """Let peers find a new data segment by its number, the count of those published before.

        They look for it when a message names it, which is posted later.
        """
        number = self._own.num_segments[0]
        assert number < self.control.MAX_SEGMENTS, "segments double: no machine has the memory for so many"
        self.own_G2[number] = segment.address, segment.nbytes
        self.bases_RG[self.rank, number] = segment.address
        self._own.segments[2 * number] = segment.fd
        self._own.segments[2 * number + 1] = segment.nbytes
        self._own.num_segments[0] = number + 1

    def map_segments(self) -> bool:
        """Map what data segments peers have published since; returns whether there was one. Those of the dead are gone."""
        num_mapped = 0
        for peer, control in enumerate(self._controls):
            opened = self._opened[peer]
            while peer != self.rank and len(opened) < control.num_segments[0]:
                fd, nbytes = control.segments[2 * len(opened) : 2 * len(opened) + 2]
                try:
                    opened.append(open_segment(self._pids[peer], fd, nbytes))
                except OSError:
                    if not self._ends(peer):
                        raise
                    break
                self.bases_RG[peer, len(opened) - 1] = opened[-1].address
                num_mapped += 1
        return num_mapped > 0

    def show(self, number: int, values: Tensor) -> None:
        """Show everyone an int64 [n] tensor under `number`. Boards are two deep: all must have read `number` - 2."""
        self._own.boards[number % 2, : values.numel()] = values
        self._own.board_sizes[number % 2] = values.numel()
        self.control.show(self.controls_R, self.rank, number)

    def boards(self, number: int) -> list[Tensor]:
        """What every rank shows, int64 [n] each; all must show `number`."""
        return [control.boards[number % 2, : control.board_sizes[number % 2]] for control in self._controls]

    def sleep(self, look: Callable[[], bool], needed: Callable[[], set[int]], deadline_s: float, nap_s: float) -> bool:
        """Sleep until `look`, or until `time.monotonic()` passes `deadline_s`; returns whether it is done.

        It looks whenever this rank is woken, and after `nap_s`. Gives up early when a peer that is still `needed` is gone.
        """
        check_s = time.monotonic() + _LIVENESS_S
        try:
            while True:
                self.control.ask_to_be_woken(self.controls_R[self.rank])
                if look():
                    return True
                now_s = time.monotonic()
                if now_s >= deadline_s:
                    return False
                if now_s >= check_s:
                    if self.gone() & needed():
                        return look()
                    check_s = now_s + _LIVENESS_S
                self._sleep(min(nap_s, check_s - now_s, deadline_s - now_s))
        finally:
            self._own.is_waiting[0] = 0

    def gone(self) -> set[int]:
        """Peers whose process has ended."""
        return {self._pidfds[pidfd] for pidfd, _ in self._alive.poll(0)}

    def _ends(self, peer: int) -> bool:
        """Whether a peer whose files cannot be opened ends: they go a moment before its process does."""
        ending = select.poll()
        ending.register(next(pidfd for pidfd, owner in self._pidfds.items() if owner == peer), select.POLLIN)
        return bool(ending.poll(_ENDING_S * 1e3))

    def _sleep(self, seconds: float) -> None:
        """Wait for the doorbell, at most so long."""
        until_s = (time.monotonic() if self._has_clock else time.time()) + seconds
        limit = ctypes.byref(_Timespec(int(until_s), int(until_s % 1 * 1e9)))
        if self._has_clock:
            self._libc.sem_clockwait(self._own.doorbell, time.CLOCK_MONOTONIC, limit)
        else:
            self._libc.sem_timedwait(self._own.doorbell, limit)


class _Timespec(ctypes.Structure):
    _fields_ = (("tv_sec", ctypes.c_long), ("tv_nsec", ctypes.c_long))
