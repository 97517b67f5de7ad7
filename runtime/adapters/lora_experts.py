"""LoRA on experts of transformers' models, as peft makes it with `target_parameters`: pairs go into the banks with their experts.

peft puts a wrapper around the experts module for each of its tensors that it adapts, one around the other. In a forward a wrapper
adds the products of its pairs, one for each expert, to the tensor. The outermost is replaced, by experts that have a pair each:
they are copied and migrate with it, and compute `x W.T + scale (x A.T) B.T`. Imported where a model has such wrappers.

Shape letters: E experts, r rank.
"""

from __future__ import annotations

from collections.abc import Sequence
from importlib import import_module
from typing import Any

from torch import nn

from ..experts.expert import LoraShape
from ..sharded_experts import ExpertSource, ShardedExperts
from ..step.layer_runtime import LayerRuntime
from .conversions import Conversions
from .experts_modules import LoraPair, TransformersExperts, adopt, carry_hooks, first_matrix, is_experts_module

_layer: Any = import_module("peft.tuners.lora.layer")


def adopt_adapted(name: str, outermost: nn.Module, conversions: Conversions) -> tuple[ShardedExperts, ExpertSource]:
    """As `adopt` for the module that peft's wrappers are around; `name` is that of the outermost.

    Raises:
        ValueError: what peft does is not LoRA with one active adapter, on matrices of frozen experts.
    """
    pairs: list[LoraPair] = []
    wrapper: Any = outermost
    experts: Any = wrapper.get_base_layer()
    inner_name, matrices = name, {first_matrix(experts): "gate_up", "down_proj": "down"}
    while not is_experts_module(wrapper):
        pairs.append(_pair_of(f"{inner_name}, {type(wrapper).__name__},", inner_name, wrapper, matrices))
        wrapper, inner_name = wrapper.base_layer, f"{inner_name}.base_layer"
    _check_frozen(name, experts)
    pairs.sort(key=lambda pair: pair.shape.matrix != "gate_up")
    new, source = adopt(name, experts, conversions, inner_name=inner_name, pairs=pairs, kind=AdaptedExperts)
    carry_hooks(outermost, new)
    new.stand_ins = (outermost,)
    new._active_adapter = outermost.active_adapters
    return new, source


def _pair_of(what: str, name: str, wrapper: Any, matrices: dict[str, str]) -> LoraPair:
    """The pairs of one wrapper."""
    if not isinstance(wrapper, _layer.ParamWrapper):
        raise ValueError(f"{what} is not LoRA on a tensor of the experts, the only method of peft here; use target_parameters")
    if wrapper.parameter_name not in matrices:
        raise ValueError(
            f"{what} adapts {wrapper.parameter_name}, but experts take LoRA on matrices: target_parameters of {list(matrices)}"
        )
    adapters = list(wrapper.lora_A)
    if len(adapters) != 1 or wrapper.active_adapters != adapters or wrapper.merged or wrapper.disable_adapters:
        state = "merged" if wrapper.merged else "disabled" if wrapper.disable_adapters else f"active {wrapper.active_adapters}"
        raise ValueError(
            f"{what} has the adapters {adapters}, {state}, but experts take one, which is active and not merged; "
            "delete, enable or unmerge adapters before shard_experts"
        )
    if "forward" in vars(wrapper):
        raise ValueError(f"{what} has a forward of its own, on the instance, which would be lost; undo it")
    (adapter,) = adapters
    a, b = wrapper.lora_A[adapter].weight, wrapper.lora_B[adapter].weight
    shape = LoraShape(matrices[wrapper.parameter_name], wrapper.r[adapter], float(wrapper.scaling[adapter]))
    return LoraPair(shape, name, ((f"lora_A.{adapter}.weight", a), (f"lora_B.{adapter}.weight", b)))


def _check_frozen(name: str, experts: nn.Module) -> None:
    trained = [weight for weight, parameter in experts.named_parameters() if parameter.requires_grad]
    if trained:
        raise ValueError(
            f"{name} has adapters, and {trained[0]} requires a gradient, but of experts with adapters only these are trained; "
            "freeze it, or merge the adapters before shard_experts"
        )


class AdaptedExperts(TransformersExperts, _layer.LoraLayer):
    """Experts with adapters, which peft finds as one of its layers: it switches them off and on, as `disable_adapter` does."""

    adapter_layer_names = ()
    other_param_names = ()

    def share(self, runtime: LayerRuntime) -> None:
        """See `ShardedExperts.share`."""
        super().share(runtime)
        for wrapper in self.stand_ins:
            wrapper.to("meta")

    def enable_adapters(self, enabled: bool) -> None:
        """See peft's `BaseTunerLayer`, also for what is below."""
        self._disable_adapters = not enabled
        self.runtime.context.adapts = enabled
        self._train_adapters(enabled)

    def set_adapter(self, adapter_names: str | Sequence[str], inference_mode: bool = False) -> None:
        """Train the adapter, or freeze it; there is no other."""
        wanted = [adapter_names] if isinstance(adapter_names, str) else list(adapter_names)
        if wanted != self.active_adapters:
            raise RuntimeError(
                f"{self.runtime.name} has the adapter {self.active_adapters} alone, and {wanted} cannot be active there"
            )
        self._train_adapters(not inference_mode)

    def set_requires_grad(self, adapter_names: str | Sequence[str], requires_grad: bool = True) -> None:
        """Train the adapter, or freeze it, if it is one of these."""
        if self.active_adapters[0] in ([adapter_names] if isinstance(adapter_names, str) else adapter_names):
            self._train_adapters(requires_grad)

    def _train_adapters(self, are_trained: bool) -> None:
        for expert in self:
            for name in self.shape.lora_sizes():
                expert.parameter(name).requires_grad_(are_trained)
