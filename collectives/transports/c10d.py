"""The transport over torch.distributed: Gloo for CPU tensors, NCCL for CUDA tensors."""

from __future__ import annotations

import time
from collections.abc import Sequence
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor

from ..messages import Buffer, CollectiveError, Pending
from ..progress import CommunicationThread
from ..tags import Tags, gather_op
from ..traffic import Traffic
from ..transport import RowsAsMessages
from .parts import Part, parts_of, progress

# The shortest wait that has a limit: torch counts whole milliseconds, and takes 0 for none.
_AT_ONCE_S = 0.001


class _Exchange:
    """Works under way and what each of them moves: one message on Gloo, all messages of the exchange on NCCL."""

    def __init__(self, transport: C10dTransport, works: list[tuple[dist.Work, list[Part]]], what: str):
        self._transport = transport
        self._left = works
        self._parts = [part for _, parts in works for part in parts]
        self._what = what
        self._error: CollectiveError | None = None

    def wait(self, *, until_sent: bool = True) -> None:
        if self._error is not None:
            raise self._error
        deadline_s = time.monotonic() + self._transport.timeout_s
        while self._left:
            work, _ = self._left[0]
            try:
                self._transport.wait_for(work, deadline_s - time.monotonic())
            except RuntimeError as error:
                self._error = self._failed(error)
                raise self._error from error
            except BaseException:
                # Interrupted, perhaps after the message had come, and Gloo would wait for another one in its place.
                if work.is_completed():
                    del self._left[0]
                raise
            del self._left[0]

    def _failed(self, error: RuntimeError) -> CollectiveError:
        """The error of the first work that is left. Others may have arrived meanwhile, and are not listed as missing."""
        self._left[1:] = [(work, parts) for work, parts in self._left[1:] if not self._has_arrived(work)]
        return self._transport.failed(self._what, self._parts, [part for _, parts in self._left for part in parts], error)

    def _has_arrived(self, work: dist.Work) -> bool:
        try:
            self._transport.wait_for(work, 0)  # Gloo's `is_completed` is true only for messages that were waited for
        except RuntimeError:
            return False
        return True


class C10dTransport(RowsAsMessages):
    """Point-to-point messages of a torch.distributed process group.

    On Gloo a wait ends with `CollectiveError` after `timeout_s`. On NCCL the current stream waits and the host goes on; there the
    watchdog of the group has the limit, and ends the process with a line that names the rank and the number of the work.

    Both sides must expect what the other sends: torch does not report how many bytes came. Gloo leaves the end of a buffer as it
    was after a shorter message, and ends the process at a longer one; NCCL defines neither. On Gloo messages carry their `Tags`:
    one about something else never comes, and both sides wait until the limit. On NCCL the order in which ranks enter its
    collectives is all there is; what they gather says what it is about, and they compare that (runtime/agreement.py).

    Args:
        group: the process group, made with the timeout `timeout_s`; ranks below are ranks in it. Give each transport a group of
            its own, so that experts in flight and tokens in flight are matched apart.
        timeout_s: seconds after which a wait fails.
    """

    name = "c10d"

    def __init__(self, group: dist.ProcessGroup, *, timeout_s: float):
        self.group = group
        self.rank = dist.get_rank(group)
        self.world_size = dist.get_world_size(group)
        self.timeout_s = timeout_s
        self.traffic = Traffic(self.world_size)
        self._is_nccl = dist.get_backend(group) == "nccl"
        self.thread = None if self._is_nccl else CommunicationThread()
        self._tags = Tags()

    def exchange(self, sends: Sequence[Buffer], recvs: Sequence[Buffer], *, op: str, where: str = "") -> Pending:
        """Launch every message; see `Transport.exchange`."""
        sends = [buffer for buffer in sends if buffer.tensor.numel()]
        recvs = [buffer for buffer in recvs if buffer.tensor.numel()]
        for buffer in sends:
            self.traffic.add(op, buffer.peer, buffer.tensor.nbytes)
        return self._begin(sends, recvs, self._tags.of(op, where), f"{op}{where and ' at ' + where}")

    def _begin(self, sends: Sequence[Buffer], recvs: Sequence[Buffer], tag: int, what: str) -> _Exchange:
        parts = parts_of(sends, recvs)
        try:
            if self._is_nccl:
                works = [(work, parts) for work in self._launch_group(sends, recvs)]
            else:
                works = [(work, [part]) for work, part in zip(self._launch_each(sends, recvs, tag), parts, strict=True)]
        except RuntimeError as error:
            raise self.failed(what, parts, parts, error) from error
        return _Exchange(self, works, what)

    def _launch_group(self, sends: Sequence[Buffer], recvs: Sequence[Buffer]) -> list[dist.Work]:
        """NCCL deadlocks unless the messages of one exchange are one group call."""
        ops = [dist.P2POp(dist.irecv, b.tensor, group=self.group, group_peer=b.peer) for b in recvs]
        ops += [dist.P2POp(dist.isend, b.tensor, group=self.group, group_peer=b.peer) for b in sends]
        return dist.batch_isend_irecv(ops) if ops else []

    def _launch_each(self, sends: Sequence[Buffer], recvs: Sequence[Buffer], tag: int) -> list[dist.Work]:
        works = [_launched(dist.irecv(b.tensor, group=self.group, group_src=b.peer, tag=tag)) for b in recvs]
        return works + [_launched(dist.isend(b.tensor, group=self.group, group_dst=b.peer, tag=tag)) for b in sends]

    def all_gather_ints(self, values: Tensor, *, where: str = "") -> Tensor:
        """Gather int64 [n] from every rank: [R, n].

        On Gloo as messages, whose errors name the rank that does not come, as those of its own gather do not.
        """
        op = gather_op(values.numel())
        what = f"{op}{where and ' at ' + where}"
        gathered = torch.empty(self.world_size, values.numel(), dtype=torch.int64, device=values.device)
        if not self._is_nccl:
            values, peers = values.contiguous(), [peer for peer in range(self.world_size) if peer != self.rank]
            gathered[self.rank] = values
            recvs = [Buffer(gathered[peer], peer) for peer in peers]
            self._begin([Buffer(values, peer) for peer in peers], recvs, self._tags.of(op, ""), what).wait()
            return gathered
        try:
            work = _launched(dist.all_gather(list(gathered.unbind()), values, group=self.group, async_op=True))
            self.wait_for(work, self.timeout_s)
        except RuntimeError as error:
            parts = [Part(gathered.nbytes, None, True)]
            raise self.failed(what, parts, parts, error) from error
        return gathered

    def wait_for(self, work: dist.Work, limit_s: float) -> None:
        """Wait for a work of this group; raises torch's `RuntimeError`."""
        if self._is_nccl:
            work.wait()  # with a limit, the host would wait too
        else:
            work.wait(timedelta(seconds=max(limit_s, _AT_ONCE_S)))

    def failed(self, what: str, parts: Sequence[Part], missing: Sequence[Part], error: RuntimeError) -> CollectiveError:
        """The error of torch, with rank, operation, peers and bytes."""
        said = str(error).splitlines()[0]
        ending = f"did not complete within {self.timeout_s:g} s" if "imed out" in said else "failed"
        return CollectiveError(f"rank {self.rank}: {what} {ending} ({progress(parts, missing)}): {said}")


def _launched(work: dist.Work | None) -> dist.Work:
    """torch returns no work to a rank outside the group, which this transport's rank never is."""
    assert work is not None
    return work
