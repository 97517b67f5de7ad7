"""The memory-bound cases of `moesaic bench kernels`, beside a copy of as many bytes, and the router's, in microseconds.

Shape letters: N routed tokens, D model dim, F expert ffn dim, G groups, T tokens, K top-k, E experts, R ranks.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from ..kernels import (
    SwigluGrads,
    bags_of,
    gather_rows,
    histogram,
    split_tokens,
    sum_rows,
    swiglu,
    swiglu_backward,
    topk_gate,
)
from .kernel_cases import Call, Case, Shape, difference, dtype_name

# Twice the last-level cache of a small processor, and the most sets of operands; the cache of a large server holds them all.
_CACHE_BYTES = 1 << 26
_MAX_SETS = 16


def _copy_bound(
    op: str,
    num_bytes: float,
    *,
    shape: Shape,
    dtype: torch.dtype,
    device: str,
    cpu_target: float | None = None,
    **kwargs: Any,
) -> Case:
    """A case whose ceiling is a copy of as many bytes, half of them read and half written."""
    source = torch.ones(max(1, int(num_bytes) // 2), dtype=torch.uint8, device=device)
    copied = torch.empty_like(source)
    return Case(
        op,
        shape.name,
        dtype_name(dtype),
        "GB/s",
        num_bytes,
        ceiling=lambda: copied.copy_(source),
        target=0.85 if device == "cuda" else cpu_target,
        **kwargs,
    )


def with_cold_operands(make: Callable[[], Iterator[Case]], shape: Shape, device: str) -> Iterator[Case]:
    """The cases of `make`, on a CPU each with several sets of operands, of which every call takes the next.

    Otherwise the previous call would decide whether operands are in the caches. (On a GPU the caches are cleared before every
    call.)
    """
    smallest = (shape.num_rows + shape.num_rows // shape.top_k) * shape.D * 4
    num_sets = 1 if device == "cuda" else min(_MAX_SETS, -(-_CACHE_BYTES // smallest))
    for cases in zip(*(make() for _ in range(num_sets)), strict=True):
        yield in_turn(cases)


def in_turn(cases: Sequence[Case]) -> Case:
    """One case of several alike: each call takes the next case; torch's calls are half a turn ahead of moesaic's."""

    def turn(calls: Sequence[Call], start: int = 0) -> Call:
        following = itertools.cycle([*calls[start:], *calls[:start]])
        return lambda: next(following)()

    first, half = cases[0], len(cases) // 2
    return replace(
        first,
        ours=turn([case.ours for case in cases]),
        ceiling=turn([case.ceiling for case in cases if callable(case.ceiling)]) if callable(first.ceiling) else first.ceiling,
        torch={name: turn([case.torch[name] for case in cases], half) for name in first.torch},
    )


def memory_cases(shape: Shape, dtype: torch.dtype, device: str) -> Iterator[Case]:
    """The memory-bound ops: gather, sum, gather and sum, SwiGLU and its backward."""
    N, D, F, K = shape.num_rows, shape.D, shape.F, shape.top_k
    T, item = N // K, torch.empty((), dtype=dtype).element_size()
    x, rows = torch.randn(T, D, device=device).to(dtype), torch.randn(N, D, device=device).to(dtype)
    # The order of dispatch: expert-major, tokens in order within an expert.
    chosen = torch.rand(T, len(shape.group_sizes), device=device).topk(K).indices
    row_ids = chosen.flatten().argsort(stable=True) // K
    bags, gathered, summed = bags_of(row_ids, T), torch.empty_like(rows), torch.empty_like(x)
    gate_up, dh, weights = (
        torch.randn(N, 2 * F, device=device).to(dtype),
        torch.randn(N, F, device=device).to(dtype),
        torch.rand(N, device=device),
    )
    h, grads = torch.empty_like(dh), SwigluGrads(torch.empty_like(gate_up), torch.empty_like(weights), torch.empty_like(dh))
    gate, up = gate_up.chunk(2, dim=1)

    tolerance = 1e-5 if dtype == torch.float32 else 1e-2
    make = partial(_copy_bound, shape=shape, dtype=dtype, device=device, tolerance=tolerance)

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
        ours=partial(sum_rows, rows, bags, out=summed),
        torch={"index_add": index_add},
        check=lambda: difference(sum_rows(rows, bags), index_add()),
    )
    yield make(
        "gather_rows + sum_rows",
        2 * (T + N) * D * item,
        ours=lambda: sum_rows(gather_rows(x, row_ids, out=gathered), bags, out=summed),
        cpu_target=0.70,
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


def router_cases(device: str) -> Iterator[Case]:
    """The gate, the histogram and the split at E = 256, R = 64: small ops, whose time itself has a limit."""
    T, E, K, R = (8192, 256, 8, 64) if device == "cuda" else (2048, 256, 8, 64)
    logits = torch.randn(T, E, device=device)
    gate = topk_gate(logits, K)
    pieces = torch.rand(E, R, device=device)
    ends = (pieces.cumsum(1) / pieces.sum(1, keepdim=True) * gate.load_E[:, None]).round().long()
    flow = ends.diff(dim=1, prepend=torch.zeros(E, 1, dtype=torch.int64, device=device))
    rank_of_place = torch.repeat_interleave(torch.arange(R, device=device).repeat(E), flow.flatten())

    anchors = torch.randint(0, R, (T, K), device=device)

    def torch_split(anchors: Tensor | None = None) -> Tensor:
        keys = gate.topk_ids_TK if anchors is None else gate.topk_ids_TK * R + anchors
        by_expert = keys.flatten().sort(stable=True).indices
        return by_expert[rank_of_place.sort(stable=True).indices]

    def torch_gate() -> tuple[Tensor, Tensor]:
        weights, ids = logits.softmax(dim=1).topk(K)
        return weights / weights.sum(dim=1, keepdim=True), torch.bincount(ids.flatten(), minlength=E)

    make = partial(Case, shape=f"T={T} E={E} K={K} R={R}", unit="us", work=1e6)
    yield make(
        op="topk_gate",
        dtype="float32",
        ours=partial(topk_gate, logits, K),
        ceiling=150.0 if device == "cuda" else 50_000.0,
        torch={"softmax, topk, bincount": torch_gate},
        check=lambda: difference(topk_gate(logits, K).weights_TK, torch_gate()[0]),
        tolerance=1e-5,
    )
    yield make(
        op="histogram",
        dtype="int64",
        ours=partial(histogram, gate.topk_ids_TK, E),
        ceiling=50.0 if device == "cuda" else 500.0,
        torch={"bincount": lambda: torch.bincount(gate.topk_ids_TK.flatten(), minlength=E)},
        check=lambda: float(not torch.equal(histogram(gate.topk_ids_TK, E), gate.load_E)),
        tolerance=0.0,
    )
    for op, more in (("split_tokens", ()), ("split_tokens with anchors", (anchors,))):
        ours, by_torch = partial(split_tokens, gate.topk_ids_TK, flow, *more), partial(torch_split, *more)

        def check(ours: Call = ours, by_torch: Call = by_torch) -> float:
            return float(not torch.equal(ours(), by_torch()))

        yield make(
            op=op,
            dtype="int64",
            ours=ours,
            ceiling=150.0 if device == "cuda" else 5_000.0,
            torch={"two sorts": by_torch},
            check=check,
            tolerance=0.0,
            target=1.0 if op == "split_tokens" else None,
        )
