"""The adapters by family: how MoE blocks are recognised in a model and turned into `MoELayer`."""

from __future__ import annotations

from typing import Protocol

from torch import nn

from ..layer import MoELayer
from .deepseek_v2 import DeepseekV2Adapter
from .deepseek_v3 import DeepseekV3Adapter
from .gpt_oss import GptOssAdapter
from .mixtral import MixtralAdapter
from .olmoe import OLMoEAdapter
from .qwen2_moe import Qwen2MoEAdapter
from .qwen3_moe import Qwen3MoEAdapter


class Adapter(Protocol):
    """Knows one family of MoE blocks."""

    name: str

    def matches(self, module: nn.Module) -> bool:
        """Whether `module` is a block of this family."""

    def convert(self, module: nn.Module) -> MoELayer:
        """A `MoELayer` with the block's weights, which takes its place in the model.

        Set `layer.family` for the weights to be saved and loaded under the names of the model's own family.
        """


class MoELayerAdapter:
    """moesaic's own layer, which needs no conversion."""

    name = "moesaic.MoELayer"

    def matches(self, module: nn.Module) -> bool:
        """See `Adapter.matches`."""
        return isinstance(module, MoELayer)

    def convert(self, module: nn.Module) -> MoELayer:
        """Return the layer itself."""
        assert isinstance(module, MoELayer)
        return module


_ADAPTERS: list[Adapter] = [
    MoELayerAdapter(),
    MixtralAdapter(),
    Qwen2MoEAdapter(),
    Qwen3MoEAdapter(),
    OLMoEAdapter(),
    DeepseekV2Adapter(),
    DeepseekV3Adapter(),
    GptOssAdapter(),
]


def register_adapter(adapter: Adapter) -> None:
    """Teach `shard_experts` a further family of MoE blocks. Later registrations are asked first."""
    _ADAPTERS.insert(0, adapter)


def adopt_moe_layers(model: nn.Module) -> dict[str, MoELayer]:
    """Find every MoE block of `model`, convert it in place, and return the layers by name, in module order.

    Raises ValueError, with what the model consists of, if there is none.
    """
    found: dict[str, tuple[Adapter, nn.Module]] = {}
    for name, module in model.named_modules():
        inside_another = any(name.startswith(outer + ".") for outer in found)
        adapter = None if inside_another else next((a for a in _ADAPTERS if a.matches(module)), None)
        if adapter is not None:
            found[name] = (adapter, module)
    if not found:
        seen = sorted({type(module).__name__ for module in model.modules()})
        known = ", ".join(adapter.name for adapter in _ADAPTERS)
        raise ValueError(
            f"no MoE block in {type(model).__name__}, which consists of {', '.join(seen)}; known blocks: {known}; "
            "teach moesaic yours with register_adapter(adapter)"
        )
    layers = {}
    for name, (adapter, module) in found.items():
        layers[name] = adapter.convert(module)
        if layers[name] is not module:
            model.set_submodule(name, layers[name])
    return layers
