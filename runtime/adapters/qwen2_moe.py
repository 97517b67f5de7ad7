"""Qwen2-MoE: softmax scores, and one shared expert behind a sigmoid gate of its own."""

from typing import Any

from torch import Tensor, nn

from ..family import FUSED, PROJECTIONS, Family
from .fused import FusedExpertsAdapter, GateRouter, gate_config


class GatedExpert(nn.Module):
    """A shared expert whose output every token scales by sigmoid(gate(x))."""

    def __init__(self, expert: nn.Module, gate: nn.Module):
        super().__init__()
        self.expert = expert
        self.gate = gate

    def forward(self, x_TD: Tensor) -> Tensor:
        """Apply to every token of [T, D]."""
        return self.gate(x_TD).sigmoid() * self.expert(x_TD)


class Qwen2MoEAdapter(FusedExpertsAdapter):
    """`Qwen2MoeSparseMoeBlock`."""

    name = "Qwen2-MoE"
    block_class = "Qwen2MoeSparseMoeBlock"
    defined_in = "transformers.models.qwen2_moe.modeling_qwen2_moe"
    family = Family(
        fused=FUSED,
        renames=(("router.gate", "gate"), ("shared.expert", "shared_expert"), ("shared.gate", "shared_expert_gate")),
        checkpoint_experts=PROJECTIONS,
    )

    def router(self, block: nn.Module, num_experts: int) -> GateRouter:
        """See `FusedExpertsAdapter.router`."""
        gate: Any = block.gate
        return GateRouter(gate, num_experts, gate.top_k, gate_config(normalize_weights=gate.norm_topk_prob))

    def shared(self, block: nn.Module) -> nn.Module:
        """See `FusedExpertsAdapter.shared`."""
        return GatedExpert(block.get_submodule("shared_expert"), block.get_submodule("shared_expert_gate"))
