"""The transport between ranks of one node: every receiver copies straight out of the sender's memory, once.

A message is described in shared memory; nothing but the description is sent. Tensors that `ShmTransport.empty` made lie in
memory that peers map, so the receiver's copy is the only one. Any other tensor is first copied into such memory.
"""

from __future__ import annotations

import math
import os
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from functools import partial

import numpy as np
import torch
from torch import Tensor

from ..messages import Buffer, CollectiveError, Pending, RowLayout
from ..progress import CommunicationThread
from ..tags import DIFFERENT_PLACES, SAME_ORDER, Tags
from ..traffic import Traffic
from .node import NodeIdentity, cache_bytes
from .parts import Part, progress
from .shm_mailbox import Address, Mailbox
from .shm_memory import Arena

# How long a rank that waits looks before it sleeps.
_SPIN_NS = 200_000
# Between two looks it keeps its core for so long: a peer that runs answers sooner than a yielded core comes back. Where there
# are more ranks than cores, the peer that it waits for probably does not run.
_PATIENCE_NS = 4_000
# How long it sleeps while it has messages to post: the receivers that make room wake it only where they are what it waits for.
_BACKLOG_NAP_S = 0.001


class _Backlog:
    """Transports with messages that their receivers' rings have had no room for, and the thread that sends on each.

    Every wait of that thread posts them, on whichever transport: it may be for a rank that first needs one of them.
    """

    def __init__(self) -> None:
        self.threads: dict[ShmTransport, int] = {}

    @property
    def nap_s(self) -> float:
        """The longest that this thread may sleep."""
        return _BACKLOG_NAP_S if threading.get_ident() in self.threads.values() else math.inf

    def is_posted(self) -> bool:
        """Post what there is room for; returns whether that is all of this thread's."""
        here = threading.get_ident()
        mine = [transport for transport, thread in list(self.threads.items()) if thread == here]
        for transport in mine:
            if transport.post_queued():
                del self.threads[transport]
        return here not in self.threads.values()


_backlog = _Backlog()


class _Exchange:
    """Messages of one exchange, as `shm_control` takes them, and their tensors: the compiled loops take addresses only.

    What was sent lives until it has been read, in `ShmTransport`; what is received until the wait is over.
    """

    __slots__ = ("_op", "_transport", "_where", "messages_M5", "num_sends", "received", "sent", "tag")

    def __init__(
        self,
        transport: ShmTransport,
        messages_M5: np.ndarray,
        num_sends: int,
        tag: int,
        sent: Sequence[Tensor],
        received: Sequence[Tensor],
        op: str,
        where: str,
    ):
        self._transport = transport
        self.messages_M5 = messages_M5
        self.num_sends = num_sends
        self.tag = tag
        self.sent = sent
        self.received = received
        self._op = op
        self._where = where

    def wait(self, *, until_sent: bool = True) -> None:
        """Copy every message in as it appears; then wait until the peers have copied theirs, or at least can."""
        transport = self._transport
        if not transport.look(self, until_sent, _SPIN_NS):
            deadline_s = time.monotonic() + transport.timeout_s
            mailbox = transport.mailbox
            if not mailbox.sleep(lambda: transport.look(self, until_sent, 0), self._needed, deadline_s, _backlog.nap_s):
                raise self.failed()
        self.received = ()
        if until_sent:
            transport.forget(self)

    def _needed(self) -> set[int]:
        return {peer for peer, _ in self._missing()} or {peer for peer, _ in self._unread()}

    def _missing(self) -> list[tuple[int, int]]:
        """Peer and bytes of every message that did not come."""
        return [(peer, nbytes) for peer, _, _, nbytes, is_read in self.messages_M5[self.num_sends :].tolist() if not is_read]

    def _unread(self) -> list[tuple[int, int]]:
        """Peer and bytes of every message that was not taken."""
        mailbox, sends = self._transport.mailbox, self.messages_M5[: self.num_sends].tolist()
        was_taken, controls_R = mailbox.control.was_taken, mailbox.controls_R
        return [(row[0], row[4]) for row in sends if not was_taken(controls_R, mailbox.rank, row[0], row[1])]

    def error(self, text: str) -> CollectiveError:
        """What went wrong with this exchange."""
        return self._transport.error(self._op, self._where, text)

    def failed(self) -> CollectiveError:
        """The error, with what is missing and which ranks are gone."""
        transport = self._transport
        missing, unread = self._missing(), self._unread()
        lost = transport.mailbox.gone() & {peer for peer, _ in missing + unread}
        ending = f"{transport.named(lost)} is gone" if lost else f"did not complete within {transport.timeout_s:g} s"
        expected = [(peer, nbytes) for peer, _, _, nbytes, _ in self.messages_M5[self.num_sends :].tolist()]
        lacking = [*transport.parts(missing, is_incoming=True), *transport.parts(unread, is_incoming=False)]
        return self.error(f"{ending} ({progress(transport.parts(expected, is_incoming=True), lacking)})")


class ShmTransport:
    """Messages between processes of one host through mapped memory. CPU tensors of any dtype.

    Collective: all ranks construct it together.

    Args:
        rank, world_size: this process among those that share.
        gather: returns every rank's value of its argument, in rank order (for example over a process group's store).
        timeout_s: seconds after which a wait fails. A peer whose process ends is noticed within a fraction of a second.
        names_R: what errors call these ranks, where they are some of a larger group.

    Raises:
        ValueError: some rank is on another node (host, container, network namespace or user).
    """

    name = "shm"

    def __init__(
        self,
        rank: int,
        world_size: int,
        gather: Callable[[object], Sequence[object]],
        *,
        timeout_s: float,
        names_R: Sequence[int] | None = None,
    ):
        self.rank = rank
        self.world_size = world_size
        self.timeout_s = timeout_s
        self.traffic = Traffic(world_size)
        self.thread: CommunicationThread | None = None
        self._tags = Tags()
        self.mailbox = Mailbox(rank, world_size)
        self._names_R = names_R or range(world_size)
        self.mailbox.connect(_addresses_on_one_node(gather, self.mailbox.address))
        self._arena = Arena(self.mailbox.publish)
        self._counts_3R = np.zeros((3, world_size), np.int64)  # messages to each rank, posted to it, expected from it
        self._queued: list[_Exchange] = []  # with messages that their receiver's ring has no room for yet
        self._in_flight: dict[_Exchange, None] = {}  # not known to have been read, in the order of their launch
        self._patience_ns = _PATIENCE_NS if world_size <= len(os.sched_getaffinity(0)) else 0
        self._boards = 0
        # Bound once: what a short exchange takes is mostly Python's.
        mailbox, control = self.mailbox, self.mailbox.control
        self._launch = partial(control.launch, mailbox.controls_R, rank, mailbox.own_G2, self._counts_3R)
        self._advance = partial(control.advance, mailbox.controls_R, rank, mailbox.bases_RG, cache_bytes(), self._patience_ns)
        self._all_taken = partial(control.all_taken, mailbox.controls_R, rank)
        # Peers find memory through this process: none may leave before all have connected.
        gather(None)

    def empty(self, shape: Sequence[int], like: Tensor) -> Tensor:
        """A tensor of undefined content with the dtype of `like`, in memory that peers read without another copy."""
        return self._arena.empty(shape, like.dtype) if like.device.type == "cpu" else like.new_empty(tuple(shape))

    def exchange(self, sends: Sequence[Buffer], recvs: Sequence[Buffer], *, op: str, where: str = "") -> Pending:
        """Describe every message to its receiver; see `Transport.exchange`."""
        parts: list[int] = []
        sent: list[Tensor] = []
        received: list[Tensor] = []
        for tensors, buffers in ((sent, sends), (received, recvs)):
            for tensor, peer in buffers:
                nbytes = tensor.nbytes
                if nbytes:
                    assert tensor.is_contiguous(), "messages must be contiguous"
                    parts += (peer, tensor.data_ptr(), nbytes)
                    tensors.append(tensor)
        parts_M3 = np.array(parts, np.int64).reshape(-1, 3)
        exchange = self._launched(parts_M3, len(sent), 0, 0, 1, sent, received, op, where)
        if exchange is None:
            self._stage(parts_M3, sent)
            exchange = self._launched(parts_M3, len(sent), 0, 0, 1, sent, received, op, where)
        assert exchange is not None
        return exchange

    def exchange_rows(self, layout: RowLayout, outgoing: Tensor, incoming: Tensor, *, op: str, where: str = "") -> Pending:
        """Describe the rows to their receivers; see `Transport.exchange_rows`."""
        parts_M3, num_sends, num_rows = layout.parts_M3, len(layout.sent), outgoing.shape[0]
        outgoing_bytes, incoming_bytes = outgoing.nbytes, incoming.nbytes
        # Strides do not say: that of a single row may be anything.
        row_bytes = outgoing_bytes // num_rows if num_rows else incoming_bytes // max(1, incoming.shape[0])
        # The compiled loops take addresses only.
        assert outgoing.is_contiguous() and incoming.is_contiguous(), "rows must lie one after the other"
        assert layout.num_sent_rows * row_bytes <= outgoing_bytes, "fewer rows than are sent"
        assert layout.num_received_rows * row_bytes <= incoming_bytes, "fewer rows than are received"
        there, into, received = outgoing.data_ptr(), incoming.data_ptr(), (incoming,)
        exchange = self._launched(parts_M3, num_sends, there, into, row_bytes, (outgoing,), received, op, where)
        if exchange is None:
            staged = self._arena.empty(outgoing.shape, outgoing.dtype).copy_(outgoing)
            exchange = self._launched(parts_M3, num_sends, staged.data_ptr(), into, row_bytes, (staged,), received, op, where)
        assert exchange is not None
        return exchange

    def all_gather_ints(self, values: Tensor, *, where: str = "") -> Tensor:
        """Gather int64 [n] from every rank: [R, n]."""
        if values.numel() <= self.mailbox.control.MAX_INTS:
            return self._gather_board(values, where)
        return torch.cat([self._gather_board(part, where) for part in values.split(self.mailbox.control.MAX_INTS)], dim=1)

    def _gather_board(self, values: Tensor, where: str) -> Tensor:
        self._boards += 1
        number, mailbox = self._boards, self.mailbox
        control, controls_R = mailbox.control, mailbox.controls_R
        mailbox.show(number, values)

        def absent() -> set[int]:
            return {peer for peer in range(self.world_size) if not control.shows(controls_R, peer, number)}

        def look(spin_ns: int = 0) -> bool:
            if not _backlog.is_posted():
                spin_ns = 0
            return bool(control.all_show(controls_R, number, spin_ns, self._patience_ns))

        op = f"gather of {values.numel()} integers"
        if not look(_SPIN_NS) and not mailbox.sleep(look, absent, time.monotonic() + self.timeout_s, _backlog.nap_s):
            ranks, gone = absent(), mailbox.gone()
            ending = "gone" if ranks & gone else f"absent after {self.timeout_s:g} s"
            raise self.error(op, where, f"{self.named(ranks & gone or ranks)} is {ending}")
        boards = mailbox.boards(number)
        for peer, board in enumerate(boards):
            if board.numel() != values.numel():
                shown = f"{self.named([peer])} shows {board.numel()}"
                raise self.error(op, where, f"{shown}; {DIFFERENT_PLACES}")
        return torch.stack(boards)

    def look(self, exchange: _Exchange, until_taken: bool, spin_ns: int) -> bool:
        """Read messages as they appear and look for `spin_ns` whether all is done; see `shm_control.advance`."""
        if _backlog.threads and not _backlog.is_posted():
            spin_ns = 0
        messages_M5, num_sends, tag, control = exchange.messages_M5, exchange.num_sends, exchange.tag, self.mailbox.control
        while (status := self._advance(messages_M5, num_sends, tag, until_taken, spin_ns)) == control.NEW_SEGMENT:
            if not self.mailbox.map_segments():
                raise exchange.failed()
        if status == control.UNLIKE:
            peer, sent_tag, there, here = control.unlike(self.mailbox.controls_R, self.rank, messages_M5[num_sends:], tag)
            if sent_tag != tag:
                raise exchange.error(f"{self.named([peer])} sent {self._tags.named(sent_tag)}; {DIFFERENT_PLACES}: {SAME_ORDER}")
            raise exchange.error(f"{self.named([peer])} sent {there} B where {here} B were expected; {DIFFERENT_PLACES}")
        return bool(status == control.DONE) and (until_taken or exchange not in self._queued)

    def forget(self, exchange: _Exchange) -> None:
        """Let go of what an exchange sent: it has been read."""
        self._in_flight.pop(exchange, None)

    def error(self, op: str, where: str, text: str) -> CollectiveError:
        """What went wrong with an operation here."""
        return CollectiveError(f"{self.named([self.rank])}: {op}{where and ' at ' + where}: {text}")

    def parts(self, messages: Iterable[tuple[int, int]], *, is_incoming: bool) -> list[Part]:
        """Messages (peer, bytes), for errors."""
        return [Part(nbytes, self._names_R[peer], is_incoming) for peer, nbytes in messages]

    def named(self, ranks: Iterable[int]) -> str:
        """These ranks of this transport, for errors."""
        return "rank " + ", ".join(str(self._names_R[rank]) for rank in sorted(ranks))

    def post_queued(self) -> bool:
        """Describe what was sent to the peers whose rings have room; returns whether that is all of it."""
        post, controls_R, counts_3R = self.mailbox.control.post, self.mailbox.controls_R, self._counts_3R
        self._queued = [q for q in self._queued if not post(controls_R, self.rank, counts_3R, q.messages_M5, q.num_sends)]
        return not self._queued

    def _stage(self, parts_M3: np.ndarray, sent: list[Tensor]) -> None:
        """Copy those of the tensors that are sent into memory that peers can read which are not in it, the same bytes once."""
        control, own_G2, staged = self.mailbox.control, self.mailbox.own_G2, {}
        for m, tensor in enumerate(sent):
            _, address, nbytes = parts_M3[m].tolist()
            if control.place(own_G2, address) < 0:
                if (address, nbytes) not in staged:
                    staged[address, nbytes] = self._arena.empty(tensor.shape, tensor.dtype).copy_(tensor)
                sent[m] = staged[address, nbytes]
                parts_M3[m, 1] = sent[m].data_ptr()

    def _launched(
        self,
        parts_M3: np.ndarray,
        num_sends: int,
        outgoing: int,
        incoming: int,
        row_bytes: int,
        sent: Sequence[Tensor],
        received: Sequence[Tensor],
        op: str,
        where: str,
    ) -> _Exchange | None:
        """An exchange of parts (peer, first row, rows) at two addresses; None, and nothing done, if peers cannot read there."""
        while self._in_flight:
            earlier = next(iter(self._in_flight))
            if not self._all_taken(earlier.messages_M5, earlier.num_sends):
                break
            del self._in_flight[earlier]
        control, messages_M5 = self.mailbox.control, np.empty((len(parts_M3), 5), np.int64)
        traffic_2R, tag = self.traffic.counts_2R(op), self._tags.of(op, where)
        status = self._launch(traffic_2R, parts_M3, num_sends, outgoing, incoming, row_bytes, tag, messages_M5)
        if status == control.UNREACHABLE:
            return None
        exchange = _Exchange(self, messages_M5, num_sends, tag, sent, received, op, where)
        if num_sends:
            self._in_flight[exchange] = None
            if status == control.NOT_YET:
                self._queued.append(exchange)
                _backlog.threads[self] = threading.get_ident()
        return exchange


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
