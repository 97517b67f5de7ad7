"""The transport of a world of one rank: nothing ever travels."""

from collections.abc import Sequence

from torch import Tensor

from ..messages import Buffer, Done, Pending
from ..progress import CommunicationThread
from ..traffic import Traffic
from ..transport import RowsAsMessages


class LocalTransport(RowsAsMessages):
    """One rank, no process group. Any message would be one to a rank that does not exist."""

    name = "local"

    def __init__(self) -> None:
        self.rank = 0
        self.world_size = 1
        self.traffic = Traffic(1)
        self.thread: CommunicationThread | None = None

    def exchange(self, sends: Sequence[Buffer], recvs: Sequence[Buffer], *, op: str, where: str = "") -> Pending:
        """Accept the empty exchange."""
        assert not any(buffer.tensor.numel() for buffer in (*sends, *recvs)), f"{op} {where}: a message in a world of one rank"
        return Done()

    def all_gather_ints(self, values: Tensor, *, where: str = "") -> Tensor:
        """Return `values` as the only row."""
        return values.unsqueeze(0)
