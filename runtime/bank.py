"""The bank: every expert's master weights and gradient, kept once, on the rank that owns it.

A bank spans all MoE layers whose experts have one shape. Its parameters have one row per expert that this rank owns, in
the row order of the owner map, so any optimizer sees ordinary parameters. Gradients are written into rows of `.grad`
by the expert backward and by the sparse reduce; the parameters are never inputs of the autograd graph.

Where experts compute in a narrower dtype than that of the master weights, the bank also keeps its rows in that dtype. This is
what FSDP2 calls `param_dtype`, but a row is cast once a step, and not for every gather.

Shape letters: B rows of this rank, E experts, L layers, D model dim, F expert ffn dim.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from typing import Self
from weakref import WeakKeyDictionary, WeakSet, finalize, ref

import torch
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_post_hook

from ..collectives import LocalTransport, Transport, average
from ..kernels import Clamp, FFNWeights
from ..placement import OwnerMap
from ._compat import call_after_backward, current_backward_id, version_of


@dataclass(frozen=True, slots=True)
class ExpertShape:
    """The shape of one expert: gate_up [2F, D] (gate first, then up) and down [D, F].

    With `clamp` it has biases besides, gate_up_bias [2F] and down_bias [D], and the activation of `kernels.clamped_ffn`.
    """

    dim: int
    ffn_dim: int
    clamp: Clamp | None = None

    def tensor_sizes(self) -> dict[str, tuple[int, ...]]:
        """The size of each of an expert's tensors, in the order in which they travel."""
        D, F = self.dim, self.ffn_dim
        matrices: dict[str, tuple[int, ...]] = {"gate_up": (2 * F, D), "down": (D, F)}
        return matrices if self.clamp is None else matrices | {"gate_up_bias": (2 * F,), "down_bias": (D,)}

    @property
    def num_elements(self) -> int:
        """Weights of one expert."""
        return sum(prod(size) for size in self.tensor_sizes().values())


@dataclass(frozen=True, slots=True, eq=False, weakref_slot=True)
class ExpertTensors:
    """Tensors in the shape of one expert: its weights, or its gradients. Views, never copies."""

    gate_up: Tensor  # [2F, D]
    down: Tensor  # [D, F]
    gate_up_bias: Tensor | None = None  # [2F]
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


class Bank(nn.Module):
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
    """

    gate_up: nn.Parameter
    down: nn.Parameter

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
    ):
        super().__init__()
        self.shape = shape
        self.owners = owners
        self.rank = rank
        self.rows = {pair: row for row, pair in enumerate(owners.rows_of(rank))}
        """The row of every (layer, expert) that this rank owns. Where an expert lies is nobody else's concern."""
        num_rows = int(owners.num_rows_R[rank])
        self._empty_layers: set[int] = set()  # whose gradient rows are allocated and hold nothing yet
        self._backward_id = -1  # the last backward pass that wrote gradients
        self._replicas = replicas or LocalTransport()
        self.averages_gradients = True
        """Whether a backward pass ends with gradients averaged over the replicas; see `Handle.set_requires_all_reduce`."""
        self._transport = transport or LocalTransport()
        like = torch.empty(0, device=device, dtype=dtype)
        for name, size in shape.tensor_sizes().items():
            self.register_parameter(name, nn.Parameter(self._transport.empty((num_rows, *size), like)))
        self._fixed_compute_dtype = compute_dtype
        self._casts: dict[str, Tensor] = {}  # the rows in the compute dtype, where it is another
        self._cast_from: dict[int, tuple[int, ...]] = {}  # by row: the version of the masters that it was cast from
        self.generation = 0
        """Counts what changed the weights as far as all ranks know of it; see `weights_changed`."""
        # Fused optimizers write without raising a tensor's version.
        this = ref(self)
        hook = register_optimizer_step_post_hook(lambda optimizer, *_: bank._note_step(optimizer) if (bank := this()) else None)
        finalize(self, hook.remove)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """What `Module.to` and its like end in."""
        dtype = self.gate_up.dtype
        wanted = fn(self.gate_up.new_empty(0)).dtype
        if self._fixed_compute_dtype is not None and wanted != dtype:
            raise ValueError(
                f"experts that ranks share are {dtype} and cannot become {wanted}; convert the model before shard_experts, "
                "or set runtime.compute_dtype"
            )
        return super()._apply(fn, recurse)

    @property
    def compute_dtype(self) -> torch.dtype:
        """The dtype that experts are computed with and copied in."""
        return self._fixed_compute_dtype or self.gate_up.dtype

    @property
    def weight_names(self) -> tuple[str, ...]:
        """The names of the parameters, in the order in which an expert's tensors travel."""
        return tuple(self.shape.tensor_sizes())

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Draw every weight from the uniform distribution that `nn.Linear` uses, row by row in row order."""
        for weights in self.parameters():
            bound = weights.shape[-1] ** -0.5 if weights.ndim == 3 else 0.0  # biases start at zero
            weights.uniform_(-bound, bound)

    def row_of(self, layer: int, expert: int) -> int:
        """The row of an expert that this rank owns."""
        return self.rows[layer, expert]

    def adopt(self, owners: OwnerMap, rows: dict[tuple[int, int], int]) -> None:
        """Go by another owner map, whose experts lie in the given rows; see `rehome.migrate`, which has moved them there."""
        assert set(rows) == set(owners.rows_of(self.rank)), "rows of other experts than those owned here"
        self.weights_changed()
        self.owners, self.rows = owners, rows

    def weights(self, layer: int, expert: int) -> ExpertTensors:
        """Master weights of an owned expert, in place."""
        row = self.row_of(layer, expert)
        # Not `.data`: what is written here must be seen by `compute_weights`.
        return ExpertTensors(**{name: getattr(self, name).detach()[row] for name in self.weight_names})

    @torch.no_grad()
    def compute_weights(self, layer: int, expert: int) -> ExpertTensors:
        """Weights of an owned expert in the compute dtype: the masters themselves, or their cast.

        A row is cast when it is first asked for after the masters changed, by an optimizer or in place; changes through `.data`
        show after `weights_changed`, which every `Handle.step` calls.
        """
        masters = self.weights(layer, expert)
        if self.compute_dtype == self.gate_up.dtype:
            return masters
        row = self.row_of(layer, expert)
        if not self._casts:
            self._casts = {n: _lasting(self._transport, p.shape, self.compute_like) for n, p in self.named_parameters()}
        cast = ExpertTensors(**{name: self._casts[name][row] for name in self.weight_names})
        if self._cast_from.get(row) != self.version:
            for narrow, master in zip(cast.tensors(), masters.tensors(), strict=True):
                narrow.copy_(master)
            self._cast_from[row] = self.version
        return cast

    def weights_changed(self) -> None:
        """Have every row cast anew when it is next asked for, and copies gathered anew. All ranks at the same point.

        Called after steps of optimizers that hold these weights, by `Handle.step`, and where weights are loaded or experts move.
        """
        self.generation += 1

    def _note_step(self, optimizer: torch.optim.Optimizer) -> None:
        """An optimizer has stepped. One of other weights may do so on this rank alone, and at any time."""
        held = {id(p) for group in optimizer.param_groups for p in group["params"]}
        if any(id(p) in held for p in self.parameters()):
            self.weights_changed()

    @property
    def version(self) -> tuple[int, ...]:
        """Another once weights have changed: as far as all ranks know, which is the first number, or in place on this rank."""
        return self.generation, *(version_of(parameter) for parameter in self.parameters())

    @property
    def compute_like(self) -> Tensor:
        """An empty tensor with the dtype and on the device that the experts compute in."""
        return torch.empty(0, dtype=self.compute_dtype, device=self.gate_up.device)

    def grads(self, layer: int, expert: int) -> ExpertTensors:
        """Gradient of an owned expert, in place; see `begin_grads`."""
        row = self.row_of(layer, expert)
        return ExpertTensors(**{name: getattr(self, name).grad[row] for name in self.weight_names})

    def begin_grads(self, layer: int) -> bool:
        """Make room for gradients in the backward of `layer`; return whether its rows hold nothing yet.

        `zero_grad` leaves parameters without a gradient. Filling a new one with zeros, only to add to them, would cost as
        much memory traffic as the optimizer: the first backward of each layer overwrites its rows instead, and the rows of
        layers that this backward pass never reaches become zeros when it is complete.
        """
        if self._backward_id != current_backward_id():
            self._backward_id = current_backward_id()
            call_after_backward(self._finish_backward)
        if all(parameter.grad is None for parameter in self.parameters()):
            for parameter in self.parameters():
                parameter.grad = torch.empty_like(parameter)
            self._empty_layers = set(range(self.owners.num_layers))
        for parameter in self.parameters():
            if parameter.grad is None:  # dropped alone; the others hold something
                parameter.grad = torch.zeros_like(parameter)
        is_empty = layer in self._empty_layers
        self._empty_layers.discard(layer)
        return is_empty

    def _finish_backward(self) -> None:
        """Clear what was not reached, and average over the replicas.

        Gradients of earlier backward passes, which were averaged then, keep their value: the mean of equals is themselves.
        """
        for (layer, _), row in self.rows.items():
            for parameter in self.parameters():
                if layer in self._empty_layers and parameter.grad is not None:
                    parameter.grad[row].zero_()
        self._empty_layers = set()
        if self.averages_gradients:
            grads = [parameter.grad for parameter in self.parameters() if parameter.grad is not None]
            average(self._replicas, grads, op="replicate", where="the end of a backward pass")

    @property
    def expert_bytes(self) -> int:
        """Bytes of one expert's master weights."""
        return self.shape.num_elements * self.gate_up.element_size()

    @property
    def copy_bytes(self) -> int:
        """Bytes of one copy of an expert's weights."""
        return self.shape.num_elements * self.compute_dtype.itemsize

    @property
    def cast_bytes(self) -> int:
        """Bytes of the rows that are kept in the compute dtype beside the masters."""
        return sum(cast.nbytes for cast in self._casts.values())

    @property
    def is_trainable(self) -> bool:
        """Whether the experts learn. All their weights do, or none."""
        return self.gate_up.requires_grad

    @torch.no_grad()
    def load_rows(self, experts: Mapping[tuple[int, int], ExpertTensors]) -> None:
        """Copy weights into rows: (layer, expert) to tensors, owned experts only."""
        for (layer, expert), source in experts.items():
            for target, tensor in zip(self.weights(layer, expert).tensors(), source.tensors(), strict=True):
                target.copy_(tensor)


class SlotPool:
    """Expert-sized buffers that materializations borrow: copies of weights, and their gradients.

    A buffer comes back when its last use has been enqueued. One that is never given back, because its graph was dropped
    without a backward, is simply freed: the pool holds only the free ones.

    `peak_slots` is the largest number of buffers that ever existed at once, lent or free, `peak_bytes` the most memory they took,
    and `predicted_bytes` the most that one forward and its backward may take; see `memory.peak_slot_bytes`.
    """

    def __init__(self, shape: ExpertShape, transport: Transport, predicted_bytes: int = 0):
        self.predicted_bytes = predicted_bytes
        self._shape = shape
        self._transport = transport
        self._free: list[ExpertTensors] = []
        self._alive: WeakSet[ExpertTensors] = WeakSet()
        self._num_sharers: WeakKeyDictionary[ExpertTensors, int] = WeakKeyDictionary()  # beside the first
        self.peak_slots = 0
        self.peak_bytes = 0

    def acquire(self, like: Tensor) -> ExpertTensors:
        """A buffer with undefined content on the device and with the dtype of `like`."""
        for i, buffer in enumerate(self._free):
            if buffer.down.device == like.device and buffer.down.dtype == like.dtype:
                return self._free.pop(i)
        buffer = ExpertTensors(**{n: _lasting(self._transport, size, like) for n, size in self._shape.tensor_sizes().items()})
        self._alive.add(buffer)
        self.peak_slots = max(self.peak_slots, len(self._alive))
        self.peak_bytes = max(self.peak_bytes, sum(tensor.nbytes for slot in self._alive for tensor in slot.tensors()))
        return buffer

    def share(self, buffer: ExpertTensors) -> ExpertTensors:
        """Lend a lent buffer once more; it comes back when it was released as often."""
        self._num_sharers[buffer] = self._num_sharers.get(buffer, 0) + 1
        return buffer

    def release(self, buffer: ExpertTensors) -> None:
        """Give a buffer back."""
        if self._num_sharers.get(buffer, 0):
            self._num_sharers[buffer] -= 1
        else:
            self._free.append(buffer)


def _lasting(transport: Transport, size: Sequence[int], like: Tensor) -> Tensor:
    """Memory that outlives the forward that asks for it: one in inference mode must not forbid training to write to it."""
    with torch.inference_mode(False):
        return transport.empty(size, like)
