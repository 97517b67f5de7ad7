"""One expert: its shape, its tensors, and the module that holds its parameters on the rank that owns it.

Shape letters: D model dim, F expert ffn dim.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any, Self

from torch import Tensor, nn

from ...kernels import FFNWeights, LowRank


@dataclass(frozen=True, slots=True)
class LoraShape:
    """A low-rank pair beside one matrix of an expert, which is frozen: it adds `scale * B A` to the matrix (LoRA).

    The pair of gate_up is gate_up_lora_A [rank, D] and gate_up_lora_B [2F, rank], that of down down_lora_A [rank, F] and
    down_lora_B [D, rank].
    """

    matrix: str
    rank: int
    scale: float

    @property
    def names(self) -> tuple[str, str]:
        """Of A and B."""
        return f"{self.matrix}_lora_A", f"{self.matrix}_lora_B"


@dataclass(frozen=True, slots=True)
class ExpertShape:
    """The shape of one expert: gate_up [2F, D] (gate first, then up; without a gate up alone, [F, D]) and down [D, F].

    With biases gate_up_bias [2F], or [F], and down_bias [D] besides; with adapters their pairs. Adapters alone are trained then.
    """

    dim: int
    ffn_dim: int
    has_gate: bool = True
    has_bias: bool = False
    lora: tuple[LoraShape, ...] = ()

    def base_sizes(self) -> dict[str, tuple[int, ...]]:
        """The size of each of an expert's tensors but for adapters, in the order in which they travel."""
        D, F = self.dim, self.ffn_dim
        W = 2 * F if self.has_gate else F
        matrices: dict[str, tuple[int, ...]] = {"gate_up": (W, D), "down": (D, F)}
        return matrices | {"gate_up_bias": (W,), "down_bias": (D,)} if self.has_bias else matrices

    def lora_sizes(self) -> dict[str, tuple[int, ...]]:
        """The size of each of the adapters' tensors, in the order in which they travel."""
        matrices = self.base_sizes()
        sizes: dict[str, tuple[int, ...]] = {}
        for pair in self.lora:
            (outputs, inputs), (a, b) = matrices[pair.matrix], pair.names
            sizes |= {a: (pair.rank, inputs), b: (outputs, pair.rank)}
        return sizes

    def tensor_sizes(self) -> dict[str, tuple[int, ...]]:
        """The size of each of an expert's tensors, in the order in which they travel."""
        return self.base_sizes() | self.lora_sizes()

    def gradient_sizes(self) -> dict[str, tuple[int, ...]]:
        """Of those that there may be gradients of: the adapters, or everything where there is none."""
        return self.lora_sizes() or self.base_sizes()


def num_elements(sizes: Mapping[str, tuple[int, ...]]) -> int:
    """Numbers in tensors of these sizes."""
    return sum(prod(size) for size in sizes.values())


class ExpertTensors:
    """Tensors of one expert by name, in the order in which they travel: its weights, or its gradients. Views, never copies."""

    __slots__ = ("__weakref__", "_by_name")

    def __init__(self, **by_name: Tensor):
        self._by_name = by_name

    def __getitem__(self, name: str) -> Tensor:
        return self._by_name[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._by_name)

    def __contains__(self, name: str) -> bool:
        return name in self._by_name

    def tensors(self) -> tuple[Tensor, ...]:
        """All there are."""
        return tuple(self._by_name.values())

    @property
    def gate_up(self) -> Tensor:
        """[2F, D]; [F, D] without a gate."""
        return self._by_name["gate_up"]

    @property
    def down(self) -> Tensor:
        """[D, F]."""
        return self._by_name["down"]


def group_weights(experts: Sequence[ExpertTensors], shape: ExpertShape) -> FFNWeights:
    """Experts as the kernels take them, one group each; gradients of adapters have nothing for the frozen matrices."""

    def of_all(name: str) -> list[Tensor]:
        return [expert[name] for expert in experts if name in expert]

    pairs = {pair.matrix: LowRank(of_all(pair.names[0]), of_all(pair.names[1]), pair.scale) for pair in shape.lora}
    return FFNWeights(
        of_all("gate_up"), of_all("down"), of_all("gate_up_bias"), of_all("down_bias"), pairs.get("gate_up"), pairs.get("down")
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
