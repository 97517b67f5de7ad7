"""Experts that are frozen on some ranks and learn on others: gradients are reduced to whom they are for."""

import numpy as np
import torch
from torch import Tensor

from moesaic import MoELayer, RuntimeConfig
from moesaic.placement import OwnerMap
from moesaic.runtime.group import RankGroup
from moesaic.runtime.shard import share_experts
from moesaic.runtime.stages import StageClock
from tests.helpers.compare import assert_bitwise
from tests.helpers.threads import run_threads
from tests.runtime.test_shard import everywhere


def gradients(group: RankGroup, owners_E: list[int], frozen: set[str]) -> tuple[dict[str, Tensor], int]:
    """Of the experts owned here that got any, after a step whose copies are everywhere; and the bytes that were reduced."""
    layer, owners = MoELayer(8, 6, 4, 2), OwnerMap(np.array([owners_E]), 2)
    generator = torch.Generator().manual_seed(9)  # ranks are threads, which share torch's own
    for parameter in layer.parameters():
        parameter.data.copy_(0.3 * torch.randn(parameter.shape, generator=generator))
    config = RuntimeConfig(policy="static", slots=4)
    share_experts({"moe": layer}, group, config=config, solver=everywhere, clock=StageClock(), owners=owners)
    for name, parameter in layer.experts.named_parameters():
        parameter.requires_grad_(name not in frozen)
    generator = torch.Generator().manual_seed(group.rank)
    for _ in range(2):  # the second has copies
        layer(torch.randn(12, 8, generator=generator)).square().sum().backward()
    grads = {name: p.grad.as_subclass(Tensor) for name, p in layer.experts.named_parameters() if p.grad is not None}
    return grads, group.experts.traffic.total_bytes().get("reduce", 0)


def test_ranks_whose_experts_are_frozen_reduce_those_of_others() -> None:
    """All of a rank's, one weight alone, or all: what learns gets the bits it gets where nothing is frozen."""
    names = {f"{e}.{weight}" for e in range(4) for weight in ("gate_up", "down")}
    for owners_E in ([0, 0, 1, 1], [1, 1, 1, 1]):
        expected = {name: grad for part, _ in run_threads(2, gradients, owners_E, set()) for name, grad in part.items()}
        assert expected.keys() == names
        for frozen in ({name for name in names if name[0] in "01"}, {"0.down", "3.gate_up"}, names):
            parts = run_threads(2, gradients, owners_E, frozen)
            found = {name: grad for part, _ in parts for name, grad in part.items()}
            assert_bitwise(found, {name: grad for name, grad in expected.items() if name not in frozen})
            assert any(num_bytes for _, num_bytes in parts) == (frozen != names)
