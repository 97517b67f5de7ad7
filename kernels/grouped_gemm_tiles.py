"""Launch parameters of a grouped product on the GPU: its permitted tiles, the fastest of them, and whether TMA loads operands.

All tiles that one call may choose from give the same bits: each element of the result adds the same steps of `block_k` terms in
the same order, by the same instruction, whatever the other tile sizes are. The choice can therefore depend on timing while every
rank and every run gets the same result. The permitted tiles follow from dtype and rows, by the rule in `tiles_for`.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import pairwise

import torch
from torch import Tensor


@dataclass(frozen=True)
class TileConfig:
    """Tile of one program, and its numbers of warps and pipeline stages."""

    block_m: int
    block_n: int
    block_k: int
    num_warps: int
    num_stages: int


# The whole search space. Within each line block_k is the same, and all tiles compile to the same matrix instruction: wgmma from
# 64 rows on, mma for the smallest, fused multiply-add for fp32.
HALF_TILES = (
    TileConfig(128, 256, 64, 8, 3),
    TileConfig(128, 128, 64, 8, 4),
    TileConfig(64, 256, 64, 8, 3),
    TileConfig(64, 128, 64, 4, 4),
)
TINY_HALF_TILES = (TileConfig(16, 128, 128, 4, 4),)
FLOAT_TILES = (TileConfig(64, 64, 32, 4, 3),)
TINY_FLOAT_TILES = (TileConfig(16, 64, 32, 4, 3),)

_TMA_BYTES = 16  # TMA requires addresses and strides that are multiples of this
_TIMED_RUNS = 5
_WARPS_PER_SM = 8  # of persistent programs: one of the largest tile, or two of any other


def tiles_for(dtype: torch.dtype, rows: int) -> tuple[TileConfig, ...]:
    """The permitted tiles of a product whose longest group has `rows` rows; the first is used where nothing is timed."""
    is_tiny = rows < 64
    if dtype == torch.float32:
        return TINY_FLOAT_TILES if is_tiny else FLOAT_TILES
    if is_tiny:
        return TINY_HALF_TILES
    return HALF_TILES if rows >= 128 else HALF_TILES[2:]


def takes_tma(device: torch.device, *matrices: Tensor) -> bool:
    """Whether TMA loads these matrices: on a GPU of capability 9 (Hopper) or later, if each matrix fits its requirements."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device) >= (9, 0) and fits_tma(*matrices)


def fits_tma(*matrices: Tensor) -> bool:
    """TMA's requirements: half precision, one contiguous dimension, address and other stride multiples of 16 bytes.

    fp32 products do not use the tensor cores, for which TMA is meant.
    """
    return all(
        matrix.element_size() == 2
        and min(matrix.stride()) == 1
        and max(matrix.stride()) * matrix.element_size() % _TMA_BYTES == 0
        and matrix.data_ptr() % _TMA_BYTES == 0
        for matrix in matrices
    )


def num_programs(device: torch.device, tile: TileConfig, num_tiles: int) -> int:
    """Programs of a persistent launch: as many as run concurrently, each looping over tiles; a few in the interpreter."""
    num_sms = torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 3
    return min(num_tiles, num_sms * max(1, _WARPS_PER_SM // tile.num_warps))


def shape_key(op: str, group_sizes: Sequence[int], *facts: Hashable) -> tuple[Hashable, ...]:
    """The key under which calls share a timing: op, widths, dtype, kind of loads, rows and groups rounded up to a power of 2."""
    return (op, *facts, (sum(group_sizes) - 1).bit_length(), (len(group_sizes) - 1).bit_length())


class TileTimings:
    """The fastest tile for each key, timed at the first call with it.

    That call runs every tile on its own operands and waits for the GPU; every tile leaves the same result. Later calls with the
    same key look the tile up without waiting.
    """

    def __init__(self) -> None:
        self._fastest: dict[Hashable, TileConfig] = {}

    def choose(self, key: Hashable, tiles: Sequence[TileConfig], run: Callable[[TileConfig], object] | None) -> TileConfig:
        """The tile to use. `run` launches the product with a tile; None off the GPU, and where the launch cannot be repeated.

        It cannot be repeated where it adds to its result. Without `run`, with a single tile, or during graph capture nothing is
        timed.
        """
        if len(tiles) == 1:
            return tiles[0]
        if key not in self._fastest:
            if run is None or torch.cuda.is_current_stream_capturing():
                return tiles[0]
            self._fastest[key] = min(tiles, key=lambda tile: _seconds(partial(run, tile)))
        return self._fastest[key]


def _seconds(call: Callable[[], object]) -> float:
    """Median time of a call on the GPU, compiled and warm."""
    call()
    events = [torch.cuda.Event(enable_timing=True) for _ in range(_TIMED_RUNS + 1)]
    events[0].record()
    for event in events[1:]:
        call()
        event.record()
    events[-1].synchronize()
    return statistics.median(start.elapsed_time(stop) for start, stop in pairwise(events)) * 1e-3
