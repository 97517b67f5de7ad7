"""Materialize: copies of experts fill slots in forward; their gradients flow back to the owners in backward.

Forward waits for the SparseAllGather that was launched earlier; backward launches the SparseReduceScatter, its transpose,
which adds straight into the gradient rows of the owners' banks (Hecate, arXiv 2502.02581, section 3).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.autograd.graph import get_gradient_edge

from ...collectives import Pending, Schedule, sparse_all_gather, sparse_reduce_scatter
from ...kernels import FFNWeights
from .._compat import current_backward_id, keeps_graph, will_run
from ..experts.expert import group_weights
from .layer_pass import LayerPass

if TYPE_CHECKING:
    from .layer_runtime import LayerRuntime


def begin_materialize(runtime: LayerRuntime, layer_pass: LayerPass, *, op: str = "gather") -> None:
    """Borrow slots for this rank's copies and launch the gather that fills them, counted as `op`.

    In training, copies that are carried over from the micro-batch before are neither borrowed nor gathered.
    """
    layer_pass.holds_copies = True
    carried = runtime.carried if layer_pass.is_training else None
    schedule = layer_pass.plan.gather if carried is None else carried.lend(layer_pass)
    layer_pass.gather = _fill_slots(runtime, layer_pass, schedule, op)
    if carried is not None:
        carried.keep(layer_pass)


def begin_calibrated(runtime: LayerRuntime, layer_pass: LayerPass, added: Schedule) -> None:
    """The same for the copies that calibration added to the plan."""
    layer_pass.added_gather = _fill_slots(runtime, layer_pass, added, "calibrate")
    if runtime.carried is not None and layer_pass.is_training:
        runtime.carried.keep(layer_pass)


def _fill_slots(runtime: LayerRuntime, layer_pass: LayerPass, schedule: Schedule, op: str) -> Pending:
    """Launch the gather of the plan's copies that have no slot yet."""
    bank, copies = runtime.bank, layer_pass.plan.copies_of(runtime.group.rank)
    filled = {e: runtime.pool.acquire(like=bank.compute_like) for e in copies if e not in layer_pass.copies}
    layer_pass.copies |= filled
    return sparse_all_gather(
        schedule,
        runtime.group.experts,
        {e: bank.compute_weights(runtime.layer, e).tensors() for e in runtime.owned_experts},
        {e: slot.tensors() for e, slot in filled.items()},
        op=layer_pass.op(op),
        where=layer_pass.where,
    )


def begin_reduce(runtime: LayerRuntime, layer_pass: LayerPass) -> None:
    """Launch the reduce of the copies' gradients. The weights in the slots are not needed any more."""
    bank = runtime.bank
    release_copies(runtime, layer_pass)
    if layer_pass.is_trained:
        schedule = layer_pass.plan.reduce
        layer_pass.staging = [runtime.pool.acquire(bank.storage["gate_up"]) for _ in range(schedule.most_received(bank.rank))]
        layer_pass.totals = {e: bank.grads(runtime.layer, e).tensors() for e in runtime.owned_experts}
        layer_pass.reduce = sparse_reduce_scatter(
            schedule,
            runtime.group.experts,
            {e: slot.tensors() for e, slot in layer_pass.copy_grads.items()},
            layer_pass.totals,
            [slot.tensors() for slot in layer_pass.staging],
            op=layer_pass.op("reduce"),
            where=layer_pass.where,
            wire=runtime.reduce_wire,
        )


def finish_reduce(runtime: LayerRuntime, layer_pass: LayerPass) -> None:
    """Wait until the owners' gradient rows hold every contribution."""
    if layer_pass.reduce is not None:
        layer_pass.reduce.wait()
        layer_pass.reduce = None
    for slot in (*layer_pass.copy_grads.values(), *layer_pass.staging):
        runtime.pool.release(slot)
    layer_pass.copy_grads, layer_pass.staging, layer_pass.totals = {}, [], {}


def discard_reduce(runtime: LayerRuntime, layer_pass: LayerPass) -> None:
    """Have what a reduce has not added yet go nowhere. It is still to be waited for: other ranks may need this one for theirs."""
    if layer_pass.reduce is not None:
        scratch = runtime.pool.acquire(runtime.bank.storage["gate_up"])
        layer_pass.staging.append(scratch)
        layer_pass.totals |= dict.fromkeys(layer_pass.totals, scratch.tensors())  # in place: the reduce reads it as sums complete


def release_copies(runtime: LayerRuntime, layer_pass: LayerPass) -> None:
    """Give the slots back. They must have been filled: a message may still be writing otherwise."""
    wait_for_copies(layer_pass)
    for slot in layer_pass.copies.values():
        runtime.pool.release(slot)
    layer_pass.copies, layer_pass.holds_copies = {}, False


def wait_for_copies(layer_pass: LayerPass) -> None:
    """Return when the slots are filled."""
    for gather in (layer_pass.gather, layer_pass.added_gather):
        if gather is not None:
            gather.wait()
    layer_pass.gather = layer_pass.added_gather = None


def materialized_weights(runtime: LayerRuntime, layer_pass: LayerPass) -> FFNWeights:
    """The weights of this rank's experts in group order: owned ones in place in the bank, copies in their slots."""
    copies, bank = layer_pass.copies, runtime.bank
    assert layer_pass.handle is not None
    return group_weights([copies.get(e) or bank.compute_weights(runtime.layer, e) for e in layer_pass.handle.experts])


@dataclass(frozen=True)
class GradientTargets:
    """Where the gradients of this rank's experts go, in group order, and which of those buffers hold nothing yet."""

    tensors: FFNWeights
    overwrite: tuple[bool, ...]


def gradient_targets(runtime: LayerRuntime, layer_pass: LayerPass) -> GradientTargets | None:
    """Owned experts: their rows of the bank's gradient. Copies: borrowed buffers, which the reduce sends to the owners.

    None when the experts are frozen, and in a backward that adds to no `.grad`: `torch.autograd.grad`, or one with `inputs`.
    """
    bank = runtime.bank
    assert layer_pass.anchor is not None
    if not will_run(layer_pass.anchor):
        return None
    layer_pass.backward_id = current_backward_id()
    if not layer_pass.is_trained:
        return None
    is_empty = bank.begin_grads(runtime.layer)
    assert layer_pass.handle is not None
    here = layer_pass.handle.experts
    layer_pass.copy_grads = {e: runtime.pool.acquire(like=bank.storage["gate_up"]) for e in here if e in layer_pass.copies}
    targets = [layer_pass.copy_grads.get(e) or bank.grads(runtime.layer, e) for e in here]
    return GradientTargets(
        group_weights(targets),
        tuple(e in layer_pass.copies or is_empty[e] for e in here),
    )


class _Enter(torch.autograd.Function):
    """The identity at a layer's door. The last of the layer's backward, it launches the reduce.

    Not earlier: on the way back through dispatch the next layer waits for token rows, and nobody yet for gradients.
    What travels then, the layer's reduce and the copies of the layer that is next, does so under the work between the two.

    A backward may come from the router alone, as that of its loss does, or add to no gradients. It leaves the copies to another
    that may follow, if the graph stays for one; which ranks agree on, as they do on what the backward reached.
    """

    @staticmethod
    def forward(ctx: Any, x_TD: Tensor, anchor: Tensor, runtime: LayerRuntime, layer_pass: LayerPass) -> tuple[Tensor, Tensor]:
        ctx.runtime, ctx.layer_pass = runtime, layer_pass
        return x_TD.view_as(x_TD), anchor.view_as(anchor)

    @staticmethod
    def backward(ctx: Any, dx_TD: Tensor, d_anchor: Tensor) -> tuple[Tensor, Tensor, None, None]:
        runtime, layer_pass = ctx.runtime, ctx.layer_pass
        if layer_pass.backward_id == current_backward_id():
            with runtime.stage("reduce", layer_pass):
                begin_reduce(runtime, layer_pass)
            runtime.reduces.add(runtime, layer_pass)
        if not keeps_graph():
            # No other backward comes. Whoever holds the loss, to print it later, holds the graph, and with it the pass.
            release_copies(runtime, layer_pass)
            layer_pass.handle = None
        if layer_pass.after_backward is not None:
            layer_pass.after_backward()
        return dx_TD, d_anchor, None, None


class _Materialize(torch.autograd.Function):
    """The identity on the pass's token. Forward waits for the gather."""

    @staticmethod
    def forward(ctx: Any, token: Tensor, runtime: LayerRuntime, layer_pass: LayerPass) -> Tensor:
        with runtime.stage("materialize", layer_pass):
            wait_for_copies(layer_pass)
        return token.view_as(token)

    @staticmethod
    def backward(ctx: Any, d_token: Tensor) -> tuple[Tensor, None, None]:
        return d_token, None, None


def enter(x_TD: Tensor, runtime: LayerRuntime, layer_pass: LayerPass) -> tuple[Tensor, Tensor]:
    """Open a pass in the autograd graph: `x_TD` unchanged, and a token that ties the later stages together.

    The token, a scalar that requires grad, makes the backward of every stage run on every rank, also where no input of the
    layer requires grad or no token arrived: all ranks must enter every collective.
    """
    anchor = torch.zeros((), device=x_TD.device, requires_grad=torch.is_grad_enabled())
    if anchor.requires_grad and layer_pass.anchor is None:  # not that of a recomputation, whose graph no backward runs through
        layer_pass.anchor = get_gradient_edge(anchor).node
    return _Enter.apply(x_TD, anchor, runtime, layer_pass)


def materialize(token: Tensor, runtime: LayerRuntime, layer_pass: LayerPass) -> Tensor:
    """Have this rank's copies at hand; see the module's docstring."""
    return _Materialize.apply(token, runtime, layer_pass)
