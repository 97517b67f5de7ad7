"""Experts modules of Hugging Face transformers: only they are replaced, inside their block, which stays transformers' own.

A block computes its router, its shared experts and its losses as before, and calls `experts(hidden_states, top_k_index,
top_k_weights)`. What is replaced are modules of classes that went through transformers' `use_experts_implementation`: it declares
what they compute, and says so on each module. Nothing here imports transformers.

Shape letters: E experts, D model dim, F expert ffn dim.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from copy import copy
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from torch import Tensor, nn
from torch.nn.utils import parametrize

from ...kernels import Activation, gated_silu, histogram
from ..experts.expert import ExpertShape, ExpertTensors, LoraShape
from ..sharded_experts import ExpertSource, ShardedExperts
from .conversions import Conversions, InterfaceNaming, interleaved, without_wrappers

_INTERFACE = "transformers.integrations.moe"
# Where configurations keep the number of experts per token.
_TOP_K = ("num_experts_per_tok", "num_experts_per_token", "top_k_experts", "moe_topk", "moe_top_k", "moe_k", "top_k")


def is_experts_module(module: nn.Module) -> bool:
    """Whether the module's class went through transformers' `use_experts_implementation`."""
    return {"is_transposed", "has_bias", "config"} <= vars(module).keys() and hasattr(type(module), "_apply_gate")


def is_wrapped_by_peft(module: nn.Module) -> bool:
    """Whether the module is one of peft around such a module, or around another one of peft around it."""
    is_theirs = type(module).__module__.startswith("peft.") and hasattr(module, "base_layer")
    return is_theirs and is_experts_module(module.get_base_layer())  # type: ignore[operator]


@dataclass(frozen=True, eq=False)
class LoraPair:
    """A low-rank pair on one matrix of all experts, as it is before they are shared."""

    shape: LoraShape
    prefix: str
    """What its weights' names begin with in the model."""
    weights: tuple[tuple[str, nn.Parameter], tuple[str, nn.Parameter]]
    """A and B, with their names behind the prefix."""


def adopt(
    name: str,
    module: nn.Module,
    conversions: Conversions,
    *,
    inner_name: str | None = None,
    pairs: Sequence[LoraPair] = (),
    kind: type[TransformersExperts] | None = None,
) -> tuple[ShardedExperts, ExpertSource]:
    """The module to put in the place of transformers' one, without weights yet, and where its weights are.

    Args:
        name: of what is replaced.
        inner_name: of the module, where what is replaced holds it.
        pairs: low-rank pairs on its matrices.
        kind: of the new module.

    Raises:
        ValueError: the module computes something else than the interface says.
    """
    what, of = f"{name}, {type(module).__name__},", vars(module)
    has_gate, has_bias = of.get("has_gate", True), bool(of["has_bias"])
    naming = _naming_of(name, inner_name or name, module, conversions)
    _check_is_own(what, module, naming)
    theirs: dict[str, Any] = {ours: getattr(module, full.rpartition(".")[2]) for ours, full in naming.fused}
    down, num_experts = theirs["down"], len(theirs["down"])
    if not down.is_floating_point():
        raise ValueError(f"the weights of {what} are {down.dtype}; load the model without quantization")
    D, F = naming.from_original("down", down).shape[1:]
    shape, top_k = ExpertShape(D, F, has_gate, has_bias, tuple(p.shape for p in pairs)), min(top_k_of(of["config"]), num_experts)
    activation = _activation_of(module) or (gated_silu if pairs else None)
    new = (kind or TransformersExperts)(shape, num_experts, top_k, activation=activation, device="meta", dtype=down.dtype)
    for pair in pairs:
        theirs |= {ours: parameter for ours, (_, parameter) in zip(pair.shape.names, pair.weights, strict=True)}
    new.naming = naming = _with_pairs(naming, layer_name(name), pairs)
    new.config = of["config"]
    new.train(module.training)
    _carry_hooks(module, new)
    source = ExpertSource(
        shape,
        num_experts,
        down.dtype,
        down.device,
        lambda e: ExpertTensors(
            **{n: naming.from_original(n, p.detach()[naming.place(n, e, num_experts)]) for n, p in theirs.items()}
        ),
        lambda e, weight: theirs[weight].requires_grad,
        tuple(theirs.values()),
        pairs[0].weights[0][1].dtype if pairs else None,
    )
    return new, source


class TransformersExperts(ShardedExperts):
    """Experts that are called as those of transformers are."""

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:  # type: ignore[override]
        """See `ShardedExperts.forward`. The id E stands for an assignment that is dropped."""
        counts_E = histogram(top_k_index, self.num_experts + 1)[:-1]
        return super().forward(hidden_states, top_k_index, top_k_weights, counts_E=counts_E)


def layer_name(name: str) -> str:
    """The name of a layer whose experts module has this name: that of the block, where the experts are its child `experts`."""
    block, _, last = name.rpartition(".")
    return block if last == "experts" else name


def top_k_of(config: object) -> int:
    """Experts per token, the most where layers differ; 1 where the configuration does not say."""
    values = next((value for key in _TOP_K if (value := getattr(config, key, None))), 1)
    return int(max(values) if isinstance(values, list | tuple) else values)


def first_matrix(module: nn.Module) -> str:
    """What the module calls the matrices before the activation."""
    return "gate_up_proj" if vars(module).get("has_gate", True) else "up_proj"


def _inside(layer: str, name: str) -> str:
    """What names of the weights of module `name` begin with inside of its layer."""
    inside = name.removeprefix(layer).lstrip(".")
    return f"{inside}." if inside else ""


def _naming_of(name: str, inner_name: str, module: nn.Module, conversions: Conversions) -> InterfaceNaming:
    of, layer = vars(module), layer_name(name)
    prefix = _inside(layer, inner_name)
    fused = [("gate_up", f"{prefix}{first_matrix(module)}"), ("down", f"{prefix}down_proj")]
    if of["has_bias"]:
        fused += [(f"{ours}_bias", f"{full}_bias") for ours, full in fused]
    is_plain = not of["has_bias"] and not of["is_transposed"] and of.get("is_concatenated", True)
    return InterfaceNaming(
        tuple(fused),
        # Matrices apart are [out, in].
        checkpoint_experts=conversions.experts(layer, *(without_wrappers(full) for _, full in fused)) if is_plain else None,
        conversions=conversions,
        is_transposed=of["is_transposed"],
        is_interleaved=not of.get("is_concatenated", True),
    )


def _with_pairs(naming: InterfaceNaming, layer: str, pairs: Sequence[LoraPair]) -> InterfaceNaming:
    names = [
        (ours, _inside(layer, pair.prefix) + inner)
        for pair in pairs
        for ours, (inner, _) in zip(pair.shape.names, pair.weights, strict=True)
    ]
    ranks = {pair.shape.names[0]: pair.shape.rank for pair in pairs}
    return replace(naming, fused=(*naming.fused, *names), ranks=ranks)


def _activation_of(module: Any) -> Activation | None:
    """What the module computes between its products; None where that is SwiGLU."""
    if not vars(module).get("has_gate", True):
        return module.act_fn
    is_default = getattr(module._apply_gate, "__module__", None) == _INTERFACE
    is_silu = is_default and (module.act_fn is nn.functional.silu or type(module.act_fn).__name__ in ("SiLU", "SiLUActivation"))
    if is_silu and not module.has_bias:
        return None
    shell = copy(module)  # the function may read what else the module holds, but weights are not kept for it
    shell._parameters = {}
    return shell._apply_gate if vars(module).get("is_concatenated", True) else partial(_of_interleaved, shell._apply_gate)


def _of_interleaved(apply_gate: Callable[[Tensor], Tensor], gate_up_N2F: Tensor) -> Tensor:
    return apply_gate(interleaved(gate_up_N2F, -1))


def _check_is_own(what: str, module: nn.Module, naming: InterfaceNaming) -> None:
    """Refuse experts that were changed: what is replaced must compute what the interface says."""
    if "forward" in vars(module):
        raise ValueError(f"{what} has a forward of its own on the instance, which would be lost; remove it before shard_experts")
    if getattr(type(module).forward, "__globals__", {}).get("__name__") != _INTERFACE:
        raise ValueError(
            f"{what} overrides forward, which would be lost; override that of the block, which stays, or call register_adapter"
        )
    if parametrize.is_parametrized(module):
        changed = ", ".join(module.parametrizations)  # type: ignore[arg-type]
        raise ValueError(
            f"{what} has parametrized weights ({changed}), which experts on other ranks would lack; "
            "call torch.nn.utils.parametrize.remove_parametrizations first"
        )
    if vars(module).get("has_post_expert_norm"):
        raise ValueError(
            f"{what} normalizes every expert's output, with a weight that all its experts share, which moesaic does not compute; "
            "write an adapter (register_adapter)"
        )
    wanted = {full.rpartition(".")[2] for _, full in naming.fused}
    weights = {name for name, _ in (*module.named_parameters(), *module.named_buffers())}
    if weights != wanted:
        raise ValueError(
            f"{what} has the weights {', '.join(sorted(weights))} where transformers' own has {', '.join(sorted(wanted))}; undo "
            "what changed them before shard_experts, or call register_adapter"
        )


_HOOKS = (
    "_forward_hooks",
    "_forward_hooks_with_kwargs",
    "_forward_hooks_always_called",
    "_forward_pre_hooks",
    "_forward_pre_hooks_with_kwargs",
    "_backward_hooks",
    "_backward_pre_hooks",
)


def _carry_hooks(old: nn.Module, new: nn.Module) -> None:
    """Have the hooks of one module on another; the handles that registered them still remove them."""
    for name in _HOOKS:
        setattr(new, name, getattr(old, name))
    new._is_full_backward_hook = old._is_full_backward_hook


def carry_hooks(old: nn.Module, new: nn.Module) -> None:
    """Have the hooks of a module on its replacement, unless that has hooks of its own."""
    if not any(getattr(new, name) for name in _HOOKS):
        _carry_hooks(old, new)
