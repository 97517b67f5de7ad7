"""Experts modules of Hugging Face transformers: only they are replaced, inside their block, which stays transformers' own.

A block computes its router, its shared experts and its losses as before, and calls `experts(hidden_states, top_k_index,
top_k_weights)`. Nothing here imports transformers: a module is recognized by the names of its class and file.

Shape letters: E experts, D model dim, F expert ffn dim.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from torch.nn.utils import parametrize

from ...kernels import Clamp
from ..experts.expert import ExpertShape, ExpertTensors
from ..sharded_experts import ExpertSource, ShardedExperts
from .known_experts import KNOWN_EXPERTS, KnownExperts

_PACKAGE = "transformers.models."
# Where configurations keep the number of experts per token.
_TOP_K = ("num_experts_per_tok", "num_experts_per_token", "top_k", "moe_topk")


def known_experts(module: nn.Module) -> KnownExperts | None:
    """The entry of an experts module of transformers, or of its nearest base class; None for any other module."""
    for kind in type(module).__mro__:
        if kind.__module__.startswith(_PACKAGE):
            folder = kind.__module__.removeprefix(_PACKAGE).partition(".")[0]
            if found := KNOWN_EXPERTS.get(f"{folder}.{kind.__name__}"):
                return found
    return None


def adopt(name: str, module: nn.Module, known: KnownExperts) -> tuple[ShardedExperts, ExpertSource]:
    """The module to put in the place of transformers' one, without weights yet, and where its weights are.

    Raises:
        ValueError: the module computes something else than transformers' own.
    """
    _check_is_own(name, module, known)
    gate_up = getattr(module, "gate_up_proj", None)
    if not isinstance(gate_up, nn.Parameter) or gate_up.ndim != 3:
        kind = type(module).__name__
        raise ValueError(
            f"{known.name}: {name}, {kind}, has no gate_up_proj of three dimensions; install transformers 5 or newer"
        )
    module_: Any = module
    E, *matrix = gate_up.shape
    clamp = Clamp(float(module_.alpha), float(module_.limit)) if known.has_clamp else None
    twice_F, D = reversed(matrix) if known.has_clamp else matrix
    shape = ExpertShape(D, twice_F // 2, clamp)
    if not gate_up.is_floating_point():
        raise ValueError(f"{known.name}: the weights of {name} are {gate_up.dtype}; load the model without quantization")
    config = getattr(module, "config", None)
    top_k = next((int(getattr(config, key)) for key in _TOP_K if getattr(config, key, None)), 1)
    experts = _TransformersExperts(shape, E, top_k, device="meta", dtype=gate_up.dtype)
    experts.naming = known.naming
    experts.config = config  # type: ignore[assignment]
    experts.train(module.training)
    _carry_hooks(module, experts)
    theirs = {ours: getattr(module, full.removeprefix("experts.")) for ours, full in known.naming.fused}
    source = ExpertSource(
        shape,
        E,
        gate_up.dtype,
        gate_up.device,
        lambda e: ExpertTensors(**{n: known.naming.from_original(n, p.detach()[e]) for n, p in theirs.items()}),
        lambda e, weight: theirs[weight].requires_grad,
        tuple(theirs.values()),
    )
    return experts, source


class _TransformersExperts(ShardedExperts):
    """Experts that are called as those of transformers are."""

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:  # type: ignore[override]
        """See `ShardedExperts.forward`."""
        return super().forward(hidden_states, top_k_index, top_k_weights)


def _check_is_own(name: str, module: nn.Module, known: KnownExperts) -> None:
    """Refuse experts that were changed: what is replaced must compute what transformers' own does."""
    what = f"{known.name}: {name}, {type(module).__name__},"
    if "forward" in vars(module):
        raise ValueError(f"{what} has a forward of its own on the instance, which would be lost; remove it before shard_experts")
    if not type(module).forward.__module__.startswith(_PACKAGE):
        raise ValueError(
            f"{what} overrides forward, which would be lost; override that of the block, which stays, or call register_adapter"
        )
    if parametrize.is_parametrized(module):
        changed = ", ".join(module.parametrizations)  # type: ignore[arg-type]
        raise ValueError(
            f"{what} has parametrized weights ({changed}), which experts on other ranks would lack; "
            "call torch.nn.utils.parametrize.remove_parametrizations first"
        )
    wanted = {full.removeprefix("experts.") for _, full in known.naming.fused}
    weights = {name for name, _ in (*module.named_parameters(), *module.named_buffers())}
    if weights != wanted and hasattr(module, "gate_up_proj"):
        raise ValueError(
            f"{what} has the weights {', '.join(sorted(weights))} where transformers' own has {', '.join(sorted(wanted))}; undo "
            "what changed them before shard_experts, or call register_adapter"
        )
    if known.has_clamp:
        return
    activation = type(getattr(module, "act_fn", None)).__name__
    if activation not in ("SiLU", "SiLUActivation"):
        raise ValueError(
            f"{known.name}: the experts' activation is {activation}, moesaic computes SiLU; set the config's hidden_act"
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
