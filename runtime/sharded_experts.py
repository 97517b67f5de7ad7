"""The experts of one MoE layer as a module: tokens and their routing in, weighted sums of expert outputs out, no router.

Shape letters: T tokens of this rank's micro-batch, D model dim, F expert ffn dim, E experts, K choices per token.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Self

import torch
from torch import Tensor, nn

from ..collectives import Buffer
from ..kernels import Activation
from ..placement import OwnerMap
from ._compat import full_state_dict_requested, outside_graphs
from .experts.bank import Bank
from .experts.expert import Expert, ExpertShape, ExpertTensors, num_elements
from .group import single_rank_group
from .naming import OWN_LAYER, WeightNaming
from .renamed_members import renamed_members
from .routing.capacity import Capacity
from .step.layer_pass import LayerPass
from .step.layer_runtime import LayerRuntime


@dataclass(frozen=True, eq=False)
class ExpertSource:
    """Experts as they are before they are shared, wherever they lie: what `shard_experts` copies the owned ones from."""

    shape: ExpertShape
    num_experts: int
    dtype: torch.dtype
    device: torch.device
    weights: Callable[[int], ExpertTensors]
    """The tensors of one expert; views, or made when asked for."""
    is_trainable: Callable[[int, str], bool]
    """Whether a weight of an expert is trained."""
    parameters: tuple[nn.Parameter, ...]
    """What holds them now, and will not any more."""
    adapter_dtype: torch.dtype | None = None
    """Of adapters; `dtype`, or there are none, by default."""

    @property
    def gradient_bytes(self) -> int:
        """Bytes of one expert's gradients."""
        return num_elements(self.shape.gradient_sizes()) * (self.adapter_dtype or self.dtype).itemsize


@renamed_members(family="naming")
class ShardedExperts(nn.Module):
    """All experts of a MoE layer: y = sum_k weight_k * expert_k(x), wherever an expert lives.

    As built it runs on one process and owns every expert. `shard_experts` leaves it those experts that this rank owns. An expert
    is a child module, named by its number: `experts.3.gate_up` is a parameter on the rank that owns expert 3, and nowhere else.

    Args:
        shape: of one expert.
        num_experts, top_k: E, and K per token.
        activation: of the experts, a function [N, 2F] to [N, F] of gate and up, or [N, F] to [N, F] without a gate; SwiGLU by
            default, for experts with a gate and without biases.
        capacity: how much experts take; everything by default.
        device, dtype: of the weights.
    """

    runtime: LayerRuntime

    def __init__(
        self,
        shape: ExpertShape,
        num_experts: int,
        top_k: int,
        *,
        activation: Activation | None = None,
        capacity: Capacity | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__()
        if activation is None and (shape.has_bias or not shape.has_gate):
            raise ValueError("experts with biases or without a gate have no SwiGLU; give their activation")
        self.shape = shape
        if isinstance(activation, nn.Module):
            if next(activation.parameters(), None) is not None:
                raise ValueError(f"{type(activation).__name__} has parameters, which an experts' activation cannot train")
            activation = activation.__call__
        self.activation = activation
        self.num_experts = num_experts
        self.top_k = top_k
        self.capacity = capacity or Capacity()
        self.naming: WeightNaming = OWN_LAYER
        """The names of the weights in the model that the experts come from."""
        self.is_sharded = False
        self.stand_ins: tuple[nn.Module, ...] = ()
        """What takes its place, without weights, while a library saves the model by its structure; none by default."""
        self._run_on(Bank(shape, OwnerMap.contiguous(1, num_experts, 1), 0, device=device, dtype=dtype))

    def _run_on(self, bank: Bank) -> None:
        """Run on one process, on a bank that holds every expert of this layer."""
        self.runtime = LayerRuntime.on_one_process(bank, self.top_k, self.capacity, single_rank_group(), self.activation)
        self._follow_bank()

    @outside_graphs
    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run hooks and `forward` as they are: a compiled model has one graph before the experts and one behind them."""
        return super().__call__(*args, **kwargs)

    def forward(
        self,
        x_TD: Tensor,
        topk_ids_TK: Tensor,
        weights_TK: Tensor,
        *,
        counts_E: Tensor | None = None,
        meanwhile: Callable[[], Tensor] | None = None,
        layer_pass: LayerPass | None = None,
    ) -> Tensor:
        """Apply the chosen experts to every token [T, D]; the result has the tokens' dtype.

        Args:
            topk_ids_TK: int, K different experts for each token.
            weights_TK: what the experts' outputs are multiplied by, differentiable.
            counts_E: assignments to every expert, where they were counted already.
            meanwhile: computes something [T, D] that is added, while tokens travel.
            layer_pass: of this forward, where the caller has begun it.

        Raises:
            ValueError: shapes that do not fit.
        """
        self._check(x_TD, topk_ids_TK, weights_TK)
        this = layer_pass or self.begin()
        this.plan(topk_ids_TK, counts_E)
        tokens = this.dispatch(x_TD, weights_TK)  # launched
        beside_TD = meanwhile() if meanwhile else None  # while tokens travel
        y_TD = this.combine(this.experts(tokens)).to(x_TD.dtype)
        return y_TD if beside_TD is None else y_TD + beside_TD

    def begin(self) -> LayerPass:
        """The pass of the forward that starts now."""
        return self.runtime.begin(is_training=self.training)

    def _check(self, x_TD: Tensor, topk_ids_TK: Tensor, weights_TK: Tensor) -> None:
        name, dim = self.runtime.name, self.shape.dim
        if x_TD.ndim != 2 or x_TD.shape[1] != dim:
            raise ValueError(
                f"{name} takes tokens of width {dim}, but x is {tuple(x_TD.shape)}; project x, or build the layer for it"
            )
        if not topk_ids_TK.shape == weights_TK.shape == (x_TD.shape[0], topk_ids_TK.shape[-1]):
            shapes = tuple(topk_ids_TK.shape), tuple(weights_TK.shape)
            raise ValueError(f"{name} got {x_TD.shape[0]} tokens, ids {shapes[0]} and weights {shapes[1]}; give both as [T, K]")

    # Which experts are children here

    def source(self) -> ExpertSource:
        """The experts before they are shared."""
        # From the parameters: load_state_dict(assign=True) and `.data` may have given them other memory than the bank's.
        experts, first = list(self), next(self.parameters())
        return ExpertSource(
            self.shape,
            self.num_experts,
            first.dtype,
            first.device,
            lambda e: ExpertTensors(**{name: p.detach() for name, p in experts[e].named_parameters()}),
            lambda e, weight: experts[e].parameter(weight).requires_grad,
            tuple(self.parameters()),
        )

    def share(self, runtime: LayerRuntime) -> None:
        """Run on a bank that ranks share from now on, whose rows hold the experts."""
        self.runtime, self.is_sharded = runtime, True
        self._follow_bank()

    def follow_bank(self) -> None:
        """Go by the bank's owner map, which has changed; see `LayerRuntime.follow_bank`."""
        self.runtime.follow_bank()
        self._follow_bank()

    def _follow_bank(self) -> None:
        bank, layer = self.runtime.bank, self.runtime.layer
        self._modules.clear()
        for expert, row in bank.owned(layer).items():
            self._modules[str(expert)] = bank.experts[row]

    def __getitem__(self, expert: int) -> Expert:
        """The module of an expert that this rank owns.

        Raises:
            KeyError: another rank owns it.
        """
        found = self._modules.get(str(expert))
        if found is None:
            owner_E = self.runtime.bank.owners.expert_to_owner_LE[self.runtime.layer]
            if not 0 <= expert < self.num_experts:
                raise KeyError(f"{self.runtime.name} has experts 0 to {self.num_experts - 1}, none with number {expert}")
            raise KeyError(
                f"expert {expert} of {self.runtime.name} is on rank {owner_E[expert]}; this is rank {self.runtime.group.rank}"
            )
        assert isinstance(found, Expert)
        return found

    def __iter__(self) -> Iterator[Expert]:
        return (self[int(name)] for name in self._modules)

    def __getattr__(self, name: str) -> Any:
        # torch's state-dict functions look up the owner of every name in a full state dict.
        if name.isdecimal() and int(name) < self.__dict__.get("num_experts", 0) and name not in self._modules:
            return _Elsewhere(self.shape)
        return super().__getattr__(name)

    @property
    def gate_up(self) -> Tensor:
        """A copy of every owned expert's gate_up [B, 2F, D], with a copy of their gradients if all have one."""
        return self._stacked("gate_up")

    @property
    def down(self) -> Tensor:
        """A copy of every owned expert's down [B, D, F]; see `gate_up`."""
        return self._stacked("down")

    def _stacked(self, weight: str) -> Tensor:
        parameters = [expert.parameter(weight) for expert in self]
        stacked = torch.stack([parameter.detach() for parameter in parameters])
        grads = [parameter.grad.as_subclass(Tensor) for parameter in parameters if parameter.grad is not None]
        if len(grads) == len(parameters):
            stacked.grad = torch.stack(grads)
        return stacked

    def extra_repr(self) -> str:
        """See `nn.Module.extra_repr`."""
        return f"{self.num_experts} experts, {len(self._modules)} of them here"

    # What torch does to modules

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """What `Module.to` and its like end in: done to the bank, whose memory the experts' parameters are views of."""
        self.runtime.bank.apply(fn)
        return self

    def __getstate__(self) -> dict[str, Any]:
        """For deepcopy and pickle, of experts on one process."""
        if self.is_sharded:
            raise RuntimeError(
                f"{self.runtime.name} is shared with other ranks and can be neither copied nor pickled: copy the model before "
                "shard_experts, or keep a copy of handle.state_dict()"
            )
        return {key: value for key, value in super().__getstate__().items() if key != "runtime"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        copies = list(self._modules.values())
        first = next(copies[0].parameters())  # type: ignore[union-attr]
        bank = Bank(self.shape, OwnerMap.contiguous(1, self.num_experts, 1), 0, device=first.device, dtype=first.dtype)
        bank.take_over(copies)  # type: ignore[arg-type]
        self._run_on(bank)

    # State dicts

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        requested = full_state_dict_requested() if self.is_sharded else None
        if requested is not None:
            destination |= self._gathered_elsewhere(prefix, on_rank_zero_only=requested.on_rank_zero_only)

    @torch.no_grad()
    def _gathered_elsewhere(self, prefix: str, *, on_rank_zero_only: bool) -> dict[str, Tensor]:
        """The weights of experts that other ranks own, an expert at a time. Collective."""
        runtime, bank = self.runtime, self.runtime.bank
        transport = runtime.group.experts
        bank.claim(runtime.layer)
        found: dict[str, Tensor] = {}
        receivers = [0] if on_rank_zero_only else list(range(transport.world_size))
        for expert, owner in enumerate(bank.owners.expert_to_owner_LE[runtime.layer].tolist()):
            sends: list[Buffer] = []
            recvs: list[Buffer] = []
            buffers: dict[str, Tensor] = {}
            if owner == transport.rank:
                tensors = bank.weights(runtime.layer, expert).tensors()
                sends = [Buffer(tensor, rank) for rank in receivers if rank != owner for tensor in tensors]
            elif transport.rank in receivers:
                buffers = {name: rows.new_empty(rows.shape[1:]) for name, rows in bank.storage.items()}
                recvs = [Buffer(buffer, owner) for buffer in buffers.values()]
            transport.exchange(sends, recvs, op="export", where=f"the full state dict of {runtime.name}").wait()
            found |= {
                f"{prefix}{expert}.{name}": buffer.cpu() if on_rank_zero_only else buffer for name, buffer in buffers.items()
            }
        return found

    def _load_from_state_dict(
        self,
        state_dict: dict[str, Any],
        prefix: str,
        local_metadata: Any,
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        """Take the owned experts out of a state that may hold all of them, one by one or, as before sharding, in one tensor."""
        for weight, name in self._fused_names():
            if prefix + name in state_dict:
                fused = state_dict.pop(prefix + name)
                if len(fused) != self.num_experts and weight in self.shape.base_sizes():
                    error_msgs.append(
                        f"size mismatch for {prefix}{name}: it holds {len(fused)} experts, and the model has {self.num_experts}"
                    )
                    continue
                for expert in map(int, self._modules):
                    place = self.naming.place(weight, expert, self.num_experts)
                    tensor = self.naming.from_original(weight, fused[place])
                    state_dict[f"{prefix}{expert}.{weight}"] = tensor
        super()._load_from_state_dict(state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs)
        elsewhere = {
            f"{prefix}{expert}.{weight}"
            for expert in range(self.num_experts)
            if str(expert) not in self._modules
            for weight in self.runtime.bank.weight_names
        }
        unexpected_keys[:] = [key for key in unexpected_keys if key not in elsewhere]
        self.runtime.bank.weights_changed()

    def _fused_names(self) -> list[tuple[str, str]]:
        """(ours, theirs) for weights that a state may hold for all experts in one tensor."""
        return [(weight, name.removeprefix("experts.")) for weight, name in self.naming.fused]


class _Elsewhere:
    """Stands for an expert on another rank where only its parameters' names are looked up."""

    def __init__(self, shape: ExpertShape):
        for name in shape.tensor_sizes():
            setattr(self, name, None)
