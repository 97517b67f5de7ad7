"""Experts that are frozen on some ranks and learn on others: gradients are reduced to whom they are for."""

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor

from moesaic import MoELayer, RuntimeConfig, shard_experts
from moesaic.placement import OwnerMap
from moesaic.runtime.group import RankGroup
from tests.helpers.cases import share_experts
from tests.helpers.compare import assert_bitwise
from tests.helpers.ranks import run_ranks
from tests.helpers.small_net import DIM, Net
from tests.helpers.threads import run_threads
from tests.runtime.test_shard import everywhere


def gradients(group: RankGroup, owners_E: list[int], frozen: set[str]) -> tuple[dict[str, Tensor], int]:
    """Of the experts owned here that got any, after a step whose copies are everywhere; and the bytes that were reduced."""
    layer, owners = MoELayer(8, 6, 4, 2), OwnerMap(np.array([owners_E]), 2)
    generator = torch.Generator().manual_seed(9)  # ranks are threads, which share torch's own
    for parameter in layer.parameters():
        parameter.data.copy_(0.3 * torch.randn(parameter.shape, generator=generator))
    config = RuntimeConfig(policy="static", slots=4)
    share_experts({"moe": layer}, group, config=config, solver=everywhere, owners=owners)
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


def clip_where_a_rank_has_none(rank: int, shard_dense: bool) -> list[str]:
    """All experts of rank 0 are frozen, so that it comes to no exchange of norms."""
    torch.manual_seed(0)
    model = Net()
    handle = shard_experts(model, mesh=init_device_mesh("cpu", (2,)), config=RuntimeConfig(shard_dense=shard_dense, timeout_s=60))
    for expert in handle.layers["layers.0.moe"], handle.layers["layers.1.moe"]:
        expert.requires_grad_(rank == 1)
    model(torch.randn(6, DIM)).square().mean().backward()
    norm, messages = handle.clip_grad_norm_(1.0), []
    assert norm > 0
    if rank == 1:
        for foreach in (None, False):
            parameters = [p for p in model.parameters() if foreach is None or not isinstance(p, DTensor)]
            with pytest.raises(RuntimeError) as refused:
                torch.nn.utils.clip_grad_norm_(parameters, 1.0, foreach=foreach)
            messages.append(str(refused.value))
    return messages


@pytest.mark.parametrize("shard_dense", [True, False])
def test_torchs_clipping_is_refused_where_a_rank_has_no_gradients_of_experts(shard_dense: bool) -> None:
    """Before any rank waits for that one; `handle.clip_grad_norm_` has the norm."""
    _, messages = run_ranks(2, clip_where_a_rank_has_none, shard_dense)
    (message,) = set(messages)
    assert message.startswith("rank 0 owns no trainable expert, so the norm of all gradients cannot be made one number")
    assert "use handle.clip_grad_norm_" in message
