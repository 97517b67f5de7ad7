"""Gathers are launched ahead, and nothing stale or borrowed is left over."""

from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh

from moesaic import Handle, RuntimeConfig, shard_experts
from tests.helpers.model import Model, cross_entropy, global_batch, make_model, rank_slice
from tests.helpers.ranks import run_ranks
from tests.runtime.test_shard import everywhere


def wrapped() -> tuple[Model, Handle]:
    model = make_model()
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    config = RuntimeConfig(policy="static", slots=5, timeout_s=30)
    handle = shard_experts(model, mesh=mesh, config=config, solver=everywhere)
    # One training forward, so that the next placements have copies.
    cross_entropy(model(batch(0)[0]), batch(0)[1]).backward()
    return model, handle


def batch(step: int) -> Any:
    return tuple(rank_slice(t, dist.get_rank(), dist.get_world_size()) for t in global_batch(step))


def gathers(handle: Handle) -> int:
    return int(handle.group.experts.traffic.messages_R("gather").sum())


def launch_order(rank: int) -> dict[str, Any]:
    """Which layers have a gather in flight when the first block runs, and when the second does."""
    model, handle = wrapped()
    first, second = (layer.runtime for layer in handle.layers.values())
    seen: dict[str, Any] = {}

    def look(name: str) -> Any:
        return lambda *_: seen.update({name: (first._prefetched is not None, second._prefetched is not None)})

    model.blocks[0].mix.register_forward_hook(look("attention of the first block"))
    model.blocks[1].mix.register_forward_hook(look("attention of the second block"))
    before = gathers(handle)
    loss = cross_entropy(model(batch(1)[0]), batch(1)[1])
    seen["gathers in forward"] = gathers(handle) - before
    loss.backward()
    seen["gathers in backward"] = gathers(handle) - before - seen["gathers in forward"]
    return seen


def test_gathers_run_ahead_of_their_layer() -> None:
    """The gather of a layer is in flight while the work before it runs; kept copies are not gathered again in backward."""
    for seen in run_ranks(2, launch_order):
        assert seen["attention of the first block"] == (True, False)
        assert seen["attention of the second block"] == (False, True)
        # 2 layers x the experts this rank owns (2 or 3 of 5) x 2 matrices, to the one other rank.
        assert seen["gathers in forward"] in (2 * 2 + 3 * 2, 8, 12)
        assert seen["gathers in backward"] == 0


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
        for parameter in handle.banks[0].parameters():
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
