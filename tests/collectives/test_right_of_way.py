"""Copies that give way to token rows: they travel in pieces, and no piece is asked for while rows are waited for."""

import threading
import time
from collections.abc import Sequence

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from moesaic.collectives import Buffer, all_to_all_rows, direct_gather, make_transports, sparse_all_gather, sparse_reduce_scatter
from moesaic.collectives.progress import RightOfWay
from moesaic.collectives.traffic import Traffic
from moesaic.collectives.transport import RowLayout
from moesaic.placement import Placement
from tests.helpers.ranks import run_ranks

NUM_ELEMENTS = (100_000, 70_001)  # 4 and 3 pieces of 128 KiB, the last of each shorter
PLACEMENT = Placement(np.array([0, 1, 1]), np.array([[True, True, True], [True, True, True]]))


class Posted:
    """A transport of rank 1 whose messages arrive when they are waited for."""

    rank, world_size, thread = 1, 2, None

    def __init__(self, right_of_way: RightOfWay):
        self.traffic = Traffic(2)
        self.traffic.right_of_way = right_of_way
        self.received_bytes: list[int] = []
        self.num_on_the_way = self.most_on_the_way = 0

    def exchange(self, sends: Sequence[Buffer], recvs: Sequence[Buffer], *, op: str, where: str = "") -> "Posted":
        self.received_bytes += [buffer.tensor.nbytes for buffer in recvs]
        self.num_on_the_way += 1
        self.most_on_the_way = max(self.most_on_the_way, self.num_on_the_way)
        return self

    def wait(self, *, until_sent: bool = True) -> None:
        self.num_on_the_way -= 1


def expert(value: float = torch.nan) -> tuple[Tensor, ...]:
    return tuple(torch.full((count,), value, dtype=torch.float32) for count in NUM_ELEMENTS)


def gather_one(transport: Posted) -> None:
    placement = Placement(np.array([0]), np.array([[True], [True]]))
    sparse_all_gather(direct_gather(placement), transport, {}, {0: expert()}, op="gather").wait()  # type: ignore[arg-type]


def test_no_piece_is_asked_for_while_rows_are_waited_for() -> None:
    """The first at once, further ones two at a time; with rows waited for, none, until they are here."""
    transport = Posted(RightOfWay())
    gather_one(transport)
    assert transport.received_bytes == [1 << 17] * 3 + [6784] + [1 << 17] * 2 + [17860]
    assert transport.most_on_the_way == 2

    waiting = Posted(RightOfWay(first_s=60))
    with waiting.traffic.right_of_way.taken():  # type: ignore[union-attr]
        thread = threading.Thread(target=gather_one, args=(waiting,))
        thread.start()
        time.sleep(0.05)
        assert waiting.received_bytes == []
    thread.join(10)
    assert waiting.received_bytes == transport.received_bytes


def test_who_holds_up_others_goes_on_after_a_while() -> None:
    transport = Posted(RightOfWay(first_s=0.001))
    with transport.traffic.right_of_way.taken():  # type: ignore[union-attr]
        gather_one(transport)
    assert len(transport.received_bytes) == 7


def exchange_all(rank: int) -> tuple[dict[str, int], bool]:
    """Copies and gradients in flight, token rows at the same time."""
    assert dist.group.WORLD is not None
    tokens, experts = make_transports("c10d", dist.group.WORLD, num_transports=2, timeout_s=30)
    owned = {e: expert(e) for e in range(3) if PLACEMENT.expert_to_owner_E[e] == rank}
    copies = {e: expert() for e in range(3) if PLACEMENT.copies_RE[rank, e]}
    grads = {e: expert(rank + 1) for e in copies}
    schedule = direct_gather(PLACEMENT)
    reduce = schedule.transpose()
    gathering = sparse_all_gather(schedule, experts, owned, copies, op="gather")
    staging = [expert() for _ in range(reduce.most_received(rank))]
    reducing = sparse_reduce_scatter(reduce, experts, grads, owned, staging, op="reduce")
    for size in (10, 200_000, 3):
        rows = torch.full((size,), torch.nan)
        counts_R = [0 if r == rank else size for r in range(2)]
        all_to_all_rows(tokens, RowLayout.consecutive(counts_R, counts_R), torch.ones(size), rows, op="dispatch").wait()
        assert (rows == 1).all()
    gathering.wait()
    reducing.wait()
    is_right = all((part == e).all() for e, item in copies.items() for part in item)
    is_summed = all((part == e + 2 - rank).all() for e, item in owned.items() for part in item)
    return experts.traffic.total_bytes(), is_right and is_summed


def test_pieces_arrive_where_they_should() -> None:
    """Real processes; as many bytes as without pieces."""
    expert_bytes = 4 * sum(NUM_ELEMENTS)
    (first, is_right), (second, is_right_too) = run_ranks(2, exchange_all)
    assert is_right and is_right_too
    assert first == {"gather": expert_bytes, "reduce": 2 * expert_bytes}
    assert second == {"gather": 2 * expert_bytes, "reduce": expert_bytes}
