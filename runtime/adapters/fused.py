"""What the adapters for Hugging Face transformers share: blocks with a gate module and experts fused into 3-D tensors.

Nothing here imports transformers: a block is known by the name of its class and of the module that defines it.

Shape letters: T tokens, D model dim, F expert ffn dim, E experts.
"""

from __future__ import annotations

from abc import ABC, abstractmethod

from torch import Tensor, nn

from ..bank import Bank
from ..config import RouterConfig
from ..family import Family
from ..layer import MoELayer
from ..router import ScoringRouter


class GateRouter(ScoringRouter):
    """Takes the logits of a family's own gate, which stays in the model: its parameters, its buffers, and hooks on it.

    It computes as in transformers, under `torch.autocast` mostly in bf16; what comes out is cast to fp32.

    transformers collects router logits for its auxiliary loss by a hook on the gate. Balancing losses are the model's own
    affair, so `config` should carry none.

    Args:
        gate: returns the logits [T, E], alone or as the first of several.
        num_experts, top_k, config: see `ScoringRouter`.
        bias: name of the gate's buffer that is added to the scores when experts are chosen.
    """

    def __init__(self, gate: nn.Module, num_experts: int, top_k: int, config: RouterConfig, *, bias: str | None = None):
        super().__init__(num_experts, top_k, config)
        self.gate = gate
        self._bias = bias

    def logits(self, x_TD: Tensor) -> Tensor:
        """See `ScoringRouter.logits`."""
        output = self.gate(x_TD)
        return (output if isinstance(output, Tensor) else output[0]).float()

    def choice_bias(self) -> Tensor | None:
        """See `ScoringRouter.choice_bias`."""
        return None if self._bias is None else getattr(self.gate, self._bias)


class FusedExpertsAdapter(ABC):
    """An adapter for one family of transformers.

    Attributes:
        name: of the family, for messages.
        block_class: name of the block's class.
        defined_in: the module of transformers that defines it.
        family: the names.
    """

    name: str
    block_class: str
    defined_in: str
    family: Family

    def matches(self, module: nn.Module) -> bool:
        """See `Adapter.matches`. A subclass of the family's block is one too."""
        return any(c.__name__ == self.block_class and c.__module__ == self.defined_in for c in type(module).__mro__)

    @abstractmethod
    def router(self, block: nn.Module, num_experts: int) -> ScoringRouter:
        """A router that decides as the block's gate does."""

    def shared(self, block: nn.Module) -> nn.Module | None:
        """The block's shared experts, [T, D] to [T, D]."""
        return None

    def convert(self, module: nn.Module) -> MoELayer:
        """See `Adapter.convert`. The layer takes the block's parameters as they are; none is copied."""
        experts = module.get_submodule("experts")
        gate_up = getattr(experts, "gate_up_proj", None)
        if not isinstance(gate_up, nn.Parameter) or gate_up.ndim != 3:
            raise ValueError(f"{self.name}: the experts of {self.block_class} are not fused; install transformers 5 or newer")
        check_silu(experts, self.name)
        E, twice_F, D = gate_up.shape
        router = self.router(module, E)
        # The bank is made without memory, then given the block's parameters.
        layer = MoELayer(
            D, twice_F // 2, E, router.top_k, router=router, shared=self.shared(module), device="meta", dtype=gate_up.dtype
        )
        layer.family = self.family
        layer.train(module.training)
        assert isinstance(layer.experts, Bank)
        layer.experts.gate_up = gate_up
        layer.experts.down = experts.down_proj  # type: ignore[assignment]
        return layer


def check_silu(experts: nn.Module, name: str) -> None:
    """Raise ValueError unless the experts' activation is SiLU."""
    activation = type(getattr(experts, "act_fn", None)).__name__
    if activation not in ("SiLU", "SiLUActivation"):
        raise ValueError(f"{name}: the experts' activation is {activation}, moesaic computes SiLU; set the config's hidden_act")


def gate_config(
    *,
    score: str = "softmax",
    normalize_weights: bool,
    weight_scale: float = 1.0,
    num_groups: int | None = None,
    groups_per_token: int | None = None,
    group_score: str = "max",
) -> RouterConfig:
    """A router's configuration without losses; the values come from a block, so a None means the default."""
    return RouterConfig(
        score=score,  # type: ignore[arg-type]
        normalize_weights=bool(normalize_weights),
        weight_scale=float(weight_scale),
        num_groups=num_groups or 1,
        groups_per_token=groups_per_token or 1,
        group_score=group_score,  # type: ignore[arg-type]
        aux_loss_coef=0.0,
    )
