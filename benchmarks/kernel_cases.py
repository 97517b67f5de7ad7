"""The cases of `moesaic bench kernels`, and those of matrix products: every op at every shape, beside torch's own operations.

The ceiling of a grouped product is one dense product over all routed tokens.

Shape letters: N routed tokens, D model dim, F expert ffn dim, G groups, T tokens, K top-k.
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
    bags_of,
    gather_rows,
    grouped_ffn,
    grouped_ffn_backward,
    grouped_gemm,
    grouped_gemm_backward,
    grouped_gemm_dgrad,
    grouped_gemm_wgrad,
    sum_rows,
    topk_gate,
    topk_gate_backward,
)
from ..kernels.groups import group_slices

Call = Callable[[], Any]


@dataclass(frozen=True)
class Shape:
    """The experts of one rank and the routed tokens of each."""

    name: str
    D: int
    F: int
    group_sizes: tuple[int, ...]
    experts: int  # of the whole layer, for the gate
    top_k: int

    @property
    def num_rows(self) -> int:
        """Routed tokens over all groups."""
        return sum(self.group_sizes)


@dataclass(frozen=True)
class Case:
    """One op at one shape. `work` is FLOP or bytes, as `unit` says; with unit us the time itself is the result."""

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
    target: float | None = None  # least ratio_to_ceiling; None for no target


def zipf_sizes(num_rows: int, num_groups: int, exponent: float) -> tuple[int, ...]:
    """`num_rows` divided by a Zipf law; exponent 0 divides evenly."""
    shares = [1.0 / (group + 1) ** exponent for group in range(num_groups)]
    bounds = [round(num_rows * sum(shares[: group + 1]) / sum(shares)) for group in range(num_groups)]
    return tuple(stop - start for start, stop in pairwise([0, *bounds]))


def shapes(device: str) -> list[Shape]:
    """Shapes per rank: of three public models on a GPU; of the demo and the step benchmark on a CPU."""
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


class Products:
    """The three products of gate_up: by torch, for one group or all tokens at once, and by moesaic's kernels, for all groups."""

    def __init__(self, shape: Shape, dtype: torch.dtype, device: str):
        N, self.sizes, wide = shape.num_rows, list(shape.group_sizes), 2 * shape.F
        G = len(self.sizes)
        self.x, self.dy = (torch.randn(N, width, device=device).to(dtype) for width in (shape.D, wide))
        self.bank = (torch.randn(G, wide, shape.D, device=device) * 0.02).to(dtype)
        self.y, self.dx, self.torch_grads = torch.empty_like(self.dy), torch.empty_like(self.x), torch.empty_like(self.bank)
        self.grads = torch.zeros(G, wide, shape.D, device=device)
        self.offsets = torch.tensor(self.sizes, device=device).cumsum(0).to(torch.int32)
        self.groups = list(group_slices(self.sizes))
        self.has_grouped_mm = device == "cpu" or dtype == torch.bfloat16

    def mm(self, kinds: Sequence[str], groups: Sequence[tuple[int, slice]]) -> None:
        """Torch's products, one call per group and kind."""
        for group, rows in groups:
            x, dy, weight = self.x[rows], self.dy[rows], self.bank[group]
            for kind in kinds:
                if kind == "forward":
                    torch.mm(x, weight.t(), out=self.y[rows])
                elif kind == "dgrad":
                    torch.mm(dy, weight, out=self.dx[rows])
                else:
                    torch.mm(dy.t(), x, out=self.torch_grads[group])

    def torch_ways(self, kinds: Sequence[str]) -> dict[str, Call]:
        """A loop of mm, and grouped_mm where it supports the dtype."""
        ways: dict[str, Call] = {"mm loop": partial(self.mm, kinds, self.groups)}
        if self.has_grouped_mm:
            operands = {"forward": (self.x, self.bank.transpose(1, 2)), "dgrad": (self.dy, self.bank)}
            pairs = [operands.get(kind, (self.dy.t(), self.x)) for kind in kinds]
            ways["grouped_mm"] = lambda: [functional.grouped_mm(a, b, offs=self.offsets) for a, b in pairs]
        return ways

    def ours(self, kinds: Sequence[str]) -> Call:
        """moesaic's kernels. Like torch, `wgrad` writes new gradients, as in the first micro-batch; `wgrad adding` accumulates.

        Both gradients together, as autograd needs them, are one call.
        """
        wgrad, fresh = partial(grouped_gemm_wgrad, self.dy, self.x, self.sizes, self.grads), [True] * len(self.sizes)
        backward = partial(grouped_gemm_backward, self.dy, self.x, self.bank, self.sizes, self.grads)
        calls: dict[str, Call] = {
            "forward": partial(grouped_gemm, self.x, self.bank, self.sizes, out=self.y),
            "dgrad": partial(grouped_gemm_dgrad, self.dy, self.bank, self.sizes, out=self.dx),
            "wgrad": partial(wgrad, overwrite=fresh),
            "wgrad adding": wgrad,
            "dgrad and wgrad": partial(backward, overwrite=fresh, out=self.dx),
        }
        both = {"dgrad", "wgrad"}
        names = [kind for kind in kinds if kind not in both] + ["dgrad and wgrad"] if both <= set(kinds) else kinds
        chosen = [calls[name] for name in names]
        return lambda: [call() for call in chosen]

    def check(self, kinds: Sequence[str]) -> float:
        """The largest difference from torch's products over all groups."""
        for result in (self.y, self.dx):
            result.fill_(torch.nan)
        self.grads.fill_(0.0 if "wgrad adding" in kinds else torch.nan)
        self.ours(kinds)()
        worst = 0.0
        for group, rows in self.groups:
            x, dy, weight = self.x[rows], self.dy[rows], self.bank[group]
            for kind in kinds:
                if kind == "forward":
                    worst = max(worst, difference(self.y[rows], x @ weight.t()))
                elif kind == "dgrad":
                    worst = max(worst, difference(self.dx[rows], dy @ weight))
                else:
                    worst = max(worst, difference(self.grads[group], dy.float().t() @ x.float()))
        return worst


def product_cases(shape: Shape, dtype: torch.dtype, device: str) -> Iterator[Case]:
    """Forward, input gradient and weight gradient of the gate_up product, each alone; and the forward with both gradients."""
    products = Products(shape, dtype, device)
    is_held = device == "cuda" and shape.name.startswith(("mixtral", "deepseek")) and min(shape.group_sizes) >= 512
    for op, kinds in (
        ("grouped_gemm", ("forward",)),
        ("grouped_gemm_dgrad", ("dgrad",)),
        ("grouped_gemm_wgrad", ("wgrad",)),
        ("grouped_gemm_wgrad adding", ("wgrad adding",)),
        ("grouped_gemm fwd+bwd", ("forward", "dgrad", "wgrad")),
    ):
        yield Case(
            op,
            shape.name,
            dtype_name(dtype),
            unit="GFLOP/s",
            work=4.0 * shape.num_rows * shape.D * shape.F * len(kinds),
            ours=products.ours(kinds),
            ceiling=partial(products.mm, kinds, [(0, slice(0, shape.num_rows))]),
            torch=products.torch_ways(kinds),
            check=partial(products.check, kinds),
            tolerance=1e-4 if dtype == torch.float32 else 2e-2,
            target=(0.92 if len(kinds) > 1 else None) if device == "cpu" else 0.80 if is_held else None,
        )


def ffn_case(shape: Shape, dtype: torch.dtype, device: str) -> Case:
    """The whole expert FFN, forward and backward; the ceiling is its six matrix products alone."""
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
    groups = list(group_slices(sizes))

    def ours() -> Tensor:
        grouped_ffn(x, row_weights, weights, sizes, out=output)
        arguments = (dy, x, output.gate_up_N2F, row_weights, weights, grads, sizes)
        grouped_ffn_backward(*arguments, overwrite=[True] * G, out=row_grads)
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
    """One rank's MoE layer from logits to input gradients; the ceiling is the six matrix products of its experts alone."""
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
        arguments = (gather_rows(dy, row_ids), rows, output.gate_up_N2F, row_weights, weights, grads, sizes)
        inner = grouped_ffn_backward(*arguments, overwrite=[True] * G)
        dlogits = topk_gate_backward(inner.drow_weights_N.view(T, K), None, logits, gate.topk_ids_TK)
        return y, sum_rows(inner.dx_ND, bags), dlogits

    def check() -> float:
        return max(0.0 if bool(result.isfinite().all()) else float("inf") for result in ours())

    target = 0.75 if device == "cuda" else None
    return replace(experts, op="layer fwd+bwd", ours=ours, torch={}, check=check, target=target)


def dtype_name(dtype: torch.dtype) -> str:
    """`float32` for `torch.float32`."""
    return str(dtype).removeprefix("torch.")
