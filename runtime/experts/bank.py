"""The bank: the memory of the experts that this rank owns, a row each, under the parameters that the rest of a program sees.

A bank spans all MoE layers whose experts have one shape. Its storage has one row per expert that this rank owns; the
parameters of an `Expert` are views of its row, so optimizers, state dicts and loops over parameters see ordinary parameters,
while kernels and collectives take rows by address. Parameters stay with their row: when experts migrate, the row's parameters
get another expert's name, content and optimizer state.

Where experts compute in a narrower dtype than that of the master weights, the bank also keeps its rows in that dtype. This is
what FSDP2 calls `param_dtype`, but a row is cast once a step, and not for every gather.

Shape letters: B rows of this rank, E experts, L layers, D model dim, F expert ffn dim.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

import torch
from torch import Tensor, nn

from ...collectives import LocalTransport, Transport
from ...placement import OwnerMap
from .._compat import version_of
from .expert import Expert, ExpertShape, ExpertTensors
from .expert_grad import ExpertRanks
from .optimizer_watch import OptimizerWatch
from .owned_grads import OwnedGrads
from .slots import lasting


class Bank:
    """The experts that rank `rank` owns under `owners`, all layers together.

    Args:
        shape: of one expert.
        owners: the owner map over the bank's layers; counts per rank may differ, zero included.
        rank: this rank.
        device, dtype: of the master weights.
        adapter_dtype: of those of adapters; `dtype` by default.
        compute_dtype: of the rows as they are computed with and copied; whatever the master weights have by default. Once it is
            given, the master weights keep their dtype as well, since memory and copies are planned by both.
        transport: what the weights will travel on; it allocates their memory.
        replicas: the ranks that own the same experts in other groups, over which gradients are averaged; none by default.
        ranks: that own experts of the model, over all its banks; the ranks of `transport`, with this bank alone, by default.
    """

    def __init__(
        self,
        shape: ExpertShape,
        owners: OwnerMap,
        rank: int,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        adapter_dtype: torch.dtype | None = None,
        compute_dtype: torch.dtype | None = None,
        transport: Transport | None = None,
        replicas: Transport | None = None,
        ranks: ExpertRanks | None = None,
    ):
        self.shape = shape
        self.owners = owners
        self.rank = rank
        self.rows = {pair: row for row, pair in enumerate(owners.rows_of(rank))}
        """The row of every (layer, expert) that this rank owns; other ranks address experts by their number."""
        self._owned_L = _by_layer(self.rows, owners.num_layers)
        num_rows = int(owners.num_rows_R[rank])
        self._transport = transport or LocalTransport()
        self.expert_ranks = ranks or ExpertRanks(self._transport, tuple(owners.num_rows_R.tolist()))
        self.owned_grads = OwnedGrads(tuple(shape.gradient_sizes()), replicas or LocalTransport(), self.expert_ranks)
        like = torch.empty(0, device=device, dtype=dtype)
        likes = dict.fromkeys(shape.lora_sizes(), like.to(adapter_dtype or like.dtype))
        self.storage = {
            name: self._transport.empty((num_rows, *size), likes.get(name, like)) for name, size in shape.tensor_sizes().items()
        }
        """The rows of every weight: gate_up [B, 2F, D], down [B, D, F], biases, adapters."""
        self.experts = [Expert({name: self.storage[name][row] for name in self.weight_names}) for row in range(num_rows)]
        """By row: the module whose parameters are views of the row."""
        self._fixed_compute_dtype = compute_dtype
        self._casts: dict[str, Tensor] = {}  # the rows in the compute dtype, of weights that have another
        self._cast_from: dict[int, tuple[int, ...]] = {}  # by row: the version of the masters that it was cast from
        self.generation = 0
        """The number of changes of the weights that happen on all ranks at the same point; see `weights_changed`."""
        self._watch = OptimizerWatch(self, is_shared=compute_dtype is not None)

    def parameters(self) -> Iterator[nn.Parameter]:
        """Every parameter of the experts owned here, row after row."""
        for expert in self.experts:
            yield from (p for p in expert._parameters.values() if p is not None)  # a walk through modules takes 50 times as long

    def check_conversion(self, fn: Callable[[Tensor], Tensor]) -> None:
        """Raise ValueError if `fn` changes the dtype of experts that ranks share."""
        for storage in self.storage.values() if self._fixed_compute_dtype is not None else ():
            wanted = fn(storage.new_empty(0)).dtype
            if wanted != storage.dtype:
                raise ValueError(
                    f"experts that ranks share are {storage.dtype} and cannot become {wanted}; convert the "
                    "model before shard_experts, or set runtime.compute_dtype"
                )

    def apply(self, fn: Callable[[Tensor], Tensor]) -> None:
        """What `Module.to` and its like do to each tensor, done to the rows and their gradients; parameters keep their identity.

        Raises:
            ValueError: `fn` changes the dtype of experts that ranks share.
        """
        self.check_conversion(fn)
        changed = {name: new for name in self.weight_names if (new := fn(old := self.storage[name])) is not old}
        for name, storage in changed.items():
            self.storage[name] = storage
            for row, expert in enumerate(self.experts):
                parameter = expert.parameter(name)
                grad, parameter.grad = parameter.grad, None
                parameter.data = storage[row]
                if grad is not None:
                    parameter.grad = fn(grad.as_subclass(Tensor))
        if changed:
            self._casts, self._cast_from = {}, {}
            self.owned_grads.drop()

    @property
    def device(self) -> torch.device:
        """The device of the experts."""
        return self.storage["gate_up"].device

    @property
    def gate_up(self) -> Tensor:
        """Every row's gate_up [B, 2F, D], the memory itself, with a copy of the gradients if all have one; to inspect."""
        return self._with_gradients("gate_up")

    @property
    def down(self) -> Tensor:
        """Every row's down [B, D, F]; see `gate_up`."""
        return self._with_gradients("down")

    def _with_gradients(self, weight: str) -> Tensor:
        rows = self.storage[weight].detach()
        grads = [grad for expert in self.experts if (grad := expert.parameter(weight).grad) is not None]
        if len(grads) == len(self.experts):
            rows.grad = torch.stack([grad.as_subclass(Tensor) for grad in grads]) if grads else torch.empty_like(rows)
        return rows

    @property
    def compute_dtype(self) -> torch.dtype:
        """The dtype that experts are computed with and copied in."""
        return self._fixed_compute_dtype or self.storage["gate_up"].dtype

    @property
    def weight_names(self) -> tuple[str, ...]:
        """The names of an expert's weights, in the order in which they travel."""
        return tuple(self.shape.tensor_sizes())

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Draw every weight from the uniform distribution that `nn.Linear` uses, row by row in row order."""
        for name in self.weight_names:
            weights = self.storage[name]
            bound = weights.shape[-1] ** -0.5 if weights.ndim == 3 else 0.0  # biases start at zero
            weights.uniform_(-bound, bound)

    def row_of(self, layer: int, expert: int) -> int:
        """The row of an expert that this rank owns."""
        return self.rows[layer, expert]

    def module_of(self, layer: int, expert: int) -> Expert:
        """The module that holds the parameters of an owned expert."""
        return self.experts[self.row_of(layer, expert)]

    def owned(self, layer: int) -> dict[int, int]:
        """The experts of `layer` that this rank owns, ascending, and their rows."""
        return self._owned_L[layer]

    def adopt(self, owners: OwnerMap, rows: dict[tuple[int, int], int]) -> None:
        """Switch to another owner map, whose experts are in the given rows; see `migrate.migrate`, which has put them there."""
        assert set(rows) == set(owners.rows_of(self.rank)), "rows of other experts than those owned here"
        self.weights_changed()
        self.owners, self.rows, self._owned_L = owners, rows, _by_layer(rows, owners.num_layers)

    def weights(self, layer: int, expert: int) -> ExpertTensors:
        """Master weights of an owned expert, in place."""
        row = self.row_of(layer, expert)
        return ExpertTensors(**{name: self.storage[name][row] for name in self.weight_names})

    @torch.no_grad()
    def compute_weights(self, layer: int, expert: int) -> ExpertTensors:
        """Weights of an owned expert in the compute dtype: the masters themselves, or their cast.

        A row is cast at its first use after the masters changed, by an optimizer or in place; changes through `.data`
        show after `weights_changed`, which every `Handle.step` calls.
        """
        others = {name: rows for name, rows in self.storage.items() if rows.dtype != self.compute_dtype}
        masters, row = self.weights(layer, expert), self.row_of(layer, expert)
        if not others:
            return masters
        if not self._casts:
            self._casts = {name: lasting(self._transport, rows.shape, self.compute_like) for name, rows in others.items()}
        version = self._version_of_rows((row,))
        if self._cast_from.get(row) != version:
            for name, narrow in self._casts.items():
                narrow[row].copy_(masters[name])
            self._cast_from[row] = version
        return ExpertTensors(**{name: self._casts.get(name, self.storage[name])[row] for name in masters})

    def weights_changed(self) -> None:
        """Have every row cast anew at its next use. All ranks call it at the same point.

        Called after steps of optimizers that hold these weights, by `Handle.step`, when weights are loaded or experts migrate.
        """
        self.generation += 1

    def retire(self, parameters: Iterable[nn.Parameter]) -> None:
        """Note parameters that the experts had before; see `OptimizerWatch.retire`."""
        self._watch.retire(parameters)

    @torch.no_grad()
    def claim(self, layer: int) -> None:
        """Have the parameters of a layer's experts be views of their rows again, where they were given other memory.

        `vector_to_parameters` and assignments to `.data` do; `load_state_dict(assign=True)` also replaces the parameters.
        The rows get new memory then: code that swaps averages in keeps the old one, to put it back.
        """
        for name in self.weight_names:
            whole = self.storage[name]
            first, step = whole.data_ptr(), whole.stride(0) * whole.element_size()
            for row in self.owned(layer).values():
                parameter = self.experts[row].parameter(name)
                # A layer built under torch.device("meta") has real parameters once load_state_dict(assign=True) gave it some.
                if parameter.data_ptr() != first + row * step and not parameter.is_meta:
                    self._take_to_new_memory(name)
                    break

    def _take_to_new_memory(self, name: str) -> None:
        """One weight of every row, of all layers, as the parameters have it now."""
        old = self.storage[name]
        parameters = [expert.parameter(name) for expert in self.experts]
        for parameter in parameters:
            if parameter.shape != old.shape[1:] or parameter.dtype != old.dtype:
                raise ValueError(
                    f"an expert's {name} was replaced by {tuple(parameter.shape)}, {parameter.dtype}, but is "
                    f"{tuple(old.shape[1:])}, {old.dtype}; assign a tensor of its shape and dtype"
                )
        given = next(parameter for parameter in parameters if not parameter.is_meta)
        self.storage[name] = new = lasting(self._transport, old.shape, given)
        for row, parameter in enumerate(parameters):
            if not parameter.is_meta:
                new[row].copy_(parameter)
                parameter.data = new[row]
        self._cast_from = {}

    def version(self, layer: int) -> tuple[int, ...]:
        """Changes with the weights of a layer: the first number alike on all ranks, the second in place on this rank."""
        return self._version_of_rows(self.owned(layer).values())

    def _version_of_rows(self, rows: Iterable[int]) -> tuple[int, ...]:
        experts = self.experts
        return self.generation, sum(version_of(p) for row in rows for p in experts[row]._parameters.values() if p is not None)

    @property
    def compute_like(self) -> Tensor:
        """An empty tensor with the dtype and on the device that the experts compute in."""
        return torch.empty(0, dtype=self.compute_dtype, device=self.device)

    @property
    def gradient_like(self) -> Tensor:
        """An empty tensor with the dtype and on the device of the experts' gradients."""
        return self.storage[next(iter(self.shape.gradient_sizes()))].new_empty(0)

    def grads(self, layer: int, expert: int) -> ExpertTensors:
        """Gradient of an owned expert, in place; see `begin_grads`."""
        return self.owned_grads.of(self.row_of(layer, expert))

    def begin_grads(self, layer: int) -> dict[int, bool]:
        """Make room for the gradients of a layer's owned experts in its backward; see `OwnedGrads.begin`."""
        return self.owned_grads.begin(layer, self.owned(layer), self.experts)

    @property
    def cast_bytes(self) -> int:
        """Bytes of the rows that are kept in the compute dtype beside the masters."""
        return sum(cast.nbytes for cast in self._casts.values())

    def is_trainable(self, layer: int) -> bool:
        """Whether a weight of a layer's experts owned here is trainable."""
        return any(p.requires_grad for row in self.owned(layer).values() for p in self.experts[row].parameters())

    @torch.no_grad()
    def take_over(self, experts: Sequence[Expert]) -> None:
        """Make these modules, one for each row, those of the rows, with their content."""
        assert len(experts) == len(self.experts)
        self.experts = list(experts)
        for row, expert in enumerate(experts):
            for name in self.weight_names:
                parameter, storage = expert.parameter(name), self.storage[name][row]
                storage.copy_(parameter)
                parameter.data = storage

    @torch.no_grad()
    def load_rows(self, experts: Mapping[tuple[int, int], ExpertTensors]) -> None:
        """Copy weights into rows: (layer, expert) to tensors, owned experts only. Those on the meta device hold nothing."""
        for (layer, expert), source in experts.items():
            for target, tensor in zip(self.weights(layer, expert).tensors(), source.tensors(), strict=True):
                if not tensor.is_meta:
                    target.copy_(tensor)


def _by_layer(rows: Mapping[tuple[int, int], int], num_layers: int) -> list[dict[int, int]]:
    """By layer: the experts owned here, ascending, and their rows."""
    owned_L: list[dict[int, int]] = [{} for _ in range(num_layers)]
    for (layer, expert), row in sorted(rows.items()):
        owned_L[layer][expert] = row
    return owned_L
