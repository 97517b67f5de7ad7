"""The transport between ranks of one node: every receiver copies straight out of the sender's memory, once.

A message is described in shared memory; nothing but the description is sent. Tensors that `ShmTransport.empty` made lie in
memory that peers map, so the receiver's copy is the only one. Any other tensor is first copied into such memory.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from ..progress import CommunicationThread
from ..traffic import Traffic
from ..transport import Buffer, CollectiveError, Pending
from .node import NodeIdentity
from .shm_mailbox import Address, Mailbox
from .shm_memory import Arena


@dataclass(slots=True, eq=False)
class _Sent:
    """Messages of one exchange, as `shm_control` takes them, and their tensors, which live until they have been read."""

    messages_M5: np.ndarray
    tensors: list[Tensor]


class _Exchange:
    """Messages of one exchange: what this rank expects, and what it sent and others have not read."""

    def __init__(self, transport: ShmTransport, sent: _Sent, recvs_Q5: np.ndarray, tensors: list[Tensor], op: str, where: str):
        self._transport = transport
        self._sends_M5 = sent.messages_M5
        self._recvs_Q5 = recvs_Q5
        self._tensors = tensors  # the compiled loops know addresses only
        self._op = op
        self._where = where

    def wait(self, *, until_sent: bool = True) -> None:
        """Copy every message in as it appears; then wait until the peers have copied theirs, or at least can."""
        transport = self._transport
        deadline_s = time.monotonic() + transport.timeout_s

        def look(spin_ns: int) -> bool:
            all_posted = transport.post_queued()
            spin_ns = spin_ns if all_posted else 0
            if not transport.advance(self._recvs_Q5, self._sends_M5, until_sent, spin_ns, self._place):
                return False
            return until_sent or transport.post_queued()

        if not transport.mailbox.wait(look, self._needed, deadline_s):
            raise CollectiveError(self._describe())
        self._tensors = []

    def _needed(self) -> set[int]:
        return {peer for peer, _ in self._missing()} or {peer for peer, _ in self._unread()}

    def _missing(self) -> list[tuple[int, int]]:
        """Peer and bytes of every message that did not come."""
        return [(peer, nbytes) for peer, _, _, nbytes, is_read in self._recvs_Q5.tolist() if not is_read]

    def _unread(self) -> list[tuple[int, int]]:
        """Peer and bytes of every message that was not taken."""
        mailbox, sends_M5 = self._transport.mailbox, self._sends_M5
        rows = enumerate(sends_M5.tolist())
        return [
            (row[0], row[4]) for m, row in rows if not mailbox.control.was_taken(mailbox.controls_R, mailbox.rank, sends_M5, m)
        ]

    def _place(self) -> str:
        return self._op + (f" at {self._where}" if self._where else "")

    def _describe(self) -> str:
        gone = self._transport.mailbox.gone()
        missing, unread = self._missing(), self._unread()
        lost = gone & {peer for peer, _ in missing + unread}
        if lost:
            ending = f"rank {', '.join(map(str, sorted(lost)))} is gone"
        else:
            ending = f"did not complete within {self._transport.timeout_s:g} s"
        expected = sum(row[3] for row in self._recvs_Q5.tolist())
        received = expected - sum(nbytes for _, nbytes in missing)
        text = f"received {received} of {expected} B"
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
        self.thread: CommunicationThread | None = None
        self.mailbox = Mailbox(rank, world_size)
        self.mailbox.connect(_addresses_on_one_node(gather, self.mailbox.address))
        self._arena = Arena(self.mailbox.publish)
        self._num_sent = [0] * world_size
        self._num_posted_R = np.zeros(world_size, np.int64)
        self._num_received = [0] * world_size  # messages that an exchange asked for
        self._queued: list[_Sent] = []  # with messages that their receiver's ring has no room for yet
        self._in_flight: list[_Sent] = []
        self._boards = 0
        # Peers find memory through this process: none may leave before all have connected.
        gather(None)

    def empty(self, shape: Sequence[int], like: Tensor) -> Tensor:
        """A tensor of undefined content with the dtype of `like`, in memory that peers read without another copy."""
        return self._arena.empty(shape, like.dtype) if like.device.type == "cpu" else like.new_empty(tuple(shape))

    def exchange(self, sends: Sequence[Buffer], recvs: Sequence[Buffer], *, op: str, where: str = "") -> Pending:
        """Describe every message to its receiver; see `Transport.exchange`."""
        sent = self._described(sends, op)
        if sent.tensors:
            self._queued.append(sent)
            self.post_queued()
            mailbox = self.mailbox
            all_taken, controls_R = mailbox.control.all_taken, mailbox.controls_R
            self._in_flight = [s for s in self._in_flight if not all_taken(controls_R, self.rank, s.messages_M5)]
            self._in_flight.append(sent)
        expected: list[int] = []
        tensors = []
        for buffer in recvs:
            tensor, peer = buffer.tensor, buffer.peer
            nbytes = tensor.nbytes
            if nbytes:
                expected += (peer, self._num_received[peer], tensor.data_ptr(), nbytes, 0)
                self._num_received[peer] += 1
                tensors.append(tensor)
        return _Exchange(self, sent, np.array(expected, np.int64).reshape(-1, 5), tensors, op, where)

    def all_gather_ints(self, values: Tensor, *, where: str = "") -> Tensor:
        """Gather int64 [n] from every rank: [R, n]."""
        return torch.cat([self._gather_board(part, where) for part in values.split(self.mailbox.control.MAX_INTS)], dim=1)

    def _gather_board(self, values: Tensor, where: str) -> Tensor:
        self._boards += 1
        number, mailbox = self._boards, self.mailbox
        control, controls_R = mailbox.control, mailbox.controls_R
        mailbox.show(number, values)

        def absent() -> set[int]:
            return {peer for peer in range(self.world_size) if not control.shows(controls_R, peer, number)}

        def look(spin_ns: int) -> bool:
            return bool(control.all_show(controls_R, number, spin_ns))

        if not mailbox.wait(look, absent, time.monotonic() + self.timeout_s):
            ranks, gone = absent(), mailbox.gone()
            ending = "gone" if ranks & gone else f"absent after {self.timeout_s:g} s"
            place = f" at {where}" if where else ""
            names = ", ".join(map(str, sorted(ranks & gone or ranks)))
            raise CollectiveError(f"rank {self.rank}: gather of {values.numel()} integers{place}: rank {names} is {ending}")
        return mailbox.boards(number, values.numel())

    def advance(
        self, recvs_Q5: np.ndarray, sends_M5: np.ndarray, until_taken: bool, spin_ns: int, what: Callable[[], str]
    ) -> bool:
        """Read messages as they appear and look for `spin_ns` whether all is done; see `shm_control.advance`."""
        mailbox = self.mailbox
        control, controls_R, bases_RG = mailbox.control, mailbox.controls_R, mailbox.bases_RG
        status = control.advance(controls_R, self.rank, bases_RG, recvs_Q5, sends_M5, until_taken, spin_ns)
        if status == control.NEW_SEGMENT:
            mailbox.map_segments()
            status = control.advance(controls_R, self.rank, bases_RG, recvs_Q5, sends_M5, until_taken, spin_ns)
        if status == control.WRONG_SIZE:
            peer, there, here = control.wrong_size(controls_R, self.rank, recvs_Q5)
            raise CollectiveError(
                f"rank {self.rank}: {what()}: rank {peer} sent {there} B where {here} B were expected; "
                "the ranks are at different places of the program"
            )
        return bool(status == control.DONE)

    def post_queued(self) -> bool:
        """Describe what was sent to the peers whose rings have room; returns whether that is all of it."""
        if self._queued:
            post, controls_R = self.mailbox.control.post, self.mailbox.controls_R
            self._queued = [s for s in self._queued if not post(controls_R, self.rank, self._num_posted_R, s.messages_M5)]
        return not self._queued

    def _described(self, buffers: Sequence[Buffer], op: str) -> _Sent:
        """Where the messages lie, in memory that peers can read."""
        arena, num_sent = self._arena, self._num_sent
        rows: list[int] = []
        tensors = []
        for buffer in buffers:
            tensor, peer = buffer.tensor, buffer.peer
            nbytes = tensor.nbytes
            if not nbytes:
                continue
            place = arena.place_of(tensor)
            if place is None:
                tensor = arena.empty(tensor.shape, tensor.dtype).copy_(tensor)
                place = arena.place_of(tensor)
                assert place is not None
            rows += (peer, num_sent[peer], place.segment, place.offset, nbytes)
            num_sent[peer] += 1
            tensors.append(tensor)
            self.traffic.add(op, peer, nbytes)
        return _Sent(np.array(rows, np.int64).reshape(-1, 5), tensors)


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
