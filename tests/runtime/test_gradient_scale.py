"""What FSDP2 divides gradients by, it divides those of experts by too, however a user sets it."""

from collections.abc import Callable

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor

from moesaic import Handle, RuntimeConfig, shard_experts
from tests.helpers.compare import assert_all_close
from tests.helpers.ranks import run_ranks
from tests.helpers.small_net import DIM, Net


def tokens(rank: int) -> Tensor:
    return torch.randn(5 + rank, DIM, generator=torch.Generator().manual_seed(rank))


def summed_gradients(world_size: int) -> dict[str, Tensor]:
    """Of the sum of all ranks' losses, in the model that is not sharded."""
    torch.manual_seed(0)
    model = Net()
    sum(model(tokens(rank)).square().sum() for rank in range(world_size)).backward()
    return {name: p.grad for name, p in model.named_parameters()}


def of_all(model: Net, factor: float) -> None:
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.set_gradient_divide_factor(factor)


def every_unit(model: Net) -> dict[str, float]:
    of_all(model, 1.0)
    return {"": 1.0}


def by_block(model: Net) -> dict[str, float]:
    """Each block by a factor of its own; the rest as by default, by the number of ranks."""
    model.layers[0].set_gradient_divide_factor(1.0)
    model.layers[1].set_gradient_divide_factor(8.0)
    return {"layers.0.": 1.0, "layers.1.": 8.0, "out.": 2.0}


def after_a_step(model: Net) -> dict[str, float]:
    """Set once a backward has run with another factor."""
    of_all(model, 16.0)
    model(tokens(dist.get_rank())).square().sum().backward()
    for parameter in model.parameters():
        parameter.grad = None
    of_all(model, 4.0)
    return {"": 4.0}


def by_default(model: Net) -> dict[str, float]:
    return {"": float(dist.get_world_size())}


def wrap(model: Net, mesh_shape: tuple[int, ...], wrapped_by_user: bool) -> Handle:
    names = ("replicate", "shard")[-len(mesh_shape) :]
    mesh = init_device_mesh("cpu", mesh_shape, mesh_dim_names=names)
    config = RuntimeConfig(shard_dense=not wrapped_by_user, timeout_s=60)
    handle = shard_experts(model, mesh=mesh, config=config)
    if wrapped_by_user:
        experts = set(handle.expert_parameters())
        for block in model.layers:
            fully_shard(block, mesh=mesh, ignored_params=experts)
        fully_shard(model, mesh=mesh, ignored_params=experts)
    return handle


def gradients(rank: int, set_factors: str, mesh_shape: tuple[int, ...], wrapped_by_user: bool) -> None:
    """Assert that a rank's gradients, dense and of experts, are those of the sum divided as asked."""
    torch.manual_seed(0)
    model = Net()
    handle = wrap(model, mesh_shape, wrapped_by_user)
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.set_force_sum_reduction_for_comms(True)  # Gloo knows no scaled sums
    factors: dict[str, float] = globals()[set_factors](model)
    model(tokens(rank)).square().sum().backward()
    handle.step()
    expected, found = summed_gradients(dist.get_world_size()), {}
    for name, parameter in model.named_parameters():
        if parameter.grad is not None:
            grad = parameter.grad
            found[name] = grad.full_tensor() if isinstance(grad, DTensor) else grad.as_subclass(Tensor)
    divided = {name: grad / next(f for part, f in factors.items() if name.startswith(part)) for name, grad in expected.items()}
    assert sum(".experts." in name for name in found) >= 4
    assert_all_close(found, {name: divided[name] for name in found})


@pytest.mark.parametrize("wrapped_by_user", [False, True], ids=["ours", "users"])
@pytest.mark.parametrize("set_factors", [by_default, every_unit, by_block, after_a_step], ids=lambda f: f.__name__)
def test_experts_are_divided_as_the_dense_part(set_factors: Callable[[Net], dict[str, float]], wrapped_by_user: bool) -> None:
    run_ranks(2, gradients, set_factors.__name__, (2,), wrapped_by_user)


@pytest.mark.parametrize("set_factors", [by_default, every_unit, after_a_step], ids=lambda f: f.__name__)
def test_with_replicas_too(set_factors: Callable[[Net], dict[str, float]]) -> None:
    run_ranks(4, gradients, set_factors.__name__, (2, 2), False)
