"""Reduces in flight: launched in their layer's backward, waited for as late as its buffers and its gradient rows allow.

That is when the layer before it begins the backward of its experts, so that a reduce travels under the attention's backward; and
for the last one when the backward pass is complete, so that `.grad` is. All ranks wait at the same point of the program: a rank
that waits may need another to pass sums on. At most one layer's reduce is in flight, which `memory.peak_slot_bytes` has room for,
and no layer adds to gradient rows that a reduce of its own still adds to.

A backward pass that breaks off is not waited for, and its gradients are nobody's: they may be set to zero before all sums are in.
Its reduces add nothing from then on, and are finished with the next ones, or before the next forward.
"""

from __future__ import annotations

from collections import deque
from typing import TYPE_CHECKING

from .._compat import call_after_backward, current_backward_id
from .layer_pass import LayerPass
from .materialize import discard_reduce, finish_reduce

if TYPE_CHECKING:
    from .layer_runtime import LayerRuntime


class PendingReduces:
    """The reduces in flight of one model; all its layers share it.

    Args:
        overlap: False: wait right after the launch.
    """

    def __init__(self, *, overlap: bool = True):
        self._overlap = overlap
        self._passes: deque[tuple[LayerRuntime, LayerPass]] = deque()

    def add(self, runtime: LayerRuntime, layer_pass: LayerPass) -> None:
        """Take over a reduce that was just launched, in a backward pass; `make_room` was called before its layer's gradients."""
        self._passes.append((runtime, layer_pass))
        if not self._overlap:
            self.finish()

    def make_room(self) -> None:
        """Before a layer begins its gradients: finish the reduces under way, and have its own finished at the end of the pass.

        Called back for every layer, since a backward pass that breaks off never is; and before what a bank does at the end,
        which must find its gradients complete.
        """
        self.finish()
        call_after_backward(_EndOfBackward(self))

    def finish(self, backward_id: int | None = None) -> None:
        """Wait for every reduce under way. Then the owners' gradient rows hold all that backward pass `backward_id` has launched.

        That is the one that runs now, by default; outside of any, none.
        """
        backward_id = current_backward_id() if backward_id is None else backward_id
        while self._passes:
            runtime, layer_pass = self._passes.popleft()
            with runtime.stage("reduce", layer_pass):
                if layer_pass.backward_id != backward_id:
                    discard_reduce(runtime, layer_pass)
                finish_reduce(runtime, layer_pass)

    def discard(self, backward_id: int) -> None:
        """Have the reduces of a backward pass that is over add nothing more. Waits for nobody."""
        for runtime, layer_pass in list(self._passes):
            if layer_pass.backward_id == backward_id:
                discard_reduce(runtime, layer_pass)


class _EndOfBackward:
    """Called when its backward pass is complete. One that breaks off drops it uncalled, before anybody sees the exception.

    That early, since a communication thread may add sums at any time, also to gradients that were set to zero meanwhile.
    """

    def __init__(self, reduces: PendingReduces):
        self._reduces, self._backward_id = reduces, current_backward_id()

    def __call__(self) -> None:
        self._reduces.finish(self._backward_id)

    def __del__(self) -> None:
        self._reduces.discard(self._backward_id)
