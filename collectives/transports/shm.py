"""The transport between ranks of one node: every receiver copies straight out of the sender's memory, once.

A message is described in shared memory; nothing but the description is sent. Tensors that `ShmTransport.empty` made lie in
memory that peers map, so the receiver's copy is the only one. Any other tensor is first copied into such memory.
"""

from __future__ import annotations

import ctypes
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..traffic import Traffic
from ..transport import Buffer, CollectiveError, Pending
from .node import NodeIdentity
from .shm_mailbox import MAX_INTS, Address, Letter, Mailbox
from .shm_memory import Arena

# An exchange that is read all at once: so few bytes that wake-ups cost more than copies, far fewer messages than rings hold.
_SMALL_BYTES = 1 << 20
_FEW_MESSAGES = 64


@dataclass(slots=True, eq=False)
class _Sent:
    peer: int
    number: int
    tensor: Tensor  # kept until the peer has read it


@dataclass(slots=True, eq=False)
class _Expected:
    peer: int
    number: int
    tensor: Tensor


class _Exchange:
    """Messages of one exchange: what this rank expects, and what it sent and others have not read."""

    def __init__(self, transport: ShmTransport, sent: list[_Sent], expected: list[_Expected], op: str, where: str):
        self._transport = transport
        self._sent = sent
        self._expected = expected
        self._op = op
        self._where = where
        self._expected_bytes = sum(e.tensor.nbytes for e in expected)

    def wait(self, *, until_sent: bool = True) -> None:
        """Copy every message in as it appears; then wait until the peers have copied theirs, or at least can."""
        transport, deadline_s = self._transport, time.monotonic() + self._transport.timeout_s
        while self._expected:
            self._wait_until(self._enough_is_here, self._senders, deadline_s)
            here = [e for e in self._expected if transport.mailbox.has_posted(e.peer, e.number)]
            for expected in here:
                transport.read(expected.peer, expected.number, expected.tensor, self._place())
            transport.mailbox.notify({e.peer for e in here})
            self._expected = [e for e in self._expected if e not in here]
        if until_sent:
            self._wait_until(lambda: not self._readers(), self._readers, deadline_s)
            self._sent = []
        else:
            self._wait_until(transport.post_queued, self._readers, deadline_s)

    def _wait_until(self, is_done: Callable[[], bool], needed: Callable[[], set[int]], deadline_s: float) -> None:
        def is_done_meanwhile() -> bool:
            self._transport.post_queued()
            return is_done()

        if not self._transport.mailbox.wait(is_done_meanwhile, needed, deadline_s):
            raise CollectiveError(self._describe())

    def _enough_is_here(self) -> bool:
        """Small messages are read together, large ones as they appear."""
        here = (self._transport.mailbox.has_posted(e.peer, e.number) for e in self._expected)
        is_small = self._expected_bytes <= _SMALL_BYTES and len(self._expected) <= _FEW_MESSAGES
        return all(here) if is_small else any(here)

    def _senders(self) -> set[int]:
        return {e.peer for e in self._expected}

    def _readers(self) -> set[int]:
        return {s.peer for s in self._sent if not self._transport.mailbox.was_taken(s.peer, s.number)}

    def _place(self) -> str:
        return self._op + (f" at {self._where}" if self._where else "")

    def _describe(self) -> str:
        gone = self._transport.mailbox.gone()
        missing = [(e.peer, e.tensor.nbytes) for e in self._expected]
        unread = [(s.peer, s.tensor.nbytes) for s in self._sent if not self._transport.mailbox.was_taken(s.peer, s.number)]
        lost = gone & ({peer for peer, _ in missing} | {peer for peer, _ in unread})
        if lost:
            ending = f"rank {', '.join(map(str, sorted(lost)))} is gone"
        else:
            ending = f"did not complete within {self._transport.timeout_s:g} s"
        received = self._expected_bytes - sum(nbytes for _, nbytes in missing)
        text = f"received {received} of {self._expected_bytes} B"
        text += "".join(f", missing {nbytes} B from rank {peer}" for peer, nbytes in missing)
        text += "".join(f", {nbytes} B not read by rank {peer}" for peer, nbytes in unread)
        return f"rank {self._transport.rank}: {self._place()}: {ending} ({text})"


class ShmTransport:
    """Messages between processes of one host through mapped memory. CPU tensors of any dtype.

    Collective: all ranks construct it together.

    Args:
        rank, world_size: this process among those that share.
        gather: returns every rank's value of its argument, in rank order (for example over a process group's store).
        timeout_s: seconds after which a wait fails. A peer whose process ends is noticed within a fraction of a second.

    Raises:
        ValueError: some rank is on another node (host, container, network namespace or user).
    """

    name = "shm"

    def __init__(self, rank: int, world_size: int, gather: Callable[[object], Sequence[object]], *, timeout_s: float):
        self.rank = rank
        self.world_size = world_size
        self.timeout_s = timeout_s
        self.traffic = Traffic(world_size)
        self.mailbox = Mailbox(rank, world_size)
        self.mailbox.connect(_addresses_on_one_node(gather, self.mailbox.address))
        self._arena = Arena(self.mailbox.publish)
        self._peers = [peer for peer in range(world_size) if peer != rank]
        self._num_sent = [0] * world_size
        self._num_received = [0] * world_size  # messages that an exchange asked for
        self._queued: dict[int, deque[tuple[int, Letter]]] = {}  # messages that their receiver's ring has no room for yet
        self._boards = 0
        self._in_flight: list[_Sent] = []
        # Peers find memory through this process: none may leave before all have connected.
        gather(None)

    def empty(self, shape: Sequence[int], like: Tensor) -> Tensor:
        """A tensor of undefined content with the dtype of `like`, in memory that peers read without another copy."""
        return self._arena.empty(shape, like.dtype) if like.device.type == "cpu" else like.new_empty(tuple(shape))

    def exchange(self, sends: Sequence[Buffer], recvs: Sequence[Buffer], *, op: str, where: str = "") -> Pending:
        """Describe every message to its receiver; see `Transport.exchange`."""
        sent = [self._queue(b, op) for b in sends if b.tensor.numel()]
        self.post_queued()
        self._in_flight = [s for s in self._in_flight if not self.mailbox.was_taken(s.peer, s.number)] + sent
        expected = []
        for buffer in recvs:
            if buffer.tensor.numel():
                expected.append(_Expected(buffer.peer, self._num_received[buffer.peer], buffer.tensor))
                self._num_received[buffer.peer] += 1
        return _Exchange(self, sent, expected, op, where)

    def all_gather_ints(self, values: Tensor, *, where: str = "") -> Tensor:
        """Gather int64 [n] from every rank: [R, n]."""
        return torch.cat([self._gather_board(part, where) for part in values.split(MAX_INTS)], dim=1)

    def _gather_board(self, values: Tensor, where: str) -> Tensor:
        count = values.numel()
        self._boards += 1
        number, mailbox = self._boards, self.mailbox
        mailbox.show(number, values)

        def absent() -> set[int]:
            return {peer for peer in self._peers if not mailbox.shown(peer, number)}

        if not mailbox.wait(lambda: not absent(), absent, time.monotonic() + self.timeout_s):
            ranks, gone = absent(), self.mailbox.gone()
            ending = "gone" if ranks & gone else f"absent after {self.timeout_s:g} s"
            place = f" at {where}" if where else ""
            names = ", ".join(map(str, sorted(ranks & gone or ranks)))
            raise CollectiveError(f"rank {self.rank}: gather of {count} integers{place}: rank {names} is {ending}")
        return torch.stack([mailbox.board(rank, number)[:count] for rank in range(self.world_size)])

    def read(self, peer: int, number: int, tensor: Tensor, what: str) -> None:
        """Copy the message of that number from `peer` into `tensor` and give the peer its memory back."""
        letter = self.mailbox.letter(peer, number)
        if letter.nbytes != tensor.nbytes:
            raise CollectiveError(
                f"rank {self.rank}: {what}: rank {peer} sent {letter.nbytes} B where {tensor.nbytes} B were expected; "
                "the ranks are at different places of the program"
            )
        # The C library's copy moves twice the bytes per second that torch's does.
        ctypes.memmove(tensor.data_ptr(), self.mailbox.address_of(peer, letter), letter.nbytes)
        self.mailbox.take(peer, number)

    def post_queued(self) -> bool:
        """Describe what was sent to the peers whose rings have room; returns whether that is all of it."""
        peers = []
        for peer, queue in self._queued.items():
            while queue and self.mailbox.has_room(peer, queue[0][0]):
                self.mailbox.post(peer, *queue.popleft())
                peers.append(peer)
        if peers:
            self.mailbox.notify(set(peers))
            self._queued = {peer: queue for peer, queue in self._queued.items() if queue}
        return not self._queued

    def _queue(self, buffer: Buffer, op: str) -> _Sent:
        tensor, peer = buffer.tensor, buffer.peer
        place = self._arena.place_of(tensor)
        if place is None:
            tensor = self._arena.empty(tensor.shape, tensor.dtype).copy_(tensor)
            place = self._arena.place_of(tensor)
            assert place is not None
        number = self._num_sent[peer]
        self._num_sent[peer] += 1
        self._queued.setdefault(peer, deque()).append((number, Letter(place.segment, place.offset, tensor.nbytes)))
        self.traffic.add(op, peer, tensor.nbytes)
        return _Sent(peer, number, tensor)


def _addresses_on_one_node(gather: Callable[[object], Sequence[object]], address: Address) -> list[Address]:
    here = NodeIdentity.of_this_process()
    found: list[Address] = []
    for peer, value in enumerate(gather((here, address))):
        assert isinstance(value, tuple)
        there, peer_address = value
        if there != here:
            raise ValueError(
                f"rank {peer} does not share memory with this one (another host, container, network or user): "
                "choose the transport c10d, or hierarchical over several hosts"
            )
        found.append(peer_address)
    return found
