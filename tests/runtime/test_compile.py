"""`torch.compile` of the blocks around MoE layers: clean graphs before and behind them, the results of eager."""

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, fx
from torch.distributed.device_mesh import init_device_mesh

from moesaic import RuntimeConfig, shard_experts
from tests.helpers.compare import assert_bitwise
from tests.helpers.model import cross_entropy, global_batch, make_model, rank_slice
from tests.helpers.ranks import run_ranks
from tests.runtime.test_shard import SOLVERS, whole_gradients


class Recorder:
    """A backend that runs graphs as they are, and keeps the names of their operations."""

    def __init__(self) -> None:
        self.graphs: list[list[str]] = []

    def __call__(self, module: fx.GraphModule, inputs: list[Tensor]) -> Callable[..., Any]:
        self.graphs.append([str(node.target) for node in module.graph.nodes if node.op.startswith("call_")])
        return module.forward


def backward_on_ranks(rank: int, when: str) -> tuple[dict[str, Tensor], list[list[str]]]:
    """Gradients of two micro-batches, and the graphs that were compiled: of the blocks before or after sharding, of the whole
    model after it, or never."""
    torch._dynamo.reset()
    world_size, recorder = dist.get_world_size(), Recorder()
    model = make_model()
    if when == "before":
        for block in model.blocks:
            block.compile(backend=recorder)
    config = RuntimeConfig(policy="static", slots=5, timeout_s=60)
    handle = shard_experts(model, mesh=init_device_mesh("cpu", (world_size,)), config=config, solver=SOLVERS["random"])
    if when == "after":
        for block in model.blocks:
            block.compile(backend=recorder)
    if when == "whole":
        model.compile(backend=recorder)
    for batch in range(2):
        ids, targets = (rank_slice(t, rank, world_size) for t in global_batch(batch))
        (cross_entropy(model(ids), targets) + handle.aux_loss()).backward()
    return whole_gradients(model, handle), recorder.graphs


def test_compiled_blocks_break_at_the_layer_alone_and_compute_what_eager_does() -> None:
    """Bit for bit, copies included: this backend does not change an operation."""
    expected = [grads for grads, _ in run_ranks(2, backward_on_ranks, "never")]
    for when in ("before", "after"):
        for (grads, graphs), eager in zip(run_ranks(2, backward_on_ranks, when), expected, strict=True):
            assert_bitwise(grads, eager)
            # Both blocks run the same two graphs: the residual branch before the layer, and the addition behind it.
            before, behind = graphs
            assert all(any(name in op for op in before) for name in ("linear", "tanh", "rms_norm"))
            assert len(behind) == 1
            assert "add" in behind[0]
    # As a whole, with the hooks that launch gathers outside its graphs.
    for (grads, graphs), eager in zip(run_ranks(2, backward_on_ranks, "whole"), expected, strict=True):
        assert_bitwise(grads, eager)
        assert graphs
