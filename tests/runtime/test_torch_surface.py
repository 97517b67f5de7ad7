"""What torch offers on modules and optimizers, held against the unwrapped model: equal, or a refusal that the documents name.

Each check trains the same small model unwrapped, on one process and the whole batch, and sharded over two ranks, each with its
half; with the dense part under FSDP2 or under DDP. All experts change their owner after the first step.
"""

import copy
import pickle
from collections.abc import Callable, Iterable
from contextlib import nullcontext
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

from moesaic import Handle, RuntimeConfig, shard_experts
from moesaic.placement import OwnerMap
from tests.helpers.ranks import run_ranks
from tests.helpers.small_net import DIM, Net

STEPS = 3
Params = Iterable[tuple[str, nn.Parameter]]


def tokens(step: int, rank: int) -> Tensor:
    return torch.randn(6, DIM, generator=torch.Generator().manual_seed(10 * step + rank))


def whole(tensor: Tensor) -> Tensor:
    return (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).detach().as_subclass(Tensor).clone()


class Way:
    """How a model is trained: plain on one process, or sharded. Checks override a piece of it."""

    def prepare(self, model: nn.Module) -> None:
        """Before sharding."""

    def after_sharding(self, model: nn.Module) -> None:
        """The same of the model once it is sharded."""

    def groups(self, parameters: Params, is_expert: Callable[[str], bool]) -> list[dict[str, Any]]:
        """Dense and experts apart, as one foreach or fused call takes no DTensors beside other tensors."""
        parameters = list(parameters)
        return [{"params": [p for name, p in parameters if is_expert(name) is kind]} for kind in (False, True)]

    def optimizer(self, groups: list[dict[str, Any]]) -> torch.optim.Optimizer:
        return torch.optim.AdamW(groups, lr=1e-2, weight_decay=0.1)

    def before_step(self, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        """Between backward and the optimizer's step."""

    def step(self, optimizer: torch.optim.Optimizer) -> None:
        optimizer.step()

    def zero(self, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        optimizer.zero_grad()

    micro_batches = 1


def is_expert(name: str) -> bool:
    return ".experts." in name


def train_plain(way: Way) -> dict[str, Tensor]:
    torch.manual_seed(0)
    model = Net()
    way.prepare(model)
    way.after_sharding(model)
    optimizer = way.optimizer(way.groups(model.named_parameters(), is_expert))
    for step in range(STEPS):
        for part in range(way.micro_batches):
            losses = [model(tokens(step, rank).chunk(way.micro_batches)[part]).square().mean() for rank in range(2)]
            (torch.stack(losses).mean() / way.micro_batches).backward()
        way.before_step(model, optimizer)
        way.step(optimizer)
        way.zero(model, optimizer)
    return {name: whole(tensor) for name, tensor in model.state_dict().items()}


def sharded(way: Way, dense: str) -> tuple[nn.Module, nn.Module, Handle]:
    """The model, what its batches go through, and the handle."""
    torch.manual_seed(0)
    model = Net()
    way.prepare(model)
    mesh = init_device_mesh("cpu", (2,))
    handle = shard_experts(model, mesh=mesh, config=RuntimeConfig(shard_dense=dense == "fsdp", timeout_s=60))
    way.after_sharding(model)
    return model, model if dense == "fsdp" else nn.parallel.DistributedDataParallel(model), handle


def move(handle: Handle, optimizer: torch.optim.Optimizer | None = None) -> None:
    """Every expert to the other rank."""
    handle.migrate([OwnerMap(1 - owners.expert_to_owner_LE, 2) for owners in handle.owner_maps], optimizer)


def everything(model: nn.Module) -> dict[str, Tensor]:
    """All weights by name, those of experts from their owners. Collective."""
    mine = {name: whole(p) for name, p in model.state_dict(keep_vars=True).items()}
    everybody: list[Any] = [None, None]
    dist.all_gather_object(everybody, mine)
    return everybody[0] | everybody[1]


def train_sharded(way: Way, dense: str) -> dict[str, Tensor]:
    model, through, handle = sharded(way, dense)
    optimizer = way.optimizer(way.groups(model.named_parameters(), is_expert))
    for step in range(STEPS):
        for part in range(way.micro_batches):
            is_last = part == way.micro_batches - 1
            context = nullcontext() if is_last or dense == "fsdp" else through.no_sync()  # type: ignore[operator]
            if isinstance(model, FSDPModule):
                model.set_requires_gradient_sync(is_last)
            with context:
                loss = through(tokens(step, dist.get_rank()).chunk(way.micro_batches)[part]).square().mean()
                (loss / way.micro_batches).backward()
        way.before_step(model, optimizer)
        way.step(optimizer)
        way.zero(model, optimizer)
        handle.step(optimizer)
        if step == 0:
            move(handle, optimizer)
    return everything(model)


class Foreach(Way):
    def optimizer(self, groups: list[dict[str, Any]]) -> torch.optim.Optimizer:
        return torch.optim.AdamW(groups, lr=1e-2, foreach=True)


class Fused(Way):
    def optimizer(self, groups: list[dict[str, Any]]) -> torch.optim.Optimizer:
        return torch.optim.AdamW(groups, lr=1e-2, fused=True)


class Momentum(Way):
    def optimizer(self, groups: list[dict[str, Any]]) -> torch.optim.Optimizer:
        return torch.optim.SGD(groups, lr=1e-2, momentum=0.9, nesterov=True)


class LayerRates(Way):
    """Learning rates and decay by the names of layers."""

    def groups(self, parameters: Params, is_expert: Callable[[str], bool]) -> list[dict[str, Any]]:
        parameters = list(parameters)
        return [
            {"params": [p for n, p in parameters if n.startswith(f"layers.{i}.") and is_expert(n) is kind], "lr": 1e-2 / (i + 1)}
            for i in range(2)
            for kind in (False, True)
        ] + [{"params": [p for n, p in parameters if n.startswith("out.")], "weight_decay": 0.0}]


class Frozen(Way):
    """A layer's experts, one weight of all, or some experts; before sharding or after."""

    def __init__(self, frozen: Callable[[str], bool], before: bool):
        self.frozen, self.before = frozen, before

    def _freeze(self, model: nn.Module) -> None:
        for name, parameter in model.named_parameters():
            if self.frozen(name):
                parameter.requires_grad_(False)

    def prepare(self, model: nn.Module) -> None:
        if self.before:
            self._freeze(model)

    def after_sharding(self, model: nn.Module) -> None:
        self._freeze(model)


class Clipped(Way):
    """By torch: of all parameters, in one call for all tensors or one for each."""

    def __init__(self, norm_type: float, foreach: bool | None):
        self.norm_type, self.foreach = norm_type, foreach

    def before_step(self, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        parameters = [p for p in model.parameters() if self.foreach is None or not isinstance(p, DTensor)]
        nn.utils.clip_grad_norm_(parameters, 0.05, norm_type=self.norm_type, foreach=self.foreach)


class ClippedByGroup(Way):
    def before_step(self, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        for group in optimizer.param_groups:
            nn.utils.clip_grad_norm_(group["params"], 0.05)


class ClippedByValue(Way):
    def before_step(self, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        nn.utils.clip_grad_value_([p for p in model.parameters() if not isinstance(p, DTensor)], 1e9)
        for parameter in model.parameters():
            if parameter.grad is not None:
                parameter.grad.clamp_(-1e-3, 1e-3)


class Evaluated(Way):
    """A forward without gradients before the optimizer is made, and one between backward and clipping and the step."""

    def after_sharding(self, model: nn.Module) -> None:
        with torch.no_grad():
            model(tokens(7, dist.get_rank()))

    def before_step(self, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        with torch.no_grad():
            model.eval()(tokens(8, dist.get_rank()))
        model.train()
        nn.utils.clip_grad_norm_(model.parameters(), 0.05)


class AveragedAfterEvaluation(Way):
    """An average of the dense weights that is begun after a forward without gradients, and takes the weights' place at last."""

    def after_sharding(self, model: nn.Module) -> None:
        with torch.no_grad():
            model(tokens(7, dist.get_rank()))
        self.model, self.num_steps = model, 0
        self.averages = [p.detach().clone() for n, p in model.named_parameters() if not is_expert(n)]

    def step(self, optimizer: torch.optim.Optimizer) -> None:
        optimizer.step()
        self.num_steps += 1
        with torch.no_grad():
            self.model(tokens(7, dist.get_rank()))
        current = [p.detach() for n, p in self.model.named_parameters() if not is_expert(n)]
        torch.optim.swa_utils.get_ema_multi_avg_fn(0.5)(self.averages, current, self.num_steps)
        if self.num_steps == STEPS:
            for weight, average in zip(current, self.averages, strict=True):
                weight.copy_(average)


class Accumulated(Way):
    micro_batches = 2


class Zeroed(Way):
    """Gradients are set to zero in place, not to None."""

    def zero(self, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        optimizer.zero_grad(set_to_none=False)


class Scheduled(Way):
    def optimizer(self, groups: list[dict[str, Any]]) -> torch.optim.Optimizer:
        optimizer = torch.optim.AdamW(groups, lr=1e-2)
        self.scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.5**step)
        return optimizer

    def step(self, optimizer: torch.optim.Optimizer) -> None:
        optimizer.step()
        self.scheduler.step()


class Scaled(Way):
    """GradScaler; in the second step one expert's gradient overflows, on its owner alone, and every rank skips the step."""

    def optimizer(self, groups: list[dict[str, Any]]) -> torch.optim.Optimizer:
        self.scaler, self.num_steps = torch.amp.GradScaler("cpu", init_scale=1.0, growth_interval=1000), 0
        self.scaler.scale(torch.ones(()))
        return super().optimizer(groups)

    def before_step(self, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        self.num_steps += 1
        for name, parameter in model.named_parameters():
            if self.num_steps == 2 and name == "layers.1.moe.experts.3.down":
                assert parameter.grad is not None
                parameter.grad[0, 0] = torch.inf

    def step(self, optimizer: torch.optim.Optimizer) -> None:
        self.scaler.step(optimizer)
        self.scaler.update()


class Initialized(Way):
    """`apply` and writing to parameters in place, or through one vector of all experts, before and after sharding."""

    def after_sharding(self, model: nn.Module) -> None:
        def halve(module: nn.Module) -> None:
            for parameter in module.parameters(recurse=False):
                with torch.no_grad():
                    parameter.mul_(0.5)

        model.apply(halve)
        experts = [parameter for name, parameter in model.named_parameters() if is_expert(name)]
        nn.utils.vector_to_parameters(nn.utils.parameters_to_vector(experts) * 0.5, experts)
        assert model.to("cpu") is model


class Hooked(Way):
    """Hooks after accumulation, which halve every gradient."""

    def after_sharding(self, model: nn.Module) -> None:
        for name, parameter in model.named_parameters():
            if is_expert(name):
                parameter.register_post_accumulate_grad_hook(lambda p: p.grad.mul_(0.5))


class SeveralTimes(Way):
    """Second thoughts: `requires_grad_` off and on again."""

    def after_sharding(self, model: nn.Module) -> None:
        model.requires_grad_(False)
        model.requires_grad_(True)


WAYS: dict[str, Way] = {
    "plain": Way(),
    "foreach": Foreach(),
    "fused": Fused(),
    "momentum": Momentum(),
    "rates by layer": LayerRates(),
    "a layer's experts frozen before": Frozen(lambda name: name.startswith("layers.0.moe.experts."), before=True),
    "a layer's experts frozen after": Frozen(lambda name: name.startswith("layers.1.moe.experts."), before=False),
    "down frozen": Frozen(lambda name: is_expert(name) and name.endswith("down"), before=True),
    "an expert frozen": Frozen(lambda name: ".experts.1." in name, before=False),
    "all experts frozen": Frozen(is_expert, before=False),
    "clipped": Clipped(2.0, None),
    "clipped by the largest": Clipped(torch.inf, None),
    "clipped by group": ClippedByGroup(),
    "clipped by value": ClippedByValue(),
    "evaluated": Evaluated(),
    "averaged after an evaluation": AveragedAfterEvaluation(),
    "accumulated": Accumulated(),
    "zeroed in place": Zeroed(),
    "scheduled": Scheduled(),
    "scaled": Scaled(),
    "applied": Initialized(),
    "hooked": Hooked(),
    "requires_grad": SeveralTimes(),
}


def walk(rank: int, dense: str) -> dict[str, str]:
    """What differs from the unwrapped model, by check."""
    wrong = {}
    for label, way in WAYS.items():
        expected, found = train_plain(way), train_sharded(way, dense)
        if set(expected) != set(found):
            wrong[label] = f"other names: {sorted(set(expected) ^ set(found))}"
            continue
        off = {name: (found[name] - tensor).abs().max().item() for name, tensor in expected.items()}
        worst = max(off, key=lambda name: off[name])
        if not off[worst] < 2e-5:
            wrong[label] = f"{worst} off by {off[worst]:.2e}"
    return wrong


@pytest.mark.parametrize("dense", ["fsdp", "ddp"])
def test_training_equals_that_of_the_unwrapped_model(dense: str) -> None:
    assert run_ranks(2, walk, dense) == [{}, {}]


def states(rank: int, dense: str, moves: bool, folder: str) -> None:
    """torch's state dicts, sharded, full and asynchronous, of the model and of the optimizer."""
    way = Way()
    model, through, handle = sharded(way, dense)
    optimizer = way.optimizer(way.groups(model.named_parameters(), is_expert))

    def train(step: int) -> None:
        through(tokens(step, rank)).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        handle.step(optimizer)

    train(0)
    if moves:
        move(handle, optimizer)
    before = everything(model)
    flat = StateDictOptions(flatten_optimizer_state_dict=True)
    state = {"model": get_model_state_dict(model), "optimizer": get_optimizer_state_dict(model, optimizer, options=flat)}
    dcp.save(state, checkpoint_id=folder)
    full = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
    assert set(full) == (set(before) if rank == 0 else set())
    assert all(torch.equal(full[name], before[name]) for name in full)
    with pytest.raises(RuntimeError, match="full_state_dict"):
        get_optimizer_state_dict(model, optimizer, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
    train(1)
    expected = everything(model)

    # Into a fresh model with the first owners.
    model, through, handle = sharded(way, dense)
    optimizer = way.optimizer(way.groups(model.named_parameters(), is_expert))
    flat = StateDictOptions(flatten_optimizer_state_dict=True)
    state = {"model": get_model_state_dict(model), "optimizer": get_optimizer_state_dict(model, optimizer, options=flat)}
    dcp.load(state, checkpoint_id=folder)
    set_model_state_dict(model, state["model"])
    set_optimizer_state_dict(model, optimizer, state["optimizer"], options=flat)
    found = everything(model)
    assert all(torch.equal(found[name], before[name]) for name in before)
    train(1)
    found = everything(model)
    assert all(torch.allclose(found[name], expected[name], atol=1e-6) for name in expected)

    # The whole state into every rank, which takes its part.
    model, through, handle = sharded(way, dense)
    options = StateDictOptions(full_state_dict=True, broadcast_from_rank0=True)
    set_model_state_dict(model, dict(expected) if rank == 0 else {}, options=options)
    found = everything(model)
    assert all(torch.equal(found[name], expected[name]) for name in expected)


@pytest.mark.parametrize("moves", [False, True])
@pytest.mark.parametrize("dense", ["fsdp", "ddp"])
def test_state_dicts_bring_every_expert_back(dense: str, moves: bool, tmp_path: Any) -> None:
    run_ranks(2, states, dense, moves, str(tmp_path / "saved"))


def refusals(rank: int, dense: str) -> list[str]:
    """What is refused, and that the model goes on afterwards."""
    way = Way()
    torch.manual_seed(0)
    early = Net()
    stale = torch.optim.SGD(early.parameters(), lr=0.1)
    mesh = init_device_mesh("cpu", (2,))
    shard_experts(early, mesh=mesh, config=RuntimeConfig(shard_dense=False))
    model, through, handle = sharded(way, dense)
    expert = next(iter(handle.layers["layers.0.moe"]))
    attempts: list[Callable[[], Any]] = [
        lambda: copy.deepcopy(model.layers[0].moe.experts),
        lambda: pickle.dumps(model.layers[0].moe.experts),
        lambda: torch.optim.swa_utils.AveragedModel(model.layers[0].moe),
        lambda: copy.deepcopy(model),
        lambda: pickle.dumps(model),
        lambda: torch.optim.swa_utils.AveragedModel(model),
        lambda: model.half(),
        lambda: expert.double(),
        lambda: expert.register_forward_hook(lambda *_: None),
        lambda: expert(torch.zeros(1, DIM)),
        lambda: stale.step(),
    ]
    messages = []
    for attempt in attempts:
        with pytest.raises((RuntimeError, ValueError)) as refused:
            attempt()
        messages.append(str(refused.value))
    hook = expert.gate_up.register_hook(lambda grad: grad)
    with pytest.raises(RuntimeError, match="register_post_accumulate_grad_hook"):
        through(tokens(0, rank)).square().mean().backward()
    hook.remove()
    return messages


@pytest.mark.parametrize("dense", ["fsdp", "ddp"])
def test_what_cannot_be_is_refused_in_a_line(dense: str) -> None:
    for messages in run_ranks(2, refusals, dense):
        assert all("\n" not in message for message in messages), messages
        parts = ["copy the model before"] * 6 + ["convert the model before", "convert the whole"]
        for message, part in zip(messages, [*parts, "hook the layer", "call its layer", "build it afterwards"], strict=True):
            assert part in message


def names(rank: int) -> list[list[str]]:
    model, _, handle = sharded(Way(), "ddp")
    first = [name for name, _ in model.named_parameters()]
    handle.migrate([OwnerMap(np.array([[1, 0, 0, 1], [1, 1, 0, 0]]), 2)])
    return [first, [name for name, _ in model.named_parameters()]]


def test_names_are_those_of_the_experts_that_a_rank_owns_in_their_order() -> None:
    def expected(experts_L: list[list[int]]) -> list[str]:
        found = []
        for i, experts in enumerate(experts_L):
            found += [f"layers.{i}.proj.weight", f"layers.{i}.proj.bias", f"layers.{i}.moe.router.weight"]
            found += [f"layers.{i}.moe.experts.{e}.{weight}" for e in experts for weight in ("gate_up", "down")]
        return [*found, "out.weight", "out.bias"]

    zero, one = run_ranks(2, names)
    assert zero == [expected([[0, 1], [0, 1]]), expected([[1, 2], [2, 3]])]
    assert one == [expected([[2, 3], [2, 3]]), expected([[0, 3], [0, 1]])]
