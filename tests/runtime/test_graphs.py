"""Whatever graph the layers are part of: parity where they are called several times, beside other branches, and recomputed."""

import threading
import weakref
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from moesaic import MoELayer, RuntimeConfig
from moesaic.collectives import Pending
from moesaic.collectives.progress import CommunicationThread
from moesaic.runtime.group import RankGroup
from moesaic.runtime.wrap.prefetch import prefetch_in_order
from tests.helpers.cases import Case, share_experts
from tests.helpers.compare import assert_all_close, assert_bitwise, assert_close
from tests.helpers.configs import runtime_config
from tests.helpers.reference import DenseMoE
from tests.helpers.threads import run_threads
from tests.runtime.test_parity import gradients, merged, rank_loss, reference_gradients

# Calls a function of tensors, as it is or under an activation checkpoint.
Region = Callable[..., Any]


def plain(function: Callable[..., Any], *inputs: Tensor) -> Any:
    return function(*inputs)


def checkpointed(function: Callable[..., Any], *inputs: Tensor) -> Any:
    return checkpoint(function, *inputs, use_reentrant=False)


class Program(nn.Module):
    """A way to call two layers; whatever they are, and however regions are called, it computes the same."""

    def __init__(self, layers: list[Any], region: Region):
        super().__init__()
        self.layers, self.region = nn.ModuleList(layers), region

    def twice(self, x: Tensor) -> Tensor:
        first, last = self.layers[0], self.layers[-1]
        x = x.sin() + 0.3 * first(x)
        x = x.sin() + 0.3 * last(1.5 * x)
        return x.sin() + 0.3 * first(0.5 * x)


class SeveralCalls(Program):
    """Two regions in a row that call a layer twice each."""

    def forward(self, x: Tensor) -> Tensor:
        return self.region(self.twice, self.region(self.twice, x))


class Siamese(Program):
    """Two calls side by side in one region."""

    def forward(self, x: Tensor) -> Tensor:
        layer = self.layers[0]
        a, b = self.region(lambda x, z: (layer(x), layer(z)), x, x.cos())
        return a.tanh() * b + self.layers[-1](x)


class Branches(Program):
    """Branches beside the layer, made before and after it: the first to be asked for in backward does not lead to the layer."""

    def forward(self, x: Tensor) -> Tensor:
        def block(x: Tensor) -> Tensor:
            return x.exp().tanh() + self.layers[0](x) + self.layers[-1](2 * x) + (2 * x).tanh().exp()

        return self.region(block, self.region(block, x).tanh())


class Nested(Program):
    """Regions within a region, and a call without gradients."""

    def forward(self, x: Tensor) -> Tensor:
        def block(x: Tensor) -> Tensor:
            with torch.no_grad():
                fixed = self.layers[0](x.sin())
            x = x.sin() + 0.3 * self.layers[0](x + fixed)
            x = x + self.region(self.twice, x)
            return x + self.region(self.twice, self.layers[-1](x).sin())

        return self.region(block, x)


class Stack(Program):
    """Residual layers."""

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = x + self.region(layer, x).sin()
        return x


# What one backward of the sum of two losses does, another way: the loss of the outputs, that of the routers, the inputs.
Backward = Callable[[Tensor, Tensor, Tensor], None]


def of_the_sum(loss: Tensor, router_loss: Tensor, x: Tensor) -> None:
    (loss + router_loss).backward()


def routers_first(loss: Tensor, router_loss: Tensor, x: Tensor) -> None:
    router_loss.backward(retain_graph=True)
    loss.backward()


def routers_last(loss: Tensor, router_loss: Tensor, x: Tensor) -> None:
    loss.backward(retain_graph=True)
    router_loss.backward()


def halves(loss: Tensor, router_loss: Tensor, x: Tensor) -> None:
    (0.5 * (loss + router_loss)).backward(retain_graph=True)
    (0.5 * (loss + router_loss)).backward()


def asked_before(loss: Tensor, router_loss: Tensor, x: Tensor) -> None:
    """Gradients that are asked for go to whoever asked, and to no `.grad`."""
    (dx,) = torch.autograd.grad(loss + router_loss, x, retain_graph=True)
    torch.autograd.grad(router_loss, x, retain_graph=True)
    loss.backward(inputs=[x], retain_graph=True)
    x.grad = None
    (loss + router_loss).backward()
    assert x.grad is not None
    assert_close("dx that was asked for", dx, x.grad, rtol=0.0)


def run_program(
    group: RankGroup, case: Case, program: type[Program], region: Region, backward: Backward, options: dict[str, Any]
) -> dict[str, Tensor]:
    layers = with_router_loss(case.layers())
    share_experts(
        {str(i): layer for i, layer in enumerate(layers)},
        group,
        config=runtime_config(slots=case.slots, **options),
        solver=case.solver(),
        owners=case.owners(),
    )
    model = program(layers, region).train()
    prefetch_in_order(model, layers)
    results = {}
    for batch in range(2):
        x = case.tokens(group.rank, batch).requires_grad_()
        y = model(x)
        backward(rank_loss(y), torch.stack([layer.aux_loss for layer in layers]).sum(), x)
        assert x.grad is not None
        results |= {f"y {group.rank} {batch}": y.detach(), f"dx {group.rank} {batch}": x.grad}
    for layer in layers:
        layer.runtime.drop_prefetched()  # `Handle.step` does, for a layer that was to be called once more
        layer.aux_loss = None
    del y
    pool = layers[0].runtime.pool
    assert len(pool._free) == len(pool._alive), "slots that never came back"
    return results | gradients(layers)


def with_router_loss(layers: list[MoELayer]) -> list[MoELayer]:
    for layer in layers:
        layer.router.config = replace(layer.router.config, z_loss_coef=0.1, aux_loss_scope="micro_batch")
    return layers


def reference(case: Case, program: type[Program]) -> dict[str, Tensor]:
    layers = [DenseMoE(layer).double() for layer in case.layers()]
    router_losses: dict[nn.Module, Tensor] = {}

    def keep_router_loss(layer: nn.Module, inputs: tuple[Tensor], _: Tensor) -> None:
        logits_TE = inputs[0] @ layer.router.T
        router_losses[layer] = 0.1 * logits_TE.logsumexp(dim=-1).square().sum() / max(len(logits_TE), 1)

    for layer in layers:
        layer.register_forward_hook(keep_router_loss)
    model, results = program(layers, plain), {}
    for batch in range(2):
        for rank in range(case.world_size):
            x = case.tokens(rank, batch).double().requires_grad_()
            y = model(x)
            ((rank_loss(y) + torch.stack(list(router_losses.values())).sum()) / case.world_size).backward()
            assert x.grad is not None
            results |= {f"y {rank} {batch}": y.detach(), f"dx {rank} {batch}": x.grad * case.world_size}
    return results | reference_gradients(layers)


def on_ranks(
    case: Case, program: type[Program], region: Region, backward: Backward = of_the_sum, **options: Any
) -> dict[str, Tensor]:
    args = case, program, region, backward, options
    return merged(case, run_threads(case.world_size, run_program, *args, topology=case.topology()))


SMALL = Case(
    world_size=3,
    num_experts=5,
    top_k=2,
    num_layers=2,
    tokens_R=(5, 0, 6),
    placement="random",
    hot_expert=False,
    any_owner=True,
    normalize=True,
    seed=3,
)


@pytest.mark.parametrize(
    "program,case,options",
    [
        (SeveralCalls, SMALL, {}),
        (Siamese, SMALL, {}),
        (Branches, replace(SMALL, placement="quota", hot_expert=True), {"calibrate": "always"}),
        (Nested, replace(SMALL, has_shared=True), {"materialize": "rematerialize"}),
    ],
)
def test_checkpointed_calls_repeat_their_own_forward(program: type[Program], case: Case, options: dict[str, Any]) -> None:
    """Each call of a layer under a checkpoint has its routing and its plan back, wherever it stands: nothing changes by a bit."""
    expected = on_ranks(case, program, plain, **options)
    assert_all_close(expected, reference(case, program))
    assert_bitwise(on_ranks(case, program, checkpointed, **options), expected)


def test_a_recomputation_that_does_something_else_is_refused() -> None:
    layer = MoELayer(8, 8, 2, 1)
    forwards = [layer]

    def changing(x: Tensor) -> Tensor:
        with torch.no_grad():
            seen = [forward(x) for forward in forwards[1:]]
        forwards.append(layer)
        return layer(x) + len(seen)

    loss = checkpointed(changing, torch.randn(3, 8, requires_grad=True)).sum()
    with pytest.raises(RuntimeError, match=r"^layer was called 1 times .*; the checkpointed function must do the same"):
        loss.backward()


@pytest.mark.parametrize(
    "backward,region,options",
    [
        (of_the_sum, plain, {}),
        (routers_first, plain, {}),
        (routers_last, plain, {}),
        (routers_last, checkpointed, {}),
        (halves, plain, {"materialize": "rematerialize"}),
        (asked_before, plain, {}),
        (asked_before, checkpointed, {"materialize": "rematerialize"}),
    ],
)
def test_several_backwards_through_one_forward(backward: Backward, region: Region, options: dict[str, Any]) -> None:
    """Each reaches what it reaches, adds to gradients if it is to, and leaves the next one what it needs."""
    assert_all_close(on_ranks(SMALL, Stack, region, backward, **options), reference(SMALL, Stack))


def test_a_gradient_that_was_dropped_alone_starts_anew() -> None:
    """That of one of an expert's parameters, or of one expert; the others keep what they hold."""
    layer, x = MoELayer(8, 8, 2, 1), torch.randn(9, 8)
    parameters = dict(layer.experts.named_parameters())
    layer(x).sum().backward()
    once = {name: parameter.grad.clone() for name, parameter in parameters.items()}
    dropped = ("0.down", "1.gate_up", "1.down")
    for name in dropped:
        parameters[name].grad = None
    layer(x).sum().backward()
    grads = {name: parameter.grad for name, parameter in parameters.items()}
    assert_all_close(grads, {name: grad if name in dropped else 2 * grad for name, grad in once.items()})


def test_a_gradient_of_somebody_elses_is_added_to() -> None:
    """Put in the place of ours before the first backward, or between two; what was taken out is written no more."""
    layer, x = MoELayer(8, 8, 2, 1), torch.randn(9, 8)
    parameters = dict(layer.experts.named_parameters())
    layer(x).sum().backward()
    once = {name: parameter.grad.clone() for name, parameter in parameters.items()}
    kept = {name: parameter.grad for name, parameter in parameters.items()}
    for parameter in parameters.values():
        parameter.grad = torch.full_like(parameter, 3.0)
    layer(x).sum().backward()
    assert_all_close({name: p.grad for name, p in parameters.items()}, {name: grad + 3.0 for name, grad in once.items()})
    assert_all_close(kept, once)


def test_where_rows_went_is_kept_no_longer_than_backward_needs_it() -> None:
    """Even while somebody holds losses; another backward, for which the graph was not kept, is refused."""
    layers, x = [MoELayer(8, 6, 3, 2) for _ in range(2)], torch.randn(9, 8)
    loss = layers[1](layers[0](x)).sum()
    handles = [weakref.ref(layer.runtime.latest_pass.handle) for layer in layers]
    loss.backward(retain_graph=True)
    assert all(handle() is not None for handle in handles)
    loss.backward()
    assert all(handle() is None for handle in handles)
    assert all(layer.aux_loss.requires_grad for layer in layers)
    with pytest.raises(
        RuntimeError, match=r"layer, plan 0, pass 0: backward ran a second time .*; give retain_graph=True"
    ) as refused:
        loss.backward()
    assert "\n" not in str(refused.value)


def test_a_recomputation_leaves_no_tokens_behind() -> None:
    """torch ends it behind the experts, where nothing is saved later; its outputs are not kept for as long as the loss is."""
    experts, x = MoELayer(8, 6, 3, 2).experts, torch.randn(9, 8, requires_grad=True)
    ids_TK = torch.tensor([[0, 1]] * 9)
    loss = checkpointed(lambda x: x + experts(x, ids_TK, torch.ones(9, 2)), x).sum()
    this = experts.runtime.latest_pass
    loss.backward()
    assert this is not None and this.is_replay
    assert this.tokens is this.token_grads is this.handle is None


def test_second_derivatives_are_refused() -> None:
    """Also where the first is taken of a sum, so that no gradient that comes in leads anywhere."""
    x = torch.randn(3, 8, requires_grad=True)
    with pytest.raises(RuntimeError, match=r"^step 0, layer, plan 0, pass 0: .*create_graph=True, but experts have no second"):
        torch.autograd.grad(MoELayer(8, 8, 2, 1)(x).sum(), x, create_graph=True)


class BreakOff(torch.autograd.Function):
    """The identity, whose backward fails."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, dx: Tensor) -> None:
        raise MemoryError("out of memory")


class Late:
    """Messages that arrive once an event has happened, as over a slow link."""

    def __init__(self, pending: Pending, event: threading.Event):
        self._pending, self._event = pending, event

    def wait(self, *, until_sent: bool = True) -> None:
        assert self._event.wait(20)
        self._pending.wait(until_sent=until_sent)


def broken_off(group: RankGroup, case: Case, has_thread: bool, breaks: bool) -> dict[str, Tensor]:
    """Gradients of a step, after one that broke off between two layers or after none, whose gradients were set to zero."""
    if has_thread:
        group.experts.thread = CommunicationThread()
    layers = case.layers()
    config = RuntimeConfig(slots=case.slots)
    named = {str(i): layer for i, layer in enumerate(layers)}
    share_experts(named, group, config=config, solver=case.solver(), owners=case.owners())
    first, last = layers
    rank_loss(last(first(case.tokens(group.rank)))).backward()
    if breaks:
        zeroed, exchange = threading.Event(), group.experts.exchange

        def exchange_late(*args: Any, op: str, where: str) -> Pending:
            pending = exchange(*args, op=op, where=where)
            return Late(pending, zeroed) if op == "reduce" else pending

        group.experts.exchange = exchange_late  # type: ignore[method-assign]
        with pytest.raises(MemoryError):
            (100 * rank_loss(last(BreakOff.apply(first(case.tokens(group.rank)))))).backward()
        (broken,) = first.runtime.context.model.reduces._grads
        reduce = broken._reduce
        assert reduce is not None
        del broken
    for parameter in (*first.runtime.bank.parameters(), *first.parameters(), *last.parameters()):
        if parameter.grad is not None:
            parameter.grad.zero_()
    if breaks:
        zeroed.set()
        if has_thread:
            reduce.wait()  # what the thread does by itself; without one, nothing is added before somebody waits
        group.experts.exchange = exchange  # type: ignore[method-assign]
    rank_loss(last(first(case.tokens(group.rank, 1)))).backward()
    pool = first.runtime.pool
    assert len(pool._free) == len(pool._alive), "slots that never came back"
    return gradients(layers)


@pytest.mark.parametrize("has_thread", [False, True])
def test_a_backward_that_broke_off_adds_nothing_to_the_next(has_thread: bool) -> None:
    """Nor to gradients that were set to zero in place while its reduce was under way, on the main thread or beside it."""
    case = replace(SMALL, placement="everywhere")
    after, expected = (
        merged(case, run_threads(3, broken_off, case, has_thread, breaks, topology=case.topology())) for breaks in (True, False)
    )
    assert_bitwise(after, expected)
