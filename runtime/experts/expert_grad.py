"""Gradients of experts: whole on the rank that owns the expert, so a norm or check over all gradients is a collective.

`torch.nn.utils.clip_grad_norm_` and `get_total_norm`, what Accelerate and the Trainer make of them, and `torch.amp.GradScaler`
look at the gradients of the parameters they are given. For FSDP2's DTensors torch adds the other ranks' part; for experts,
which are plain tensors, this file does:

    _foreach_norm, vector_norm of gradients  ->  one `ExpertNorm` for each expert's gradient, this rank's own
    stack of norms                           ->  `ExpertNorm` [N], marked where they belong to experts
    vector_norm of that                      ->  the norm over all ranks: those of experts add up, others count once
    GradScaler's check for overflow          ->  an overflow on one rank is one on all

The norm of a single gradient, as it is logged by parameter, stays what it is. Everything else sees plain tensors.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from ...collectives import Transport
from .._compat import allow_in_foreach

_NORM = "the norm of all gradients"


@dataclass(frozen=True, eq=False)
class ExpertRanks:
    """The ranks that own experts of one model, and how many experts each of them owns, over all banks."""

    transport: Transport
    num_experts_R: tuple[int, ...]
    learning: dict[str, np.ndarray] = field(default_factory=dict)
    """By layer, bool [R]: the ranks that own a trainable expert, as of the layer's last forward."""

    def check(self, where: str) -> None:
        """Before any rank waits for another one.

        Raises:
            RuntimeError: some rank has no gradient of an expert, and so would not call `combine`.
        """
        for rank, num_experts in enumerate(self.num_experts_R):
            if not num_experts or (self.learning and not any(trainable_R[rank] for trainable_R in self.learning.values())):
                raise RuntimeError(
                    f"rank {rank} owns no trainable expert, so {where} cannot be made one number for all ranks; "
                    "use handle.clip_grad_norm_, or fewer ranks per group"
                )

    def combine(self, value: Tensor, *, largest: bool, where: str) -> Tensor:
        """The sum, or the largest, of every rank's fp64 number, in rank order. Collective; see `check`."""
        self.check(where)
        bits_R = self.transport.all_gather_ints(value.double().view(1).view(torch.int64), where=where)
        values_R = bits_R.view(torch.float64).flatten()
        return values_R.max() if largest else values_R.sum()


class ExpertGrad(Tensor):
    """The gradient of one weight of one expert; see the module's docstring."""

    ranks: ExpertRanks

    @classmethod
    def of(cls, tensor: Tensor, ranks: ExpertRanks) -> ExpertGrad:
        """The same memory as a gradient that is marked as an expert's."""
        grad = tensor.as_subclass(cls)
        grad.ranks = ranks
        return grad

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        handler = _HANDLERS.get(func)
        with torch._C.DisableTorchFunctionSubclass():
            return func(*args, **(kwargs or {})) if handler is None else handler(func, *args, **(kwargs or {}))


class ExpertNorm(Tensor):
    """Norms of gradients, 0-d or [N], some of which are those of experts of this rank alone."""

    ranks: ExpertRanks
    of_experts: list[bool]

    @classmethod
    def of(cls, tensor: Tensor, ranks: ExpertRanks, of_experts: list[bool]) -> ExpertNorm:
        """The same numbers, with a mark for each that is of an expert."""
        norm = tensor.as_subclass(cls)
        norm.ranks, norm.of_experts = ranks, of_experts
        return norm

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        handler = _NORM_HANDLERS.get(func)
        with torch._C.DisableTorchFunctionSubclass():
            return func(*args, **(kwargs or {})) if handler is None else handler(func, *args, **(kwargs or {}))


allow_in_foreach(ExpertGrad)


def _plain(tensor: Tensor) -> Tensor:
    """A norm that is the same on all ranks, as a plain tensor."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def _foreach_norm(func: Callable[..., Any], tensors: Sequence[Tensor], *args: Any, **kwargs: Any) -> list[Tensor]:
    """Norms of gradients of all kinds, in order. torch takes no list of DTensors and other tensors."""
    next(tensor.ranks for tensor in tensors if isinstance(tensor, ExpertGrad)).check(_NORM)
    norms: list[Tensor | None] = [None] * len(tensors)
    for is_sharded in (True, False):
        places = [i for i, tensor in enumerate(tensors) if isinstance(tensor, DTensor) is is_sharded]
        for i, norm in zip(places, func([tensors[i] for i in places], *args, **kwargs) if places else (), strict=True):
            grad = tensors[i]
            norms[i] = ExpertNorm.of(norm, grad.ranks, [True]) if isinstance(grad, ExpertGrad) else _plain(norm)
    return norms  # type: ignore[return-value]


def _foreach_scale(func: Callable[..., Any], tensors: Sequence[Tensor], *args: Any, **kwargs: Any) -> None:
    """The same operation in place on gradients of all kinds, with one scalar."""
    for is_sharded in (True, False):
        part = [tensor for tensor in tensors if isinstance(tensor, DTensor) is is_sharded]
        if part:
            func(part, *args, **kwargs)


def _norm(func: Callable[..., Any], grad: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    norm = func(grad, *args, **kwargs)
    return ExpertNorm.of(norm, grad.ranks, [True]) if isinstance(grad, ExpertGrad) and norm.ndim == 0 else norm


def _check_overflow(func: Callable[..., Any], grads: Sequence[Tensor], found_inf: Tensor, inv_scale: Tensor) -> None:
    """GradScaler's check and unscaling; an overflow in the experts of one rank is one on all ranks."""
    ranks = next(grad.ranks for grad in grads if isinstance(grad, ExpertGrad))
    _foreach_scale(func, grads, found_inf, inv_scale)
    found_inf.copy_(ranks.combine(found_inf, largest=True, where="GradScaler's check for overflow"))


def _deepcopy(func: Callable[..., Any], grad: ExpertGrad, memo: dict[int, Any]) -> Tensor:
    """A copy has the numbers alone, as ranks cannot be copied."""
    return grad.as_subclass(Tensor).clone()  # which `copy.deepcopy` notes in `memo`


def _reduce(func: Callable[..., Any], grad: ExpertGrad, protocol: int) -> Any:
    """Files have the numbers alone, too."""
    return func(grad.as_subclass(Tensor), protocol)


def _move(func: Callable[..., Any], norm: ExpertNorm, *args: Any, **kwargs: Any) -> Tensor:
    return ExpertNorm.of(func(norm, *args, **kwargs), norm.ranks, norm.of_experts)


def _stack(func: Callable[..., Any], tensors: Sequence[Tensor], dim: int = 0, **kwargs: Any) -> Tensor:
    ranks = next(norm.ranks for norm in tensors if isinstance(norm, ExpertNorm))
    ranks.check(_NORM)
    of_experts = [isinstance(norm, ExpertNorm) for norm in tensors]
    return ExpertNorm.of(func([_plain(norm) for norm in tensors], dim, **kwargs), ranks, of_experts)


def _total_norm(func: Callable[..., Any], norm: ExpertNorm, ord: float = 2.0, *args: Any, **kwargs: Any) -> Tensor:
    """The norm over all ranks of what the norms in [N] are norms of."""
    if norm.ndim != 1:
        return func(norm, ord, *args, **kwargs)
    is_of_expert_N = torch.tensor(norm.of_experts, device=norm.device)
    powers_N, largest = norm.double().abs(), math.isinf(ord)
    if not largest:
        powers_N = powers_N.pow(ord)
    mine, others = powers_N[is_of_expert_N], powers_N[~is_of_expert_N]
    total = norm.ranks.combine(mine.amax() if largest else mine.sum(), largest=largest, where=_NORM)
    if largest:
        return torch.cat([total.view(1), others]).amax().to(norm.dtype)
    return (total + others.sum()).pow(1.0 / ord).to(norm.dtype)


_HANDLERS: dict[Any, Callable[..., Any]] = {
    torch._foreach_norm: _foreach_norm,
    torch._foreach_mul_: _foreach_scale,
    torch.linalg.vector_norm: _norm,
    torch.linalg.norm: _norm,
    torch.norm: _norm,
    Tensor.norm: _norm,
    torch._amp_foreach_non_finite_check_and_unscale_: _check_overflow,
    Tensor.__deepcopy__: _deepcopy,
    Tensor.__reduce_ex__: _reduce,
}
_NORM_HANDLERS: dict[Any, Callable[..., Any]] = {
    Tensor.to: _move,
    Tensor.cpu: _move,
    Tensor.cuda: _move,
    torch.stack: _stack,
    torch.linalg.vector_norm: _total_norm,
    torch.linalg.norm: _total_norm,
    torch.norm: _total_norm,
    Tensor.norm: _total_norm,
}
