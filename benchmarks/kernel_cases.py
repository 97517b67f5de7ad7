"""The cases of `moesaic bench kernels`: each op at each shape, torch's ways to the same result, and a ceiling of the same work.

The ceiling is one dense product of all rows for the grouped products, and a plain copy of as many bytes for everything that
memory bounds.

Shape letters: N routed rows, D model dim, F expert ffn dim, G groups, T tokens, K top-k, E experts, R ranks.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from ..kernels import (
    FFNWeights,
    GroupedFFNGrads,
    GroupedFFNOutput,
    SwigluGrads,
    accumulate_rows,
    bags_of,
    gather_rows,
    grouped_ffn,
    grouped_ffn_backward,
    grouped_gemm,
    grouped_gemm_dgrad,
    grouped_gemm_wgrad,
    pack_rows,
    split_tokens,
    sum_rows,
    swiglu,
    swiglu_backward,
    topk_gate,
    topk_gate_backward,
)

Call = Callable[[], Any]


@dataclass(frozen=True)
class Shape:
    """The experts of one rank and the rows they get."""

    name: str
    D: int
    F: int
    group_sizes: tuple[int, ...]
    experts: int  # of the whole layer, for the gate
    top_k: int

    @property
    def num_rows(self) -> int:
        """Rows over all groups."""
        return sum(self.group_sizes)


@dataclass(frozen=True)
class Case:
    """One op at one shape. `work` is in FLOP or bytes; `unit` says which, per second, or that the time itself counts."""

    op: str
    shape: str
    dtype: str
    unit: str  # GFLOP/s, GB/s or us
    work: float
    ours: Call
    ceiling: Call | float  # a call, or microseconds for unit us
    torch: dict[str, Call]
    check: Callable[[], float]  # largest relative difference from torch's result
    tolerance: float


def zipf_sizes(num_rows: int, num_groups: int, exponent: float) -> tuple[int, ...]:
    """`num_rows` cut by a Zipf law; exponent 0 is an even cut."""
    shares = [1.0 / (group + 1) ** exponent for group in range(num_groups)]
    bounds = [round(num_rows * sum(shares[: group + 1]) / sum(shares)) for group in range(num_groups)]
    return tuple(stop - start for start, stop in pairwise([0, *bounds]))


def shapes(device: str) -> list[Shape]:
    """Per-rank shapes: three public models on a GPU; the demo's and the step benchmark's on a CPU."""
    if device == "cuda":
        models = [
            ("mixtral-8x7b", 4096, 14336, 2, 8192, 8, 2),
            ("qwen3-30b-a3b", 2048, 768, 16, 16384, 128, 8),
            ("deepseek-v3", 7168, 2048, 8, 8192, 256, 8),
        ]
    else:
        models = [("demo", 128, 256, 8, 8192, 8, 2), ("small", 256, 512, 8, 2048, 8, 2), ("step", 512, 1024, 8, 8192, 16, 2)]
    return [
        Shape(f"{name} {label}", D, F, zipf_sizes(num_rows, num_groups, exponent), experts, top_k)
        for name, D, F, num_groups, num_rows, experts, top_k in models
        for label, exponent in (("balanced", 0.0), ("zipf 1.2", 1.2))
    ]


def difference(actual: Tensor, expected: Tensor) -> float:
    """Largest difference relative to the largest value; NaN is infinite."""
    error = (actual.float() - expected.float()).abs().max() / expected.float().abs().max().clamp_min(1e-6)
    return float(error) if bool(error.isfinite()) else float("inf")


def product_cases(shape: Shape, dtype: torch.dtype, device: str) -> Iterator[Case]:
    """Forward, input gradient and weight gradient of the gate_up product."""
    N, G, sizes = shape.num_rows, len(shape.group_sizes), list(shape.group_sizes)
    wide = 2 * shape.F
    x, dy = (torch.randn(N, width, device=device).to(dtype) for width in (shape.D, wide))
    bank = (torch.randn(G, wide, shape.D, device=device) * 0.02).to(dtype)
    grads, weights = torch.zeros(G, wide, shape.D, device=device), list(bank)
    y, dx = torch.empty(N, wide, dtype=dtype, device=device), torch.empty(N, shape.D, dtype=dtype, device=device)
    dense_grad, torch_grads = torch.empty(wide, shape.D, dtype=dtype, device=device), torch.empty_like(bank)
    ends = torch.tensor(sizes, device=device).cumsum(0).to(torch.int32)
    groups = [(g, slice(stop - size, stop)) for g, (size, stop) in enumerate(zip(sizes, ends.tolist(), strict=True)) if size]

    def loop(product: Callable[[int, slice], Any]) -> Call:
        return lambda: [product(g, rows) for g, rows in groups]

    def grouped(a: Tensor, b: Tensor) -> dict[str, Call]:
        native = device == "cuda" and dtype == torch.bfloat16
        return {"grouped_mm": lambda: functional.grouped_mm(a, b, offs=ends)} if native else {}

    def check_wgrad() -> float:
        grads.zero_()
        grouped_gemm_wgrad(dy, x, sizes, list(grads), alpha=0.5)
        return max(difference(grads[g], 0.5 * (dy[rows].float().t() @ x[rows].float())) for g, rows in groups)

    def check(run: Callable[[], Tensor], expected: Callable[[int, slice], Tensor]) -> float:
        actual = run()
        return max(difference(actual[rows], expected(g, rows)) for g, rows in groups)

    make = partial(Case, shape=shape.name, dtype=dtype_name(dtype), unit="GFLOP/s", work=2.0 * N * shape.D * wide)
    forward = partial(grouped_gemm, x, weights, sizes, out=y)
    dgrad = partial(grouped_gemm_dgrad, dy, weights, sizes, out=dx)
    tolerance = 1e-4 if dtype == torch.float32 else 2e-2
    yield make(
        op="grouped_gemm",
        ours=forward,
        ceiling=lambda: torch.mm(x, bank[0].t(), out=y),
        torch={"mm loop": loop(lambda g, rows: torch.mm(x[rows], bank[g].t(), out=y[rows])), **grouped(x, bank.transpose(1, 2))},
        check=lambda: check(forward, lambda g, rows: x[rows] @ bank[g].t()),
        tolerance=tolerance,
    )
    yield make(
        op="grouped_gemm_dgrad",
        ours=dgrad,
        ceiling=lambda: torch.mm(dy, bank[0], out=dx),
        torch={"mm loop": loop(lambda g, rows: torch.mm(dy[rows], bank[g], out=dx[rows])), **grouped(dy, bank)},
        check=lambda: check(dgrad, lambda g, rows: dy[rows] @ bank[g]),
        tolerance=tolerance,
    )
    # Ours adds to fp32 gradients; torch's ways write new ones in the rows' dtype, which is less to move.
    yield make(
        op="grouped_gemm_wgrad",
        ours=partial(grouped_gemm_wgrad, dy, x, sizes, list(grads)),
        ceiling=lambda: torch.mm(dy.t(), x, out=dense_grad),
        torch={"mm loop": loop(lambda g, rows: torch.mm(dy[rows].t(), x[rows], out=torch_grads[g])), **grouped(dy.t(), x)},
        check=check_wgrad,
        tolerance=tolerance,
    )


def ffn_case(shape: Shape, dtype: torch.dtype, device: str) -> Case:
    """The whole expert FFN, forward and backward, against its six products with nothing between them."""
    N, D, F, G, sizes = shape.num_rows, shape.D, shape.F, len(shape.group_sizes), list(shape.group_sizes)
    x, dy = (torch.randn(N, D, device=device).to(dtype) for _ in range(2))
    row_weights = torch.rand(N, device=device)
    gate_up, down = ((torch.randn(G, *size, device=device) * 0.02).to(dtype) for size in ((2 * F, D), (D, F)))
    weights = FFNWeights(list(gate_up), list(down))
    grads = FFNWeights(list(torch.zeros_like(gate_up, dtype=torch.float32)), list(torch.zeros_like(down, dtype=torch.float32)))
    output = GroupedFFNOutput(torch.empty_like(x), torch.empty(N, 2 * F, dtype=dtype, device=device))
    row_grads = GroupedFFNGrads(torch.empty_like(x), torch.empty_like(row_weights))
    a, h, dh, y, dx = (torch.randn(N, width, device=device).to(dtype) for width in (2 * F, F, F, D, D))
    grad_gate_up, grad_down = torch.empty_like(gate_up), torch.empty_like(down)
    stops = torch.tensor(sizes).cumsum(0).tolist()
    groups = [(g, slice(stop - size, stop)) for g, (size, stop) in enumerate(zip(sizes, stops, strict=True)) if size]

    def ours() -> Tensor:
        grouped_ffn(x, row_weights, weights, sizes, out=output)
        arguments = (dy, x, output.gate_up_N2F, row_weights, weights, grads, sizes)
        grouped_ffn_backward(*arguments, out=row_grads)
        return output.y_ND

    def products(parts: Sequence[tuple[int, slice]]) -> None:
        for g, rows in parts:
            torch.mm(x[rows], gate_up[g].t(), out=a[rows])
            torch.mm(h[rows], down[g].t(), out=y[rows])
            torch.mm(dy[rows], down[g], out=dh[rows])
            torch.mm(a[rows], gate_up[g], out=dx[rows])
            torch.mm(dy[rows].t(), h[rows], out=grad_down[g])
            torch.mm(a[rows].t(), x[rows], out=grad_gate_up[g])

    def check() -> float:
        actual, worst = ours(), 0.0
        for g, rows in groups:
            gate, up = (x[rows] @ gate_up[g].t()).chunk(2, dim=1)
            hidden = functional.silu(gate) * up * row_weights[rows, None].to(dtype)
            worst = max(worst, difference(actual[rows], hidden @ down[g].t()))
        return worst

    return Case(
        op="grouped_ffn fwd+bwd",
        shape=shape.name,
        dtype=dtype_name(dtype),
        unit="GFLOP/s",
        work=18.0 * N * D * F,
        ours=ours,
        ceiling=lambda: products([(0, slice(0, N))]),
        torch={"mm loop": lambda: products(groups)},
        check=check,
        tolerance=1e-4 if dtype == torch.float32 else 3e-2,
    )


def layer_case(shape: Shape, dtype: torch.dtype, device: str) -> Case:
    """One rank's MoE layer from logits to input gradients, against the six products of its experts and nothing else."""
    experts = ffn_case(shape, dtype, device)
    N, D, F, K, sizes = shape.num_rows, shape.D, shape.F, shape.top_k, list(shape.group_sizes)
    T, G = N // K, len(sizes)
    x, dy = (torch.randn(T, D, device=device).to(dtype) for _ in range(2))
    logits = torch.randn(T, G, device=device)
    row_ids = torch.randperm(T * K, device=device) % T
    gate_up, down = ((torch.randn(G, *size, device=device) * 0.02).to(dtype) for size in ((2 * F, D), (D, F)))
    weights = FFNWeights(list(gate_up), list(down))
    grads = FFNWeights(list(torch.zeros_like(gate_up, dtype=torch.float32)), list(torch.zeros_like(down, dtype=torch.float32)))

    def ours() -> tuple[Tensor, Tensor, Tensor]:
        gate = topk_gate(logits, K)
        bags, row_weights = bags_of(row_ids, T), gate.weights_TK.flatten()
        rows = gather_rows(x, row_ids)
        output = grouped_ffn(rows, row_weights, weights, sizes)
        y = sum_rows(output.y_ND, bags)
        inner = grouped_ffn_backward(gather_rows(dy, row_ids), rows, output.gate_up_N2F, row_weights, weights, grads, sizes)
        dlogits = topk_gate_backward(inner.drow_weights_N.view(T, K), None, logits, gate.topk_ids_TK)
        return y, sum_rows(inner.dx_ND, bags), dlogits

    def check() -> float:
        return max(0.0 if bool(result.isfinite().all()) else float("inf") for result in ours())

    return replace(experts, op="layer fwd+bwd", ours=ours, torch={}, check=check)


def row_cases(shape: Shape, dtype: torch.dtype, device: str) -> Iterator[Case]:
    """The memory-bound ops: gather, sum, both ways in turn, SwiGLU and its backward."""
    N, D, F, K = shape.num_rows, shape.D, shape.F, shape.top_k
    T, item = N // K, torch.empty((), dtype=dtype).element_size()
    x, rows = torch.randn(T, D, device=device).to(dtype), torch.randn(N, D, device=device).to(dtype)
    row_ids = torch.randperm(N, device=device) % T
    bags, gathered = bags_of(row_ids, T), torch.empty_like(rows)
    gate_up, dh, weights = (
        torch.randn(N, 2 * F, device=device).to(dtype),
        torch.randn(N, F, device=device).to(dtype),
        torch.rand(N, device=device),
    )
    h, grads = torch.empty_like(dh), SwigluGrads(torch.empty_like(gate_up), torch.empty_like(weights), torch.empty_like(dh))
    gate, up = gate_up.chunk(2, dim=1)

    def make(op: str, num_bytes: float, **kwargs: Any) -> Case:
        # Copies of as many bytes, half of them read and half written.
        source = torch.ones(max(1, int(num_bytes) // 2), dtype=torch.uint8, device=device)
        target = torch.empty_like(source)
        tolerance = 1e-5 if dtype == torch.float32 else 1e-2
        return Case(
            op,
            shape.name,
            dtype_name(dtype),
            "GB/s",
            num_bytes,
            ceiling=lambda: target.copy_(source),
            tolerance=tolerance,
            **kwargs,
        )

    index_add = lambda: torch.zeros_like(x).index_add_(0, row_ids, rows)  # noqa: E731
    plain_swiglu = lambda: functional.silu(gate) * up * weights[:, None].to(dtype)  # noqa: E731
    yield make(
        "gather_rows",
        (T + N) * D * item,
        ours=partial(gather_rows, x, row_ids, out=gathered),
        torch={"index_select": partial(torch.index_select, x, 0, row_ids, out=gathered)},
        check=lambda: difference(gather_rows(x, row_ids), x[row_ids]),
    )
    yield make(
        "sum_rows",
        (T + N) * D * item,
        ours=partial(sum_rows, rows, bags),
        torch={"index_add": index_add},
        check=lambda: difference(sum_rows(rows, bags), index_add()),
    )
    yield make(
        "gather_rows + sum_rows",
        2 * (T + N) * D * item,
        ours=lambda: sum_rows(gather_rows(x, row_ids, out=gathered), bags),
        torch={"index_select, index_add": lambda: torch.zeros_like(x).index_add_(0, row_ids, x[row_ids])},
        check=lambda: difference(sum_rows(gather_rows(x, row_ids), bags), K * x),
    )
    yield make(
        "swiglu",
        3 * N * F * item,
        ours=partial(swiglu, gate_up, weights, out=h),
        torch={"silu, mul, mul": plain_swiglu},
        check=lambda: difference(swiglu(gate_up, weights), plain_swiglu()),
    )
    yield make(
        "swiglu_backward",
        6 * N * F * item,
        ours=partial(swiglu_backward, dh, gate_up, weights, out=grads),
        torch={},
        check=lambda: difference(swiglu_backward(dh, gate_up, weights).h_NF, plain_swiglu()),
    )


def bank_cases(shape: Shape, dtype: torch.dtype, device: str) -> Iterator[Case]:
    """Bank rows to a send buffer with a cast, and back into fp32 gradients."""
    G, row = len(shape.group_sizes), 2 * shape.F * shape.D
    bank, ids = torch.randn(G, row, device=device), torch.arange(G, device=device).flip(0)
    buffer, item = torch.randn(G, row, device=device).to(dtype), torch.empty((), dtype=dtype).element_size()
    bags, out = bags_of(ids, G), torch.empty(G, row, dtype=dtype, device=device)

    def make(op: str, num_bytes: float, **kwargs: Any) -> Case:
        source = torch.ones(int(num_bytes) // 2, dtype=torch.uint8, device=device)
        target = torch.empty_like(source)
        return Case(
            op, shape.name, dtype_name(dtype), "GB/s", num_bytes, ceiling=lambda: target.copy_(source), tolerance=1e-2, **kwargs
        )

    def check_accumulate() -> float:
        expected = bank.index_add(0, ids, buffer.float())
        accumulated = bank.clone()
        accumulate_rows(accumulated, bags, buffer)
        return difference(accumulated, expected)

    yield make(
        "pack_rows",
        G * row * (4 + item),
        ours=partial(pack_rows, bank, ids, out=out),
        torch={"index, to": lambda: out.copy_(bank[ids])},
        check=lambda: difference(pack_rows(bank, ids, dtype=dtype), bank[ids]),
    )
    yield make(
        "accumulate_rows",
        G * row * (8 + item),
        ours=partial(accumulate_rows, bank, bags, buffer),
        torch={"index_add": lambda: bank.index_add_(0, ids, buffer.float())},
        check=check_accumulate,
    )


def router_cases(device: str) -> Iterator[Case]:
    """The gate and the split at E = 256, R = 64: small work, so the time itself is held to a limit in microseconds."""
    T, E, K, R = (8192, 256, 8, 64) if device == "cuda" else (2048, 256, 8, 64)
    logits = torch.randn(T, E, device=device)
    gate = topk_gate(logits, K)
    pieces = torch.rand(E, R, device=device)
    ends = (pieces.cumsum(1) / pieces.sum(1, keepdim=True) * gate.load_E[:, None]).round().long()
    flow = ends.diff(dim=1, prepend=torch.zeros(E, 1, dtype=torch.int64, device=device))
    rank_of_place = torch.repeat_interleave(torch.arange(R, device=device).repeat(E), flow.flatten())

    def torch_split() -> Tensor:
        by_expert = gate.topk_ids_TK.flatten().sort(stable=True).indices
        return by_expert[rank_of_place.sort(stable=True).indices]

    def torch_gate() -> tuple[Tensor, Tensor]:
        weights, ids = logits.softmax(dim=1).topk(K)
        return weights / weights.sum(dim=1, keepdim=True), torch.bincount(ids.flatten(), minlength=E)

    name = f"T={T} E={E} K={K} R={R}"
    yield Case(
        op="topk_gate",
        shape=name,
        dtype="float32",
        unit="us",
        work=1e6,
        ours=partial(topk_gate, logits, K),
        ceiling=150.0 if device == "cuda" else 50_000.0,
        torch={"softmax, topk, bincount": torch_gate},
        check=lambda: difference(topk_gate(logits, K).weights_TK, torch_gate()[0]),
        tolerance=1e-5,
    )
    yield Case(
        op="split_tokens",
        shape=name,
        dtype="int64",
        unit="us",
        work=1e6,
        ours=partial(split_tokens, gate.topk_ids_TK, flow),
        ceiling=150.0 if device == "cuda" else 5_000.0,
        torch={"two sorts": torch_split},
        check=lambda: float(not torch.equal(split_tokens(gate.topk_ids_TK, flow), torch_split())),
        tolerance=0.0,
    )


def all_cases(device: str, dtype: torch.dtype) -> Iterator[Case]:
    """Every case of a device, one after the other, so that a case's tensors are freed before the next."""
    for shape in shapes(device):
        yield from product_cases(shape, dtype, device)
        yield ffn_case(shape, dtype, device)
        yield layer_case(shape, dtype, device)
        if shape.name.endswith("balanced"):
            yield from row_cases(shape, dtype, device)
            yield from bank_cases(shape, dtype, device)
    yield from router_cases(device)


def dtype_name(dtype: torch.dtype) -> str:
    """`float32` of `torch.float32`."""
    return str(dtype).removeprefix("torch.")
