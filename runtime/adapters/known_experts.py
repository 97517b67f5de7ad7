"""The experts modules of Hugging Face transformers that are replaced, as data: the names and the layout of their weights.

transformers 5 gives most models one experts module a block: `gate_up_proj` [E, 2F, D] and `down_proj` [E, D, F] for all its
experts. Most checkpoints on disk keep experts apart.

Shape letters: E experts, D model dim, F expert ffn dim.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..naming import ExpertNames, WeightNaming

_FUSED = (("gate_up", "experts.gate_up_proj"), ("down", "experts.down_proj"))
_PROJECTIONS = ExpertNames(
    gate="experts.{expert}.gate_proj.weight", up="experts.{expert}.up_proj.weight", down="experts.{expert}.down_proj.weight"
)


class GptOssNaming(WeightNaming):
    """GPT-OSS: weights are [E, in, out], and the columns of gate and up alternate."""

    def to_original(self, weight: str, tensor: Tensor) -> Tensor:
        """See `WeightNaming.to_original`."""
        if weight == "gate_up":
            gate, up = tensor.chunk(2, dim=-2)
            return torch.stack([gate, up], dim=-2).flatten(-3, -2).mT
        if weight == "gate_up_bias":
            gate, up = tensor.chunk(2, dim=-1)
            return torch.stack([gate, up], dim=-1).flatten(-2)
        return tensor.mT if weight == "down" else tensor

    def from_original(self, weight: str, tensor: Tensor) -> Tensor:
        """See `WeightNaming.from_original`."""
        if weight == "gate_up":
            return torch.cat([tensor[..., ::2].mT, tensor[..., 1::2].mT], dim=-2)
        if weight == "gate_up_bias":
            return torch.cat([tensor[..., ::2], tensor[..., 1::2]], dim=-1)
        return tensor.mT if weight == "down" else tensor


@dataclass(frozen=True)
class KnownExperts:
    """One experts module.

    Attributes:
        name: of its models, for messages.
        naming: the names and the layout of its weights.
        has_clamp: biases and the clamped activation of GPT-OSS, in the place of SiLU.
    """

    name: str
    naming: WeightNaming
    has_clamp: bool = False


_APART = WeightNaming(fused=_FUSED, checkpoint_experts=_PROJECTIONS)

KNOWN_EXPERTS: dict[str, KnownExperts] = {
    "mixtral.MixtralExperts": KnownExperts(
        "Mixtral",
        WeightNaming(
            fused=_FUSED,
            checkpoint_experts=ExpertNames(
                gate="experts.{expert}.w1.weight", up="experts.{expert}.w3.weight", down="experts.{expert}.w2.weight"
            ),
            checkpoint_block="block_sparse_moe",
        ),
    ),
    "qwen2_moe.Qwen2MoeExperts": KnownExperts("Qwen2-MoE", _APART),
    "qwen3_moe.Qwen3MoeExperts": KnownExperts("Qwen3-MoE", _APART),
    "olmoe.OlmoeExperts": KnownExperts("OLMoE", _APART),
    "deepseek_v2.DeepseekV2Experts": KnownExperts("DeepSeek-V2", _APART),
    "deepseek_v3.DeepseekV3Experts": KnownExperts("DeepSeek-V3", _APART),
    "deepseek_v3.DeepseekV3NaiveMoe": KnownExperts("DeepSeek-V3", _APART),
    "gpt_oss.GptOssExperts": KnownExperts(
        "GPT-OSS",
        GptOssNaming(
            fused=(
                ("gate_up", "experts.gate_up_proj"),
                ("down", "experts.down_proj"),
                ("gate_up_bias", "experts.gate_up_proj_bias"),
                ("down_bias", "experts.down_proj_bias"),
            )
        ),
        has_clamp=True,
    ),
}
"""By the folder of `transformers.models` and the class of the experts module."""
