"""Mixtral: softmax over the chosen experts, no shared expert."""

from typing import Any

from torch import nn

from ..family import FUSED, ExpertNames, Family
from .fused import FusedExpertsAdapter, GateRouter, gate_config


class MixtralAdapter(FusedExpertsAdapter):
    """`MixtralSparseMoeBlock`."""

    name = "Mixtral"
    block_class = "MixtralSparseMoeBlock"
    defined_in = "transformers.models.mixtral.modeling_mixtral"
    family = Family(
        fused=FUSED,
        renames=(("router.gate", "gate"),),
        checkpoint_experts=ExpertNames(
            gate="experts.{expert}.w1.weight", up="experts.{expert}.w3.weight", down="experts.{expert}.w2.weight"
        ),
        checkpoint_block="block_sparse_moe",
    )

    def router(self, block: nn.Module, num_experts: int) -> GateRouter:
        """See `FusedExpertsAdapter.router`."""
        jitter: Any = getattr(block, "jitter_noise", 0.0)
        if jitter:
            raise ValueError(f"Mixtral: router_jitter_noise is {jitter}, which moesaic does not apply; set it to 0")
        gate: Any = block.gate
        return GateRouter(gate, num_experts, gate.top_k, gate_config(normalize_weights=True))
