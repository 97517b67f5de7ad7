"""Observation of a model on one rank or several: outputs, gradients, global norm, router losses, counts.

The loss is a fixed random projection of the outputs plus the router losses. One rank takes the parts of the batch one after the
other, one part per rank of the comparison, and runs backward through their mean; each of R ranks takes its own part.

Where the scores of two experts differ by rounding alone, another order of summation may choose the other expert, which changes
everything after it. So on several ranks moesaic's routers use the reference's choices; choices that they would have made
differently, or that routers of other libraries did make differently, are reported.

Shape letters: T tokens, K top-k, R ranks, E experts.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ...placement import ExpertLoad
from ...runtime import Handle, MoELayer, Routing
from ...runtime.adapters.weights import whole
from ...runtime.layer import moe_layers
from ...runtime.routing.router import ScoringRouter
from ...runtime.sharded_experts import ShardedExperts
from ...runtime.step.replay import is_recomputing
from .target import Inputs


@dataclass
class Reference:
    """The observation on one rank."""

    outputs: list[dict[str, Tensor]]
    """For every part of the batch, by name."""
    gradients: dict[str, Tensor] = field(default_factory=dict)
    """By logical name, without parameters that no gradient reached."""
    norm: float = 0.0
    aux_loss: float = 0.0
    loads: dict[str, Tensor] = field(default_factory=dict)
    """Assignments by layer, int64 [R, E], one line per part of the batch."""
    choices: dict[str, list[list[Tensor]]] = field(default_factory=dict)
    """The chosen experts, int64 [T, K], by layer, part of the batch, and call."""


def outputs_of(model: nn.Module, part: Inputs) -> dict[str, Tensor]:
    """The differentiable tensors that the forward returns, by name. Raises ValueError if there is none."""
    found: dict[str, Tensor] = {}

    def collect(name: str, value: Any) -> None:
        if isinstance(value, Tensor) and value.is_floating_point() and value.requires_grad:
            found[name or "output"] = value
        elif isinstance(value, Mapping):
            for key, item in value.items():
                collect(f"{name}.{key}".lstrip("."), item)
        elif isinstance(value, tuple | list):
            for index, item in enumerate(value):
                collect(f"{name}[{index}]", item)

    returned = model(*part.args, **part.kwargs)
    collect("", returned)
    if not found:
        raise ValueError(
            f"the forward returned {type(returned).__name__} without a differentiable tensor; return tensors, in tuples or "
            "dicts, and let some parameter require a gradient"
        )
    return found


def projection(outputs: Mapping[str, Tensor], part: int) -> Tensor:
    """A scalar that depends on every output of one part of the batch, with fixed random coefficients."""
    generator = torch.Generator().manual_seed(1000 + part)
    terms = [
        (output.float() * torch.randn(output.shape, generator=generator).to(output.device)).sum() / math.sqrt(output.numel())
        for output in outputs.values()
    ]
    return torch.stack(terms).sum()


def disable_dropout(model: nn.Module, layers: Mapping[str, ShardedExperts]) -> None:
    """Set evaluation mode, without dropout, but for the MoE layers, whose planning needs training mode."""
    model.eval()
    for layer in (*layers.values(), *moe_layers(model).values()):
        layer.training = True


def observe_unwrapped(model: nn.Module, inputs: Inputs, num_parts: int) -> Reference:
    """Outputs and gradient norm of the model as built, without router losses. Its gradients are cleared afterwards."""
    model.eval()
    outputs = [outputs_of(model, inputs.part(index, num_parts)) for index in range(num_parts)]
    torch.stack([projection(each, index) for index, each in enumerate(outputs)]).mean().backward()
    grads = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
    norm = torch.stack([torch.linalg.vector_norm(grad, dtype=torch.float64) for grad in grads]).norm()
    model.zero_grad()
    return Reference([_detached(each) for each in outputs], norm=float(norm))


def observe_on_one(handle: Handle, inputs: Inputs, num_parts: int, *, with_aux_loss: bool) -> Reference:
    """The whole observation of a model sharded over one rank."""
    with recorded_choices(handle) as routings:
        outputs, starts = [], []
        for index in range(num_parts):
            starts.append({name: len(calls) for name, calls in routings.items()})
            outputs.append(outputs_of(handle.model, inputs.part(index, num_parts)))
    parts = {
        name: [calls[a[name] : b[name]] for a, b in zip(starts, [*starts[1:], {name: len(calls)}], strict=True)]
        for name, calls in routings.items()
    }
    loads = {
        name: np.stack([sum(r.counts_E(handle.layers[name].num_experts).cpu().numpy() for r in calls) for calls in of_part])
        for name, of_part in parts.items()
        if all(of_part)
    }
    aux_loss = _aux_loss(moe_layers(handle.model), parts, num_parts)
    loss = torch.stack([projection(each, index) for index, each in enumerate(outputs)]).mean()
    (loss + aux_loss if with_aux_loss else loss).backward()
    found = Reference(
        [_detached(each) for each in outputs],
        {name: grad.clone().cpu() for name, grad in gradients_of(handle) if grad is not None},
        float(handle.clip_grad_norm_(math.inf)),
        float(aux_loss.detach()),
        {name: torch.from_numpy(load_RE) for name, load_RE in loads.items()},
        {name: [[r.topk_ids_TK.cpu() for r in calls] for calls in of_part] for name, of_part in parts.items()},
    )
    handle.model.zero_grad()
    handle.step()
    return found


def _aux_loss(layers: Mapping[str, MoELayer], parts: Mapping[str, list[list[Routing]]], num_parts: int) -> Tensor:
    """The mean over the parts of the router losses that one rank per part would have."""
    losses = [torch.zeros(())]
    for name, layer in layers.items():
        for calls in zip(*parts[name], strict=True):
            load = ExpertLoad(np.stack([routing.counts_E(layer.num_experts).cpu().numpy() for routing in calls]))
            losses += [layer.router.loss(routing, load, rank) / num_parts for rank, routing in enumerate(calls)]
    return torch.stack([loss.to(losses[-1].device) for loss in losses]).sum()


def _detached(outputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: output.detach().cpu() for name, output in outputs.items()}


def gradients_of(handle: Handle) -> Iterator[tuple[str, Tensor | None]]:
    """This rank's gradients by logical name: dense gradients unsharded, and those of owned experts. Collective."""
    for name, parameter in handle.model.named_parameters():
        yield name, None if parameter.grad is None else whole(parameter.grad)


@contextmanager
def _hooked(handle: Handle, seen: Callable[[str, Routing, nn.Module | None], Tensor | None]) -> Iterator[None]:
    """Inside the block call `seen(layer, routing, router)` for every routing, recomputations excepted.

    The router is None for layers of other libraries. If `seen` returns expert ids, moesaic's router uses these instead.
    """

    def by_router(name: str) -> Any:
        def after(router: nn.Module, args: tuple[Any, ...], routing: Routing) -> Routing:
            if len(args) > 1 and args[1] is not None:  # a recomputation
                return routing
            ids_TK = seen(name, routing, router)
            return routing if ids_TK is None else router.forward(args[0], ids_TK)

        return after

    def by_experts(name: str) -> Any:
        def before(experts: nn.Module, args: tuple[Any, ...]) -> None:
            if not is_recomputing():
                seen(name, Routing(args[1].detach(), args[2].detach()), None)

        return before

    own = moe_layers(handle.model)
    hooks = [layer.router.register_forward_hook(by_router(name)) for name, layer in own.items()]
    hooks += [e.register_forward_pre_hook(by_experts(name)) for name, e in handle.layers.items() if name not in own]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


@contextmanager
def recorded_choices(handle: Handle) -> Iterator[dict[str, list[Routing]]]:
    """Record the routings inside the block, by layer, in the order of calls."""
    routings: dict[str, list[Routing]] = {name: [] for name in handle.layers}
    with _hooked(handle, lambda name, routing, router: routings[name].append(routing)):
        yield routings


@dataclass
class Choices:
    """A rank's own choices compared with the reference's."""

    num_choices: int = 0
    num_other: int = 0
    """Tokens with other experts than in the reference."""
    worst: str = ""
    worst_gap: float = 0.0
    """The difference between the scores of chosen and reference expert, as a share of the layer's largest score."""

    def compare(self, name: str, routing: Routing, expected_TK: Tensor, router: nn.Module | None = None) -> bool:
        """Compare one call; return whether its choices are the reference's."""
        chosen, reference = routing.topk_ids_TK.sort(dim=1).values, expected_TK.sort(dim=1).values
        is_other_T = (chosen != reference).any(dim=1)
        self.num_choices += len(is_other_T)
        if not is_other_T.any():
            return True
        self.num_other += int(is_other_T.sum())
        gap = math.inf
        if isinstance(router, ScoringRouter) and routing.logits_TE is not None:
            scores_TE = router.choice_scores(routing.logits_TE.detach())
            # The K-th best score, minus the lowest score of the reference's choice.
            gaps_T = scores_TE.gather(1, chosen).min(dim=1).values - scores_TE.gather(1, reference).min(dim=1).values
            gap = float(gaps_T[is_other_T].max() / scores_TE[scores_TE.isfinite()].abs().max().clamp(min=1e-20))
        if gap >= self.worst_gap:
            self.worst, self.worst_gap = name, gap
        return False


@contextmanager
def followed_choices(handle: Handle, expected: Mapping[str, Sequence[Tensor]]) -> Iterator[Choices]:
    """Inside the block compare the choices of each call with `expected`, which moesaic's own routers then use."""
    choices = Choices()
    expected_calls = {name: list(calls) for name, calls in expected.items()}

    def follow(name: str, routing: Routing, router: nn.Module | None) -> Tensor | None:
        ids_TK = expected_calls[name].pop(0).to(routing.topk_ids_TK.device)
        return None if choices.compare(name, routing, ids_TK, router) else ids_TK

    with _hooked(handle, follow):
        yield choices
