"""Two transports as one: messages to ranks of the same node travel inside it, all others between nodes."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..messages import Buffer, Pending
from ..progress import CommunicationThread
from ..tags import gather_op
from ..traffic import Traffic
from ..transport import RowsAsMessages, Transport


class _Both:
    """An exchange of which a part runs inside and a part outside.

    The inside part is waited for first: it needs only this node's ranks, while the outside part goes on by itself.
    """

    def __init__(self, inside: Pending, outside: Pending):
        self._parts = (inside, outside)

    def wait(self, *, until_sent: bool = True) -> None:
        for part in self._parts:
            part.wait(until_sent=until_sent)


class HierarchicalTransport(RowsAsMessages):
    """A transport inside a node and one between nodes, as one transport over all ranks.

    Args:
        inside: over the ranks of this rank's node, in ascending order of their rank.
        outside: over all ranks; its messages must make progress without being waited for, as those of c10d do.
        node_of_R: the node of every rank, the same on all.
    """

    name = "hierarchical"

    def __init__(self, inside: Transport, outside: Transport, node_of_R: Sequence[int]):
        self.inside = inside
        self.outside = outside
        self.rank = outside.rank
        self.world_size = outside.world_size
        self.traffic = Traffic(self.world_size)
        self.thread: CommunicationThread | None = CommunicationThread()
        assert len(node_of_R) == self.world_size
        self._members = [r for r, node in enumerate(node_of_R) if node == node_of_R[self.rank]]
        self._index = {rank: i for i, rank in enumerate(self._members)}
        assert (inside.rank, inside.world_size) == (self._index[self.rank], len(self._members)), "not the ranks of the node"
        nodes = sorted(set(node_of_R))
        self._ranks_of_nodes = [[r for r, node in enumerate(node_of_R) if node == n] for n in nodes]

    def empty(self, shape: Sequence[int], like: Tensor) -> Tensor:
        """A tensor in memory that the ranks of this node can read; the transport between nodes sends from any."""
        return self.inside.empty(shape, like)

    def exchange(self, sends: Sequence[Buffer], recvs: Sequence[Buffer], *, op: str, where: str = "") -> Pending:
        """Launch every message on the transport that reaches its peer; see `Transport.exchange`."""
        for buffer in sends:
            if buffer.tensor.numel():
                self.traffic.add(op, buffer.peer, buffer.tensor.nbytes)
        outside = self.outside.exchange(self._far(sends), self._far(recvs), op=op, where=where)
        return _Both(self.inside.exchange(self._near(sends), self._near(recvs), op=op, where=where), outside)

    def all_gather_ints(self, values: Tensor, *, where: str = "") -> Tensor:
        """Gather int64 [n] from every rank: [R, n]. Inside each node, between the nodes' first ranks, and inside again."""
        gathered = values.new_empty(self.world_size, values.numel())
        gathered[self._members] = self.inside.all_gather_ints(values, where=where)
        if len(self._ranks_of_nodes) == 1 or not values.numel():
            return gathered
        op, first = gather_op(values.numel()), self._members[0]
        if self.rank == first:
            mine = gathered[self._members]
            others = [ranks for ranks in self._ranks_of_nodes if ranks != self._members]
            blocks = [values.new_empty(len(ranks), values.numel()) for ranks in others]
            sends = [Buffer(mine, ranks[0]) for ranks in others]
            recvs = [Buffer(block, ranks[0]) for block, ranks in zip(blocks, others, strict=True)]
            self.outside.exchange(sends, recvs, op=op, where=where).wait()
            for ranks, block in zip(others, blocks, strict=True):
                gathered[torch.tensor(ranks)] = block
            sends = [Buffer(gathered, i) for i in range(1, len(self._members))]
            self.inside.exchange(sends, [], op=op, where=where).wait()
        else:
            self.inside.exchange([], [Buffer(gathered, 0)], op=op, where=where).wait()
        return gathered

    def _near(self, buffers: Sequence[Buffer]) -> list[Buffer]:
        return [Buffer(b.tensor, self._index[b.peer]) for b in buffers if b.peer in self._index]

    def _far(self, buffers: Sequence[Buffer]) -> list[Buffer]:
        return [b for b in buffers if b.peer not in self._index]
