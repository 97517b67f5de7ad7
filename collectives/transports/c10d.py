"""The transport over torch.distributed: Gloo for CPU tensors, NCCL for CUDA tensors."""

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor

from ..progress import CommunicationThread
from ..traffic import Traffic
from ..transport import Buffer, CollectiveError, Pending, RowsAsMessages


@dataclass(frozen=True, slots=True)
class _Messages:
    """What errors say of an exchange."""

    what: str  # rank, operation and place
    parts: str  # peers and bytes

    def failed(self, error: RuntimeError, timeout: timedelta) -> CollectiveError:
        """The error of torch with what it does not know."""
        said = str(error).splitlines()[0]
        ending = f"did not complete within {timeout.total_seconds():g} s" if "imed out" in said else "failed"
        return CollectiveError(f"{self.what} {ending} ({self.parts}): {said}")


class _Works:
    """Outstanding torch.distributed works of one exchange."""

    def __init__(self, works: list[dist.Work], timeout: timedelta, messages: _Messages):
        self._works = works
        self._timeout = timeout
        self._messages = messages

    def wait(self, *, until_sent: bool = True) -> None:
        works, self._works = self._works, []
        try:
            for work in works:
                work.wait(self._timeout)
        except RuntimeError as error:
            raise self._messages.failed(error, self._timeout) from error


class C10dTransport(RowsAsMessages):
    """Point-to-point messages of a torch.distributed process group.

    Args:
        group: the process group; ranks below are ranks in it. Give each transport a group of its own, so that
            experts in flight and tokens in flight are matched apart.
        timeout_s: seconds after which a wait fails.
    """

    name = "c10d"

    def __init__(self, group: dist.ProcessGroup, *, timeout_s: float):
        self.group = group
        self.rank = dist.get_rank(group)
        self.world_size = dist.get_world_size(group)
        self.traffic = Traffic(self.world_size)
        self._timeout = timedelta(seconds=timeout_s)
        self._coalesce = dist.get_backend(group) == "nccl"
        self.thread = None if self._coalesce else CommunicationThread()

    def empty(self, shape: Sequence[int], like: Tensor) -> Tensor:
        """An ordinary tensor."""
        return like.new_empty(tuple(shape))

    def exchange(self, sends: Sequence[Buffer], recvs: Sequence[Buffer], *, op: str, where: str = "") -> Pending:
        """Launch every message; see `Transport.exchange`."""
        sends = [buffer for buffer in sends if buffer.tensor.numel()]
        recvs = [buffer for buffer in recvs if buffer.tensor.numel()]
        for buffer in sends:
            self.traffic.add(op, buffer.peer, buffer.tensor.nbytes)
        messages = self._describe(sends, recvs, op, where)
        try:
            works = self._launch(sends, recvs)
        except RuntimeError as error:
            raise messages.failed(error, self._timeout) from error
        return _Works(works, self._timeout, messages)

    def _launch(self, sends: Sequence[Buffer], recvs: Sequence[Buffer]) -> list[dist.Work]:
        if self._coalesce:
            # NCCL deadlocks unless the messages of one exchange are one group call.
            ops = [dist.P2POp(dist.irecv, b.tensor, group=self.group, group_peer=b.peer) for b in recvs]
            ops += [dist.P2POp(dist.isend, b.tensor, group=self.group, group_peer=b.peer) for b in sends]
            return dist.batch_isend_irecv(ops) if ops else []
        works = [_launched(dist.irecv(b.tensor, group=self.group, group_src=b.peer)) for b in recvs]
        return works + [_launched(dist.isend(b.tensor, group=self.group, group_dst=b.peer)) for b in sends]

    def all_gather_ints(self, values: Tensor, *, where: str = "") -> Tensor:
        """Gather int64 [n] from every rank: [R, n]."""
        gathered = torch.empty(self.world_size, values.numel(), dtype=torch.int64, device=values.device)
        what = f"rank {self.rank}: gather of {values.numel()} integers{where and ' at ' + where}"
        messages = _Messages(what, f"{values.nbytes} B from each of {self.world_size} ranks")
        try:
            work = _launched(dist.all_gather(list(gathered.unbind()), values, group=self.group, async_op=True))
        except RuntimeError as error:
            raise messages.failed(error, self._timeout) from error
        _Works([work], self._timeout, messages).wait()
        return gathered

    def _describe(self, sends: Sequence[Buffer], recvs: Sequence[Buffer], op: str, where: str) -> _Messages:
        to = ", ".join(f"{b.tensor.nbytes} B to rank {b.peer}" for b in sends)
        of = ", ".join(f"{b.tensor.nbytes} B from rank {b.peer}" for b in recvs)
        place = f" at {where}" if where else ""
        return _Messages(f"rank {self.rank}: {op}{place}", f"sending {to or 'nothing'}; expecting {of or 'nothing'}")


def _launched(work: dist.Work | None) -> dist.Work:
    """torch returns no work to a rank outside the group, which this transport's rank never is."""
    assert work is not None
    return work
