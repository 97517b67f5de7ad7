"""The gradients of a bank's experts: memory that kernels and the sparse reduce write, and `.grad` of the parameters points to.

Parameters are never inputs of the autograd graph. What autograd does for a parameter happens here: a gradient is made or kept
when a layer's backward begins, averaged over replicas when the backward pass ends, and hooks are called then.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor, nn

from ...collectives import Transport, average
from .._compat import call_after_backward, current_backward_id, hooks_on, post_accumulate_hooks
from .expert import Expert, ExpertTensors
from .expert_grad import ExpertGrad, ExpertRanks


class OwnedGrads:
    """Gradients by bank row.

    Args:
        names: of the weights that there may be gradients of, in the order in which they travel.
        replicas: the ranks that own the same experts in other groups, over which gradients are averaged.
        ranks: the ranks that own experts of the model.
    """

    def __init__(self, names: Sequence[str], replicas: Transport, ranks: ExpertRanks):
        self.averages = True
        """Whether a backward pass ends with gradients averaged over the replicas; see `Handle.set_requires_all_reduce`."""
        self._names = tuple(names)
        self._replicas = replicas
        self._ranks = ranks
        self._targets: dict[int, ExpertTensors] = {}  # by row: the gradients as kernels write them
        self._objects: dict[int, dict[str, ExpertGrad]] = {}  # by row: the same memory as `.grad` has it
        self._scratch: dict[str, Tensor] = {}  # takes the gradients of frozen weights
        self._backward_id = -1  # the last backward pass that wrote gradients
        self._reached: dict[int, list[tuple[int, Expert]]] = {}  # by layer: the rows that it wrote gradients of

    def of(self, row: int) -> ExpertTensors:
        """The gradient of a row's expert, in place; see `begin`."""
        return self._targets[row]

    def drop(self) -> None:
        """Let go of all memory: the experts have gone to another device or dtype."""
        self._targets, self._objects, self._scratch = {}, {}, {}

    def begin(self, layer: int, rows: Mapping[int, int], experts: Sequence[Expert]) -> dict[int, bool]:
        """Make room for gradients where a layer's backward begins; by expert, whether its memory is undefined.

        `zero_grad` leaves parameters without a gradient. Filling a new one with zeros, only to add to them, would cost as
        much memory traffic as the optimizer: the first backward of a layer overwrites instead. Gradients that were put in the
        place of ours are added to. Gradients of frozen weights go to scratch memory.

        Args:
            layer: its index in the bank.
            rows: by owned expert of the layer, its row.
            experts: by row, the module.
        """
        if self._backward_id != current_backward_id():
            self._backward_id, self._reached = current_backward_id(), {}
            call_after_backward(self._finish_backward)
        self._reached[layer] = [(row, experts[row]) for row in rows.values()]
        with torch._C.DisableTorchFunctionSubclass():  # gradients as the plain tensors that they are
            return self._make(rows, experts)

    def _make(self, rows: Mapping[int, int], experts: Sequence[Expert]) -> dict[int, bool]:
        """See `begin`."""
        _check_adapters_alone_learn(rows, experts, self._names)
        is_empty = dict.fromkeys(rows, True)
        targets: dict[int, dict[str, Tensor]] = {row: {} for row in rows.values()}
        objects: dict[int, dict[str, ExpertGrad]] = {row: {} for row in rows.values()}
        new: dict[str, list[tuple[int, int, nn.Parameter]]] = {name: [] for name in self._names}
        for name, without in new.items():
            for expert, row in rows.items():
                parameter = experts[row].parameter(name)
                if hooks_on(parameter):
                    raise RuntimeError(
                        f"a tensor hook (register_hook) is on {name} of expert {expert}, whose gradient is not made by autograd; "
                        "use register_post_accumulate_grad_hook"
                    )
                grad = parameter.grad
                if grad is not None:
                    is_empty[expert] = False
                if not parameter.requires_grad:
                    targets[row][name] = self._scratch_like(name, parameter)
                elif grad is not None and self._is_ours(grad, row, name):
                    targets[row][name], objects[row][name] = self._targets[row][name], self._objects[row][name]
                else:
                    without.append((expert, row, parameter))
        for name, without in new.items():
            for (expert, row, parameter), memory in zip(without, _memory_for([p for _, _, p in without]), strict=True):
                if parameter.grad is not None:
                    memory.copy_(parameter.grad)
                elif not is_empty[expert]:
                    memory.zero_()
                targets[row][name] = memory
                parameter.grad = objects[row][name] = ExpertGrad.of(memory, self._ranks)
        self._targets |= {row: ExpertTensors(**{n: of[n] for n in self._names}) for row, of in targets.items()}
        self._objects |= objects
        return is_empty

    def _is_ours(self, grad: Tensor, row: int, name: str) -> bool:
        """Whether a gradient is still the one that was made here, and was given no other memory, as through `.data`."""
        if grad is not self._objects.get(row, {}).get(name):
            return False
        return grad.data_ptr() == self._targets[row][name].data_ptr()

    def _scratch_like(self, name: str, parameter: nn.Parameter) -> Tensor:
        if name not in self._scratch:
            self._scratch[name] = torch.zeros_like(parameter.detach())
        return self._scratch[name]

    def _finish_backward(self) -> None:
        """Average over the replicas what the backward pass wrote, and call the hooks of parameters whose gradient is complete.

        Gradients of earlier backward passes, which were averaged then, keep their value: the mean of equals is themselves.
        """
        reached = [self._reached[layer] for layer in sorted(self._reached)]
        if self.averages and self._replicas.world_size > 1:
            grads = [
                self._targets[row][name]
                for rows in reached
                for name in self._names
                for row, _ in rows
                if name in self._objects[row]
            ]
            average(self._replicas, _joined(grads), op="replicate", where="the end of a backward pass")
        for _, expert in (pair for rows in reached for pair in rows):
            for parameter in expert._parameters.values():
                if parameter is not None and parameter.requires_grad and parameter.grad is not None:
                    for hook in post_accumulate_hooks(parameter):
                        hook(parameter)


def _check_adapters_alone_learn(rows: Mapping[int, int], experts: Sequence[Expert], names: Sequence[str]) -> None:
    """Refuse to leave out the gradient of a weight that was unfrozen beside adapters."""
    for expert, row in rows.items():
        for name, parameter in experts[row]._parameters.items():
            if name not in names and parameter is not None and parameter.requires_grad:
                raise RuntimeError(
                    f"{name} of expert {expert} requires a gradient, but of experts with adapters only these are trained; "
                    "freeze it again, or merge the adapters before shard_experts"
                )


def _memory_for(parameters: Sequence[nn.Parameter]) -> Sequence[Tensor]:
    """Undefined memory in the shape of each parameter, one piece for all."""
    return parameters[0].detach().new_empty(len(parameters), *parameters[0].shape).unbind(0) if parameters else ()


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
