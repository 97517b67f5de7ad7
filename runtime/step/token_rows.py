"""Token rows in the autograd graph: dispatch and combine, each the other's backward; and the work that they travel under.

Rows make a round trip, out to their experts and home again, their gradients another one in backward. Both are the same:

    launch the rows of every part; for each run of experts: wait for its part, compute, launch the way home; wait for all, add up

so that with two parts the experts of one run while rows of the other travel, out or home, and experts at home, which no other
rank needs, while the first come and the last leave (expert_order.py). A layer with shared experts has work that needs no
rows at all. It runs between the launch and the first wait in forward, and between the last launch and the last wait in backward:
autograd runs nodes that were made later first.

Three nodes of the graph hold this: `begin_dispatch`, the experts (experts.py), `combine`. Rows reach them through the `Crossing`
they share; only scalars link them, so that nobody meets rows that are still on their way as a tensor of the graph.

A recomputation, which torch ends where the last tensor was saved, may end behind the experts. It launches nothing on the way
home before it gets to combine, if it does.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..dispatch.handle import ReturnedRows, RowsHome, RowsInFlight
from .layer_pass import LayerPass

if TYPE_CHECKING:
    from .layer_runtime import LayerRuntime


class RoundTrip:
    """Token rows of one forward, or their gradients in its backward, out to their experts and home again.

    What the shared experts issue meanwhile on other groups, such as FSDP2's gathers, every rank issues between the same launch
    and the same wait. All groups are thus entered in one order everywhere, which is what NCCL asks of communicators that are
    in use at once.
    """

    def __init__(self, runtime: LayerRuntime, layer_pass: LayerPass, *, is_backward: bool):
        self._runtime, self._pass, self._is_backward = runtime, layer_pass, is_backward
        self._stages = ("combine", "dispatch") if is_backward else ("dispatch", "combine")
        self._ops = ("combine_backward", "dispatch_backward") if is_backward else ("dispatch", "combine")
        self._out: list[RowsInFlight[Tensor]] = []  # a run each
        self._home: list[RowsInFlight[None]] = []  # a part each
        self._results: tuple[Tensor, Tensor | None] | None = None  # what goes home; and the buffers in which it does
        self._buffers: RowsHome | None = None

    def set_out(self, x_TD: Tensor, weights_TK: Tensor | None = None) -> None:
        """Launch tokens [T, D] to the ranks that compute them.

        What a forward or a backward that broke off has left on its way is taken in first; likewise, by a recomputation, what the
        backward that asks for it is still to wait for. With `weights_TK` the assignments are described, unless they have been.
        """
        runtime, this, transport = self._runtime, self._pass, self._runtime.group.tokens
        with runtime.stage(self._stages[0], this, is_complete=False):
            left, transport.traffic.unfinished = transport.traffic.unfinished, None
            if left is not None:
                left.take_in()
            if weights_TK is not None and this.handle is None:
                this.handle = runtime.describe(weights_TK, this)
            assert this.handle is not None
            self._home, self._results, self._buffers = [], None, None
            self._out = this.handle.send_rows(x_TD, transport, this.op(self._ops[0]), this.where)
            transport.traffic.unfinished = self
        if not runtime.overlap:
            self.arrived(len(self._out) - 1)

    def arrived(self, index: int) -> Tensor:
        """Wait for the rows of a run, and of those before it: slot-major [N, D], in which theirs are set."""
        handle = self._pass.handle
        assert handle is not None
        for run, rows in zip(handle.runs[: index + 1], self._out, strict=False):
            if not rows.has_arrived:
                with self._runtime.stage(self._stages[0], self._pass, is_complete=run.part == handle.num_parts - 1):
                    rows.wait()
        self._note_end()
        return self._out[index].wait()

    def set_home(self, index: int, rows_ND: Tensor, gate_grads_N: Tensor | None = None) -> None:
        """Launch the results of a run on their way home, unless it is there; of slot-major [N, D] its rows are set."""
        this = self._pass
        assert this.handle is not None
        self._results = rows_ND, gate_grads_N
        if index + 1 == len(this.handle.runs):
            self._out = []  # All have arrived and been read.
        if this.handle.runs[index].part is not None and (self._is_backward or not this.is_replay):
            self._launch_home()

    def _launch_home(self) -> None:
        """Launch the next part."""
        transport, this = self._runtime.group.tokens, self._pass
        assert this.handle is not None and self._results is not None
        with self._runtime.stage(self._stages[1], this, is_complete=False):
            if self._buffers is None:
                rows_ND, gate_grads_N = self._results
                self._buffers = this.handle.rows_home(rows_ND, transport, gate_grads_N)
            part, op = len(self._home), this.op(self._ops[1])
            self._home.append(this.handle.return_rows(part, self._buffers, transport, op, this.where))
            transport.traffic.unfinished = self
            if not self._runtime.overlap:
                self._home[part].wait()

    def come_home(self) -> ReturnedRows:
        """Wait for the results, and add them up."""
        handle = self._pass.handle
        assert handle is not None
        while len(self._home) < handle.num_parts:
            self._launch_home()
        with self._runtime.stage(self._stages[1], self._pass):
            self.take_in()
            buffers, self._out, self._home, self._results, self._buffers = self._buffers, [], [], None, None
            assert buffers is not None
            return handle.add_up(buffers)

    def take_in(self) -> None:
        """Wait for all that is on its way, in the order of the launches; see `Traffic.unfinished`."""
        for rows in self._all():
            rows.wait()
        self._note_end()

    def _all(self) -> list[RowsInFlight[Any]]:
        return [*self._out, *self._home]

    def _note_end(self) -> None:
        if all(rows.has_arrived for rows in self._all()):
            self._runtime.group.tokens.traffic.finished(self)


class Crossing:
    """The round trips of one forward and of its backward."""

    def __init__(self, runtime: LayerRuntime, layer_pass: LayerPass):
        self.runtime, self.layer_pass = runtime, layer_pass
        self.rows = RoundTrip(runtime, layer_pass, is_backward=False)
        self.grads = RoundTrip(runtime, layer_pass, is_backward=True)


class _BeginDispatch(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_TD: Tensor, weights_TK: Tensor, crossing: Crossing) -> Tensor:
        ctx.crossing = crossing
        # Detached, since rows in flight are held where no graph must be.
        crossing.rows.set_out(x_TD.detach(), weights_TK.detach())
        return new_link(x_TD)

    @staticmethod
    def backward(ctx: Any, d_link: Tensor) -> tuple[Tensor, Tensor, None]:
        home, handle = ctx.crossing.grads.come_home(), ctx.crossing.layer_pass.handle
        assert home.gate_grads_A is not None
        return home.x_TD, home.gate_grads_A.view(handle.num_tokens, handle.top_k), None


class _Combine(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, link: Tensor, crossing: Crossing) -> Tensor:
        ctx.crossing = crossing
        return crossing.rows.come_home().x_TD

    @staticmethod
    def backward(ctx: Any, dy_TD: Tensor) -> tuple[Tensor, None]:
        crossing = ctx.crossing
        if torch.is_grad_enabled():
            raise RuntimeError(
                f"{crossing.layer_pass.where}: backward ran with create_graph=True, but experts have no second derivatives; "
                "leave create_graph out, or keep the layer out of what is differentiated twice"
            )
        if crossing.layer_pass.handle is None:
            raise RuntimeError(
                f"{crossing.layer_pass.where}: backward ran a second time through one forward; "
                "give retain_graph=True to the first, or run the forward again"
            )
        crossing.runtime.rematerialize(crossing.layer_pass)
        crossing.grads.set_out(dy_TD.contiguous())
        crossing.grads.arrived(0)
        return new_link(dy_TD), None


def new_link(like: Tensor) -> Tensor:
    """A scalar that ties two nodes of the graph together, or its gradient."""
    return torch.zeros((), device=like.device)


def begin_dispatch(x_TD: Tensor, weights_TK: Tensor, crossing: Crossing) -> Tensor:
    """Launch every token to where its experts are computed. Returns the link to the experts."""
    return _BeginDispatch.apply(x_TD, weights_TK, crossing)


def combine(link: Tensor, crossing: Crossing) -> Tensor:
    """Add up the weighted results that came home [T, D], in the tokens' order. `link`: from the experts."""
    return _Combine.apply(link, crossing)
