"""Dispatch and combine in the autograd graph, each the other's backward; and the work that dispatch travels under.

A layer with shared experts has work that needs no rows. It runs between the launch of dispatch and the wait for it, which are
two nodes of the graph then, in place of one. Autograd runs nodes that were made later first, so the backward mirrors that: the
later node launches the way home, the shared experts' backward runs, the earlier node waits. In any other order the results are
the same, since the two are tied together.

Why dispatch, and not combine: what is left of the gather of copies travels under the same work, those that calibration has just
added among them. And a recomputation, which torch ends where the last tensor was saved, ends behind the wait, in the experts.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .dispatch import ReturnedRows, RowsInFlight
from .layer_pass import LayerPass

if TYPE_CHECKING:
    from .layer_runtime import LayerRuntime


class Crossing:
    """One dispatch between its launch and its wait: of token rows in forward, of their gradients in backward.

    What the shared experts issue meanwhile on other groups, such as FSDP2's gathers, every rank issues between the same launch
    and the same wait. All groups are thus entered in one order everywhere, which is what NCCL asks of communicators that are
    in use at once.
    """

    def __init__(self, runtime: LayerRuntime, layer_pass: LayerPass):
        self.runtime, self.layer_pass = runtime, layer_pass
        self.link: Tensor | None = None
        """Ties the wait to the launch in the graph; None once both were one."""
        self.rows: tuple[Tensor, Tensor] | None = None
        self._in_flight: RowsInFlight[Any] | None = None

    def launch(self, start: Callable[[], RowsInFlight[Any]]) -> None:
        """Send rows on their way, and hold them whatever becomes of the graph.

        Those of a forward or a backward that broke off before its wait are taken in first.
        """
        traffic = self.runtime.group.tokens.traffic
        left, traffic.unfinished = traffic.unfinished, None
        if left is not None:
            left.wait()
        with self.runtime.stage("dispatch", self.layer_pass, is_complete=False):
            self._in_flight = traffic.unfinished = start()

    def arrive(self) -> Any:
        """Wait for what was launched."""
        rows, self._in_flight = self._in_flight, None
        assert rows is not None, "nothing is on its way"
        self.runtime.group.tokens.traffic.finished(rows)
        with self.runtime.stage("dispatch", self.layer_pass):
            return rows.wait()


def _send(x_TD: Tensor, weights_TK: Tensor, runtime: LayerRuntime, layer_pass: LayerPass) -> RowsInFlight[Tensor]:
    """Describe the pass's assignments, unless a forward that is repeated has, and launch their rows."""
    transport, plan = runtime.group.tokens, layer_pass.plan
    if layer_pass.handle is None:
        assert plan.split is not None and layer_pass.topk_ids_TK is not None
        layer_pass.handle = runtime.build_handle(
            runtime.capacity.kept_ids(layer_pass.topk_ids_TK, weights_TK, runtime.num_experts),
            weights_TK,
            plan.split,
            plan.experts_of(transport.rank),
            transport,
            layer_pass.op("describe"),
            layer_pass.where,
        )
    return layer_pass.handle.send_rows(x_TD, transport, layer_pass.op("dispatch"), layer_pass.where)


def _return(dx_ND: Tensor, d_row_weights_N: Tensor, runtime: LayerRuntime, layer_pass: LayerPass) -> RowsInFlight[ReturnedRows]:
    """Launch the gradients of rows and gate weights on their way home."""
    assert layer_pass.handle is not None
    op = layer_pass.op("dispatch_backward")
    return layer_pass.handle.return_rows(dx_ND, runtime.group.tokens, op, layer_pass.where, d_row_weights_N)


def _row_weights(layer_pass: LayerPass) -> Tensor:
    assert layer_pass.handle is not None
    return layer_pass.handle.row_weights_N.clone()


def _gradients(home: ReturnedRows, layer_pass: LayerPass) -> tuple[Tensor, Tensor]:
    """Of the tokens [T, D] and of their gate weights [T, K]."""
    handle = layer_pass.handle
    assert handle is not None and home.gate_grads_A is not None
    return home.x_TD, home.gate_grads_A.view(handle.num_tokens, handle.top_k)


class _Dispatch(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x_TD: Tensor, weights_TK: Tensor, runtime: LayerRuntime, layer_pass: LayerPass
    ) -> tuple[Tensor, Tensor]:
        ctx.runtime, ctx.layer_pass = runtime, layer_pass
        with runtime.stage("dispatch", layer_pass):
            return _send(x_TD, weights_TK, runtime, layer_pass).wait(), _row_weights(layer_pass)

    @staticmethod
    def backward(ctx: Any, dx_ND: Tensor, d_row_weights_N: Tensor) -> tuple[Tensor, Tensor, None, None]:
        with ctx.runtime.stage("dispatch", ctx.layer_pass):
            home = _return(dx_ND, d_row_weights_N, ctx.runtime, ctx.layer_pass).wait()
        return *_gradients(home, ctx.layer_pass), None, None


class _Launch(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_TD: Tensor, weights_TK: Tensor, crossing: Crossing) -> Tensor:
        ctx.crossing = crossing
        # Detached, since rows in flight are held where no graph must be.
        crossing.launch(lambda: _send(x_TD.detach(), weights_TK, crossing.runtime, crossing.layer_pass))
        return x_TD.new_zeros((), dtype=torch.float32)

    @staticmethod
    def backward(ctx: Any, d_link: Tensor) -> tuple[Tensor, Tensor, None]:
        return *_gradients(ctx.crossing.arrive(), ctx.crossing.layer_pass), None


class _Arrive(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, link: Tensor, crossing: Crossing) -> tuple[Tensor, Tensor]:
        ctx.crossing = crossing
        return crossing.arrive(), _row_weights(crossing.layer_pass)

    @staticmethod
    def backward(ctx: Any, dx_ND: Tensor, d_row_weights_N: Tensor) -> tuple[Tensor, None]:
        crossing = ctx.crossing
        crossing.launch(lambda: _return(dx_ND, d_row_weights_N, crossing.runtime, crossing.layer_pass))
        return d_row_weights_N.new_zeros((), dtype=torch.float32), None


class _Combine(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, y_ND: Tensor, runtime: LayerRuntime, layer_pass: LayerPass) -> Tensor:
        ctx.runtime, ctx.layer_pass = runtime, layer_pass
        handle = layer_pass.handle
        assert handle is not None
        with runtime.stage("combine", layer_pass):
            return handle.return_rows(y_ND, runtime.group.tokens, layer_pass.op("combine"), layer_pass.where).wait().x_TD

    @staticmethod
    def backward(ctx: Any, dy_TD: Tensor) -> tuple[Tensor, None, None]:
        layer_pass, transport = ctx.layer_pass, ctx.runtime.group.tokens
        ctx.runtime.rematerialize(layer_pass)
        handle, op = layer_pass.handle, layer_pass.op("combine_backward")
        with ctx.runtime.stage("combine", layer_pass):
            return handle.send_rows(dy_TD.contiguous(), transport, op, layer_pass.where).wait(), None, None


def begin_dispatch(
    x_TD: Tensor, weights_TK: Tensor, runtime: LayerRuntime, layer_pass: LayerPass, *, is_covered: bool
) -> Crossing:
    """Launch every token to where its experts are computed.

    `is_covered`: work of the layer follows before `finish_dispatch`. Without any the rows are waited for here.
    """
    crossing = Crossing(runtime, layer_pass)
    if is_covered:
        crossing.link = _Launch.apply(x_TD, weights_TK, crossing)
    else:
        crossing.rows = _Dispatch.apply(x_TD, weights_TK, runtime, layer_pass)
    return crossing


def finish_dispatch(crossing: Crossing) -> tuple[Tensor, Tensor]:
    """What has arrived: slot-major rows [N, D], and the gate weight of each [N]."""
    if crossing.rows is None:
        return _Arrive.apply(crossing.link, crossing)
    rows, crossing.rows = crossing.rows, None  # so that they can be freed as soon as nobody else needs them
    return rows


def combine(y_ND: Tensor, runtime: LayerRuntime, layer_pass: LayerPass) -> Tensor:
    """Bring the weighted results home and add them up: slot-major [N, D] to [T, D], in the tokens' order."""
    return _Combine.apply(y_ND, runtime, layer_pass)
