"""All ranks compare their places where a model's forward begins, and where its backward does; absent ranks are named.

That is within the time limit. Without this the first to wait would be FSDP2, for as long as its process group allows and
without naming the absent rank. Each costs a gather of a few integers. A recomputation by activation checkpointing is no forward;
and MoE layers that are called without the model's own forward compare at their own gathers, see agreement.py.
"""

from __future__ import annotations

import sys
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.utils.hooks import RemovableHandle

from ...collectives import CollectiveError
from .._compat import current_backward_id, outside_graphs, tensors_in
from ..stages import StageClock
from ..step.layer_runtime import LayerRuntime
from ..step.replay import is_recomputing
from .generate import generate_together

_TORCH_DISTRIBUTED = str(Path(dist.__file__).parent)


def compare_in_forwards(model: nn.Module, layers: Sequence[LayerRuntime], clock: StageClock) -> None:
    """Hook `model`, whose MoE layers these are, after FSDP2 has, where it does: of hooks that are put first the last runs
    first. `generate` of a model of transformers then ends on all ranks together; see generate.py."""
    if layers[0].group.control.world_size > 1:
        comparisons = ForwardComparisons(layers[0], clock)
        comparisons.hook(model)
        generate_together(model, comparisons, layers[0].bank.device)


class ForwardComparisons:
    """The hooks of one model."""

    def __init__(self, layer: LayerRuntime, clock: StageClock):
        self._layer, self._clock = layer, clock
        self._forward = 0  # the number of the last one
        self._hook: RemovableHandle | None = None
        self._is_before_fsdp = False
        self._has_begun = False  # the next forward, which is another rank's

    def hook(self, model: nn.Module) -> None:
        """Have the model's forwards begin and end here."""
        self._put_first(model)
        model.register_forward_hook(self._end, prepend=True, always_call=True)

    def take_part(self, model: nn.Module, forward: Callable[[], Any]) -> None:
        """Run `forward`, one of the model, whenever another rank begins one, until all ranks are here."""
        while self._layer.agreement.begin_others_forward(self._layer.step, is_training=model.training):
            self._has_begun = True
            forward()

    def _put_first(self, model: nn.Module) -> None:
        if self._hook is not None:
            self._hook.remove()
        self._hook = model.register_forward_pre_hook(self._begin, prepend=True)
        self._is_before_fsdp = isinstance(model, FSDPModule)

    @outside_graphs
    def _begin(self, model: nn.Module, inputs: tuple[Any, ...]) -> None:
        if is_recomputing():
            return
        if isinstance(model, FSDPModule) and not self._is_before_fsdp:
            # Its user has sharded the dense part since. From the next forward on this is first again.
            self._put_first(model)
        if self._has_begun:
            self._has_begun = False
            return
        self._forward = self._layer.agreement.begin_forward(self._layer.step, is_training=model.training)

    @outside_graphs
    def _end(self, model: nn.Module, inputs: tuple[Any, ...], output: Any) -> None:
        if is_recomputing():
            return
        error = sys.exc_info()[1]
        if output is None and error is not None:
            self._explain(error)
            return
        # On a leaf, as a parameter that the model returns is, hooks would stay, one more with every forward.
        tensors = [tensor for tensor in tensors_in(output) if tensor.grad_fn is not None]
        begin_backward = _BeginBackward(self._layer, self._forward)
        for tensor in tensors:
            tensor.register_hook(begin_backward)

    def _explain(self, error: BaseException) -> None:
        """Add to an error of torch.distributed, as of FSDP2's gathers, what it does not say. Those of MoE layers say it."""
        if isinstance(error, RuntimeError) and not isinstance(error, CollectiveError) and _is_of_torch_distributed(error):
            last = "none" if self._clock.completed is None else " of ".join(self._clock.completed)
            error.add_note(
                f"rank {dist.get_rank()} was in a collective of torch.distributed, step {self._layer.step}, forward "
                f"{self._forward} of the model; the last stage of a MoE layer that it completed: {last}"
            )


class _BeginBackward:
    """Called with the gradient of each tensor that a forward returned: compares the ranks' places once in every backward pass."""

    def __init__(self, layer: LayerRuntime, forward: int):
        self._layer, self._forward = layer, forward
        self._backward_id = -1

    def __call__(self, grad: Tensor) -> None:
        if self._backward_id != current_backward_id():
            self._backward_id = current_backward_id()
            self._layer.agreement.begin_backward(self._layer.step, self._forward)


def _is_of_torch_distributed(error: BaseException) -> bool:
    return any(frame.f_code.co_filename.startswith(_TORCH_DISTRIBUTED) for frame, _ in traceback.walk_tb(error.__traceback__))
