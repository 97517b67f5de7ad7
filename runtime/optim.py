"""Muon of sharded models: the momentum of a matrix made orthogonal; AdamW for what is no matrix of a hidden layer.

    M = momentum * M + (1 - momentum) * G        of a matrix [m, n], G its gradient
    U = nearest orthogonal matrix to the Nesterov average of G and M, by Newton-Schulz iterations
    W = (1 - lr * weight_decay) * W - 0.2 * sqrt(max(m, n)) * lr * U

Keller Jordan's Muon with the scale of Moonlight (arXiv 2502.16982), by which U is as large as AdamW's update: one learning rate
and one weight decay serve both. It is `torch.optim.Muon(adjust_lr_fn="match_rms_adamw")`, which cannot be given the matrices of
one model together with what AdamW trains, and would send every product of its iterations where FSDP2 has sharded the matrix.

An expert lies whole on its owner, so its update sends nothing. Of matrices that FSDP2 has sharded the average is gathered, one
all-gather each, and every rank keeps its part of U. Matrices of one shape are computed together.

Shape letters: B matrices of one shape, M and N their sides.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor

from .wrap.handle import Handle

# The elements of matrices that are computed together.
_ELEMENTS_AT_ONCE = 1 << 24
# Of the quintic of the iterations, by Keller Jordan: steepest at zero.
_A, _B, _C = 3.4445, -4.7750, 2.0315
_ITERATIONS = 5
_SMALLEST_NORM = 1e-7


class Muon(torch.optim.AdamW):
    """Muon for parameter groups with `use_muon` true, as they are by default; AdamW for the others.

    Args:
        params: groups of `muon_groups(handle)`, or your own. What Muon trains has two dimensions.
        lr, weight_decay: of both; groups may have their own.
        momentum: of Muon.
        betas, eps: of AdamW.

    Raises:
        ValueError: a parameter of a group of Muon that is no matrix.
    """

    def __init__(
        self,
        params: Iterable[Tensor] | Iterable[dict[str, Any]],
        lr: float = 1e-3,
        *,
        weight_decay: float = 0.1,
        momentum: float = 0.95,
        betas: tuple[float, float] = (0.9, 0.95),
        eps: float = 1e-8,
    ):
        if not 0 <= momentum < 1:
            raise ValueError(f"momentum is {momentum}; give a number from 0 to below 1")
        self._momentum = momentum
        super().__init__(params, lr=lr, betas=betas, eps=eps, weight_decay=weight_decay)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """See `torch.optim.Optimizer.add_param_group`."""
        param_group = {"use_muon": True, "momentum": self._momentum, **param_group}
        super().add_param_group(param_group)
        for parameter in self.param_groups[-1]["params"]:
            if param_group["use_muon"] and parameter.ndim != 2:
                self.param_groups.pop()
                raise ValueError(
                    f"Muon trains matrices, and a parameter has the shape {tuple(parameter.shape)}; give the groups of "
                    "moesaic.optim.muon_groups(handle), or a group of such parameters with use_muon=False"
                )

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """See `torch.optim.Optimizer.step`. Collective where FSDP2 has sharded matrices."""
        groups = self.param_groups
        self.param_groups = [group for group in groups if not group["use_muon"]]
        try:
            loss = super().step(closure)
        finally:
            self.param_groups = groups
        for group in groups:
            if group["use_muon"]:
                self._step_matrices(group)
        return loss

    def _step_matrices(self, group: dict[str, Any]) -> None:
        # Sharded ones apart, which all ranks gather in one order; of experts, each rank has others.
        alike: dict[Any, list[nn.Parameter]] = defaultdict(list)
        for parameter in group["params"]:
            if parameter.grad is not None:
                alike[isinstance(parameter, DTensor), parameter.shape, parameter.device, parameter.dtype].append(parameter)
        for (_, shape, _, _), parameters in alike.items():
            num = max(1, _ELEMENTS_AT_ONCE // max(1, shape.numel()))
            scale = 0.2 * math.sqrt(max(shape)) * float(group["lr"])
            for start in range(0, len(parameters), num):
                some = parameters[start : start + num]
                averages = [self._average(parameter, group["momentum"]) for parameter in some]
                for parameter, update in zip(some, _orthogonal(torch.stack(averages)), strict=True):
                    parameter.mul_(1 - float(group["lr"]) * group["weight_decay"])
                    parameter.add_(_as_sharded(update.to(parameter.dtype), parameter), alpha=-scale)

    def _average(self, parameter: nn.Parameter, momentum: float) -> Tensor:
        """The Nesterov average of a gradient and its momentum, whole."""
        assert parameter.grad is not None
        # An expert's gradient is marked as such for norms over all ranks; here it is what it is.
        grad = parameter.grad if isinstance(parameter.grad, DTensor) else parameter.grad.as_subclass(Tensor)
        state = self.state[parameter]
        if "momentum_buffer" not in state:
            state["momentum_buffer"] = torch.zeros_like(grad)
        state["momentum_buffer"].lerp_(grad, 1 - momentum)
        average = grad.lerp(state["momentum_buffer"], momentum)
        return average.full_tensor() if isinstance(average, DTensor) else average


def _orthogonal(x_BMN: Tensor) -> Tensor:
    """The nearest orthogonal matrices, nearly: singular values between 0.7 and 1.2. In bf16 on CUDA, in fp32 on the CPU."""
    if x_BMN.shape[1] > x_BMN.shape[2]:
        return _orthogonal(x_BMN.mT).mT
    x_BMN = x_BMN.to(torch.bfloat16 if x_BMN.is_cuda else torch.float32)
    x_BMN = x_BMN / torch.linalg.matrix_norm(x_BMN, keepdim=True).clamp(min=_SMALLEST_NORM)
    for _ in range(_ITERATIONS):
        gram_BMM = x_BMN @ x_BMN.mT
        x_BMN = _A * x_BMN + (_B * gram_BMM + _C * gram_BMM @ gram_BMM) @ x_BMN
    return x_BMN


def _as_sharded(whole: Tensor, parameter: nn.Parameter) -> Tensor:
    """A tensor that every rank has whole, sharded as the parameter is; nothing is sent."""
    if not isinstance(parameter, DTensor):
        return whole
    return distribute_tensor(whole, parameter.device_mesh, parameter.placements, src_data_rank=None)


def muon_groups(handle: Handle, *, adamw: Sequence[str] = ()) -> list[dict[str, Any]]:
    """The parameters of a sharded model for `Muon`, dense ones and experts apart.

    Muon trains the matrices of experts and of hidden layers; AdamW trains embeddings, output heads that the model names
    (`get_output_embeddings`), routers, and vectors, the last without weight decay.

    Args:
        adamw: patterns of the names of further parameters that AdamW is to train, as ["head.*"].
    """
    handle.parameters()  # FSDP2's shards, also after a forward without a backward
    others = _ids_for_adamw(handle)
    experts = {id(parameter) for parameter in handle.expert_parameters()}
    groups: dict[tuple[bool, str], list[nn.Parameter]] = {
        (is_expert, kind): [] for is_expert in (False, True) for kind in ("muon", "adamw", "vectors")
    }
    for name, parameter in handle.model.named_parameters():
        by_name = any(fnmatchcase(name, pattern) for pattern in adamw)
        is_matrix = parameter.ndim == 2 and min(parameter.shape) > 1
        kind = (
            "vectors" if parameter.ndim < 2 else "muon" if is_matrix and not by_name and id(parameter) not in others else "adamw"
        )
        groups[id(parameter) in experts, kind].append(parameter)
    settings: dict[str, dict[str, Any]] = {
        "muon": {"use_muon": True},
        "adamw": {"use_muon": False},
        "vectors": {"use_muon": False, "weight_decay": 0.0},
    }
    # As many groups on every rank, also where it owns no expert.
    of_experts = ("muon", "vectors") if any(layer.shape.has_bias for layer in handle.layers.values()) else ("muon",)
    return [
        {"params": parameters, **settings[kind]}
        for (is_expert, kind), parameters in groups.items()
        if parameters or (is_expert and kind in of_experts)
    ]


def _ids_for_adamw(handle: Handle) -> set[int]:
    """Embeddings, the output head, and routers: matrices beside the experts with a row for each expert."""
    head = getattr(handle.model, "get_output_embeddings", lambda: None)()
    modules = [module for module in handle.model.modules() if isinstance(module, nn.Embedding)]
    found = {id(parameter) for module in (*modules, *([] if head is None else [head])) for parameter in module.parameters()}
    for name, layer in handle.layers.items():
        block = handle.model.get_submodule(name)
        found |= {id(p) for p in block.parameters() if p.ndim == 2 and p.shape[0] == layer.num_experts}
    return found - {id(parameter) for parameter in handle.expert_parameters()}
