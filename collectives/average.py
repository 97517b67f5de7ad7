"""The mean of tensors over ranks that all hold them: what brings the gradients of replicated groups together.

    average   in place, bitwise the same on every rank

Every rank adds up one part of a piece, in rank order, and sends the sum to the others: 2 (R - 1) / R of the bytes leave each
rank, which no all-reduce goes below. Shape letters: R ranks.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from .messages import Buffer
from .schedule import chunk_bounds
from .transport import Transport

# Bytes that a rank receives into and sums in.
_PIECE_BYTES = 32 << 20


def average(
    transport: Transport, tensors: Sequence[Tensor], *, op: str, where: str = "", piece_bytes: int = _PIECE_BYTES
) -> None:
    """Replace `tensors`, contiguous and alike on all ranks, by their mean over the ranks. Collective.

    Sums run in rank order, in fp32 (fp64 for fp64), and are rounded once. The buffers for it take at most `piece_bytes`, rounded
    up to R elements; a transport that sends from memory of its own (shm) keeps as much again, at most, of what it sends.
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

    # Phase 1: everybody's values of this rank's part.
    arriving = {r: torch.empty_like(mine) for r in peers}
    sends = [Buffer(parts_R[r], r) for r in peers]
    transport.exchange(sends, [Buffer(arriving[r], r) for r in peers], op=op, where=where).wait()

    # Phase 2: their mean.
    total = torch.zeros_like(mine, dtype=_sum_dtype(mine))
    for r in range(world_size):
        total += arriving.get(r, mine)
    mine.copy_(total.div_(world_size))

    # Phase 3: to everybody.
    sends = [Buffer(mine, r) for r in peers]
    transport.exchange(sends, [Buffer(parts_R[r], r) for r in peers], op=op, where=where).wait()


def _sum_dtype(tensor: Tensor) -> torch.dtype:
    return torch.promote_types(tensor.dtype, torch.float32)
