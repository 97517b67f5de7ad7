"""Kernels of one MoE layer, one op per file: the public function, its torch twin of the same signature, its Triton kernel.

host_values.py          Asynchronous host-to-device copies of small integer arrays.
types.py                Types shared by several ops, or by an op with its Triton kernel and its compiled CPU routine.
checks.py               Checks of an op's arguments before it runs: one device, a supported dtype, integer ids, contiguous rows.
grouped_gemm_tiles.py   Launch parameters of a grouped product on the GPU: its permitted tiles, the fastest of them, and whether
                        TMA loads operands.
histogram_triton.py     Triton kernel of `histogram`, which counts block by block, without atomics.
cpu/                    Shared by the compiled CPU routines: BLAS, memory by address, operands of fp32 tensors, torch's threads.
groups.py               Ragged groups of rows: their checks, their slices, and the weight gradient of one group.
permute_triton.py       Triton kernels of `gather_rows` and `sum_rows`.
swiglu_triton.py        Triton kernels of `swiglu` and `swiglu_backward`.
topk_gate_triton.py     Triton kernels of `topk_gate` and its backward.
histogram.py            Counts of ids: `histogram`, the load of every expert from the ids that the router chose.
split_tokens_triton.py  Triton kernels of `split_tokens`: a counting sort without atomics and without a host synchronisation.
grouped_gemm_cpu.py     The products of all groups in one compiled call, fp32 on the CPU.
permute_cpu.py          Compiled row copies and row sums for the CPU.
swiglu_cpu.py           Compiled single-pass SwiGLU for the CPU.
grouped_gemm_triton.py  Triton kernels of the grouped matrix products.
topk_gate.py            The router's gate: scores, top-k choice, weights, log-sum-exp and load histogram from the logits, and its
                        backward.
split_tokens.py         The exact split applied on one rank: which of its assignments go to which replica, and in which order.
permute.py              Token rows to expert-major order and back: `gather_rows` and its transpose `sum_rows`.
grouped_ffn_cpu.py      The expert FFN of all groups in one compiled call, fp32 on the CPU: per chunk its products and the
                        activation between them.
swiglu.py               SwiGLU with row weights: `h = silu(gate) * up * row_weight`, and its backward from the pre-activation.
grouped_gemm.py         Ragged matrix products, one per group of rows: forward, input gradient, weight gradient.
grouped_ffn.py          The expert FFN over ragged groups: `y = (silu(x Wg) * (x Wu) * row_weight) Wd`, forward and backward.
low_rank.py             Ragged products with matrices to which low-rank pairs are added: `y = x (W + scale * B A).T`, never
                        forming the sum.
activated_ffn.py        The expert FFN over ragged groups with any activation, optional biases and low-rank pairs: forward and
                        backward.
"""

from .activated_ffn import Activation, Clamp, activated_ffn, activated_ffn_backward, gated_silu
from .grouped_ffn import grouped_ffn, grouped_ffn_backward
from .grouped_gemm import grouped_gemm, grouped_gemm_backward, grouped_gemm_dgrad, grouped_gemm_wgrad
from .histogram import histogram
from .host_values import on_device
from .permute import bags_of, gather_rows, sum_rows
from .split_tokens import split_tokens
from .swiglu import swiglu, swiglu_backward
from .topk_gate import gate_scores, topk_gate, topk_gate_backward
from .types import Bags, FFNWeights, Gate, GroupedFFNGrads, GroupedFFNOutput, LowRank, SwigluGrads

__all__ = [
    "Activation",
    "Bags",
    "Clamp",
    "FFNWeights",
    "Gate",
    "GroupedFFNGrads",
    "GroupedFFNOutput",
    "LowRank",
    "SwigluGrads",
    "activated_ffn",
    "activated_ffn_backward",
    "bags_of",
    "gate_scores",
    "gated_silu",
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
