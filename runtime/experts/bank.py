"""The bank: memory and gradients of the experts that this rank owns, each once, under the parameters that everybody else sees.

A bank spans all MoE layers whose experts have one shape. Its storage has one row per expert that this rank owns; the
parameters of an `Expert` are views of its row, so an optimizer, a state dict or a loop over parameters meets ordinary
parameters, while kernels and collectives take rows by address. Parameters stay with their row: when experts migrate, the row's
parameters get another expert's name, content and optimizer state. Parameters are never inputs of the autograd graph: the
expert backward and the sparse reduce write gradients where `.grad` of each parameter points.

Where experts compute in a narrower dtype than that of the master weights, the bank also keeps its rows in that dtype. This is
what FSDP2 calls `param_dtype`, but a row is cast once a step, and not for every gather.

Shape letters: B rows of this rank, E experts, L layers, D model dim, F expert ffn dim.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any
from weakref import WeakSet, finalize, ref

import torch
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

from ...collectives import LocalTransport, Transport, average
from ...placement import OwnerMap
from .._compat import (
    call_after_backward,
    current_backward_id,
    full_state_dict_requested,
    hooks_on,
    post_accumulate_hooks,
    version_of,
)
from .expert import Expert, ExpertShape, ExpertTensors
from .expert_grad import ExpertGrad, ExpertRanks
from .slots import lasting


class Bank:
    """The experts that rank `rank` owns under `owners`, all layers together.

    Args:
        shape: of one expert.
        owners: the owner map over the bank's layers; counts per rank may differ, zero included.
        rank: this rank.
        device, dtype: of the master weights.
        compute_dtype: of the rows as they are computed with and copied; whatever the master weights have by default. Once it is
            given, the master weights keep their dtype as well, since memory and copies are planned by both.
        transport: what the weights will travel on; it knows the memory to keep them in.
        replicas: the ranks that own the same experts in other groups, over which gradients are averaged; none by default.
        ranks: who owns experts of the model, over all its banks; the ranks of `transport`, with this bank alone, by default.
    """

    def __init__(
        self,
        shape: ExpertShape,
        owners: OwnerMap,
        rank: int,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        compute_dtype: torch.dtype | None = None,
        transport: Transport | None = None,
        replicas: Transport | None = None,
        ranks: ExpertRanks | None = None,
    ):
        self.shape = shape
        self.owners = owners
        self.rank = rank
        self.rows = {pair: row for row, pair in enumerate(owners.rows_of(rank))}
        """The row of every (layer, expert) that this rank owns. Where an expert lies is nobody else's concern."""
        self._owned_L = _by_layer(self.rows, owners.num_layers)
        num_rows = int(owners.num_rows_R[rank])
        self._grads: dict[int, ExpertTensors] = {}  # by row: the gradients as kernels write them
        self._grad_objects: dict[int, dict[str, ExpertGrad]] = {}  # by row: the same memory as `.grad` has it
        self._scratch: ExpertTensors | None = None  # takes the gradients of frozen weights
        self._backward_id = -1  # the last backward pass that wrote gradients
        self._reached: set[int] = set()  # the layers that it wrote gradients of
        self._replicas = replicas or LocalTransport()
        self.averages_gradients = True
        """Whether a backward pass ends with gradients averaged over the replicas; see `Handle.set_requires_all_reduce`."""
        self._transport = transport or LocalTransport()
        self.expert_ranks = ranks or ExpertRanks(self._transport, tuple(owners.num_rows_R.tolist()))
        like = torch.empty(0, device=device, dtype=dtype)
        self.storage = {name: self._transport.empty((num_rows, *size), like) for name, size in shape.tensor_sizes().items()}
        """The rows of every weight: gate_up [B, 2F, D], down [B, D, F], biases."""
        self.experts = [Expert({name: self.storage[name][row] for name in self.weight_names}) for row in range(num_rows)]
        """By row: the module whose parameters are views of the row."""
        self._fixed_compute_dtype = compute_dtype
        self._casts: dict[str, Tensor] = {}  # the rows in the compute dtype, where it is another
        self._cast_from: dict[int, tuple[int, ...]] = {}  # by row: the version of the masters that it was cast from
        self.generation = 0
        """Counts what changed the weights as far as all ranks know of it; see `weights_changed`."""
        self._watched: WeakSet[torch.optim.Optimizer] = WeakSet()  # optimizers of shared experts that have stepped
        self._retired: dict[int, ref[nn.Parameter]] = {}  # by id: parameters that these experts had before
        # Fused optimizers write without raising a tensor's version.
        this = ref(self)
        after = register_optimizer_step_post_hook(lambda optimizer, *_: bank._note_step(optimizer) if (bank := this()) else None)
        before = register_optimizer_step_pre_hook(lambda optimizer, *_: bank._check_step(optimizer) if (bank := this()) else None)
        finalize(self, after.remove)
        finalize(self, before.remove)

    def parameters(self) -> Iterator[nn.Parameter]:
        """Every parameter of the experts owned here, row after row."""
        for expert in self.experts:
            yield from (p for p in expert._parameters.values() if p is not None)  # a walk through modules takes 50 times as long

    def check_conversion(self, fn: Callable[[Tensor], Tensor]) -> None:
        """Raise ValueError if `fn` changes the dtype of experts that ranks share."""
        wanted = fn(self.storage["gate_up"].new_empty(0)).dtype
        if self._fixed_compute_dtype is not None and wanted != self.storage["gate_up"].dtype:
            raise ValueError(
                f"experts that ranks share are {self.storage['gate_up'].dtype} and cannot become {wanted}; convert the "
                f"model before "
                "shard_experts, or set runtime.compute_dtype"
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
            self._casts, self._cast_from, self._scratch = {}, {}, None
            self._grads, self._grad_objects = {}, {}

    @property
    def device(self) -> torch.device:
        """The device that the experts lie on."""
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
        """Go by another owner map, whose experts lie in the given rows; see `migrate.migrate`, which has put them there."""
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

        A row is cast when it is first asked for after the masters changed, by an optimizer or in place; changes through `.data`
        show after `weights_changed`, which every `Handle.step` calls.
        """
        masters = self.weights(layer, expert)
        if self.compute_dtype == self.storage["gate_up"].dtype:
            return masters
        row = self.row_of(layer, expert)
        if not self._casts:
            sizes = {name: self.storage[name].shape for name in self.weight_names}
            self._casts = {name: lasting(self._transport, size, self.compute_like) for name, size in sizes.items()}
        cast = ExpertTensors(**{name: self._casts[name][row] for name in self.weight_names})
        version = self._version_of_rows((row,))
        if self._cast_from.get(row) != version:
            for narrow, master in zip(cast.tensors(), masters.tensors(), strict=True):
                narrow.copy_(master)
            self._cast_from[row] = version
        return cast

    def weights_changed(self) -> None:
        """Have every row cast anew when it is next asked for, and copies gathered anew. All ranks at the same point.

        Called after steps of optimizers that hold these weights, by `Handle.step`, when weights are loaded or experts migrate.
        """
        self.generation += 1

    def retire(self, parameters: Iterable[nn.Parameter]) -> None:
        """Note parameters that the experts had before: an optimizer that still holds one would train nothing, and is refused."""
        self._retired |= {id(parameter): ref(parameter) for parameter in parameters}

    def _holds(self, optimizer: torch.optim.Optimizer) -> bool:
        """Whether it steps the experts' weights. Where none is owned, their parameter group is empty."""
        if not self.experts:
            return any(not group["params"] for group in optimizer.param_groups)
        mine = {id(parameter) for parameter in self.parameters()}
        return any(id(p) in mine for group in optimizer.param_groups for p in group["params"])

    def _note_step(self, optimizer: torch.optim.Optimizer) -> None:
        """An optimizer has stepped. One of other weights may do so on this rank alone, and at any time."""
        if self._holds(optimizer):
            self.weights_changed()

    def _check_step(self, optimizer: torch.optim.Optimizer) -> None:
        """Refuse an optimizer that was built from parameters which the experts do not have any more, and watch the others."""
        if self._fixed_compute_dtype is not None and optimizer not in self._watched and self._holds(optimizer):
            self._watched.add(optimizer)
            optimizer.register_state_dict_pre_hook(_refuse_full_state)
            optimizer.register_load_state_dict_pre_hook(_refuse_groups_of_one_rank)
        self._retired = {key: of for key, of in self._retired.items() if of() is not None}
        if self._retired and any(id(p) in self._retired for group in optimizer.param_groups for p in group["params"]):
            raise RuntimeError(
                f"{type(optimizer).__name__} was built before shard_experts and holds parameters that experts do not "
                "have any more; build it afterwards, from handle.parameter_groups()"
            )

    @torch.no_grad()
    def claim(self, layer: int) -> None:
        """Have the parameters of a layer's experts be views of their rows again, where somebody gave them other memory.

        `vector_to_parameters` and assignments to `.data` do; `load_state_dict(assign=True)` also replaces the parameters.
        The rows get new memory then: whoever swaps averages in keeps the old one, to put it back.
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
        """Another once weights of a layer changed: as far as all ranks know, which is the first number, or in place on this
        rank."""
        return self._version_of_rows(self.owned(layer).values())

    def _version_of_rows(self, rows: Iterable[int]) -> tuple[int, ...]:
        experts = self.experts
        return self.generation, sum(version_of(p) for row in rows for p in experts[row]._parameters.values() if p is not None)

    @property
    def compute_like(self) -> Tensor:
        """An empty tensor with the dtype and on the device that the experts compute in."""
        return torch.empty(0, dtype=self.compute_dtype, device=self.device)

    def grads(self, layer: int, expert: int) -> ExpertTensors:
        """Gradient of an owned expert, in place; see `begin_grads`."""
        return self._grads[self.row_of(layer, expert)]

    def begin_grads(self, layer: int) -> dict[int, bool]:
        """Make room for the gradients of a layer's owned experts in its backward; by expert, whether it holds nothing yet.

        `zero_grad` leaves parameters without a gradient. Filling a new one with zeros, only to add to them, would cost as
        much memory traffic as the optimizer: the first backward of a layer overwrites instead. Gradients that somebody has put in
        the place of ours are added to. Gradients of frozen weights go nowhere.
        """
        if self._backward_id != current_backward_id():
            self._backward_id, self._reached = current_backward_id(), set()
            call_after_backward(self._finish_backward)
        self._reached.add(layer)
        owned = self.owned(layer)
        params = {name: {row: self.experts[row].parameter(name) for row in owned.values()} for name in self.weight_names}
        mine = {
            name: {row for row, p in of.items() if p.requires_grad and self._is_mine(row, name)} for name, of in params.items()
        }
        new = {
            name: self._new_grads(name, [row for row, p in of.items() if p.requires_grad and row not in mine[name]])
            for name, of in params.items()
        }
        is_empty = {}
        for expert, row in owned.items():
            is_empty[expert] = all(params[name][row].grad is None for name in params)
            tensors: dict[str, Tensor] = {}
            objects: dict[str, ExpertGrad] = {}
            for name in self.weight_names:
                parameter, grad = params[name][row], new[name].get(row)
                if hooks_on(parameter):
                    raise RuntimeError(
                        f"a tensor hook (register_hook) is on {name} of expert {expert}, whose gradient is not made by autograd; "
                        "use register_post_accumulate_grad_hook"
                    )
                if row in mine[name]:
                    tensors[name], objects[name] = getattr(self._grads[row], name), self._grad_objects[row][name]
                elif grad is None:
                    tensors[name] = getattr(self._scratch_grads(), name)
                else:
                    if parameter.grad is not None:
                        grad.copy_(parameter.grad)
                    elif not is_empty[expert]:
                        grad.zero_()
                    tensors[name], objects[name] = grad, ExpertGrad.of(grad, self.expert_ranks)
                    parameter.grad = objects[name]
            self._grads[row], self._grad_objects[row] = ExpertTensors(**tensors), objects
        return is_empty

    def _is_mine(self, row: int, name: str) -> bool:
        """Whether a gradient is still the one that was made here, and no other memory was given to it, as through `.data`."""
        grad = self._grad_objects.get(row, {}).get(name)
        if grad is None or grad is not self.experts[row].parameter(name).grad:
            return False
        return grad.data_ptr() == getattr(self._grads[row], name).data_ptr()

    def _new_grads(self, name: str, rows: list[int]) -> dict[int, Tensor]:
        """Memory for gradients of one weight, undefined, for each of the rows."""
        storage: Tensor = self.storage[name]
        return dict(zip(rows, storage.new_empty(len(rows), *storage.shape[1:]).unbind(0), strict=True))

    def _scratch_grads(self) -> ExpertTensors:
        """Where gradients of frozen weights go."""
        if self._scratch is None:
            self._scratch = ExpertTensors(
                **{name: self.storage[name].new_zeros(size) for name, size in self.shape.tensor_sizes().items()}
            )
        return self._scratch

    def _finish_backward(self) -> None:
        """Average over the replicas what the backward pass wrote, and call the hooks of parameters whose gradient is complete.

        Gradients of earlier backward passes, which were averaged then, keep their value: the mean of equals is themselves.
        """
        reached = [list(self.owned(layer).values()) for layer in sorted(self._reached)]
        if self.averages_gradients and self._replicas.world_size > 1:
            grads = [
                getattr(self._grads[row], name)
                for rows in reached
                for name in self.weight_names
                for row in rows
                if name in self._grad_objects[row]
            ]
            average(self._replicas, _joined(grads), op="replicate", where="the end of a backward pass")
        for row in (row for rows in reached for row in rows):
            for parameter in self.experts[row]._parameters.values():
                if parameter is not None and parameter.requires_grad and parameter.grad is not None:
                    for hook in post_accumulate_hooks(parameter):
                        hook(parameter)

    @property
    def expert_bytes(self) -> int:
        """Bytes of one expert's master weights."""
        return self.shape.num_elements * self.storage["gate_up"].element_size()

    @property
    def copy_bytes(self) -> int:
        """Bytes of one copy of an expert's weights."""
        return self.shape.num_elements * self.compute_dtype.itemsize

    @property
    def cast_bytes(self) -> int:
        """Bytes of the rows that are kept in the compute dtype beside the masters."""
        return sum(cast.nbytes for cast in self._casts.values())

    def is_trainable(self, layer: int) -> bool:
        """Whether a weight of a layer's experts owned here learns."""
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
        """Copy weights into rows: (layer, expert) to tensors, owned experts only."""
        for (layer, expert), source in experts.items():
            for target, tensor in zip(self.weights(layer, expert).tensors(), source.tensors(), strict=True):
                target.copy_(tensor)


def _by_layer(rows: Mapping[tuple[int, int], int], num_layers: int) -> list[dict[int, int]]:
    """By layer: the experts owned here, ascending, and their rows."""
    owned_L: list[dict[int, int]] = [{} for _ in range(num_layers)]
    for (layer, expert), row in sorted(rows.items()):
        owned_L[layer][expert] = row
    return owned_L


def _joined(tensors: Iterable[Tensor]) -> list[Tensor]:
    """Contiguous tensors, those that lie one after the other in one memory as one, flat."""
    joined: list[Tensor] = []
    for tensor in tensors:
        last = joined[-1] if joined else None
        if (
            last is not None
            and last.data_ptr() + last.nbytes == tensor.data_ptr()
            and (last.untyped_storage().data_ptr() == tensor.untyped_storage().data_ptr())
        ):
            joined[-1] = last.as_strided((last.numel() + tensor.numel(),), (1,), last.storage_offset())
        else:
            joined.append(tensor.view(-1))
    return joined


def _refuse_full_state(optimizer: torch.optim.Optimizer) -> None:
    """Refuse the whole state on one rank: torch gathers that of DTensors only, and experts' would be one rank's for all."""
    if full_state_dict_requested() is not None:
        raise RuntimeError(
            f"the state of {type(optimizer).__name__} is asked for with full_state_dict=True, but torch would leave out that of "
            "other ranks' experts; leave full_state_dict out, and save the sharded state with torch.distributed.checkpoint"
        )


def _refuse_groups_of_one_rank(optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> None:
    """Refuse parameter groups without settings: torch's checkpoints keep one rank's groups, with the names of its experts."""
    for group, saved in zip(optimizer.param_groups, state["param_groups"], strict=False):
        lacking = sorted(set(group) - {"params", "param_names"})
        # One that lacks some is of an optimizer with fewer settings, as another version of torch has; torch keeps the defaults.
        if lacking and not set(saved) - {"params", "param_names"}:
            raise RuntimeError(
                f"the state has no {lacking[0]!r} for a parameter group of {type(optimizer).__name__} that holds experts: torch "
                "saves the groups of one rank; get and set the state with StateDictOptions(flatten_optimizer_state_dict=True)"
            )
