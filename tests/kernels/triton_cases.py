"""Each Triton kernel against its torch twin: run compiled where there is a GPU, else through Triton's interpreter.

Not collected by itself: test_triton.py runs it in a process of its own, since TRITON_INTERPRET must be set before triton is
imported. The interpreter multiplies bfloat16 operands as integers and casts to bfloat16 by truncation, so there half
precision is float16.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor

from moesaic.benchmarks import kernels as benchmark
from moesaic.benchmarks.kernel_cases import Shape
from moesaic.kernels import (
    FFNWeights,
    SwigluGrads,
    bags_of,
    gather_rows,
    grouped_ffn,
    grouped_ffn_backward,
    histogram,
    split_tokens,
    sum_rows,
    topk_gate,
    topk_gate_backward,
)
from moesaic.kernels.grouped_gemm import grouped_gemm_dgrad_torch, grouped_gemm_torch, grouped_gemm_wgrad_torch
from moesaic.kernels.grouped_gemm_tiles import (
    FLOAT_TILES,
    HALF_TILES,
    TINY_FLOAT_TILES,
    TINY_HALF_TILES,
    TileConfig,
    TileTimings,
    fits_tma,
    takes_tma,
)
from moesaic.kernels.grouped_gemm_triton import grouped_gemm_dgrad_triton, grouped_gemm_triton, grouped_gemm_wgrad_triton
from moesaic.kernels.histogram import histogram_torch
from moesaic.kernels.histogram_triton import histogram_triton
from moesaic.kernels.permute_triton import gather_rows_triton, sum_rows_triton
from moesaic.kernels.split_tokens import split_tokens_torch
from moesaic.kernels.split_tokens_triton import split_tokens_triton
from moesaic.kernels.swiglu import swiglu_backward_torch, swiglu_torch
from moesaic.kernels.swiglu_triton import swiglu_backward_triton, swiglu_triton
from moesaic.kernels.topk_gate import _TopkGate, topk_gate_backward_torch, topk_gate_torch
from moesaic.kernels.topk_gate_triton import topk_gate_backward_triton, topk_gate_triton
from tests.kernels.test_split_tokens import random_flow

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
HALF = torch.bfloat16 if DEVICE == "cuda" else torch.float16
DTYPES = [torch.float32, HALF]
GROUP_SIZES = {"one row": [1], "odd": [7, 1, 63], "empty groups": [0, 129, 0, 0, 5], "all in one": [0, 0, 150], "no rows": [0, 0]}
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2**-7, torch.float16: 2**-9}


def assert_close(name: str, actual: Tensor, expected: Tensor, tolerance: float) -> None:
    actual, expected = actual.double().cpu(), expected.double().cpu()
    assert actual.shape == expected.shape, name
    if actual.numel():
        error = (actual - expected).abs().max() / expected.abs().max().clamp_min(1e-6)
        assert error <= tolerance, f"{name}: {error:.3e} > {tolerance:.1e}"


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("N,M,D", [(1, 1, 1), (63, 7, 5), (65, 20, 64), (9, 5, 4100), (0, 3, 4)])
def test_permute(N: int, M: int, D: int, dtype: torch.dtype) -> None:
    x_MD, rows_ND = torch.randn(M, D, dtype=dtype, device=DEVICE), torch.randn(N, D, device=DEVICE).to(dtype)
    row_ids_N = torch.randint(0, M, (N,), device=DEVICE)
    expected = x_MD[row_ids_N]
    assert torch.equal(gather_rows_triton(x_MD, row_ids_N), expected)
    assert torch.equal(gather_rows_triton(x_MD.t().contiguous().t(), row_ids_N.int()), expected)
    bags = bags_of(row_ids_N, M)
    sums = torch.zeros(M, D, device=DEVICE)
    for n, m in enumerate(row_ids_N.tolist()):
        sums[m] += rows_ND[n].float()
    assert torch.equal(sum_rows_triton(rows_ND, bags), sums.to(dtype))
    wide = torch.empty(M, 2 * D, dtype=dtype, device=DEVICE)
    assert torch.equal(sum_rows_triton(rows_ND, bags, out=wide[:, D:]), sums.to(dtype))
    # The same rows, the last of them in a second tensor.
    part_M, part_N = M // 2, N // 2
    assert torch.equal(gather_rows_triton(x_MD[:part_M], row_ids_N, beside=x_MD[part_M:]), expected)
    assert torch.equal(sum_rows_triton(rows_ND[:part_N], bags, beside=rows_ND[part_N:]), sums.to(dtype))


@pytest.mark.parametrize("has_weights", [True, False], ids=["weighted", "plain"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("N,F", [(1, 1), (7, 63), (65, 129), (3, 4100), (0, 5)])
def test_swiglu(N: int, F: int, dtype: torch.dtype, has_weights: bool) -> None:
    gate_up_N2F, dh_NF = torch.randn(N, 2 * F, device=DEVICE).to(dtype), torch.randn(N, F, device=DEVICE).to(dtype)
    weights_N = torch.rand(N, device=DEVICE) if has_weights else None
    expected = swiglu_backward_torch(dh_NF, gate_up_N2F, weights_N)
    h_NF = torch.empty(N, F, dtype=dtype, device=DEVICE)
    assert_close("h", swiglu_triton(gate_up_N2F, weights_N, h_NF), swiglu_torch(gate_up_N2F, weights_N), TOLERANCE[dtype])
    dh_copy_NF = dh_NF.clone()
    dweights_N = torch.empty(N, device=DEVICE) if has_weights else None
    buffers = SwigluGrads(torch.empty_like(gate_up_N2F), dweights_N, dh_copy_NF)
    grads = swiglu_backward_triton(dh_copy_NF, gate_up_N2F, weights_N, buffers)
    assert_close("dgate_up", grads.dgate_up_N2F, expected.dgate_up_N2F, TOLERANCE[dtype])
    assert_close("h over dh", grads.h_NF, expected.h_NF, TOLERANCE[dtype])
    if expected.drow_weights_N is not None and grads.drow_weights_N is not None:
        assert_close("drow_weights", grads.drow_weights_N, expected.drow_weights_N, 1e-5)


def _check_products(
    sizes: list[int],
    in_dim: int,
    out_dim: int,
    dtype: torch.dtype,
    *,
    tile: TileConfig | None = None,
    use_tma: bool | None = None,
    is_whole: bool = False,
) -> list[Tensor]:
    """Compare the three products, of whole numbers if asked, with their twins; returns what they computed."""

    def framed(*shape: int) -> Tensor:
        """Random numbers in a larger tensor of NaN, of which nothing may come through."""
        numbers = torch.full([n + 8 for n in shape], torch.nan, dtype=dtype, device=DEVICE)[tuple(slice(n) for n in shape)]
        numbers.normal_()
        return numbers.round_() if is_whole else numbers

    x_NI, dy_NO, bank = framed(sum(sizes), in_dim), framed(sum(sizes), out_dim), framed(len(sizes) + 1, out_dim, in_dim)
    weights = [bank[len(sizes) - group] for group in range(len(sizes))]
    # Every other group's buffer holds nothing yet.
    overwrite = [group % 2 == 0 for group in range(len(sizes))]
    expected_grads = [torch.randn(out_dim, in_dim, device=DEVICE) for _ in sizes]
    grads = [torch.full_like(g, torch.nan) if fresh else g.clone() for g, fresh in zip(expected_grads, overwrite, strict=True)]
    options = {"tile": tile, "use_tma": use_tma}
    y_NO = grouped_gemm_triton(x_NI, weights, sizes, **options)
    assert_close("y", y_NO, grouped_gemm_torch(x_NI, weights, sizes), TOLERANCE[dtype])
    dx_NI = grouped_gemm_dgrad_triton(dy_NO, weights, sizes, **options)
    assert_close("dx", dx_NI, grouped_gemm_dgrad_torch(dy_NO, weights, sizes), TOLERANCE[dtype])
    grouped_gemm_wgrad_triton(dy_NO, x_NI, sizes, grads, alpha=0.5, overwrite=overwrite, **options)
    grouped_gemm_wgrad_torch(dy_NO, x_NI, sizes, expected_grads, alpha=0.5, overwrite=overwrite)
    for group, size in enumerate(sizes):
        assert_close(f"grad {group}", grads[group], expected_grads[group], 1e-5)
        assert size or torch.equal(grads[group], expected_grads[group])
    return [y_NO, dx_NI, *grads]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("in_dim,out_dim", [(1, 1), (33, 65), (65, 40)])
@pytest.mark.parametrize("sizes", GROUP_SIZES.values(), ids=GROUP_SIZES)
def test_grouped_gemm(sizes: list[int], in_dim: int, out_dim: int, dtype: torch.dtype) -> None:
    _check_products(sizes, in_dim, out_dim, dtype)


@pytest.mark.parametrize("sizes", GROUP_SIZES.values(), ids=GROUP_SIZES)
def test_grouped_gemm_by_tma(sizes: list[int]) -> None:
    """Widths that are no multiple of a tile's, but of the 16 bytes that TMA asks for."""
    _check_products(sizes, 72, 136, HALF, use_tma=DEVICE == "cpu" or takes_tma(torch.device(DEVICE)))


@pytest.mark.parametrize(
    "tiles", [HALF_TILES, TINY_HALF_TILES, FLOAT_TILES, TINY_FLOAT_TILES], ids=["half", "tiny", "float", "tiny float"]
)
def test_tiles_of_one_rule_and_both_ways_to_load_give_the_same_bits(tiles: tuple[TileConfig, ...]) -> None:
    """So the choice among them may go by timing. Off the GPU BLAS multiplies tiles in its own order: there no sum rounds."""
    assert len({tile.block_k for tile in tiles}) == 1
    dtype = torch.float32 if tiles in (FLOAT_TILES, TINY_FLOAT_TILES) else HALF
    ways = [False, True] if dtype == HALF and (DEVICE == "cpu" or takes_tma(torch.device(DEVICE))) else [False]
    results = []
    for tile in tiles:
        for use_tma in ways:
            torch.manual_seed(1)
            is_whole = DEVICE == "cpu"
            results.append(_check_products([70, 0, 3], 40, 136, dtype, tile=tile, use_tma=use_tma, is_whole=is_whole))
    for other in results[1:]:
        assert all(torch.equal(first, second) for first, second in zip(results[0], other, strict=True))


def test_wgrad_takes_nothing_from_the_rows_of_other_groups() -> None:
    """A tile's last rows may be those of the next group: an infinity there must not become a NaN here."""
    rows_ND, sizes = torch.randn(20, 16, device=DEVICE).to(HALF), [7, 13]
    rows_ND[7:] = torch.inf
    for use_tma in (False, DEVICE == "cpu" or takes_tma(torch.device(DEVICE))):
        grads = [torch.zeros(16, 16, device=DEVICE) for _ in sizes]
        grouped_gemm_wgrad_triton(rows_ND, rows_ND, sizes, grads, use_tma=use_tma)
        assert grads[0].isfinite().all()


def test_rules_of_tma() -> None:
    """It loads what lies in rows of whole 16 bytes, of half precision; not where there is no GPU."""
    matrix = torch.zeros(8, 24, dtype=HALF, device=DEVICE)
    assert fits_tma(matrix, matrix.t(), matrix[2:, 8:])
    assert not fits_tma(matrix, matrix.float())
    assert not fits_tma(matrix[:, 1:])
    assert not fits_tma(matrix[:, ::2])
    assert not fits_tma(torch.zeros(8, 20, dtype=HALF, device=DEVICE))
    assert not takes_tma(torch.device("cpu"), matrix)
    with pytest.raises(ValueError, match="16-byte aligned rows"):
        grouped_gemm_triton(matrix[:, :20], [torch.zeros(3, 20, dtype=HALF, device=DEVICE)], [8], use_tma=True)


@pytest.mark.skipif(DEVICE == "cpu", reason="nothing is timed without a GPU")
def test_a_tile_is_timed_once_for_each_kind_of_call() -> None:
    timings, runs = TileTimings(), []
    first = timings.choose("key", HALF_TILES, runs.append)
    assert set(runs) == set(HALF_TILES)
    num_runs = len(runs)
    assert timings.choose("key", HALF_TILES, runs.append) == timings.choose("key", HALF_TILES, None) == first
    assert len(runs) == num_runs
    assert timings.choose("other key", HALF_TILES, None) == HALF_TILES[0]


def test_the_sweep_of_the_benchmark_runs_every_tile_both_ways(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every call that the benchmark would time, once, at a tiny size."""

    def once(calls: dict[str, Callable[[], Tensor]], device: str, rounds: int) -> dict[str, list[float]]:
        for call in calls.values():
            call()
        return {name: [1.0] for name in calls}

    monkeypatch.setattr(benchmark, "shapes", lambda device: [Shape("tiny", 16, 8, (5, 0, 3), experts=4, top_k=2)])
    monkeypatch.setattr(benchmark, "time_interleaved", once)
    monkeypatch.setattr("moesaic.kernels.grouped_gemm_tiles.takes_tma", lambda device, *matrices: fits_tma(*matrices))
    rows = benchmark.sweep_tiles("cpu")
    assert len(rows) == 3 * 2 * len(HALF_TILES)
    assert {row["use_tma"] for row in rows} == {False, True}


def test_grouped_gemm_takes_transposed_weights_and_names_what_it_cannot() -> None:
    x_NI, weights = torch.randn(9, 16, device=DEVICE), [torch.randn(16, 8, device=DEVICE).t() for _ in range(2)]
    assert_close("y", grouped_gemm_triton(x_NI, weights, [4, 5]), grouped_gemm_torch(x_NI, weights, [4, 5]), 1e-5)
    with pytest.raises(ValueError, match="matrix 1 is"):
        grouped_gemm_triton(x_NI, [weights[0], weights[1].contiguous()], [4, 5])
    with pytest.raises(ValueError, match="take float32, bfloat16 or float16, got"):
        grouped_gemm_triton(x_NI.double(), weights, [4, 5])


@pytest.mark.parametrize("has_bias", [False, True], ids=["plain", "biased"])
@pytest.mark.parametrize("normalize", [True, False], ids=["normalized", "raw"])
@pytest.mark.parametrize("score", ["softmax", "sigmoid"])
@pytest.mark.parametrize("T,E,K", [(1, 1, 1), (65, 7, 3), (17, 64, 8)])
def test_topk_gate(T: int, E: int, K: int, score: str, normalize: bool, has_bias: bool) -> None:
    logits_TE, bias_E = torch.randn(T, E, device=DEVICE), torch.randn(E, device=DEVICE) if has_bias else None
    gate = topk_gate_triton(logits_TE, K, normalize=normalize, score=score, bias_E=bias_E)
    expected = topk_gate_torch(logits_TE, K, normalize=normalize, score=score, bias_E=bias_E)
    assert torch.equal(gate.topk_ids_TK, expected.topk_ids_TK)
    assert torch.equal(gate.load_E, expected.load_E)
    assert_close("weights", gate.weights_TK, expected.weights_TK, 1e-6)
    assert_close("lse", gate.lse_T, expected.lse_T, 1e-6)
    options = {"normalize": normalize, "score": score, "bias_E": None, "topk_ids_TK": expected.topk_ids_TK, "with_lse": False}
    given = topk_gate_triton(logits_TE, K, **options)
    assert torch.equal(given.weights_TK, gate.weights_TK)
    assert torch.equal(given.load_E, gate.load_E)
    assert given.lse_T is None
    for dlse_T in (None, torch.randn(T, device=DEVICE)):
        arguments = (torch.randn(T, K, device=DEVICE), dlse_T, logits_TE, gate.topk_ids_TK)
        actual = topk_gate_backward_triton(*arguments, normalize=normalize, score=score)
        expected_grad = topk_gate_backward_torch(*arguments, normalize=normalize, score=score)
        torch.testing.assert_close(actual, expected_grad, rtol=1e-5, atol=2e-6)


def test_topk_gate_under_autograd() -> None:
    """The fused gate is differentiated as its twin is, whichever of its outputs are used."""

    def fused(leaf_TE: Tensor, with_lse: bool) -> tuple[Tensor, Tensor | None]:
        return _TopkGate.apply(leaf_TE, 2, True, "softmax", None, None, with_lse)[:2]

    def twin(leaf_TE: Tensor, with_lse: bool) -> tuple[Tensor, Tensor | None]:
        gate = topk_gate_torch(leaf_TE, 2, with_lse=with_lse)
        return gate.weights_TK, gate.lse_T

    logits_TE, dweights_TK, dlse_T = (
        torch.randn(9, 6, device=DEVICE),
        torch.randn(9, 2, device=DEVICE),
        torch.randn(9, device=DEVICE),
    )
    for with_lse, uses_weights in ((False, True), (True, True), (True, False)):
        grads = []
        for gate in (fused, twin):
            leaf_TE = logits_TE.clone().requires_grad_()
            weights_TK, lse_T = gate(leaf_TE, with_lse)
            loss = (weights_TK * dweights_TK).sum() if uses_weights else 0.0
            loss = loss if lse_T is None else loss + (lse_T * dlse_T).sum()
            grads.append(torch.autograd.grad(loss, leaf_TE)[0])
        torch.testing.assert_close(*grads, rtol=1e-5, atol=2e-6)


def test_topk_gate_gives_equal_logits_to_the_lower_ids() -> None:
    gate = topk_gate_triton(torch.tensor([[0.0, 1.0, 1.0, 1.0]], device=DEVICE), 2, normalize=True, score="softmax", bias_E=None)
    assert gate.topk_ids_TK.tolist() == [[1, 2]]
    masked = topk_gate_triton(
        torch.tensor([[0.0, -torch.inf, 1.0, -torch.inf, -torch.inf]], device=DEVICE),
        3,
        normalize=True,
        score="softmax",
        bias_E=None,
    )
    assert masked.topk_ids_TK.tolist() == [[2, 0, 1]]
    dark = topk_gate_triton(torch.full((1, 4), -200.0, device=DEVICE), 2, normalize=True, score="sigmoid", bias_E=None)
    assert dark.weights_TK.tolist() == [[0.0, 0.0]]


@pytest.mark.parametrize("T,K,E,R", [(1, 1, 1, 1), (7, 2, 3, 2), (129, 4, 100, 8), (300, 1, 7, 5), (0, 2, 3, 2)])
def test_split_tokens(T: int, K: int, E: int, R: int) -> None:
    topk_ids_TK = torch.randint(0, E, (T, K))
    flow_ER = random_flow(topk_ids_TK, E, R)
    order_N = split_tokens_triton(topk_ids_TK.to(DEVICE), flow_ER.to(DEVICE))
    assert torch.equal(order_N.cpu(), split_tokens_torch(topk_ids_TK, flow_ER))
    # A matrix with gaps: for K = 1 it flattens to a view.
    gaps_TK, flow_RE = torch.stack([topk_ids_TK, topk_ids_TK + 1], dim=2).to(DEVICE), flow_ER.int().t().contiguous().to(DEVICE)
    assert torch.equal(split_tokens_triton(gaps_TK[..., 0], flow_RE.t()).cpu(), order_N.cpu())
    # In the order of anchors; the last expert is none, so that its assignments are left out.
    anchors_TK, flow_ER = torch.randint(0, R, (T, K)), flow_ER[:-1]
    options = {"num_sent": int(flow_ER.sum())}
    order_A = split_tokens_triton(topk_ids_TK.to(DEVICE), flow_ER.to(DEVICE), anchors_TK.to(DEVICE), **options)
    assert torch.equal(order_A.cpu(), split_tokens_torch(topk_ids_TK, flow_ER, anchors_TK, **options))


@pytest.mark.parametrize("N,B", [(1, 1), (7, 3), (129, 100), (300, 7), (0, 3)])
def test_histogram(N: int, B: int) -> None:
    ids_N2 = torch.randint(0, B, (N, 2), device=DEVICE)
    for ids in (ids_N2, ids_N2[:, :1], ids_N2.int()):
        assert torch.equal(histogram_triton(ids, B).cpu(), histogram_torch(ids.cpu(), B))


def far_apart(num_rows: int, width: int, stride: int) -> Tensor:
    """Rows of zeros in memory that nobody has touched yet."""
    num_bytes = (num_rows * stride) * HALF.itemsize
    if DEVICE == "cuda":
        if torch.cuda.mem_get_info()[0] < num_bytes:
            pytest.skip(f"needs {num_bytes >> 30} GiB of GPU memory")
        memory = torch.zeros(num_rows * stride, dtype=HALF, device=DEVICE)
    else:
        try:
            memory = torch.from_numpy(np.zeros(num_bytes, dtype=np.uint8)).view(HALF)
        except MemoryError:
            pytest.skip(f"needs {num_bytes >> 30} GiB of address space")
    return memory.as_strided((num_rows, width), (stride, 1))


def test_rows_past_int32_offsets(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every kernel that walks over rows, from rows and to rows that lie more than 2**31 elements into their tensor."""
    if DEVICE == "cpu":
        # It copies every tensor's memory back, here onto itself, and with that makes gigabytes of what nobody touched.
        monkeypatch.setattr("triton.runtime.interpreter.GridExecutor._restore_args_dev", lambda *args: None)
    N, stride = 260, 2**23
    near, far, far_out = torch.randn(N, 4, device=DEVICE).to(HALF), far_apart(N, 4, stride), far_apart(N, 4, stride)
    assert far[-1].storage_offset() > 2**31
    near[:-4] = 0.0  # as the memory is
    far[-4:] = near[-4:]
    ids_N = torch.arange(N, device=DEVICE).flip(0)
    assert torch.equal(gather_rows_triton(far, ids_N, out=far_out), near[ids_N])
    bags = bags_of(ids_N % 3, 3)
    assert torch.equal(sum_rows_triton(far, bags), sum_rows_triton(near, bags))
    assert torch.equal(sum_rows_triton(near, bags, out=far_out[-3:]), sum_rows_triton(near, bags))
    weights_N, h_N2 = torch.rand(N, device=DEVICE), torch.empty(N, 2, dtype=HALF, device=DEVICE)
    assert torch.equal(swiglu_triton(far, weights_N, far_out[:, :2]), swiglu_triton(near, weights_N, h_N2))
    grads, far_grads = (
        swiglu_backward_triton(rows[:, 2:], rows, weights_N, SwigluGrads(out, torch.empty_like(weights_N), h_N2.clone()))
        for rows, out in ((near, torch.empty_like(near)), (far, far_out))
    )
    assert torch.equal(far_grads.dgate_up_N2F, grads.dgate_up_N2F)
    assert torch.equal(far_grads.h_NF, grads.h_NF)
    weights, sizes = list(torch.randn(2, 4, 4, device=DEVICE).to(HALF)), [1, N - 1]
    for product in (grouped_gemm_triton, grouped_gemm_dgrad_triton):
        assert torch.equal(product(far, weights, sizes, out=far_out), product(near, weights, sizes))
    gradients = [[torch.zeros(4, 4, device=DEVICE) for _ in sizes] for _ in range(2)]
    for rows, sums in zip((near, far), gradients, strict=True):
        grouped_gemm_wgrad_triton(rows, rows, sizes, sums)
    assert all(torch.equal(first, second) for first, second in zip(*gradients, strict=True))


@pytest.mark.skipif(DEVICE == "cpu", reason="on the CPU a layer runs other code")
def test_whole_layer_without_a_host_synchronisation() -> None:
    """From logits to every gradient on the GPU: what the CPU computes, the same bits twice, and nothing waits for the device."""
    T, D, F, E, K = 200, 64, 40, 5, 2
    x_TD, dy_TD, logits_TE = torch.randn(T, D), torch.randn(T, D), torch.randn(T, E)
    gate_up, down = list(torch.randn(E, 2 * F, D)), list(torch.randn(E, D, F))
    sizes = topk_gate(logits_TE, K).load_E.tolist()
    flow_ER = torch.tensor(sizes)[:, None]

    def layer(device: str) -> list[Tensor]:
        x, dy, logits, flow = (tensor.to(device) for tensor in (x_TD, dy_TD, logits_TE, flow_ER))
        weights = FFNWeights([w.to(device) for w in gate_up], [w.to(device) for w in down])
        grads = FFNWeights(
            [torch.full_like(w, torch.nan) for w in weights.gate_up], [torch.full_like(w, torch.nan) for w in weights.down]
        )
        if device == "cuda":
            torch.cuda.set_sync_debug_mode("error")
        try:
            gate = topk_gate(logits, K)
            order_N = split_tokens(gate.topk_ids_TK, flow)
            token_ids_N, row_weights_N = order_N // K, gate.weights_TK.flatten()[order_N]
            bags, rows_ND = bags_of(token_ids_N, T), gather_rows(x, token_ids_N)
            output = grouped_ffn(rows_ND, row_weights_N, weights, sizes)
            y_TD = sum_rows(output.y_ND, bags)
            arguments = (gather_rows(dy, token_ids_N), rows_ND, output.gate_up_N2F, row_weights_N, weights, grads, sizes)
            inner = grouped_ffn_backward(*arguments, overwrite=[True] * E)
            dweights_N = torch.empty_like(row_weights_N).index_copy(0, order_N, inner.drow_weights_N)
            dlogits_TE = topk_gate_backward(dweights_N.view(T, K), None, logits, gate.topk_ids_TK)
            load_E = histogram(gate.topk_ids_TK, E)
        finally:
            torch.cuda.set_sync_debug_mode("default")
        return [y_TD, sum_rows(inner.dx_ND, bags), dlogits_TE, load_E, *grads.gate_up, *grads.down]

    expected, actual, again = layer("cpu"), layer("cuda"), layer("cuda")
    for i in range(len(expected)):
        assert_close(f"result {i}", actual[i], expected[i], 1e-4)
        assert torch.equal(actual[i], again[i])


def test_twice_is_bitwise_equal() -> None:
    sizes = [70, 0, 41]
    x_NI, dy_NO = torch.randn(111, 65, device=DEVICE), torch.randn(111, 33, device=DEVICE)
    grads = [[torch.zeros(33, 65, device=DEVICE) for _ in sizes] for _ in range(2)]
    for grad in grads:
        grouped_gemm_wgrad_triton(dy_NO, x_NI, sizes, grad)
    for first, second in zip(*grads, strict=True):
        assert torch.equal(first, second)
    rows_ND, bags = torch.randn(200, 33, device=DEVICE), bags_of(torch.randint(0, 5, (200,), device=DEVICE), 5)
    assert torch.equal(sum_rows_triton(rows_ND, bags), sum_rows_triton(rows_ND, bags))
