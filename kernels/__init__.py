"""Kernels of one MoE layer, one op a file: the public function, its torch twin of the same signature, its Triton kernel."""

from .grouped_ffn import FFNWeights, GroupedFFNGrads, GroupedFFNOutput, grouped_ffn, grouped_ffn_backward
from .grouped_gemm import grouped_gemm, grouped_gemm_dgrad, grouped_gemm_wgrad
from .permute import Bags, bags_of, gather_rows, sum_rows
from .swiglu import SwigluGrads, swiglu, swiglu_backward

__all__ = [
    "Bags",
    "FFNWeights",
    "GroupedFFNGrads",
    "GroupedFFNOutput",
    "SwigluGrads",
    "bags_of",
    "gather_rows",
    "grouped_ffn",
    "grouped_ffn_backward",
    "grouped_gemm",
    "grouped_gemm_dgrad",
    "grouped_gemm_wgrad",
    "sum_rows",
    "swiglu",
    "swiglu_backward",
]
