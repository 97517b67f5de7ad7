"""SwiGLU with row weights: `h = silu(gate) * up * row_weight`, and its backward from the pre-activation.

Half-precision inputs are computed in fp32 and rounded once. On the CPU one compiled pass (swiglu_cpu.py) replaces torch's eleven
passes; the torch twin processes blocks of rows that fit the second-level cache.

Shapes: N rows, F expert ffn dim; gate_up_N2F holds gate in its first F columns and up in its last F.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import cache

import torch
from torch import Tensor

from .checks import check_devices, check_floating
from .types import SwigluGrads

# With more threads than this, torch's own passes are faster than the compiled pass on the caller's thread alone.
_ALONE_MAX_THREADS = 4
# Elements of one [rows, F] block: five such fp32 blocks (gate, up, dh, two temporaries) stay in a 2 MiB cache.
_BLOCK_ELEMENTS = 1 << 16


def swiglu(gate_up_N2F: Tensor, row_weights_N: Tensor | None = None, *, out: Tensor | None = None) -> Tensor:
    """Return `h_NF = silu(gate) * up`, times `row_weights_N[:, None]` when weights are given. No autograd."""
    check_devices(gate_up_N2F.device, row_weights_N=row_weights_N, out=out)
    check_floating(gate_up_N2F=gate_up_N2F)
    h_NF = gate_up_N2F.new_empty(_hidden_shape(gate_up_N2F)) if out is None else out
    _check_shapes(gate_up_N2F, row_weights_N=row_weights_N, h_NF=h_NF)
    if gate_up_N2F.device.type == "cuda":
        from .swiglu_triton import swiglu_triton

        return swiglu_triton(gate_up_N2F, row_weights_N, h_NF)
    if not takes_compiled_pass([row_weights_N], gate_up_N2F, h_NF):
        return swiglu_torch(gate_up_N2F, row_weights_N, out=h_NF)
    from .swiglu_cpu import swiglu_into

    swiglu_into(h_NF, gate_up_N2F, _given_or_ones(row_weights_N, len(h_NF)))
    return h_NF


def swiglu_backward(
    dh_NF: Tensor, gate_up_N2F: Tensor, row_weights_N: Tensor | None = None, *, out: SwigluGrads | None = None
) -> SwigluGrads:
    """Return the gradients of `swiglu` for `dh_NF`, and its output h again (the down product's wgrad needs it).

    `out` names buffers to write into. `dh_NF` itself may serve as `out.h_NF`, which on the CPU saves a copy; no other input
    may overlap one.
    """
    check_devices(gate_up_N2F.device, dh_NF=dh_NF, row_weights_N=row_weights_N)
    check_floating(gate_up_N2F=gate_up_N2F)
    _check_dh(dh_NF, gate_up_N2F)
    grads = _new_grads(gate_up_N2F, row_weights_N) if out is None else out
    check_devices(gate_up_N2F.device, dgate_up_N2F=grads.dgate_up_N2F, drow_weights_N=grads.drow_weights_N, h_NF=grads.h_NF)
    dweights_N = grads.drow_weights_N
    _check_shapes(
        gate_up_N2F, row_weights_N=row_weights_N, dgate_up_N2F=grads.dgate_up_N2F, drow_weights_N=dweights_N, h_NF=grads.h_NF
    )
    if gate_up_N2F.device.type == "cuda":
        from .swiglu_triton import swiglu_backward_triton

        return swiglu_backward_triton(dh_NF, gate_up_N2F, row_weights_N, grads)
    if not takes_compiled_pass([row_weights_N, dweights_N], gate_up_N2F, dh_NF, grads.dgate_up_N2F, grads.h_NF):
        return swiglu_backward_torch(dh_NF, gate_up_N2F, row_weights_N, out=grads)
    from .swiglu_cpu import swiglu_backward_into

    if grads.h_NF.data_ptr() != dh_NF.data_ptr():
        grads.h_NF.copy_(dh_NF)
    weights_N = _given_or_ones(row_weights_N, len(dh_NF))
    dweights_N = torch.empty_like(weights_N) if dweights_N is None else dweights_N
    swiglu_backward_into(grads.h_NF, gate_up_N2F, weights_N, grads.dgate_up_N2F, dweights_N)
    return grads


def swiglu_torch(gate_up_N2F: Tensor, row_weights_N: Tensor | None = None, *, out: Tensor | None = None) -> Tensor:
    """Torch twin of `swiglu`."""
    h_NF = gate_up_N2F.new_empty(_hidden_shape(gate_up_N2F)) if out is None else out
    compute_dtype = _compute_dtype(gate_up_N2F)
    for rows in _row_blocks(gate_up_N2F):
        gate, up = gate_up_N2F[rows].to(compute_dtype).chunk(2, dim=1)
        h = h_NF[rows] if h_NF.dtype == compute_dtype else torch.empty_like(gate)
        torch.ops.aten.silu.out(gate, out=h)
        h.mul_(up)
        if row_weights_N is not None:
            h.mul_(row_weights_N[rows, None])
        if h_NF.dtype != compute_dtype:
            h_NF[rows] = h
    return h_NF


def swiglu_backward_torch(
    dh_NF: Tensor, gate_up_N2F: Tensor, row_weights_N: Tensor | None = None, *, out: SwigluGrads | None = None
) -> SwigluGrads:
    """Torch twin of `swiglu_backward`."""
    _check_dh(dh_NF, gate_up_N2F)
    grads = _new_grads(gate_up_N2F, row_weights_N) if out is None else out
    for rows in _row_blocks(gate_up_N2F):
        _backward_block(
            dh_NF[rows],
            gate_up_N2F[rows],
            None if row_weights_N is None else row_weights_N[rows],
            SwigluGrads(
                grads.dgate_up_N2F[rows],
                None if grads.drow_weights_N is None else grads.drow_weights_N[rows],
                grads.h_NF[rows],
            ),
        )
    return grads


def _backward_block(dh_nF: Tensor, gate_up_n2F: Tensor, row_weights_n: Tensor | None, out: SwigluGrads) -> None:
    """The backward of one block of rows, written into `out`; all temporaries have the block's size."""
    compute_dtype = _compute_dtype(gate_up_n2F)
    dh = dh_nF.to(compute_dtype)
    gate, up = gate_up_n2F.to(compute_dtype).chunk(2, dim=1)
    is_direct = out.dgate_up_N2F.dtype == compute_dtype
    dgate_up = out.dgate_up_N2F if is_direct else torch.empty_like(gate_up_n2F, dtype=compute_dtype)
    dgate, dup = dgate_up.chunk(2, dim=1)

    activated = torch.nn.functional.silu(gate)
    dh_up = dh * up
    if row_weights_n is not None:
        if out.drow_weights_N is not None:
            torch.mul(dh_up, activated, out=dgate)  # dgate is scratch here
            out.drow_weights_N.copy_(dgate.sum(dim=1))
        activated.mul_(row_weights_n[:, None])
        dh_up.mul_(row_weights_n[:, None])
    torch.mul(dh, activated, out=dup)
    torch.ops.aten.silu_backward.grad_input(dh_up, gate, grad_input=dgate)
    if is_direct:
        torch.mul(activated, up, out=out.h_NF)
    else:
        out.h_NF.copy_(activated.mul_(up))
        out.dgate_up_N2F.copy_(dgate_up)


def _new_grads(gate_up_N2F: Tensor, row_weights_N: Tensor | None) -> SwigluGrads:
    """Buffers for `swiglu_backward`, uninitialised."""
    return SwigluGrads(
        dgate_up_N2F=torch.empty_like(gate_up_N2F, memory_format=torch.contiguous_format),
        drow_weights_N=None if row_weights_N is None else torch.empty_like(row_weights_N),
        h_NF=gate_up_N2F.new_empty(_hidden_shape(gate_up_N2F)),
    )


def _hidden_shape(gate_up_N2F: Tensor) -> tuple[int, int]:
    """(N, F) of a gate_up matrix."""
    if gate_up_N2F.dim() != 2 or gate_up_N2F.shape[1] % 2:
        raise ValueError(f"gate_up_N2F must be [N, 2F], got {tuple(gate_up_N2F.shape)}; gate and up lie side by side")
    return gate_up_N2F.shape[0], gate_up_N2F.shape[1] // 2


def _check_dh(dh_NF: Tensor, gate_up_N2F: Tensor) -> None:
    """Raise ValueError unless `dh_NF` matches `gate_up_N2F` in shape and dtype."""
    if dh_NF.shape != _hidden_shape(gate_up_N2F) or dh_NF.dtype != gate_up_N2F.dtype:
        raise ValueError(
            f"dh_NF is {dh_NF.dtype} {tuple(dh_NF.shape)}, but gate_up_N2F asks for "
            f"{gate_up_N2F.dtype} {_hidden_shape(gate_up_N2F)}"
        )


def _check_shapes(gate_up_N2F: Tensor, **tensors: Tensor | None) -> None:
    """Raise ValueError unless every tensor has the shape that its name says; compiled routines receive only addresses."""
    N, F = _hidden_shape(gate_up_N2F)
    shapes = {"N": (N,), "NF": (N, F), "N2F": (N, 2 * F)}
    for name, tensor in tensors.items():
        expected = shapes[name.rpartition("_")[2]]
        if tensor is not None and tensor.shape != expected:
            raise ValueError(f"{name} is {tuple(tensor.shape)}, but gate_up_N2F {(N, 2 * F)} asks for {expected}")


def takes_compiled_pass(weights: Sequence[Tensor | None], *tensors: Tensor) -> bool:
    """Whether the compiled CPU pass supports these tensors: fp32 or bf16, row weights in fp32, all contiguous."""
    first = tensors[0]
    if (
        first.device.type != "cpu"
        or first.dtype not in (torch.float32, torch.bfloat16)
        or not all(tensor.dtype == first.dtype and tensor.is_contiguous() for tensor in tensors)
        or not all(weight is None or (weight.dtype == torch.float32 and weight.is_contiguous()) for weight in weights)
    ):
        return False
    return serves_threads()


def serves_threads() -> bool:
    """Whether the compiled CPU pass runs on torch's threads, or these are so few that it is faster on the caller's thread."""
    return _has_torch_threads() or torch.get_num_threads() <= _ALONE_MAX_THREADS


@cache
def _has_torch_threads() -> bool:
    from .cpu.threads import has_torch_threads

    return has_torch_threads()


def _given_or_ones(row_weights_N: Tensor | None, num_rows: int) -> Tensor:
    """The row weights, or ones, as the compiled pass reads them: fp32 on the CPU, whatever torch's defaults are."""
    return torch.ones(num_rows, dtype=torch.float32, device="cpu") if row_weights_N is None else row_weights_N


def _compute_dtype(x: Tensor) -> torch.dtype:
    """fp32 for half precision, else the tensor's own dtype."""
    return torch.float32 if x.dtype in (torch.bfloat16, torch.float16) else x.dtype


def _row_blocks(gate_up_N2F: Tensor) -> Iterator[slice]:
    """Slices of rows: cache-sized on the CPU, all rows at once elsewhere."""
    N, F = _hidden_shape(gate_up_N2F)
    block = max(1, _BLOCK_ELEMENTS // max(1, F)) if gate_up_N2F.device.type == "cpu" else max(1, N)
    for start in range(0, N, block):
        yield slice(start, min(start + block, N))
