"""DeepSeek-V3: sigmoid scores, chosen with a bias from the groups with the two best experts, scaled; shared experts."""

from typing import Any

from torch import nn

from ..family import FUSED, PROJECTIONS, Family
from .fused import FusedExpertsAdapter, GateRouter, gate_config


class DeepseekV3Adapter(FusedExpertsAdapter):
    """`DeepseekV3MoE`."""

    name = "DeepSeek-V3"
    block_class = "DeepseekV3MoE"
    defined_in = "transformers.models.deepseek_v3.modeling_deepseek_v3"
    family = Family(fused=FUSED, renames=(("router.gate", "gate"), ("shared", "shared_experts")), checkpoint_experts=PROJECTIONS)

    def router(self, block: nn.Module, num_experts: int) -> GateRouter:
        """See `FusedExpertsAdapter.router`."""
        gate: Any = block.gate
        config = gate_config(
            score="sigmoid",
            normalize_weights=gate.norm_topk_prob,
            weight_scale=gate.routed_scaling_factor,
            num_groups=gate.num_group,
            groups_per_token=gate.topk_group,
            group_score="top2",
        )
        return GateRouter(gate, num_experts, gate.top_k, config, bias="e_score_correction_bias")

    def shared(self, block: nn.Module) -> nn.Module:
        """See `FusedExpertsAdapter.shared`."""
        return block.get_submodule("shared_experts")
