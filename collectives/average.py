"""The mean of a tensor over all ranks, in place: the all-reduce of gradients over replicated groups.

    average   in place, bitwise the same on every rank

Each rank sums one part of a piece, in rank order, and sends the mean to the others: each rank sends 2 (R - 1) / R of the bytes,
the minimum for any all-reduce. Shape letters: R ranks.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from .messages import Buffer
from .schedule import chunk_bounds
from .transport import Transport

# Bytes of the buffers for receiving and summing.
_PIECE_BYTES = 32 << 20


def average(
    transport: Transport, tensors: Sequence[Tensor], *, op: str, where: str = "", piece_bytes: int = _PIECE_BYTES
) -> None:
    """Replace `tensors`, contiguous and of the same shapes on all ranks, by their mean over the ranks. Collective.

    Sums run in rank order, in fp32 (fp64 for fp64), and are rounded once. Buffers take at most `piece_bytes`, rounded up to R
    elements; a transport that sends from memory of its own (shm) uses at most as much again.
    """
    if transport.world_size == 1:
        return
    for tensor in tensors:
        # Of the R parts of a piece a rank receives R - 1, and sums one in the dtype of sums, which is no narrower.
        for piece in tensor.view(-1).split(max(1, piece_bytes // _sum_dtype(tensor).itemsize)):
            _average_piece(transport, piece, op, where)


def _average_piece(transport: Transport, piece: Tensor, op: str, where: str) -> None:
    rank, world_size = transport.rank, transport.world_size
    parts_R = [piece[slice(*chunk_bounds(r, world_size, piece.numel()))] for r in range(world_size)]
    peers = [r for r in range(world_size) if r != rank]
    mine = parts_R[rank]

    # Phase 1: gather all ranks' values of this rank's part.
    arriving = {r: torch.empty_like(mine) for r in peers}
    sends = [Buffer(parts_R[r], r) for r in peers]
    transport.exchange(sends, [Buffer(arriving[r], r) for r in peers], op=op, where=where).wait()

    # Phase 2: compute their mean.
    total = torch.zeros_like(mine, dtype=_sum_dtype(mine))
    for r in range(world_size):
        total += arriving.get(r, mine)
    mine.copy_(total.div_(world_size))

    # Phase 3: send it to all ranks.
    sends = [Buffer(mine, r) for r in peers]
    transport.exchange(sends, [Buffer(parts_R[r], r) for r in peers], op=op, where=where).wait()


def _sum_dtype(tensor: Tensor) -> torch.dtype:
    return torch.promote_types(tensor.dtype, torch.float32)
