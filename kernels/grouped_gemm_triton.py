"""Triton kernels of the grouped matrix products. Import this module lazily: it imports triton.

Weights and gradients are reached through a table of addresses, so bank rows and slots need no packing. The host knows
the group sizes, so it lists the row tiles of all groups; the table travels in one asynchronous copy from pinned memory.
Tile sizes follow from dtype and group sizes by rule, not by timing, so that every rank and every run sums alike.

Shapes: N rows, I input width, O output width, weights [O, I].
"""

# The compiler gives kernels their types, which Python annotations cannot say.
# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from .checks import check_devices
from .grouped_gemm import zero_empty
from .permute_triton import unit_stride


@dataclass(frozen=True)
class TileConfig:
    """Tile of one program and how many warps and pipeline stages it gets."""

    block_m: int
    block_n: int
    block_k: int
    num_warps: int
    num_stages: int


_MAX_GROUPS = 65_535  # programs in the second dimension of a CUDA grid

# The whole space the rules below choose from; the benchmark sweeps it.
HALF_CONFIGS = (
    TileConfig(128, 256, 64, 8, 3),
    TileConfig(128, 128, 64, 8, 4),
    TileConfig(64, 256, 64, 8, 3),
    TileConfig(64, 128, 64, 4, 4),
    TileConfig(16, 128, 128, 4, 4),
)
FLOAT_CONFIGS = (TileConfig(64, 64, 32, 4, 3), TileConfig(16, 64, 32, 4, 3))


@triton.jit
def _tile_of(pid, num_m_tiles, num_n_tiles, GROUP_M: tl.constexpr):
    """Walk GROUP_M row tiles per column tile, so that a wave of programs shares rows and weights in the L2 cache."""
    tiles_per_band = GROUP_M * num_n_tiles
    band = pid // tiles_per_band
    first_m = band * GROUP_M
    band_m = tl.minimum(num_m_tiles - first_m, GROUP_M)
    return first_m + (pid % tiles_per_band) % band_m, (pid % tiles_per_band) // band_m


@triton.jit
def _grouped_gemm_kernel(
    a_ptr,
    tiles_ptr,
    addresses_ptr,
    out_ptr,
    num_m_tiles,
    num_n_tiles,
    width_n,
    width_k,
    stride_a,
    stride_b_k,
    stride_b_n,
    stride_out,
    ALIGNMENT: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP_M: tl.constexpr,
):
    """out[rows of g] = a[rows of g] @ B_g, with B_g [K, N] at addresses[g].

    Each row tile is (first row, end row of its group, group). With group sizes [3, 0, 2] and BLOCK_M = 2:
    tiles = [(0, 3, 0), (2, 3, 0), (3, 5, 2)].
    """
    tile_m, tile_n = _tile_of(tl.program_id(0), num_m_tiles, num_n_tiles, GROUP_M)
    first = tl.load(tiles_ptr + tile_m * 3)
    end = tl.load(tiles_ptr + tile_m * 3 + 1)
    group = tl.load(tiles_ptr + tile_m * 3 + 2)
    b_ptr = tl.multiple_of(tl.load(addresses_ptr + group).to(tl.pointer_type(a_ptr.dtype.element_ty)), ALIGNMENT)

    m = first + tl.arange(0, BLOCK_M)
    n = tile_n * BLOCK_N + tl.arange(0, BLOCK_N)
    k = tl.arange(0, BLOCK_K)
    # A tile's rows past the group's end read its first row again and are dropped by the store.
    a_ptrs = a_ptr + tl.where(m < end, m, first)[:, None] * stride_a + k[None, :]
    b_ptrs = b_ptr + n[None, :].to(tl.int64) * stride_b_n + k[:, None].to(tl.int64) * stride_b_k
    total = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    for start in range(0, width_k, BLOCK_K):
        a = tl.load(a_ptrs, mask=(start + k < width_k)[None, :], other=0.0)
        b = tl.load(b_ptrs, mask=(start + k < width_k)[:, None] & (n < width_n)[None, :], other=0.0)
        total = tl.dot(a, b, total, input_precision=PRECISION)
        a_ptrs += BLOCK_K
        b_ptrs += BLOCK_K * stride_b_k
    out = out_ptr + m[:, None] * stride_out + n[None, :]
    tl.store(out, total.to(out_ptr.dtype.element_ty), mask=(m < end)[:, None] & (n < width_n)[None, :])


@triton.jit
def _grouped_wgrad_kernel(
    dy_ptr,
    x_ptr,
    groups_ptr,
    addresses_ptr,
    num_o_tiles,
    num_i_tiles,
    width_o,
    width_i,
    stride_dy,
    stride_x,
    stride_grad_o,
    stride_grad_i,
    alpha,
    ALIGNMENT: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP_M: tl.constexpr,
):
    """grad_g += alpha * dy_g.T @ x_g, one tile of one group per program, rows in ascending order.

    Each entry of `groups` is (first row, end row, group, 1 if its gradient is added to and 0 if it is set); groups without rows
    are not listed. With group sizes [3, 0, 2], the last to be set: groups = [(0, 3, 0, 1), (3, 5, 2, 0)].
    """
    entry = tl.program_id(1)
    first = tl.load(groups_ptr + entry * 4)
    end = tl.load(groups_ptr + entry * 4 + 1)
    group = tl.load(groups_ptr + entry * 4 + 2)
    is_added = tl.load(groups_ptr + entry * 4 + 3)
    grad_ptr = tl.multiple_of(tl.load(addresses_ptr + group).to(tl.pointer_type(tl.float32)), ALIGNMENT)

    tile_o, tile_i = _tile_of(tl.program_id(0), num_o_tiles, num_i_tiles, GROUP_M)
    o = tile_o * BLOCK_M + tl.arange(0, BLOCK_M)
    i = tile_i * BLOCK_N + tl.arange(0, BLOCK_N)
    k = tl.arange(0, BLOCK_K)
    dy_ptrs = dy_ptr + (first + k)[:, None] * stride_dy + o[None, :]
    x_ptrs = x_ptr + (first + k)[:, None] * stride_x + i[None, :]
    total = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    for row in range(first, end, BLOCK_K):
        is_row = (row + k < end)[:, None]
        dy = tl.load(dy_ptrs, mask=is_row & (o < width_o)[None, :], other=0.0)
        x = tl.load(x_ptrs, mask=is_row & (i < width_i)[None, :], other=0.0)
        total = tl.dot(tl.trans(dy), x, total, input_precision=PRECISION)
        dy_ptrs += BLOCK_K * stride_dy
        x_ptrs += BLOCK_K * stride_x
    grad_ptrs = grad_ptr + o[:, None].to(tl.int64) * stride_grad_o + i[None, :].to(tl.int64) * stride_grad_i
    mask = (o < width_o)[:, None] & (i < width_i)[None, :]
    before = tl.load(grad_ptrs, mask=mask & (o < width_o * is_added)[:, None], other=0.0)
    tl.store(grad_ptrs, before + alpha * total, mask=mask)


def grouped_gemm_triton(
    x_NI: Tensor,
    weights: Sequence[Tensor],
    group_sizes: Sequence[int],
    *,
    out: Tensor | None = None,
    config: TileConfig | None = None,
) -> Tensor:
    """Launch the product with `weights[g].T`: its K is I, its N is O."""
    _check_weights(weights, x_NI.dtype, x_NI.device)
    stride_o, stride_i = weights[0].stride()
    return _launch_gemm(x_NI, weights, group_sizes, weights[0].shape[0], stride_i, stride_o, out, config)


def grouped_gemm_dgrad_triton(
    dy_NO: Tensor,
    weights: Sequence[Tensor],
    group_sizes: Sequence[int],
    *,
    out: Tensor | None = None,
    config: TileConfig | None = None,
) -> Tensor:
    """Launch the product with `weights[g]`: its K is O, its N is I."""
    _check_weights(weights, dy_NO.dtype, dy_NO.device)
    stride_o, stride_i = weights[0].stride()
    return _launch_gemm(dy_NO, weights, group_sizes, weights[0].shape[1], stride_o, stride_i, out, config)


def grouped_gemm_wgrad_triton(
    dy_NO: Tensor,
    x_NI: Tensor,
    group_sizes: Sequence[int],
    grads: Sequence[Tensor],
    *,
    alpha: float = 1.0,
    overwrite: Sequence[bool] | None = None,
    config: TileConfig | None = None,
) -> None:
    """Launch `_grouped_wgrad_kernel` over the groups that have rows."""
    _check_weights(grads, torch.float32, dy_NO.device)
    dy_NO, x_NI = unit_stride(dy_NO), unit_stride(x_NI)
    O, I = grads[0].shape  # noqa: E741
    zero_empty(grads, group_sizes, overwrite)
    is_fresh = [False] * len(grads) if overwrite is None else overwrite
    groups = [(*tile, int(not is_fresh[tile[2]])) for tile in row_tiles(group_sizes, max(1, sum(group_sizes)))]
    if not groups:
        return
    if len(groups) > _MAX_GROUPS:
        raise ValueError(f"one launch serves up to {_MAX_GROUPS} groups, got {len(groups)}; split the call")
    config = _config(dy_NO.dtype, O) if config is None else config
    num_o_tiles, num_i_tiles = triton.cdiv(O, config.block_m), triton.cdiv(I, config.block_n)
    table, addresses = _device_tables(groups, grads, dy_NO.device)
    _grouped_wgrad_kernel[(num_o_tiles * num_i_tiles, len(groups))](
        dy_NO,
        x_NI,
        table,
        addresses,
        num_o_tiles,
        num_i_tiles,
        O,
        I,
        dy_NO.stride(0),
        x_NI.stride(0),
        grads[0].stride(0),
        grads[0].stride(1),
        alpha,
        ALIGNMENT=_alignment(grads),
        PRECISION=_dot_precision(dy_NO.dtype),
        BLOCK_M=config.block_m,
        BLOCK_N=config.block_n,
        BLOCK_K=config.block_k,
        GROUP_M=8,
        num_warps=config.num_warps,
        num_stages=config.num_stages,
    )


def row_tiles(group_sizes: Sequence[int], block_m: int) -> list[tuple[int, int, int]]:
    """(first row, end row of the group, group) of every tile of `block_m` rows; tiles don't cross groups."""
    tiles: list[tuple[int, int, int]] = []
    start = 0
    for group, size in enumerate(group_sizes):
        tiles.extend((first, start + size, group) for first in range(start, start + size, block_m))
        start += size
    return tiles


def _launch_gemm(
    a_NK: Tensor,
    weights: Sequence[Tensor],
    group_sizes: Sequence[int],
    width: int,
    stride_b_k: int,
    stride_b_n: int,
    out: Tensor | None,
    config: TileConfig | None,
) -> Tensor:
    """Launch `_grouped_gemm_kernel` for rows a_NK and an output of `width` columns."""
    a_NK = unit_stride(a_NK)
    out = a_NK.new_empty(a_NK.shape[0], width) if out is None else out
    if out.shape != (a_NK.shape[0], width) or out.dtype != a_NK.dtype or out.stride(1) != 1:
        raise ValueError(
            f"out must be {a_NK.dtype} {(a_NK.shape[0], width)} with contiguous rows, "
            f"got {out.dtype} {tuple(out.shape)} {out.stride()}"
        )
    if out.numel() == 0:
        return out
    if config is None:
        config = _config(a_NK.dtype, max(group_sizes))
    tiles = row_tiles(group_sizes, config.block_m)
    num_n_tiles = triton.cdiv(width, config.block_n)
    table, addresses = _device_tables(tiles, weights, a_NK.device)
    _grouped_gemm_kernel[(len(tiles) * num_n_tiles,)](
        a_NK,
        table,
        addresses,
        out,
        len(tiles),
        num_n_tiles,
        width,
        a_NK.shape[1],
        a_NK.stride(0),
        stride_b_k,
        stride_b_n,
        out.stride(0),
        ALIGNMENT=_alignment(weights),
        PRECISION=_dot_precision(a_NK.dtype),
        BLOCK_M=config.block_m,
        BLOCK_N=config.block_n,
        BLOCK_K=config.block_k,
        GROUP_M=8,
        num_warps=config.num_warps,
        num_stages=config.num_stages,
    )
    return out


def _config(dtype: torch.dtype, rows: int) -> TileConfig:
    """The tile for the longest group: the largest whose rows it fills, the smallest for tiny groups."""
    configs = FLOAT_CONFIGS if dtype == torch.float32 else (HALF_CONFIGS[0], HALF_CONFIGS[2], HALF_CONFIGS[4])
    return next((config for config in configs if config.block_m <= rows), configs[-1])


def _dot_precision(dtype: torch.dtype) -> str:
    """How fp32 products are rounded: exactly, unless torch was told that TF32 will do."""
    return "tf32" if dtype == torch.float32 and torch.get_float32_matmul_precision() != "highest" else "ieee"


def _device_tables(tiles: Sequence[tuple[int, ...]], tensors: Sequence[Tensor], device: torch.device) -> tuple[Tensor, Tensor]:
    """(tiles, addresses) as int64 on the device, in one copy that the host doesn't wait for."""
    flat = [value for tile in tiles for value in tile] + [tensor.data_ptr() for tensor in tensors]
    table = torch.tensor(flat, dtype=torch.int64, pin_memory=device.type == "cuda").to(device, non_blocking=True)
    return table[: -len(tensors)], table[-len(tensors) :]


def _alignment(tensors: Sequence[Tensor]) -> int:
    """Bytes that divide every address, 16 at most: what the kernel may assume for wide loads."""
    is_wide = all(tensor.data_ptr() % 16 == 0 for tensor in tensors)
    return 16 if is_wide else tensors[0].element_size()


def _check_weights(weights: Sequence[Tensor], dtype: torch.dtype, device: torch.device) -> None:
    """Raise ValueError unless all matrices have one shape, one stride, and the dtype and device of the call."""
    if dtype not in (torch.float32, torch.bfloat16, torch.float16):
        raise ValueError(f"grouped products on the GPU take float32, bfloat16 or float16, got {dtype}; cast first")
    for group, weight in enumerate(weights):
        check_devices(device, **{f"matrix {group}": weight})
        if weight.shape != weights[0].shape or weight.stride() != weights[0].stride() or weight.dtype != dtype:
            raise ValueError(
                f"matrix {group} is {weight.dtype} {tuple(weight.shape)} {weight.stride()}, but this call needs "
                f"{dtype} {tuple(weights[0].shape)} {weights[0].stride()} for all groups"
            )
