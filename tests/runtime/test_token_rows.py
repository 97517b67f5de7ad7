"""Tokens travel under shared experts: what is launched and waited for when; what a failure leaves."""

from typing import Any
from unittest.mock import Mock

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh

from moesaic import Handle, shard_experts
from moesaic.collectives import Pending
from moesaic.runtime.dispatch.exchange import TokenExchange
from moesaic.runtime.experts.replicas import ReplicaState
from tests.helpers.compare import assert_bitwise
from tests.helpers.configs import runtime_config
from tests.helpers.model import Model, cross_entropy, global_batch, make_model, rank_slice
from tests.helpers.ranks import run_ranks
from tests.runtime.test_memory import two_copies
from tests.runtime.test_shard import whole_gradients

ROWS = ("dispatch", "combine", "combine_backward", "dispatch_backward")
SENT = ["launch dispatch", "wait dispatch"]
COMBINED = ["launch combine", "wait combine"]
COMBINED_BACK = ["launch combine_backward", "wait combine_backward"]
# Rows, and the gradients of their gate weights.
SENT_BACK, TAKEN_BACK = 2 * ["launch dispatch_backward"], 2 * ["wait dispatch_backward"]
FORWARD = ["launch dispatch", "shared", "wait dispatch", *COMBINED]
BACKWARD = [*COMBINED_BACK, *SENT_BACK, "shared's backward", *TAKEN_BACK]
PLAIN = [*SENT, "shared", *COMBINED, *COMBINED_BACK, *SENT_BACK, *TAKEN_BACK, "shared's backward"]
WITHOUT_SHARED = [*SENT, *COMBINED, *COMBINED_BACK, *SENT_BACK, *TAKEN_BACK]


def wrapped(**options: Any) -> tuple[Model, Handle]:
    """The model whose first MoE layer has a shared expert."""
    model = make_model(use_checkpoint=options.pop("use_checkpoint", False))
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    config = runtime_config(policy="static", slots=5, timeout_s=30, calibrate="never", **options)
    return model, shard_experts(model, mesh=mesh, config=config, solver=two_copies)


def batch(step: int) -> tuple[Tensor, Tensor]:
    ids, targets = (rank_slice(t, dist.get_rank(), dist.get_world_size()) for t in global_batch(step))
    return ids, targets


class Recorded:
    """Messages whose wait is written down."""

    def __init__(self, pending: Pending, op: str, events: list[str]):
        self._pending, self._op, self._events = pending, op, events

    def wait(self, *, until_sent: bool = True) -> None:
        self._events.append(f"wait {self._op}")
        self._pending.wait(until_sent=until_sent)


def recorded_step(
    rank: int, options: dict[str, Any], is_compiled: bool = False
) -> tuple[dict[str, list[str]], dict[str, Tensor]]:
    """What happened in a step, by layer, and its gradients."""
    torch._dynamo.reset()
    model, handle = wrapped(**options)
    if is_compiled:
        for block in model.blocks:
            block.compile(backend="eager")
    events: dict[str, list[str]] = {name: [] for name in handle.layers}
    transport = handle._group.tokens
    exchange_rows = transport.exchange_rows

    def recording(*args: Any, op: str, where: str) -> Pending:
        pending = exchange_rows(*args, op=op, where=where)
        if op not in ROWS:
            return pending
        of_layer = events[where.split(", ")[1]]
        of_layer.append(f"launch {op}")
        return Recorded(pending, op, of_layer)

    transport.exchange_rows = recording  # type: ignore[method-assign]
    first = events["blocks.0.moe"]

    def watch(module: nn.Module, inputs: Any, output: Tensor) -> None:
        first.append("shared")
        output.register_hook(lambda grad: first.append("shared's backward"))

    model.blocks[0].moe.shared.register_forward_hook(watch)
    ids, targets = batch(1)
    (cross_entropy(model(ids), targets) + handle.aux_loss()).backward()
    return events, whole_gradients(model, handle)


@pytest.mark.parametrize("transport", ["c10d", "shm"])
def test_shared_experts_run_between_launch_and_wait(transport: str) -> None:
    """In both directions, also repeated, and between compiled graphs; to the bits of the plain order. Other layers as ever."""
    expected = {
        "overlapped": ({}, False, [*FORWARD, *BACKWARD]),
        "repeated": ({"use_checkpoint": True}, False, [*FORWARD, *FORWARD, *BACKWARD]),
        "compiled": ({}, True, [*FORWARD, *BACKWARD]),
        "plain": ({"overlap": False}, False, PLAIN),
    }
    found = {
        name: run_ranks(2, recorded_step, options | {"transport": transport}, is_compiled)
        for name, (options, is_compiled, _) in expected.items()
    }
    for name, (_, _, events) in expected.items():
        for (of_layer, grads), (_, plain_grads) in zip(found[name], found["plain"], strict=True):
            assert of_layer["blocks.0.moe"] == events, name
            assert name == "repeated" or of_layer["blocks.1.moe"] == WITHOUT_SHARED
            assert_bitwise(grads, plain_grads)


class BrokenOffError(Exception):
    """Raised by a shared expert."""


def break_off(rank: int, transport: str, when: str) -> tuple[dict[str, Tensor], dict[str, Tensor], dict[str, Any]]:
    """Gradients of a step after one that broke off while token rows were on their way, of one that nothing came before, and
    what is left."""
    found = []
    for breaks in (True, False):
        # FSDP2 keeps gradients of a backward that broke off, so it is left out.
        model, handle = wrapped(transport=transport, shard_dense=False)
        cross_entropy(model(batch(0)[0]), batch(0)[1]).backward()  # the next forward has copies
        shared, rows = model.blocks[0].moe.shared, handle._group.tokens.traffic

        def fail(*_: Any) -> None:
            raise BrokenOffError

        def pass_on(*_: Any) -> None:
            pass

        def fail_in_backward(module: nn.Module, inputs: Any, output: Tensor) -> None:
            output.register_hook(fail)

        if breaks:
            with pytest.MonkeyPatch.context() as patch:
                if when == "experts":
                    patch.setattr("moesaic.runtime.step.layer_pass.grouped_ffn", Mock(side_effect=BrokenOffError))
                if when == "experts in backward":
                    patch.setattr("moesaic.runtime.step.layer_pass.grouped_ffn_backward", Mock(side_effect=BrokenOffError))
                hook = shared.register_forward_hook({"forward": fail, "backward": fail_in_backward}.get(when, pass_on))
                with pytest.raises(BrokenOffError):
                    cross_entropy(model(batch(1)[0]), batch(1)[1]).backward()
                hook.remove()
            left, broken = rows.unfinished, model.blocks[0].moe.runtime.latest_pass
            assert isinstance(left, TokenExchange) == ("experts" not in when)
        model.zero_grad()
        cross_entropy(model(batch(2)[0]), batch(2)[1]).backward()
        assert rows.unfinished is None
        if breaks:
            in_flight = (left._tokens, left._returning) if isinstance(left, TokenExchange) else ()
            assert all(tokens is None or tokens.has_arrived for tokens in in_flight), "tokens are left on their way"
        if breaks and when == "experts":
            assert broken is not None and broken.tokens is not None and broken.tokens._tokens is None, "tokens are kept"
        if breaks and when in ("forward", "experts"):
            assert broken is not None and broken.replicas.state is ReplicaState.RELEASED
        handle.step()
        found.append(whole_gradients(model, handle))
    pool = next(iter(handle.layers.values())).runtime.pool
    return found[0], found[1], {"lent": len(pool._alive) - len(pool._free)}


@pytest.mark.parametrize("transport", ["c10d", "shm"])
@pytest.mark.parametrize("when", ["forward", "backward", "experts", "experts in backward"])
def test_a_failure_leaves_nothing_behind(transport: str, when: str) -> None:
    """Of the shared experts, or of the experts: the next step computes what it does after none; no rows are on
    their way, no slot is lent."""
    for after_failure, expected, left in run_ranks(2, break_off, transport, when):
        assert_bitwise(after_failure, expected)
        assert left == {"lent": 0}
