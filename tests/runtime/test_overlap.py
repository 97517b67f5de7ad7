"""Gathers are launched ahead, reduces waited for late, and nothing stale or borrowed is left over."""

import json
import tempfile
import threading
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh

from moesaic import Handle, shard_experts
from moesaic.collectives import Pending, Span
from moesaic.runtime.experts.bank import Bank
from moesaic.runtime.experts.replicas import ReplicaState
from moesaic.runtime.layer import moe_layers
from moesaic.runtime.wrap.profile import communication_events
from tests.helpers.configs import runtime_config
from tests.helpers.model import Model, cross_entropy, global_batch, make_model, rank_slice
from tests.helpers.ranks import run_ranks
from tests.runtime.test_shard import everywhere


def wrapped(**options: Any) -> tuple[Model, Handle]:
    model = make_model()
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    config = runtime_config(policy="static", slots=5, timeout_s=30, calibrate="never", **options)
    handle = shard_experts(model, mesh=mesh, config=config, solver=everywhere)
    # One training forward, so that the next placements have copies.
    cross_entropy(model(batch(0)[0]), batch(0)[1]).backward()
    return model, handle


def batch(step: int) -> Any:
    return tuple(rank_slice(t, dist.get_rank(), dist.get_world_size()) for t in global_batch(step))


def gathers(handle: Handle) -> int:
    return int(handle._group.experts.traffic.messages_R("gather").sum())


def launch_order(rank: int, overlap: bool) -> dict[str, Any]:
    """Which layers have a gather in flight when a block's attention runs, and which a reduce when its backward does."""
    model, handle = wrapped(overlap=overlap)
    first, second = (layer.runtime for layer in handle.layers.values())
    seen: dict[str, Any] = {}

    def look(name: str) -> Any:
        return lambda *_: seen.update({name: (first._prefetched is not None, second._prefetched is not None)})

    def look_back(name: str) -> Any:
        return lambda *_: seen.update({name: [grads._of.where.split(", ")[1] for grads in first.context.model.reduces._grads]})

    model.blocks[0].mix.register_full_backward_pre_hook(look_back("backward of the first attention"))
    model.blocks[1].mix.register_full_backward_pre_hook(look_back("backward of the second attention"))
    model.blocks[0].mix.register_forward_hook(look("attention of the first block"))
    model.blocks[1].mix.register_forward_hook(look("attention of the second block"))
    before = gathers(handle)
    loss = cross_entropy(model(batch(1)[0]), batch(1)[1])
    seen["gathers in forward"] = gathers(handle) - before
    loss.backward()
    assert not first.context.model.reduces._grads, "a reduce is in flight after backward"
    seen["gathers in backward"] = gathers(handle) - before - seen["gathers in forward"]
    handle.step()
    seen["exposed"] = handle.metrics()
    return seen


def test_gathers_run_ahead_of_their_layer() -> None:
    """The gather of a layer is in flight while the work before it runs; kept copies are not gathered again in backward."""
    for seen in run_ranks(2, launch_order, True):
        assert seen["attention of the first block"] == (True, False)
        assert seen["attention of the second block"] == (False, True)
        assert seen["backward of the second attention"] == ["blocks.1.moe"]
        assert seen["backward of the first attention"] == ["blocks.0.moe"]
        # 2 layers x the experts this rank owns (2 or 3 of 5) x 2 matrices, to the one other rank.
        assert seen["gathers in forward"] in (2 * 2 + 3 * 2, 8, 12)
        assert seen["gathers in backward"] == 0
        exposed = {key: seconds for key, seconds in seen["exposed"].items() if key.startswith("exposed_")}
        per_layer = {f"exposed_s/blocks.{i}.moe": exposed[f"exposed_s/blocks.{i}.moe"] for i in range(2)}
        totals = {f"exposed_{what}_s" for what in ("gather", "reduce", "tokens")}
        assert exposed.keys() == totals | per_layer.keys()
        assert sum(per_layer.values()) == pytest.approx(sum(exposed[key] for key in totals))
        assert all(seconds > 0 for seconds in exposed.values())


def test_without_overlap_nothing_is_in_flight_in_backward() -> None:
    for seen in run_ranks(2, launch_order, False):
        assert seen["backward of the second attention"] == seen["backward of the first attention"] == []


class _HeldBack:
    """Messages that count as arrived only once an event has happened."""

    def __init__(self, pending: Pending, event: threading.Event):
        self._pending, self._event = pending, event

    def wait(self, *, until_sent: bool = True) -> None:
        assert self._event.wait(20), "communication did not go on beside the main thread"
        self._pending.wait(until_sent=until_sent)


def profile_of_a_step(rank: int) -> list[dict[str, Any]]:
    """A step over Gloo, in which the second layer's gather and reduce arrive only after that layer's attention has begun."""
    model, handle = wrapped(transport="c10d")
    handle.step()
    events = {"gather": threading.Event(), "reduce": threading.Event()}
    transport = handle._group.experts
    exchange = transport.exchange

    def held_back(*args: Any, op: str, where: str) -> Pending:
        pending = exchange(*args, op=op, where=where)
        return _HeldBack(pending, events[op]) if "blocks.1" in where else pending

    transport.exchange = held_back  # type: ignore[method-assign]
    model.blocks[1].mix.register_forward_hook(lambda *_: events["gather"].set())
    model.blocks[1].mix.register_full_backward_pre_hook(lambda *_: events["reduce"].set())
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "profile.json"
        with handle.telemetry.profile(path):
            cross_entropy(model(batch(1)[0]), batch(1)[1]).backward()
        handle.step()
        assert [p.name for p in Path(folder).iterdir()] == ["profile.json"]
        found: list[dict[str, Any]] = json.loads(path.read_text())["traceEvents"]
    keep = ("ph", "cat", "name", "tid", "ts", "dur", "args")
    return [{key: event[key] for key in keep if key in event} for event in found if event["ph"] in "XM"]


def test_a_profile_shows_communication_under_attention() -> None:
    """One file; spans of a track nest or follow each other; gather and reduce of a layer span its attention's work."""
    for events in run_ranks(2, profile_of_a_step):
        spans = [event for event in events if event.get("cat") == "communication"]
        names = {event["args"]["name"] for event in events if event["name"] == "thread_name"}
        assert {"communication: experts", "communication: token rows"} <= names
        assert {span["name"].split(",")[0] for span in spans} >= {"gather", "reduce", "dispatch", "combine_backward", "measure"}
        for a in spans:
            for b in spans:
                if a is not b and a["tid"] == b["tid"]:
                    first, second = sorted((a, b), key=lambda event: (event["ts"], -event["dur"]))
                    follows = first["ts"] + first["dur"] <= second["ts"] + 1e-3
                    holds = second["ts"] + second["dur"] <= first["ts"] + first["dur"] + 1e-3
                    assert follows or holds
        attention = [event for event in events if event["name"] == "Linear"][1]
        experts = {s["name"]: s for s in spans if s["name"] in ("gather", "reduce") and "blocks.1" in s["args"]["where"]}
        gather, reduce = experts["gather"], experts["reduce"]
        assert gather["ts"] < attention["ts"]
        assert attention["ts"] + attention["dur"] < gather["ts"] + gather["dur"]
        # In backward, token rows go first; that the attention begins while the reduce is under way has released its arrival.
        stages = {event["name"]: event for event in events if event["name"].startswith("moesaic::")}
        dispatch = stages["moesaic::dispatch(blocks.1.moe)"]  # the last of the name: backward's
        assert dispatch["ts"] + dispatch["dur"] < reduce["ts"]


def test_collectives_in_flight_together_get_tracks_of_their_own() -> None:
    spans = [
        Span("gather", "a", 0.0, 2.0, 1.5, 2.5),
        Span("reduce", "b", 1.0, 3.0, 3.5, 3.5),
        Span("dispatch", "c", 2.0, 4.0, 5.0, 5.0),
    ]
    events = communication_events({"experts": spans}, 3, pid=7, offset_us=10.0)
    shown = [(e["name"], e["tid"] % (1 << 30), e["ts"], e["dur"]) for e in events if e["ph"] == "X"]
    assert shown == [
        ("gather", 0, 10.0, 2e6),
        ("gather, waited for", 0, 1.5e6 + 10, 0.5e6),
        ("reduce", 1, 1e6 + 10, 2e6),
        ("dispatch", 0, 2e6 + 10, 2e6),
    ]
    assert [e["args"]["name"] for e in events if e["ph"] == "M"] == ["rank 3", *2 * ["communication: experts"]]


def backward_order(rank: int, materialize: Any) -> dict[str, Any]:
    """What is in flight when the attention of the second block has its backward, and what is gathered and held, when."""
    model, handle = wrapped(materialize=materialize)
    first, second = (layer.runtime for layer in handle.layers.values())
    traffic, reduces = handle._group.experts.traffic, second.context.model.reduces
    sent = {op: int(traffic.bytes_R(op).sum()) for op in ("gather", "regather")}
    seen: dict[str, Any] = {}

    def look(*_: Any) -> None:
        assert first.latest_pass is not None
        seen.update({"gather": first.latest_pass.replicas.state is ReplicaState.GATHERING, "reduce": len(reduces._grads)})

    model.blocks[1].mix.register_full_backward_hook(look)
    loss = cross_entropy(model(batch(1)[0]), batch(1)[1])
    this = first.latest_pass
    assert this is not None
    seen["held after forward"] = this.replicas.state is not ReplicaState.RELEASED
    loss.backward()
    seen["left"] = this.replicas.state is not ReplicaState.RELEASED, len(reduces._grads)
    sent = {op: int(traffic.bytes_R(op).sum()) - before for op, before in sent.items()}
    return seen | {"bytes": sent, "owned": [len(r.bank.owned(r.layer)) for r in (first, second)]}


@pytest.mark.parametrize("materialize", ["keep", "rematerialize"])
def test_what_travels_under_the_attention_backward(materialize: str) -> None:
    """The second layer's reduce, and the first one's copies if they were released: half of what forward had gathered."""
    expert_bytes = 3 * 16 * 24 * 4
    for seen in run_ranks(2, backward_order, materialize):
        first, second = seen["owned"]
        assert seen["held after forward"] == (materialize == "keep")
        assert (seen["gather"], seen["reduce"]) == (materialize == "rematerialize", 1)
        assert seen["bytes"]["gather"] == (first + second) * expert_bytes
        assert seen["bytes"]["regather"] == (first * expert_bytes if materialize == "rematerialize" else 0)
        assert seen["left"] == (False, 0)


CHANGES: dict[str, Callable[[Bank], Any]] = {
    "sgd": lambda bank: torch.optim.SGD(bank.parameters(), lr=0.1).step(),
    "adamw fused": lambda bank: torch.optim.AdamW(bank.parameters(), lr=0.1, fused=True).step(),
    "in place": lambda bank: bank.experts[0].down.detach().mul_(0.5),
    "migration elsewhere": lambda bank: bank.adopt(bank.owners, bank.rows),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES.keys())
def test_backward_after_the_weights_changed_is_refused(change: Callable[[Bank], Any]) -> None:
    """The owners' rows, and copies gathered anew, would no longer be the weights of the forward."""
    layer = make_model().blocks[0].moe
    loss = layer(torch.randn(3, 16)).square().sum()
    for parameter in layer.experts.parameters():
        parameter.grad = torch.ones_like(parameter)
    change(layer.runtime.bank)
    with pytest.raises(RuntimeError, match="weights changed between this forward and its backward") as refused:
        loss.backward()
    assert "\n" not in str(refused.value)


def forward_only(rank: int) -> dict[str, Any]:
    """Evaluation: same outputs as the unsharded model, the predictor learns nothing, the slots come back."""
    model, handle = wrapped()
    expected_model = make_model().eval()
    model.eval()
    counters = [layer.runtime.counters.num_forwards for layer in handle.layers.values()]
    pool = next(iter(handle.layers.values())).runtime.pool
    with torch.no_grad():
        outputs = [model(batch(step)[0]) for step in range(3)]
        expected = [expected_model(batch(step)[0]) for step in range(3)]
    held = [layer.runtime._prefetched is not None for layer in handle.layers.values()]
    return {
        "difference": max((a - b).abs().max().item() for a, b in zip(outputs, expected, strict=True)),
        "counted": [layer.runtime.counters.num_forwards for layer in handle.layers.values()] == counters,
        "free": len(pool._free),
        "held": held,
    }


def test_evaluation_leaves_no_trace() -> None:
    for result in run_ranks(2, forward_only):
        assert result["difference"] < 1e-5
        assert result["counted"]
        # A layer gives its copies back before those of the next are gathered: the pool never grew past one layer's 2 or 3.
        assert result["free"] == 3
        assert result["held"] == [False, False]


class BrokenOffError(Exception):
    """Raised in the middle of a forward."""


def break_off(rank: int) -> float:
    """A forward breaks off after a gather was launched; weights change; the next forward must not use the old copies."""
    model, handle = wrapped()
    expected_model = make_model()

    def fail(*_: Any) -> None:
        raise BrokenOffError

    hook = model.blocks[1].mix.register_forward_hook(fail)
    with pytest.raises(BrokenOffError):
        model(batch(1)[0])
    hook.remove()
    with torch.no_grad():
        for parameter in handle._banks[0].parameters():
            parameter.mul_(2.0)
        for block in expected_model.blocks:
            for parameter in block.moe.experts.parameters():
                parameter.mul_(2.0)
        return (model(batch(1)[0]) - expected_model(batch(1)[0])).abs().max().item()


def test_a_forward_that_broke_off_leaves_nothing_stale() -> None:
    assert max(run_ranks(2, break_off)) < 1e-5


def reentrant(rank: int) -> str:
    from torch.utils.checkpoint import checkpoint

    layer = make_model().blocks[0].moe
    x = torch.randn(3, 16, requires_grad=True)
    with pytest.raises(RuntimeError, match="use_reentrant=False") as refused:
        checkpoint(layer, x, use_reentrant=True).sum().backward()
    return str(refused.value)


def test_reentrant_checkpointing_is_refused() -> None:
    """Its forward leaves no graph to repeat; the error names the cure."""
    assert "\n" not in reentrant(0)


def skip_a_layer(rank: int) -> tuple[bool, list[bool]]:
    """The second forward skips the second block. Whether passes and losses of the first are alive as it begins, and who has a
    loss after."""
    model, handle = wrapped()
    layers = moe_layers(model).values()
    loss = cross_entropy(model(batch(0)[0]), batch(0)[1]) + handle.aux_loss()
    before = [weakref.ref(of_layer) for layer in layers for of_layer in (layer.runtime.latest_pass, layer.aux_loss)]
    loss.backward()
    del loss
    alive: list[bool] = []
    model.blocks[0].register_forward_pre_hook(lambda *_: alive.append(any(this() is not None for this in before)))
    model.blocks[1].forward = torch.clone  # type: ignore[method-assign]
    (cross_entropy(model(batch(1)[0]), batch(1)[1]) + handle.aux_loss()).backward()
    return any(alive), [layer.aux_loss is not None for layer in layers]


def test_router_losses_are_those_of_the_last_forward_alone() -> None:
    """A layer that it skips has none; and nothing keeps the graph of the forward before."""
    assert run_ranks(2, skip_a_layer) == [(False, [True, False])] * 2
