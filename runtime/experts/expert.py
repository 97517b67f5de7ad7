"""One expert: its shape, its tensors, and the module that holds its parameters on the rank that owns it.

Shape letters: D model dim, F expert ffn dim.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any, Self

from torch import Tensor, nn

from ...kernels import FFNWeights


@dataclass(frozen=True, slots=True)
class ExpertShape:
    """The shape of one expert: gate_up [2F, D] (gate first, then up; without a gate up alone, [F, D]) and down [D, F].

    With biases gate_up_bias [2F], or [F], and down_bias [D] besides.
    """

    dim: int
    ffn_dim: int
    has_gate: bool = True
    has_bias: bool = False

    def tensor_sizes(self) -> dict[str, tuple[int, ...]]:
        """The size of each of an expert's tensors, in the order in which they travel."""
        D, F = self.dim, self.ffn_dim
        W = 2 * F if self.has_gate else F
        matrices: dict[str, tuple[int, ...]] = {"gate_up": (W, D), "down": (D, F)}
        return matrices | {"gate_up_bias": (W,), "down_bias": (D,)} if self.has_bias else matrices

    @property
    def num_elements(self) -> int:
        """Weights of one expert."""
        return sum(prod(size) for size in self.tensor_sizes().values())


@dataclass(frozen=True, slots=True, eq=False, weakref_slot=True)
class ExpertTensors:
    """Tensors in the shape of one expert: its weights, or its gradients. Views, never copies."""

    gate_up: Tensor  # [2F, D]; [F, D] without a gate
    down: Tensor  # [D, F]
    gate_up_bias: Tensor | None = None  # [2F]; [F] without a gate
    down_bias: Tensor | None = None  # [D]

    def tensors(self) -> tuple[Tensor, ...]:
        """All there are, in the order in which they travel."""
        return tuple(t for t in (self.gate_up, self.down, self.gate_up_bias, self.down_bias) if t is not None)


def group_weights(experts: Sequence[ExpertTensors]) -> FFNWeights:
    """Experts as the kernels take them, one group each."""
    return FFNWeights(
        [e.gate_up for e in experts],
        [e.down for e in experts],
        [e.gate_up_bias for e in experts if e.gate_up_bias is not None],
        [e.down_bias for e in experts if e.down_bias is not None],
    )


class Expert(nn.Module):
    """The parameters of one expert: those of its `ExpertShape`.

    They are ordinary parameters, which optimizers, schedulers, freezing and state dicts treat as any others; their memory is a
    row of the bank. The expert runs as part of its layer, with many others at once, so hooks on its forward would never be
    called and are refused.
    """

    def __init__(self, tensors: Mapping[str, Tensor]):
        super().__init__()
        for name, tensor in tensors.items():
            self.register_parameter(name, nn.Parameter(tensor))

    def parameter(self, name: str) -> nn.Parameter:
        """The parameter of that name."""
        parameter = self._parameters[name]
        assert parameter is not None
        return parameter

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Refuse: an expert is computed by its layer.

        Raises:
            RuntimeError: always.
        """
        raise RuntimeError(
            "an expert has no forward of its own; call its layer, which sends tokens to where the expert is computed"
        )

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """What `Module.to` and its like end in, called on the expert alone: its memory belongs to the bank."""
        for parameter in self.parameters():
            wanted = fn(parameter.new_empty(0))
            if (wanted.dtype, wanted.device) != (parameter.dtype, parameter.device):
                raise ValueError(
                    f"one expert alone cannot go from {parameter.dtype} on {parameter.device} to {wanted.dtype} on "
                    f"{wanted.device}; "
                    "convert the whole model, before shard_experts"
                )
        return self


def _refuse_hook(self: Expert, *args: Any, **kwargs: Any) -> Any:
    raise RuntimeError("hooks on a single expert are never called, as its layer computes many experts at once; hook the layer")


for _kind in ("forward", "forward_pre", "full_backward", "full_backward_pre", "backward"):
    setattr(Expert, f"register_{_kind}_hook", _refuse_hook)
