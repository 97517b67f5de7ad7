"""What every transport must do, as one body that each rank runs: values, order, empty messages, dtypes, bytes counted."""

from collections.abc import Callable

import torch
import torch.distributed as dist
from torch import Tensor

from moesaic.collectives import Buffer, RowLayout, RowPart, Transport, all_to_all_rows, make_transports
from moesaic.collectives.transports.shm import ShmTransport

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64, torch.int64, torch.int16, torch.uint8, torch.bool)
LARGE = 1 << 20


def shm(timeout_s: float = 60.0) -> ShmTransport:
    """Shared memory between all ranks. Collective."""
    group = dist.group.WORLD
    assert group is not None
    (transport,) = make_transports("shm", group, num_transports=1, timeout_s=timeout_s)
    assert isinstance(transport, ShmTransport)
    return transport


def message(src: int, dst: int, index: int, size: int, dtype: torch.dtype) -> Tensor:
    """The tensor that `src` sends to `dst` as its `index`-th message."""
    generator = torch.Generator().manual_seed(1000 * src + 100 * dst + index)
    return torch.randint(0, 2 if dtype == torch.bool else 100, (size,), generator=generator).to(dtype)


def poison(size: int, dtype: torch.dtype) -> Tensor:
    """A receive buffer whose content cannot be what was sent."""
    return torch.full((size,), torch.nan).to(dtype) if dtype.is_floating_point else torch.full((size,), 101).to(dtype)


def check_transport(transport: Transport) -> None:
    """Assert everything; every rank of the transport runs it."""
    check_dtypes(transport)
    check_order(transport)
    check_one_way(transport)
    check_large(transport)
    check_rows(transport)
    check_ints(transport)


def check_dtypes(transport: Transport) -> None:
    """Each rank sends each other one a message of each dtype, of a size of its own; some are empty."""
    rank, peers = transport.rank, [r for r in range(transport.world_size) if r != transport.rank]
    size = {(src, dst): 3 * src + dst for src in range(transport.world_size) for dst in range(transport.world_size)}
    transport.traffic.reset()
    for index, dtype in enumerate(DTYPES):
        sends = [Buffer(message(rank, peer, index, size[rank, peer], dtype), peer) for peer in peers]
        recvs = [Buffer(poison(size[peer, rank], dtype), peer) for peer in peers]
        transport.exchange(sends, recvs, op="dtypes").wait()
        for buffer in recvs:
            assert torch.equal(buffer.tensor, message(buffer.peer, rank, index, size[buffer.peer, rank], dtype)), (dtype, buffer)
    for peer in peers:
        assert transport.traffic.bytes_R("dtypes")[peer] == size[rank, peer] * sum(dtype.itemsize for dtype in DTYPES)
        assert transport.traffic.messages_R("dtypes")[peer] == (len(DTYPES) if size[rank, peer] else 0)


def check_order(transport: Transport) -> None:
    """Several messages between the same two ranks, in several exchanges under way, arrive in the order of posting."""
    rank, peers = transport.rank, [r for r in range(transport.world_size) if r != transport.rank]
    pending, expected = [], []
    for exchange in range(3):
        indices = range(4 * exchange, 4 * exchange + 4)
        sends = [Buffer(message(rank, peer, i, 5 + i, torch.float32), peer) for i in indices for peer in peers]
        recvs = [Buffer(poison(5 + i, torch.float32), peer) for i in indices for peer in peers]
        expected += [
            (b.tensor, message(peer, rank, i, 5 + i, torch.float32))
            for b, (i, peer) in zip(recvs, [(i, peer) for i in indices for peer in peers], strict=True)
        ]
        pending.append(transport.exchange(sends, recvs, op="order"))
    for one in pending:
        one.wait()
    assert all(torch.equal(actual, wanted) for actual, wanted in expected)


def check_one_way(transport: Transport) -> None:
    """A rank may only send, only receive, or take no part."""
    rank, last = transport.rank, transport.world_size - 1
    received = poison(7, torch.float32)
    sends = [Buffer(message(0, last, 0, 7, torch.float32), last)] if rank == 0 != last else []
    recvs = [Buffer(received, 0)] if rank == last != 0 else []
    transport.exchange(sends, recvs, op="one way").wait()
    assert not recvs or torch.equal(received, message(0, last, 0, 7, torch.float32))


def check_large(transport: Transport) -> None:
    """Everybody sends to everybody before anybody waits, from memory that the transport gave."""
    rank, peers = transport.rank, [r for r in range(transport.world_size) if r != transport.rank]
    like = torch.empty(0)
    sends = [Buffer(transport.empty((LARGE,), like).fill_(10 * rank + peer), peer) for peer in peers]
    recvs = [Buffer(transport.empty((LARGE,), like).fill_(torch.nan), peer) for peer in peers]
    transport.exchange(sends, recvs, op="large").wait()
    for buffer in recvs:
        assert (buffer.tensor == 10 * buffer.peer + rank).all()


def check_rows(transport: Transport) -> None:
    """Parts of one tensor, of any memory and dtype, with gaps between them: two exchanges under way, and the way back."""
    rank, world_size = transport.rank, transport.world_size

    def parts(count: Callable[[int], int]) -> list[RowPart]:
        """Each followed by a row that nobody gets; this rank's own are left out."""
        firsts = [sum(count(r) + 1 for r in range(peer)) for peer in range(world_size)]
        return [RowPart(peer, firsts[peer], count(peer)) for peer in range(world_size) if peer != rank]

    def num_rows(src: int, dst: int) -> int:
        return (3 * src + dst) % 4

    sent, received = parts(lambda peer: num_rows(rank, peer)), parts(lambda peer: num_rows(peer, rank))
    layout = RowLayout(sent, received)
    num_sent = num_received = 4 * world_size  # as many as there can be, and more
    for dtype in (torch.float32, torch.bfloat16):
        for make in (transport.empty, lambda shape, like: like.new_empty(shape)):
            transport.traffic.reset()
            outgoing = make((num_sent, 5), torch.empty(0, dtype=dtype))
            outgoing.copy_(100 * rank + torch.arange(num_sent)[:, None])
            incoming = [torch.full((num_received, 5), torch.nan, dtype=dtype) for _ in range(2)]
            pending = [all_to_all_rows(transport, layout, outgoing, into, op="rows") for into in incoming]
            for one in pending:
                one.wait()
            back = torch.full_like(outgoing, torch.nan)
            all_to_all_rows(transport, layout.transpose, incoming[1], back, op="back").wait()
            for into in incoming:
                expected = torch.full_like(into, torch.nan)
                for peer, first, count in received:
                    there = sum(num_rows(peer, r) + 1 for r in range(rank))
                    expected[first : first + count] = (100 * peer + there + torch.arange(count))[:, None].to(dtype)
                assert torch.equal(into.nan_to_num(-1), expected.nan_to_num(-1))
            for _, first, count in sent:
                assert torch.equal(back[first : first + count], outgoing[first : first + count])
                back[first : first + count] = torch.nan
            assert back.isnan().all()
            for peer, _, count in sent:
                assert transport.traffic.bytes_R("rows")[peer] == 2 * count * 5 * dtype.itemsize
                assert transport.traffic.messages_R("rows")[peer] == (2 if count else 0)


def check_ints(transport: Transport) -> None:
    """Integers of every rank, in rank order."""
    for size in (1, 5, 300):
        values = torch.arange(size) + 1000 * transport.rank - 2**40
        gathered = transport.all_gather_ints(values, where="check")
        assert gathered.dtype == torch.int64
        assert torch.equal(gathered, torch.stack([torch.arange(size) + 1000 * r - 2**40 for r in range(transport.world_size)]))
