"""GPT-OSS: softmax over the chosen experts, router and experts with biases, a clamped activation, transposed weights."""

from typing import Any

import torch
from torch import Tensor, nn

from ...kernels import Clamp
from ..bank import Bank
from ..family import Family
from ..layer import MoELayer
from .fused import FusedExpertsAdapter, GateRouter, gate_config


class GptOssFamily(Family):
    """Weights are [E, in, out], and the columns of gate and up alternate."""

    def to_family(self, weight: str, tensor: Tensor) -> Tensor:
        """See `Family.to_family`."""
        if weight == "gate_up":
            gate, up = tensor.chunk(2, dim=-2)
            return torch.stack([gate, up], dim=-2).flatten(-3, -2).mT
        if weight == "gate_up_bias":
            gate, up = tensor.chunk(2, dim=-1)
            return torch.stack([gate, up], dim=-1).flatten(-2)
        return tensor.mT if weight == "down" else tensor

    def from_family(self, weight: str, tensor: Tensor) -> Tensor:
        """See `Family.from_family`."""
        if weight == "gate_up":
            return torch.cat([tensor[..., ::2].mT, tensor[..., 1::2].mT], dim=-2)
        if weight == "gate_up_bias":
            return torch.cat([tensor[..., ::2], tensor[..., 1::2]], dim=-1)
        return tensor.mT if weight == "down" else tensor


class GptOssLayer(MoELayer):
    """Returns what the family's block returns: the output, and in the place of the router's scores, which none reads, None."""

    def forward(self, x: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        """Apply the layer to every token of `x` [..., D]."""
        return super().forward(x), None


class GptOssAdapter(FusedExpertsAdapter):
    """`GptOssMLP`. Its weights are laid out anew, so a layer exists twice while it is converted."""

    name = "GPT-OSS"
    block_class = "GptOssMLP"
    defined_in = "transformers.models.gpt_oss.modeling_gpt_oss"
    family = GptOssFamily(
        fused=(
            ("gate_up", "experts.gate_up_proj"),
            ("down", "experts.down_proj"),
            ("gate_up_bias", "experts.gate_up_proj_bias"),
            ("down_bias", "experts.down_proj_bias"),
        ),
        renames=(("router.gate", "router"),),
    )

    def router(self, block: nn.Module, num_experts: int) -> GateRouter:
        """See `FusedExpertsAdapter.router`."""
        gate: Any = block.router
        return GateRouter(gate, num_experts, gate.top_k, gate_config(normalize_weights=True))

    @torch.no_grad()
    def convert(self, module: nn.Module) -> MoELayer:
        """See `Adapter.convert`."""
        experts: Any = module.get_submodule("experts")
        weights: nn.Parameter = experts.gate_up_proj
        E, D, twice_F = weights.shape
        router = self.router(module, E)
        clamp = Clamp(float(experts.alpha), float(experts.limit))
        layer = GptOssLayer(
            D, twice_F // 2, E, router.top_k, router=router, clamp=clamp, device=weights.device, dtype=weights.dtype
        )
        layer.family = self.family
        layer.train(module.training)
        assert isinstance(layer.experts, Bank)
        for weight, name in self.family.fused:
            getattr(layer.experts, weight).copy_(self.family.from_family(weight, module.get_parameter(name)))
        layer.experts.requires_grad_(weights.requires_grad)
        return layer
