"""Parameters of experts that got other memory, through `.data` or `load_state_dict(assign=True)`: that counts."""

from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from moesaic import MoELayer, RuntimeConfig, shard_experts
from tests.helpers.ranks import run_ranks

DIM, EXPERTS = 8, 4


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.proj = nn.Linear(DIM, DIM)
        self.moe = MoELayer(DIM, 6, EXPERTS, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.moe(self.proj(x))


def state(seed: int) -> dict[str, Any]:
    torch.manual_seed(seed)
    return dict(Net().state_dict())


def assigned(build_on: str) -> Net:
    """A model that has the weights of seed 1 by assignment."""
    with torch.device(build_on):
        model = Net()
    model.load_state_dict(state(1), assign=True)
    return model


@pytest.mark.parametrize("build_on", ["cpu", "meta"])
def test_one_process_runs_with_assigned_weights(build_on: str) -> None:
    model, expected, x = assigned(build_on), Net(), torch.randn(5, DIM)
    expected.load_state_dict(state(1))
    assert torch.equal(model(x), expected(x))
    assert all(torch.equal(value, state(1)[name]) for name, value in model.state_dict().items())


def shard_assigned(rank: int, build_on: str) -> bool:
    model = assigned(build_on)
    shard_experts(model, mesh=init_device_mesh("cpu", (2,)))
    return all(torch.equal(p, state(1)[f"moe.experts.{name}"]) for name, p in model.moe.experts.named_parameters())


@pytest.mark.parametrize("build_on", ["cpu", "meta"])
def test_assigned_weights_are_those_that_ranks_share(build_on: str) -> None:
    assert run_ranks(2, shard_assigned, build_on) == [True, True]


def save_given(rank: int) -> list[float]:
    handle = shard_experts(Net(), mesh=init_device_mesh("cpu", (2,)))
    for parameter in handle.expert_parameters():
        parameter.data = torch.full_like(parameter, 7.0)
    saved = handle.weights.state_dict()
    return [saved[f"moe.experts.{e}.down"].mean().item() for e in range(EXPERTS)] if rank == 0 else []


def test_given_weights_are_saved() -> None:
    assert run_ranks(2, save_given)[0] == [7.0] * EXPERTS


def load_given(rank: int) -> bool:
    model = Net()
    handle = shard_experts(model, mesh=init_device_mesh("cpu", (2,)))
    for parameter in handle.expert_parameters():
        parameter.data = torch.full_like(parameter, 7.0)
    handle.weights.load_state_dict(state(1))
    model(torch.randn(5, DIM))
    return all(torch.equal(p, state(1)[f"moe.experts.{name}"]) for name, p in model.moe.experts.named_parameters())


def test_weights_that_are_loaded_afterwards_stay() -> None:
    assert run_ranks(2, load_given) == [True, True]


def convert_after_fully_shard(rank: int) -> bool:
    """Whether the forward follows the dense parameters once a conversion gave all of them other memory."""
    torch.manual_seed(0)
    model, mesh = Net(), init_device_mesh("cpu", (2,))
    handle = shard_experts(model, mesh=mesh, config=RuntimeConfig(shard_dense=False))
    fully_shard(model, mesh=mesh, ignored_params=set(handle.expert_parameters()))
    x = torch.randn(5, DIM)
    model(x).sum().backward()
    model._apply(torch.clone)
    before = model(x).detach().clone()
    model.reshard()  # type: ignore[operator]
    with torch.no_grad():
        for parameter in model.proj.parameters():
            parameter.zero_()
    return not torch.equal(model(x), before)


def test_fsdp2_finds_what_a_conversion_made_also_where_its_user_shards_later() -> None:
    assert run_ranks(2, convert_after_fully_shard) == [True, True]


@pytest.mark.parametrize("num_experts", [EXPERTS - 1, EXPERTS + 1])
def test_a_tensor_for_another_number_of_experts_is_refused(num_experts: int) -> None:
    model, whole = Net(), state(1)
    for weight in ("gate_up", "down"):
        rows = [whole.pop(f"moe.experts.{e}.{weight}") for e in range(EXPERTS)]
        whole[f"moe.experts.{weight}"] = torch.stack([rows[e % EXPERTS] for e in range(num_experts)])
    with pytest.raises(RuntimeError, match=f"holds {num_experts} experts, and the model has {EXPERTS}"):
        model.load_state_dict(whole)


def swap_averages(rank: int) -> list[bool]:
    """Averages take the weights' place for an evaluation, and give it back; twice, and with copies kept in bf16."""
    seen = []
    for compute_dtype in ("as_is", "bf16"):
        torch.manual_seed(0)
        model, x = Net(), torch.randn(5, DIM)
        config = RuntimeConfig(shard_dense=False, compute_dtype=compute_dtype)
        handle = shard_experts(model, mesh=init_device_mesh("cpu", (dist.get_world_size(),)), config=config)
        averages = {name: torch.full_like(p, 0.3) for name, p in model.named_parameters()}
        with torch.no_grad():
            expected = model(x).clone()
            averaged = model(x).clone()
            for _ in range(2):
                kept = {name: parameter.data for name, parameter in model.named_parameters()}
                for name, parameter in model.named_parameters():
                    parameter.data = averages[name]
                handle.step()
                averaged = model(x).clone()
                for name, parameter in model.named_parameters():
                    parameter.data = kept[name]
                handle.step()
                seen.append(torch.equal(model(x), expected) and not torch.equal(averaged, expected))
        seen.append(all((average == 0.3).all() for average in averages.values()))
    return [bool(value) for value in seen]


@pytest.mark.parametrize("world_size", [1, 2])
def test_averages_are_swapped_in_and_out(world_size: int) -> None:
    assert run_ranks(world_size, swap_averages) == [[True] * 6] * world_size
