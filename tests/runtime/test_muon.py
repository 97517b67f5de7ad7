"""Muon: the same ten steps on one, two and four ranks, as the formula says, and not a byte sent for experts."""

import math
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor.debug import CommDebugMode

from moesaic import Handle, RouterConfig, RuntimeConfig, shard_experts
from moesaic.optim import Muon, muon_groups
from moesaic.placement import OwnerMap
from tests.helpers.compare import assert_all_close, assert_close
from tests.helpers.model import BATCH, CLASSES, LENGTH, Model, cross_entropy, make_model, rank_slice
from tests.helpers.ranks import run_ranks

STEPS, LR, DECAY, MOMENTUM = 10, 1e-2, 0.1, 0.95


def batch_ids(step: int) -> Tensor:
    return torch.randint(CLASSES, (BATCH, LENGTH), generator=torch.Generator().manual_seed(step))


def built() -> Model:
    return make_model(RouterConfig(aux_loss_coef=0.0))


def loss_of(model: nn.Module, ids: Tensor) -> Tensor:
    return cross_entropy(model(ids), (3 * ids + 1) % CLASSES)


def sharded() -> tuple[Model, Handle]:
    model = built()
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    config = RuntimeConfig(timeout_s=60, check_replicas_every=4)
    return model, shard_experts(model, mesh=mesh, config=config)


def train(rank: int, migrates: bool) -> dict[str, Tensor]:
    model, handle = sharded()
    optimizer = Muon(muon_groups(handle, adamw=["head.*"]), lr=LR, weight_decay=DECAY, momentum=MOMENTUM)
    for step in range(STEPS):
        loss_of(model, rank_slice(batch_ids(step), rank, dist.get_world_size())).backward()
        optimizer.step()
        optimizer.zero_grad()
        handle.step(optimizer)
        if migrates and step % 3 == 0:
            handle.migrate([next_owners(owners) for owners in handle.owner_maps], optimizer)
    return {name: tensor.clone() for name, tensor in handle.weights.state_dict().items()}


def next_owners(owners: OwnerMap) -> OwnerMap:
    """Every rank gives its last expert of each layer to the next rank."""
    wanted_LE = owners.expert_to_owner_LE.copy()
    for layer, owner_E in enumerate(owners.expert_to_owner_LE):
        for rank in range(owners.num_ranks):
            wanted_LE[layer, np.flatnonzero(owner_E == rank)[-1]] = (rank + 1) % owners.num_ranks
    return OwnerMap(wanted_LE, owners.num_ranks)


def orthogonal(x: Tensor) -> Tensor:
    """One matrix, in fp64."""
    x = x.double() / x.double().norm()
    for _ in range(5):
        gram = x @ x.T
        x = 3.4445 * x - 4.7750 * gram @ x + 2.0315 * gram @ gram @ x
    return x.float()


def is_for_muon(name: str, parameter: Tensor) -> bool:
    return parameter.ndim == 2 and not name.startswith(("embed", "head")) and ".router." not in name


def train_plain() -> dict[str, Tensor]:
    """The unwrapped model on the whole batch: the formula, a parameter at a time."""
    model = built()
    named = dict(model.named_parameters())
    matrices = {name: parameter for name, parameter in named.items() if is_for_muon(name, parameter)}
    rest = [parameter for name, parameter in named.items() if name not in matrices]
    adamw = torch.optim.AdamW(
        [
            {"params": [parameter for parameter in rest if parameter.ndim > 1]},
            {"params": [parameter for parameter in rest if parameter.ndim < 2], "weight_decay": 0.0},
        ],
        lr=LR,
        betas=(0.9, 0.95),
        weight_decay=DECAY,
    )
    momenta = {name: torch.zeros_like(parameter) for name, parameter in matrices.items()}
    for step in range(STEPS):
        loss_of(model, batch_ids(step)).backward()
        with torch.no_grad():
            for name, parameter in matrices.items():
                if parameter.grad is not None:
                    grad = parameter.grad
                    momenta[name] = MOMENTUM * momenta[name] + (1 - MOMENTUM) * grad
                    update = orthogonal(MOMENTUM * momenta[name] + (1 - MOMENTUM) * grad)
                    parameter -= LR * (DECAY * parameter + 0.2 * math.sqrt(max(parameter.shape)) * update)
        adamw.step()
        model.zero_grad()
    return model.state_dict()


@pytest.mark.parametrize("world_size,migrates", [(1, False), (2, False), (4, True)])
def test_ten_steps_are_those_of_the_formula(world_size: int, migrates: bool) -> None:
    found, *others = run_ranks(world_size, train, migrates)
    assert_all_close(dict(found), train_plain())
    assert all(state == {} for state in others)


def count_what_is_sent(rank: int) -> dict[str, Any]:
    """Of one step: collectives, by all parameters and by the experts' alone, and the bytes of the runtime's own transports."""
    model, handle = sharded()
    groups = muon_groups(handle)
    experts = {id(parameter) for parameter in handle.expert_parameters()}
    loss_of(model, rank_slice(batch_ids(0), rank, 2)).backward()
    transports = (handle._group.tokens, handle._group.experts, handle._group.replicas, handle._group.control)
    before = [transport.traffic.total_bytes() for transport in transports]
    counts = []
    for some in ([group for group in groups if {*map(id, group["params"])} <= experts], groups):
        with CommDebugMode() as communication:
            Muon(some).step()
        counts.append({str(op): count for op, count in communication.get_comm_counts().items()})
    assert [transport.traffic.total_bytes() for transport in transports] == before
    with pytest.raises(ValueError, match=r"the shape \(16,\).*muon_groups"):
        Muon([{"params": [p for p in model.parameters() if p.ndim == 1]}])
    for_muon = {id(p) for group in groups if group["use_muon"] for p in group["params"]}
    names = [name for name, p in model.named_parameters() if id(p) in for_muon and id(p) not in experts]
    return {"experts": counts[0], "all": counts[1], "names": names}


def test_an_update_of_experts_sends_nothing() -> None:
    """And one of a matrix that FSDP2 has sharded is gathered once."""
    hidden = ["blocks.0.mix.weight", "blocks.0.moe.shared.gate_up", "blocks.0.moe.shared.down", "blocks.1.mix.weight"]
    for found in run_ranks(2, count_what_is_sent):
        assert found["names"] == [*hidden, "head.weight"]
        assert found["experts"] == {}
        assert list(found["all"].values()) == [len(found["names"])]


def test_a_step_is_torchs_own() -> None:
    """But for its iterations, which are in bf16."""
    weight, grad = torch.randn(2, 12, 20, generator=torch.Generator().manual_seed(0))
    found, expected = nn.Parameter(weight.clone()), nn.Parameter(weight.clone())
    found.grad, expected.grad = grad.clone(), grad.clone()
    Muon([found], lr=1.0).step()
    torch.optim.Muon([expected], lr=1.0, weight_decay=0.1, adjust_lr_fn="match_rms_adamw").step()
    assert_close("weight", found.detach(), expected.detach(), rtol=1e-2)
