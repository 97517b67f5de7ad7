"""Triton kernels of the grouped matrix products. Import this module lazily: it imports triton.

Weights and gradients are accessed through a table of addresses, so bank rows and slots need no packing. The group sizes are on
the host, which lists the row tiles of all groups; one asynchronous copy from pinned memory moves the table to the device. The
kernels are persistent: as many programs as run concurrently loop over the tiles, in an order that shares rows and weights in the
L2 cache. Operands are loaded by TMA where `takes_tma` permits, else through pointers; both sum in the same order.

Shapes: N rows, I input width, O output width, weights [O, I].
"""

# Triton infers the types of kernels; Python annotations cannot express them.
# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
import triton
import triton.language as tl
from torch import Tensor

from .checks import check_devices, unit_stride
from .grouped_gemm_tiles import TileConfig, TileTimings, fits_tma, num_programs, shape_key, takes_tma, tiles_for
from .groups import zero_empty
from .host_values import on_device
from .types import Matrices

_TIMINGS = TileTimings()  # per process, like the compiled kernels


@triton.jit
def _tile_of(pid, num_m_tiles, num_n_tiles, GROUP_M: tl.constexpr):
    """Walk GROUP_M row tiles per column tile, so that a wave of programs shares rows and weights in the L2 cache."""
    tiles_per_band = GROUP_M * num_n_tiles
    band = pid // tiles_per_band
    first_m = band * GROUP_M
    band_m = tl.minimum(num_m_tiles - first_m, GROUP_M)
    return first_m + (pid % tiles_per_band) % band_m, (pid % tiles_per_band) // band_m


@triton.jit(do_not_specialize=["num_rows", "num_m_tiles"])
def _grouped_gemm_kernel(
    a_ptr,
    tiles_ptr,
    addresses_ptr,
    out_ptr,
    num_rows,
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
    USE_TMA: tl.constexpr,
    IS_K_CONTIGUOUS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP_M: tl.constexpr,
):
    """out[rows of g] = a[rows of g] @ B_g, with B_g [K, N] at addresses[g].

    Each row tile is (first row, end row of its group, group). With group sizes [3, 0, 2] and BLOCK_M = 2:
    tiles = [(0, 3, 0), (2, 3, 0), (3, 5, 2)].
    """
    k = tl.arange(0, BLOCK_K)
    if USE_TMA:
        rows = tl.make_tensor_descriptor(a_ptr, [num_rows, width_k], [stride_a, 1], [BLOCK_M, BLOCK_K])
    # Flattening overlaps the next tile's loads with this tile's last products; pointer loads would lose their pipelining.
    for tile in tl.range(tl.program_id(0), num_m_tiles * num_n_tiles, tl.num_programs(0), flatten=USE_TMA):
        tile_m, tile_n = _tile_of(tile, num_m_tiles, num_n_tiles, GROUP_M)
        first = tl.load(tiles_ptr + tile_m * 3)
        end = tl.load(tiles_ptr + tile_m * 3 + 1)
        group = tl.load(tiles_ptr + tile_m * 3 + 2)
        b_ptr = tl.multiple_of(tl.load(addresses_ptr + group).to(tl.pointer_type(a_ptr.dtype.element_ty)), ALIGNMENT)
        m = first + tl.arange(0, BLOCK_M)
        n = tile_n * BLOCK_N + tl.arange(0, BLOCK_N)
        total = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
        # Rows of a tile past the group's end hold another group's rows, or its first row again; the store masks them off.
        if USE_TMA:
            if IS_K_CONTIGUOUS:
                matrix = tl.make_tensor_descriptor(b_ptr, [width_n, width_k], [stride_b_n, 1], [BLOCK_N, BLOCK_K])
            else:
                matrix = tl.make_tensor_descriptor(b_ptr, [width_k, width_n], [stride_b_k, 1], [BLOCK_K, BLOCK_N])
            for start in range(0, width_k, BLOCK_K):
                a = rows.load([first.to(tl.int32), start])
                if IS_K_CONTIGUOUS:
                    b = matrix.load([tile_n * BLOCK_N, start]).T
                else:
                    b = matrix.load([start, tile_n * BLOCK_N])
                total = tl.dot(a, b, total, input_precision=PRECISION)
        else:
            a_ptrs = a_ptr + tl.where(m < end, m, first)[:, None] * stride_a + k[None, :]
            b_ptrs = b_ptr + n[None, :].to(tl.int64) * stride_b_n + k[:, None].to(tl.int64) * stride_b_k
            for start in range(0, width_k, BLOCK_K):
                a = tl.load(a_ptrs, mask=(start + k < width_k)[None, :], other=0.0)
                b = tl.load(b_ptrs, mask=(start + k < width_k)[:, None] & (n < width_n)[None, :], other=0.0)
                total = tl.dot(a, b, total, input_precision=PRECISION)
                a_ptrs += BLOCK_K
                b_ptrs += BLOCK_K * stride_b_k
        out = out_ptr + m[:, None] * stride_out + n[None, :]
        tl.store(out, total.to(out_ptr.dtype.element_ty), mask=(m < end)[:, None] & (n < width_n)[None, :])


@triton.jit(do_not_specialize=["num_rows", "num_groups"])
def _grouped_wgrad_kernel(
    dy_ptr,
    x_ptr,
    groups_ptr,
    addresses_ptr,
    num_rows,
    num_groups,
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
    USE_TMA: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP_M: tl.constexpr,
):
    """grad_g += alpha * dy_g.T @ x_g, tile by tile, rows in ascending order.

    Each entry of `groups` is (first row, end row, group, 1 if its gradient is added to and 0 if it is set); groups without rows
    are not listed. With group sizes [3, 0, 2], the last to be set: groups = [(0, 3, 0, 1), (3, 5, 2, 0)].
    """
    k = tl.arange(0, BLOCK_K)
    if USE_TMA:
        dy_rows = tl.make_tensor_descriptor(dy_ptr, [num_rows, width_o], [stride_dy, 1], [BLOCK_K, BLOCK_M])
        x_rows = tl.make_tensor_descriptor(x_ptr, [num_rows, width_i], [stride_x, 1], [BLOCK_K, BLOCK_N])
    tiles_per_group = num_o_tiles * num_i_tiles
    for tile in tl.range(tl.program_id(0), num_groups * tiles_per_group, tl.num_programs(0)):
        entry = tile // tiles_per_group
        first = tl.load(groups_ptr + entry * 4)
        end = tl.load(groups_ptr + entry * 4 + 1)
        group = tl.load(groups_ptr + entry * 4 + 2)
        is_added = tl.load(groups_ptr + entry * 4 + 3)
        grad_ptr = tl.multiple_of(tl.load(addresses_ptr + group).to(tl.pointer_type(tl.float32)), ALIGNMENT)

        tile_o, tile_i = _tile_of(tile % tiles_per_group, num_o_tiles, num_i_tiles, GROUP_M)
        o = tile_o * BLOCK_M + tl.arange(0, BLOCK_M)
        i = tile_i * BLOCK_N + tl.arange(0, BLOCK_N)
        total = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
        if USE_TMA:
            first, end = first.to(tl.int32), end.to(tl.int32)
            last = end - (end - first) % BLOCK_K
            for row in range(first, last, BLOCK_K):
                dy = dy_rows.load([row, tile_o * BLOCK_M])
                total = tl.dot(dy.T, x_rows.load([row, tile_i * BLOCK_N]), total, input_precision=PRECISION)
            if last < end:
                # Rows past the end belong to another group.
                is_row = (last + k < end)[:, None]
                dy = tl.where(is_row, dy_rows.load([last, tile_o * BLOCK_M]), 0.0)
                x = tl.where(is_row, x_rows.load([last, tile_i * BLOCK_N]), 0.0)
                total = tl.dot(dy.T, x, total, input_precision=PRECISION)
        else:
            dy_ptrs = dy_ptr + (first + k)[:, None] * stride_dy + o[None, :]
            x_ptrs = x_ptr + (first + k)[:, None] * stride_x + i[None, :]
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
    weights: Matrices,
    group_sizes: Sequence[int],
    *,
    out: Tensor | None = None,
    tile: TileConfig | None = None,
    use_tma: bool | None = None,
) -> Tensor:
    """Launch the product with `weights[g].T`: its K is I, its N is O. `tile` and `use_tma` override the rules."""
    _check_weights(weights, x_NI.dtype, x_NI.device)
    stride_o, stride_i = weights[0].stride()
    return _launch_gemm("forward", x_NI, weights, group_sizes, weights[0].shape[0], stride_i, stride_o, out, tile, use_tma)


def grouped_gemm_dgrad_triton(
    dy_NO: Tensor,
    weights: Matrices,
    group_sizes: Sequence[int],
    *,
    out: Tensor | None = None,
    tile: TileConfig | None = None,
    use_tma: bool | None = None,
) -> Tensor:
    """Launch the product with `weights[g]`: its K is O, its N is I. `tile` and `use_tma` override the rules."""
    _check_weights(weights, dy_NO.dtype, dy_NO.device)
    stride_o, stride_i = weights[0].stride()
    return _launch_gemm("dgrad", dy_NO, weights, group_sizes, weights[0].shape[1], stride_o, stride_i, out, tile, use_tma)


def grouped_gemm_wgrad_triton(
    dy_NO: Tensor,
    x_NI: Tensor,
    group_sizes: Sequence[int],
    grads: Matrices,
    *,
    alpha: float = 1.0,
    overwrite: Sequence[bool] | None = None,
    tile: TileConfig | None = None,
    use_tma: bool | None = None,
) -> None:
    """Launch `_grouped_wgrad_kernel` over the groups that have rows. `tile` and `use_tma` override the rules."""
    _check_weights(grads, torch.float32, dy_NO.device)
    dy_NO, x_NI = unit_stride(dy_NO), unit_stride(x_NI)
    O, I = grads[0].shape  # noqa: E741
    zero_empty(grads, group_sizes, overwrite)
    is_fresh = [False] * len(grads) if overwrite is None else overwrite
    groups = [(*rows, int(not is_fresh[rows[2]])) for rows in row_tiles(group_sizes, max(1, sum(group_sizes)))]
    if not groups:
        return
    # Longest groups first: a long group started last would prolong the launch.
    groups.sort(key=lambda entry: entry[0] - entry[1])
    use_tma = _resolve_tma(use_tma, dy_NO, x_NI)
    table, addresses = _device_tables(groups, grads, dy_NO.device)

    def run(tile: TileConfig) -> None:
        num_o_tiles, num_i_tiles = triton.cdiv(O, tile.block_m), triton.cdiv(I, tile.block_n)
        _grouped_wgrad_kernel[(num_programs(dy_NO.device, tile, len(groups) * num_o_tiles * num_i_tiles),)](
            dy_NO,
            x_NI,
            table,
            addresses,
            dy_NO.shape[0],
            len(groups),
            num_o_tiles,
            num_i_tiles,
            O,
            I,
            dy_NO.stride(0),
            x_NI.stride(0),
            grads[0].stride(0),
            grads[0].stride(1),
            alpha,
            USE_TMA=use_tma,
            **_options(tile, grads, dy_NO.dtype),
        )

    if tile is None:
        key = shape_key("wgrad", group_sizes, O, I, dy_NO.dtype, use_tma)
        is_repeatable = dy_NO.is_cuda and not any(is_added for *_, is_added in groups)
        tile = _TIMINGS.choose(key, tiles_for(dy_NO.dtype, O), run if is_repeatable else None)
    run(tile)


def row_tiles(group_sizes: Sequence[int], block_m: int) -> list[tuple[int, int, int]]:
    """(first row, end row of the group, group) of every tile of `block_m` rows; tiles don't cross groups."""
    tiles: list[tuple[int, int, int]] = []
    start = 0
    for group, size in enumerate(group_sizes):
        tiles.extend((first, start + size, group) for first in range(start, start + size, block_m))
        start += size
    return tiles


def _launch_gemm(
    op: str,
    a_NK: Tensor,
    weights: Matrices,
    group_sizes: Sequence[int],
    width: int,
    stride_b_k: int,
    stride_b_n: int,
    out: Tensor | None,
    tile: TileConfig | None,
    use_tma: bool | None,
) -> Tensor:
    """Launch `_grouped_gemm_kernel` for rows a_NK and an output of `width` columns."""
    a_NK = unit_stride(a_NK)
    result = a_NK.new_empty(a_NK.shape[0], width) if out is None else out
    if result.shape != (a_NK.shape[0], width) or result.dtype != a_NK.dtype or result.stride(1) != 1:
        raise ValueError(
            f"out must be {a_NK.dtype} {(a_NK.shape[0], width)} with contiguous rows, "
            f"got {result.dtype} {tuple(result.shape)} {result.stride()}"
        )
    if result.numel() == 0:
        return result
    use_tma = _resolve_tma(use_tma, a_NK, *weights)

    def run(tile: TileConfig) -> None:
        tiles = row_tiles(group_sizes, tile.block_m)
        num_n_tiles = triton.cdiv(width, tile.block_n)
        table, addresses = _device_tables(tiles, weights, a_NK.device)
        _grouped_gemm_kernel[(num_programs(a_NK.device, tile, len(tiles) * num_n_tiles),)](
            a_NK,
            table,
            addresses,
            result,
            a_NK.shape[0],
            len(tiles),
            num_n_tiles,
            width,
            a_NK.shape[1],
            a_NK.stride(0),
            stride_b_k,
            stride_b_n,
            result.stride(0),
            USE_TMA=use_tma,
            IS_K_CONTIGUOUS=stride_b_k == 1,
            **_options(tile, weights, a_NK.dtype),
        )

    if tile is None:
        key = shape_key(op, group_sizes, width, a_NK.shape[1], a_NK.dtype, use_tma)
        tile = _TIMINGS.choose(key, tiles_for(a_NK.dtype, max(group_sizes)), run if a_NK.is_cuda else None)
    run(tile)
    return result


def _resolve_tma(use_tma: bool | None, *matrices: Tensor) -> bool:
    """Whether to use TMA: by rule, or as the caller requests, if these matrices allow it."""
    if use_tma is None:
        use_tma = takes_tma(matrices[0].device, *matrices)
    elif use_tma and not fits_tma(*matrices):
        raise ValueError("TMA loads half-precision matrices with 16-byte aligned rows and addresses; pass use_tma=False")
    if use_tma:
        # Descriptors that are built on the device need device memory.
        triton.set_allocator(_allocate)
    return use_tma


def _allocate(size: int, alignment: int, stream: int | None) -> Tensor:
    """Memory for the descriptors of one launch; the caching allocator aligns it and reuses it in stream order."""
    return torch.empty(size, dtype=torch.int8, device="cuda")


def _options(tile: TileConfig, matrices: Matrices, dtype: torch.dtype) -> dict[str, Any]:
    """The constants for which both kernels are compiled."""
    return {
        "ALIGNMENT": _alignment(matrices),
        "PRECISION": _dot_precision(dtype),
        "BLOCK_M": tile.block_m,
        "BLOCK_N": tile.block_n,
        "BLOCK_K": tile.block_k,
        "GROUP_M": 8,
        "num_warps": tile.num_warps,
        "num_stages": tile.num_stages,
    }


def _dot_precision(dtype: torch.dtype) -> str:
    """Precision of fp32 products: IEEE, unless TF32 is enabled in torch."""
    return "tf32" if dtype == torch.float32 and torch.get_float32_matmul_precision() != "highest" else "ieee"


def _device_tables(tiles: Sequence[tuple[int, ...]], tensors: Matrices, device: torch.device) -> tuple[Tensor, Tensor]:
    """(tiles, addresses) as int64 on the device, in one asynchronous copy."""
    flat = [value for tile in tiles for value in tile] + [tensor.data_ptr() for tensor in tensors]
    table = on_device(np.array(flat, dtype=np.int64), device)
    return table[: -len(tensors)], table[-len(tensors) :]


def _alignment(tensors: Matrices) -> int:
    """Common alignment of all addresses in bytes, at most 16; the kernel's wide loads rely on it."""
    is_wide = all(tensor.data_ptr() % 16 == 0 for tensor in tensors)
    return 16 if is_wide else tensors[0].element_size()


def _check_weights(weights: Matrices, dtype: torch.dtype, device: torch.device) -> None:
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
