"""Qwen3-MoE: softmax scores, normalized if the model says so, no shared expert."""

from typing import Any

from torch import nn

from ..family import FUSED, PROJECTIONS, Family
from .fused import FusedExpertsAdapter, GateRouter, gate_config


class Qwen3MoEAdapter(FusedExpertsAdapter):
    """`Qwen3MoeSparseMoeBlock`."""

    name = "Qwen3-MoE"
    block_class = "Qwen3MoeSparseMoeBlock"
    defined_in = "transformers.models.qwen3_moe.modeling_qwen3_moe"
    family = Family(fused=FUSED, renames=(("router.gate", "gate"),), checkpoint_experts=PROJECTIONS)

    def router(self, block: nn.Module, num_experts: int) -> GateRouter:
        """See `FusedExpertsAdapter.router`."""
        gate: Any = block.gate
        return GateRouter(gate, num_experts, gate.top_k, gate_config(normalize_weights=gate.norm_topk_prob))
