"""Types shared by several ops, or by an op with its Triton kernel and its compiled CPU routine. Imports nothing of ours."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, TypeAlias

import torch
from torch import Tensor

Matrices: TypeAlias = Sequence[Tensor] | Tensor
"""One matrix per group, or all of them stacked."""

FORWARD, DGRAD, WGRAD, BACKWARD = range(4)
"""The kinds of a grouped product; BACKWARD is WGRAD and DGRAD."""

Score = Literal["softmax", "sigmoid"]


@dataclass(frozen=True)
class Bags:
    """Groups of row positions in CSR form: bag m holds `indices[offsets[m]:offsets[m + 1]]`, in this order.

    Example: `row_ids_N = [2, 0, 2]` with `num_rows = 3` gives `indices = [1, 0, 2]`, `offsets = [0, 1, 1, 3]`.
    """

    indices: Tensor  # int32 [N]
    offsets: Tensor  # int32 [num_bags + 1]

    def __post_init__(self) -> None:
        if self.indices.dim() != 1 or self.offsets.dim() != 1 or self.offsets.numel() < 1:
            raise ValueError(
                f"Bags needs 1-D indices and 1-D offsets with at least one element, got shapes "
                f"{tuple(self.indices.shape)} and {tuple(self.offsets.shape)}; build them with bags_of"
            )
        if self.indices.dtype != torch.int32 or self.offsets.dtype != torch.int32:
            raise ValueError(f"Bags holds int32, got {self.indices.dtype} and {self.offsets.dtype}; build them with bags_of")

    @property
    def num_bags(self) -> int:
        """Number of bags, empty ones included."""
        return self.offsets.numel() - 1


@dataclass(frozen=True)
class SwigluGrads:
    """What `swiglu_backward` returns: both input gradients and the recomputed forward output."""

    dgate_up_N2F: Tensor
    drow_weights_N: Tensor | None
    h_NF: Tensor


@dataclass(frozen=True)
class LowRank:
    """One pair of rank r per group: `scale * b @ a` is added to the group's matrix [O, I] (LoRA, arXiv 2106.09685).

    Or views to add the gradients of pairs to.
    """

    a: Sequence[Tensor]  # [r, I]
    b: Sequence[Tensor]  # [O, r]
    scale: float


@dataclass(frozen=True)
class FFNWeights:
    """One gate_up [2F, D], or [F, D] without a gate, and one down [D, F] per group: weights, or views to add gradients to.

    Biases, gate_up_bias [2F] or [F] and down_bias [D] per group, and low-rank pairs beside the matrices are those of
    `activated_ffn`; `grouped_ffn` has gates and none of these. Gradients of frozen weights are empty sequences.
    """

    gate_up: Sequence[Tensor]
    down: Sequence[Tensor]
    gate_up_bias: Sequence[Tensor] = ()
    down_bias: Sequence[Tensor] = ()
    gate_up_low_rank: LowRank | None = None
    down_low_rank: LowRank | None = None

    def __post_init__(self) -> None:
        if len(self.gate_up) != len(self.down):
            raise ValueError(f"{len(self.gate_up)} gate_up and {len(self.down)} down matrices; give one pair per group")
        biases = len(self.gate_up_bias), len(self.down_bias)
        if biases not in ((0, 0), (len(self.down), len(self.down))):
            raise ValueError(f"{biases[0]} gate_up and {biases[1]} down biases for {len(self.down)} groups; give all or none")


@dataclass(frozen=True)
class GroupedFFNOutput:
    """Forward result: the weighted output, and the pre-activation that the backward needs."""

    y_ND: Tensor
    gate_up_N2F: Tensor

    @classmethod
    def empty(cls, x_ND: Tensor, weights: FFNWeights) -> GroupedFFNOutput:
        """Buffers for these rows; a rank may hold no expert of a layer, and then has no rows."""
        width = weights.gate_up[0].shape[0] if len(weights.gate_up) else 0
        return cls(x_ND.new_empty(x_ND.shape), x_ND.new_empty(x_ND.shape[0], width))


@dataclass(frozen=True)
class GroupedFFNGrads:
    """Gradients of rows and row weights; weight gradients were added in place."""

    dx_ND: Tensor
    drow_weights_N: Tensor

    @classmethod
    def empty(cls, x_ND: Tensor, row_weights_N: Tensor) -> GroupedFFNGrads:
        """Buffers for the gradients of these."""
        return cls(torch.empty_like(x_ND, memory_format=torch.contiguous_format), torch.empty_like(row_weights_N))


@dataclass(frozen=True)
class Gate:
    """The router's decision for every token."""

    topk_ids_TK: Tensor  # int64, best first
    weights_TK: Tensor  # float32
    lse_T: Tensor | None  # float32, log-sum-exp of the logits: the z-loss is the mean of its square; None if not requested
    load_E: Tensor  # int64, assignments per expert
