"""How the ranks of one node find each other's memory, sleep until something happens there, and notice who is gone."""

from __future__ import annotations

import ctypes
import os
import select
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from .shm_memory import Segment, create_segment, open_segment

_LIVENESS_S = 0.2


@dataclass(frozen=True, slots=True)
class Address:
    """How peers find a rank's control segment."""

    pid: int
    fd: int
    nbytes: int


class Mailbox:
    """This rank's control segment and its view of everybody else's; `shm_control` says what lies in them.

    Attributes:
        control: the module `shm_control`, which is loaded, and compiled where that never happened, with the first mailbox.
        controls_R: where every rank's control segment lies here, int64.
        bases_RG: where the peers' data segments lie here, int64; 0 for those that are not mapped.
        own_G2: where this rank's own lie, and their bytes, int64; zeros for those that there are not.
    """

    def __init__(self, rank: int, world_size: int):
        from . import shm_control

        self.control = shm_control
        self.rank = rank
        self.world_size = world_size
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
                self._pidfds[os.pidfd_open(address.pid)] = peer
            self.controls_R[peer] = self._controls[peer].segment.address
        for pidfd in self._pidfds:
            self._alive.register(pidfd, select.POLLIN)

    def publish(self, segment: Segment) -> None:
        """Let peers find a new data segment by its number, the count of those published before.

        They look for it when a message names it, which is posted later.
        """
        number = self._own.num_segments[0]
        if number == self.control.MAX_SEGMENTS:
            raise MemoryError(f"rank {self.rank} has {number} shared segments, the most there can be")
        self.own_G2[number] = segment.address, segment.nbytes
        self._own.segments[2 * number] = segment.fd
        self._own.segments[2 * number + 1] = segment.nbytes
        self._own.num_segments[0] = number + 1

    def map_segments(self) -> None:
        """Map every data segment that peers have published since."""
        for peer, control in enumerate(self._controls):
            opened = self._opened[peer]
            while peer != self.rank and len(opened) < control.num_segments[0]:
                fd, nbytes = control.segments[2 * len(opened) : 2 * len(opened) + 2]
                opened.append(open_segment(self._pids[peer], fd, nbytes))
                self.bases_RG[peer, len(opened) - 1] = opened[-1].address

    def show(self, number: int, values: Tensor) -> None:
        """Show everyone an int64 [n] tensor under `number`. Boards are two deep: all must have read `number` - 2."""
        self._own.boards[number % 2, : values.numel()] = values
        self.control.show(self.controls_R, self.rank, number)

    def boards(self, number: int, count: int) -> Tensor:
        """The first `count` integers of every rank's board, int64 [R, count]; all must show `number`."""
        return torch.stack([control.boards[number % 2, :count] for control in self._controls])

    def sleep(self, look: Callable[[], bool], needed: Callable[[], set[int]], deadline_s: float) -> bool:
        """Sleep until `look`, or until `time.monotonic()` passes `deadline_s`; returns whether it is done.

        Gives up early when a peer that is still `needed` is gone.
        """
        try:
            while True:
                self.control.ask_to_be_woken(self.controls_R[self.rank])
                if look():
                    return True
                now_s = time.monotonic()
                if now_s >= deadline_s:
                    return False
                if not self._sleep(min(_LIVENESS_S, deadline_s - now_s)) and self.gone() & needed():
                    return look()
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


class _Timespec(ctypes.Structure):
    _fields_ = (("tv_sec", ctypes.c_long), ("tv_nsec", ctypes.c_long))
