"""What a model computes: outputs, gradients, global norm, router losses, expert counts; on one rank, and what several follow.

The loss is a fixed random projection of the outputs plus the router losses. One rank takes the parts of the batch one after the
other, as many as there are ranks to be compared with, and backward through their mean; each of R ranks takes its own part.
A choice between two experts whose scores differ by rounding alone may fall the other way where sums have another order, and then
everything after it differs. So moesaic's routers follow the reference's choices; those that ranks would have made otherwise, or
that routers of other libraries did make otherwise, are reported.

Shape letters: T tokens, K top-k, R ranks, E experts.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
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
from ...runtime.step.layer_pass import is_recomputing
from .target import Inputs


@dataclass
class Reference:
    """What one rank saw."""

    outputs: list[dict[str, Tensor]]
    """Of every part of the batch, by name."""
    gradients: dict[str, Tensor] = field(default_factory=dict)
    """By logical name; what no gradient reached is left out."""
    norm: float = 0.0
    aux_loss: float = 0.0
    loads: dict[str, Tensor] = field(default_factory=dict)
    """Assignments by layer, int64 [R, E]: of each part of the batch."""
    choices: dict[str, list[list[Tensor]]] = field(default_factory=dict)
    """By layer, of every part of the batch, of every call in it: the experts that were chosen, int64 [T, K]."""


def outputs_of(model: nn.Module, part: Inputs) -> dict[str, Tensor]:
    """The differentiable tensors that a forward returns, by name. Raises ValueError if there is none."""
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
    """A scalar that depends on every output of one part of the batch, with random coefficients that do not change."""
    generator = torch.Generator().manual_seed(1000 + part)
    terms = [
        (output.float() * torch.randn(output.shape, generator=generator).to(output.device)).sum() / math.sqrt(output.numel())
        for output in outputs.values()
    ]
    return torch.stack(terms).sum()


def watch_only(model: nn.Module, layers: Mapping[str, ShardedExperts]) -> None:
    """Turn off what is random in training, such as dropout. MoE layers still train, so that they learn what load to expect."""
    model.eval()
    for layer in (*layers.values(), *moe_layers(model).values()):
        layer.training = True


def observe_unwrapped(model: nn.Module, inputs: Inputs, num_parts: int) -> Reference:
    """Outputs and gradient norm of the model as it was built, without router losses. Its gradients are taken away again."""
    model.eval()
    outputs = [outputs_of(model, inputs.part(index, num_parts)) for index in range(num_parts)]
    torch.stack([projection(each, index) for index, each in enumerate(outputs)]).mean().backward()
    grads = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
    norm = torch.stack([torch.linalg.vector_norm(grad, dtype=torch.float64) for grad in grads]).norm()
    model.zero_grad()
    return Reference([_detached(each) for each in outputs], norm=float(norm))


def observe_on_one(handle: Handle, inputs: Inputs, num_parts: int, *, with_aux_loss: bool) -> Reference:
    """Everything, of a model that is sharded over one rank."""
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
    """The mean over parts of the losses that the routers of so many ranks would have, each for its own part."""
    losses = [torch.zeros(())]
    for name, layer in layers.items():
        for calls in zip(*parts[name], strict=True):
            load = ExpertLoad(np.stack([routing.counts_E(layer.num_experts).cpu().numpy() for routing in calls]))
            losses += [layer.router.loss(routing, load, rank) / num_parts for rank, routing in enumerate(calls)]
    return torch.stack([loss.to(losses[-1].device) for loss in losses]).sum()


def _detached(outputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: output.detach().cpu() for name, output in outputs.items()}


def gradients_of(handle: Handle) -> Iterator[tuple[str, Tensor | None]]:
    """This rank's gradients by logical name: dense ones whole, which is collective, and those of experts that it owns."""
    for name, parameter in handle.model.named_parameters():
        yield name, None if parameter.grad is None else whole(parameter.grad)


@contextmanager
def recorded_choices(handle: Handle) -> Iterator[dict[str, list[Routing]]]:
    """What the routers decide inside the block, by layer, call after call: what the experts are asked for."""
    routings: dict[str, list[Routing]] = {name: [] for name in handle.layers}

    def by_router(name: str) -> Any:
        def after(router: nn.Module, args: tuple[Any, ...], routing: Routing) -> None:
            if len(args) == 1 or args[1] is None:  # not a recomputation
                routings[name].append(routing)

        return after

    def by_experts(name: str) -> Any:
        def before(experts: nn.Module, args: tuple[Any, ...]) -> None:
            if not is_recomputing():
                routings[name].append(Routing(args[1].detach(), args[2].detach()))

        return before

    own = moe_layers(handle.model)
    hooks = [layer.router.register_forward_hook(by_router(name)) for name, layer in own.items()]
    hooks += [e.register_forward_pre_hook(by_experts(name)) for name, e in handle.layers.items() if name not in own]
    try:
        yield routings
    finally:
        for hook in hooks:
            hook.remove()


@dataclass
class Choices:
    """How a rank's own choices compare with the reference's."""

    num_choices: int = 0
    num_other: int = 0
    """Tokens for which other experts were chosen."""
    worst: str = ""
    worst_gap: float = 0.0
    """Between the scores of the expert that was chosen and of the reference's, as a share of the layer's largest score."""

    def compare(self, name: str, routing: Routing, expected_TK: Tensor, router: nn.Module | None = None) -> bool:
        """Take in one call; whether the router chose what the reference did."""
        mine, theirs = routing.topk_ids_TK.sort(dim=1).values, expected_TK.sort(dim=1).values
        is_other_T = (mine != theirs).any(dim=1)
        self.num_choices += len(is_other_T)
        if not is_other_T.any():
            return True
        self.num_other += int(is_other_T.sum())
        gap = math.inf
        if isinstance(router, ScoringRouter) and routing.logits_TE is not None:
            scores_TE = router.choice_scores(routing.logits_TE.detach())
            # The K-th best score, less what the reference took instead.
            gaps_T = scores_TE.gather(1, mine).min(dim=1).values - scores_TE.gather(1, theirs).min(dim=1).values
            gap = float(gaps_T[is_other_T].max() / scores_TE[scores_TE.isfinite()].abs().max().clamp(min=1e-20))
        if gap >= self.worst_gap:
            self.worst, self.worst_gap = name, gap
        return False


@contextmanager
def followed_choices(handle: Handle, expected: Mapping[str, Sequence[Tensor]]) -> Iterator[Choices]:
    """Inside the block choices are compared with `expected`, call after call, and moesaic's own routers choose what it says."""
    choices = Choices()
    num_calls = dict.fromkeys(handle.layers, 0)

    def next_ids(name: str, routing: Routing) -> Tensor:
        num_calls[name] += 1
        return expected[name][num_calls[name] - 1].to(routing.topk_ids_TK.device)

    def by_router(name: str) -> Any:
        def after(router: nn.Module, args: tuple[Any, ...], routing: Routing) -> Routing:
            if len(args) > 1 and args[1] is not None:
                return routing
            ids_TK = next_ids(name, routing)
            return routing if choices.compare(name, routing, ids_TK, router) else router.forward(args[0], ids_TK)

        return after

    def by_experts(name: str) -> Any:
        def before(experts: nn.Module, args: tuple[Any, ...]) -> None:
            if not is_recomputing():
                routing = Routing(args[1].detach(), args[2].detach())
                choices.compare(name, routing, next_ids(name, routing))

        return before

    own = moe_layers(handle.model)
    hooks = [layer.router.register_forward_hook(by_router(name)) for name, layer in own.items()]
    hooks += [e.register_forward_pre_hook(by_experts(name)) for name, e in handle.layers.items() if name not in own]
    try:
        yield choices
    finally:
        for hook in hooks:
            hook.remove()
