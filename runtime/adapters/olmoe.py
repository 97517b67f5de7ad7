"""OLMoE: softmax scores, normalized if the model says so, no shared expert."""

from typing import Any

from torch import nn

from ..family import FUSED, PROJECTIONS, Family
from .fused import FusedExpertsAdapter, GateRouter, gate_config


class OLMoEAdapter(FusedExpertsAdapter):
    """`OlmoeSparseMoeBlock`."""

    name = "OLMoE"
    block_class = "OlmoeSparseMoeBlock"
    defined_in = "transformers.models.olmoe.modeling_olmoe"
    family = Family(fused=FUSED, renames=(("router.gate", "gate"),), checkpoint_experts=PROJECTIONS)

    def router(self, block: nn.Module, num_experts: int) -> GateRouter:
        """See `FusedExpertsAdapter.router`."""
        gate: Any = block.gate
        return GateRouter(gate, num_experts, gate.top_k, gate_config(normalize_weights=gate.norm_topk_prob))
