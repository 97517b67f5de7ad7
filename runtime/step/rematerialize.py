"""Re-materialize: copies that were released after forward are gathered again for backward, from slots that layers share.

They come from the weights that forward gathered them from, by the same schedule (Hecate-RM, arXiv 2502.02581). So do those that
a backward has released, where another one follows through the same forward.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from .._compat import call_after_backward
from .layer_pass import LayerPass
from .materialize import begin_materialize, release_copies

if TYPE_CHECKING:
    from .layer_runtime import LayerRuntime


class Rematerializer:
    """Holds the copies of one pass at a time, which bounds the slots they take; one per bank. See `memory.peak_slot_bytes`."""

    def __init__(self) -> None:
        self._held: tuple[LayerRuntime, LayerPass] | None = None

    def launch(self, runtime: LayerRuntime, layer_pass: LayerPass) -> None:
        """In backward: gather the copies of a pass again, unless they are here or on their way. All ranks at the same point.

        Those of another pass are given back. They wait for a backward that may never come, or that comes after this one's:
        several layers under one activation checkpoint all run forward again first.
        """
        if self._held is not None and self._held[1] is not layer_pass:
            self._release()
        if layer_pass.holds_copies:
            return
        self._held = runtime, layer_pass
        # For every one, since a backward pass that breaks off never calls back.
        call_after_backward(self._release)
        with runtime.stage("materialize", layer_pass):
            begin_materialize(runtime, layer_pass, op="regather")

    def _release(self) -> None:
        if self._held is not None:
            release_copies(*self._held)
            self._held = None
