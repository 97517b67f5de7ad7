"""State under logical names through torch.distributed.checkpoint: models and optimizers that are out of the ordinary."""

from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh

from moesaic import Handle, MoELayer, RuntimeConfig, shard_experts
from tests.helpers.compare import assert_bitwise
from tests.helpers.ranks import run_ranks
from tests.runtime.test_shard import whole

NUM_EXPERTS = 3


class Unusual(nn.Module):
    """One MoE layer that is called twice and known under two names, and a part that is never called."""

    def __init__(self) -> None:
        super().__init__()
        self.dense = nn.Linear(8, 8)
        self.unused = nn.Linear(3, 3)
        self.first = MoELayer(8, 4, NUM_EXPERTS, 2)
        self.second = self.first

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.first(self.dense(x)))


class Averaging(torch.optim.Optimizer):
    """Keeps a Python number, a tensor with one number, and a tensor with the parameter's shape."""

    def __init__(self, groups: Any, lr: float):
        super().__init__(groups, {"lr": lr})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    state = self.state[parameter]
                    state.setdefault("mean", torch.zeros_like(parameter)).lerp_(parameter.grad, 0.1)
                    state.setdefault("decay", torch.ones(1)).mul_(0.9)
                    state["num_steps"] = state.get("num_steps", 0) + 1
                    parameter.sub_(group["lr"] * state["mean"])


def wrapped(make: Any = torch.optim.AdamW) -> tuple[nn.Module, Handle, torch.optim.Optimizer]:
    model = Unusual()
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    handle = shard_experts(model, mesh=mesh, config=RuntimeConfig(policy="static", slots=0, timeout_s=60))
    return model, handle, make(handle.parameter_groups(), lr=0.1)


def train(model: nn.Module, handle: Handle, optimizer: torch.optim.Optimizer, num_steps: int) -> None:
    for _ in range(num_steps):
        model(torch.randn(6, 8)).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()
        handle.step()


def copy_of(state: dict[str, Any]) -> dict[str, Any]:
    return {key: whole(torch.as_tensor(value)).clone() for key, value in state.items()}


def through_a_checkpoint(rank: int, folder: str, make: Any) -> list[str]:
    """Save after two steps, go on, load into a fresh model and into the old one: all is as it was. Returns the names."""
    trained = wrapped(make)
    train(*trained, 2)
    saved = copy_of(trained[1].state_dict(trained[2]))
    dcp.save(trained[1].state_dict(trained[2]), checkpoint_id=folder)
    train(*trained, 1)
    for _, handle, optimizer in (wrapped(make), trained):
        handle.prepare_optimizer(optimizer, dcp.FileSystemReader(folder).read_metadata().state_dict_metadata)
        state = handle.state_dict(optimizer)
        dcp.load(state, checkpoint_id=folder)
        handle.load_state_dict(state, optimizer)
        assert_bitwise(copy_of(handle.state_dict(optimizer)), saved)
    return sorted(saved)


@pytest.mark.parametrize("make, field", [(torch.optim.AdamW, "exp_avg"), (Averaging, "num_steps")])
def test_a_checkpoint_brings_everything_back_under_logical_names(tmp_path: object, make: Any, field: str) -> None:
    """Experts under their layer's first name only; of what never got a gradient no state."""
    names = run_ranks(2, through_a_checkpoint, str(tmp_path), make)
    experts = [{name for name in part if name.startswith("model.") and ".experts." in name} for part in names]
    assert experts[0] | experts[1] == {
        f"model.first.experts.{e}.{weight}" for e in range(NUM_EXPERTS) for weight in ("gate_up", "down")
    }
    assert not experts[0] & experts[1]
    for part in names:
        assert all(name.startswith("optimizer.first.") for name in part if name.startswith("optimizer.") and ".experts." in name)
        assert [name for name in part if ".unused." in name] == ["model.unused.bias", "model.unused.weight"]
        assert f"optimizer.dense.weight.{field}" in part


class OutOfMemory(torch.optim.AdamW):
    """Has room for the state of one group of parameters."""

    def step(self, closure: Any = None) -> None:
        groups = self.param_groups
        self.param_groups = groups[:1]
        super().step()
        self.param_groups = groups
        raise MemoryError("no room for the experts' state")


def refused(rank: int) -> None:
    """What is not loaded leaves weights, gradients, learning rates and optimizer state as they were."""
    _, handle, optimizer = wrapped()
    weights = copy_of(handle.state_dict())
    with pytest.raises(ValueError, match=r"lacks \d+ of \d+ entries, .* into an optimizer that has not stepped"):
        handle.load_state_dict({key: torch.zeros_like(value) for key, value in handle.state_dict().items()}, optimizer)
    assert not optimizer.state
    optimizer = OutOfMemory(handle.parameter_groups(), lr=0.1)
    with pytest.raises(MemoryError):
        handle.prepare_optimizer(optimizer)
    assert not optimizer.state
    assert [group["lr"] for group in optimizer.param_groups] == [0.1, 0.1]
    assert all(p.grad is None for group in optimizer.param_groups for p in group["params"])
    assert_bitwise(copy_of(handle.state_dict()), weights)


def test_what_is_refused_changes_nothing() -> None:
    run_ranks(2, refused)


class Plain(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.dense = nn.Linear(8, 8)
        self.moe = MoELayer(8, 4, NUM_EXPERTS, 2)


def state_of_banks() -> dict[str, Tensor]:
    """What was saved of `Plain` and AdamW when the experts of a rank were one parameter: of each expert its row, and one step."""
    shapes = {"dense.weight": (8, 8), "dense.bias": (8,), "moe.router.weight": (NUM_EXPERTS, 8)}
    for e in range(NUM_EXPERTS):
        shapes |= {f"moe.experts.{e}.gate_up": (8, 8), f"moe.experts.{e}.down": (8, 4)}
    torch.manual_seed(5)
    state = {f"model.{name}": torch.randn(shape) for name, shape in shapes.items()}
    for name, shape in shapes.items():
        state |= {f"optimizer.{name}.{field}": torch.rand(shape) for field in ("exp_avg", "exp_avg_sq")}
        state[f"optimizer.{name}.step"] = torch.tensor(7.0)
    return state


def load_state_of_banks(rank: int, folder: str) -> list[str]:
    """Returns the names that this rank has loaded."""
    model = Plain()
    handle = shard_experts(model, mesh=init_device_mesh("cpu", (2,)), config=RuntimeConfig(slots=0, timeout_s=60))
    optimizer = torch.optim.AdamW(handle.parameter_groups(), lr=0.1)
    handle.prepare_optimizer(optimizer, dcp.FileSystemReader(folder).read_metadata().state_dict_metadata)
    state = handle.state_dict(optimizer)
    dcp.load(state, checkpoint_id=folder)
    handle.load_state_dict(state, optimizer)
    saved = state_of_banks()
    assert_bitwise(copy_of(handle.state_dict(optimizer)), {name: saved[name] for name in state})
    for name, parameter in model.named_parameters():
        assert_bitwise(
            copy_of({"weight": parameter.detach(), **optimizer.state[parameter]}),
            {"weight": saved[f"model.{name}"]}
            | {field: saved[f"optimizer.{name}.{field}"] for field in ("step", "exp_avg", "exp_avg_sq")},
        )
    return list(state)


def test_a_state_of_whole_banks_is_loaded(tmp_path: object) -> None:
    """Of earlier versions, whose optimizers kept one tensor for all experts of a rank: nothing of it is missed or left over."""
    dcp.save(state_of_banks(), checkpoint_id=str(tmp_path), no_dist=True)
    names = run_ranks(2, load_state_of_banks, str(tmp_path))
    assert set(names[0]) | set(names[1]) == state_of_banks().keys()
