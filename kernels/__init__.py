"""Kernels of one MoE layer, one op a file: the public function, its torch twin of the same signature, its Triton kernel."""

from .clamped_ffn import Clamp, clamped_ffn, clamped_ffn_backward
from .grouped_ffn import grouped_ffn, grouped_ffn_backward
from .grouped_gemm import grouped_gemm, grouped_gemm_backward, grouped_gemm_dgrad, grouped_gemm_wgrad
from .histogram import histogram
from .host_values import on_device
from .permute import bags_of, gather_rows, sum_rows
from .split_tokens import split_tokens
from .swiglu import swiglu, swiglu_backward
from .topk_gate import gate_scores, topk_gate, topk_gate_backward
from .types import Bags, FFNWeights, Gate, GroupedFFNGrads, GroupedFFNOutput, SwigluGrads

__all__ = [
    "Bags",
    "Clamp",
    "FFNWeights",
    "Gate",
    "GroupedFFNGrads",
    "GroupedFFNOutput",
    "SwigluGrads",
    "bags_of",
    "clamped_ffn",
    "clamped_ffn_backward",
    "gate_scores",
    "gather_rows",
    "grouped_ffn",
    "grouped_ffn_backward",
    "grouped_gemm",
    "grouped_gemm_backward",
    "grouped_gemm_dgrad",
    "grouped_gemm_wgrad",
    "histogram",
    "on_device",
    "split_tokens",
    "sum_rows",
    "swiglu",
    "swiglu_backward",
    "topk_gate",
    "topk_gate_backward",
]
