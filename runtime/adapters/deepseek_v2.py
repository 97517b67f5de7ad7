"""DeepSeek-V2: softmax scores, scaled, from the groups with the best expert; shared experts."""

from typing import Any

from torch import nn

from ..family import FUSED, PROJECTIONS, Family
from .fused import FusedExpertsAdapter, GateRouter, gate_config


class DeepseekV2Adapter(FusedExpertsAdapter):
    """`DeepseekV2Moe`."""

    name = "DeepSeek-V2"
    block_class = "DeepseekV2Moe"
    defined_in = "transformers.models.deepseek_v2.modeling_deepseek_v2"
    family = Family(fused=FUSED, renames=(("router.gate", "gate"), ("shared", "shared_experts")), checkpoint_experts=PROJECTIONS)

    def router(self, block: nn.Module, num_experts: int) -> GateRouter:
        """See `FusedExpertsAdapter.router`."""
        gate: Any = block.gate
        if gate.topk_method not in ("greedy", "group_limited_greedy"):
            raise ValueError(f"DeepSeek-V2: topk_method is {gate.topk_method!r}; set 'greedy' or 'group_limited_greedy'")
        is_grouped = gate.topk_method == "group_limited_greedy"
        config = gate_config(
            normalize_weights=False,
            weight_scale=gate.routed_scaling_factor,
            num_groups=gate.num_group if is_grouped else None,
            groups_per_token=gate.topk_group if is_grouped else None,
        )
        return GateRouter(gate, num_experts, gate.top_k, config)

    def shared(self, block: nn.Module) -> nn.Module:
        """See `FusedExpertsAdapter.shared`."""
        return block.get_submodule("shared_experts")
