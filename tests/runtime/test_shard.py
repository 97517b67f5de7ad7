"""`shard_experts` on real processes: gradients, global norm, loss curves over world sizes, determinism, state."""

import warnings
from functools import partial
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from moesaic import Handle, MoELayer, RuntimeConfig, shard_experts
from moesaic.collectives import SCHEDULES
from moesaic.placement import OwnerMap, Placement, Problem
from moesaic.runtime.group import RankGroup
from tests.helpers.cases import share_experts
from tests.helpers.compare import assert_all_close
from tests.helpers.model import (
    NUM_EXPERTS,
    Model,
    cross_entropy,
    global_batch,
    make_model,
    rank_slice,
)
from tests.helpers.ranks import run_ranks
from tests.helpers.threads import run_threads


def everywhere(problem: Problem) -> Any:
    """A solver that copies every expert to every rank."""
    return SimpleNamespace(placement=Placement.everywhere(problem.expert_to_owner_E, problem.num_ranks))


def random_copies(problem: Problem) -> Any:
    """A solver whose copies follow from the load, so that they change from step to step but are the same on all ranks."""
    random = np.random.default_rng(int(problem.load.load_RE[0].sum() + 7 * problem.load.totals_E[0]))
    owners = Placement.owners_only(problem.expert_to_owner_E, problem.num_ranks)
    return SimpleNamespace(
        placement=Placement(problem.expert_to_owner_E, owners.replicas_RE | (random.random(owners.replicas_RE.shape) < 0.5))
    )


SOLVERS = {"static": None, "everywhere": everywhere, "random": random_copies}


def wrapped(solver: str = "random", **options: Any) -> tuple[Model, Handle]:
    model = make_model(**options)
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    handle = shard_experts(
        model, mesh=mesh, config=RuntimeConfig(policy="static", slots=NUM_EXPERTS, timeout_s=60), solver=SOLVERS[solver]
    )
    return model, handle


def whole(tensor: Tensor) -> Tensor:
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def whole_gradients(model: Model, handle: Handle) -> dict[str, Tensor]:
    """Every gradient under its logical name, the experts' collected from their owners."""
    experts = set(handle.expert_parameters())
    grads = {name: whole(p.grad) for name, p in model.named_parameters() if p not in experts}
    owned = {name: p.grad.clone() for name, p in model.named_parameters() if p in experts}
    everybody: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everybody, owned)
    for part in everybody:
        assert not grads.keys() & part.keys()
        grads |= part
    return {name: grad.detach().clone() for name, grad in grads.items()}


def unsharded_gradients(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.grad.clone() for name, p in model.named_parameters()}


def backward_on_ranks(rank: int, solver: str, num_batches: int, use_checkpoint: bool) -> Any:
    """Gradients and global norm after one warm-up forward (so that copies exist) and `num_batches` micro-batches."""
    world_size = dist.get_world_size()
    model, handle = wrapped(solver, use_checkpoint=use_checkpoint)
    model(rank_slice(global_batch(0)[0], rank, world_size))
    for batch in range(num_batches):
        ids, targets = (rank_slice(t, rank, world_size) for t in global_batch(batch))
        loss = cross_entropy(model(ids), targets) + handle.aux_loss()
        (loss / num_batches).backward()
    grads = whole_gradients(model, handle)
    norm = handle.clip_grad_norm_(0.5)
    return grads, norm, whole_gradients(model, handle)


def backward_on_one(num_batches: int) -> tuple[dict[str, Tensor], Tensor, dict[str, Tensor]]:
    """The same on the unsharded model, whole batches, torch's own clipping."""
    model = make_model()
    for batch in range(num_batches):
        ids, targets = global_batch(batch)
        loss = cross_entropy(model(ids), targets) + sum(block.moe.aux_loss for block in model.blocks)
        (loss / num_batches).backward()
    grads = unsharded_gradients(model)
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 0.5)
    return grads, norm, unsharded_gradients(model)


@pytest.mark.parametrize("world_size", [1, 2, 3, 4])
@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("num_batches,use_checkpoint", [(1, False), (3, False), (3, True)])
def test_gradients_and_norm_equal_one_process(world_size: int, solver: str, num_batches: int, use_checkpoint: bool) -> None:
    """Every gradient by name, auxiliary losses included, before and after clipping to the global norm."""
    expected = backward_on_one(num_batches)
    for grads, norm, clipped in run_ranks(world_size, backward_on_ranks, solver, num_batches, use_checkpoint):
        assert_all_close(grads, expected[0])
        assert norm.item() == pytest.approx(expected[1].item(), rel=1e-5)
        assert_all_close(clipped, expected[2])


def backward_with_the_dense_part_wrapped(rank: int, how: str) -> dict[str, Tensor]:
    """Gradients of the second step, with the dense part left to `how`; a `fully_shard` that takes the experts too is refused."""
    mesh = init_device_mesh("cpu", (2,))
    model = make_model()
    config = RuntimeConfig(policy="static", slots=NUM_EXPERTS, shard_dense=False, timeout_s=60)
    handle = shard_experts(model, mesh=mesh, config=config, solver=everywhere)
    ids, targets = (rank_slice(t, rank, 2) for t in global_batch(0))
    if how == "fully_shard, all":
        fully_shard(model, mesh=mesh)
        with pytest.raises(
            ValueError, match=r"experts of \w*Model were sharded once more, .* give every fully_shard ignored_params"
        ):
            model(ids)
        return {}
    if how == "fully_shard":
        fully_shard(model, mesh=mesh, ignored_params=set(handle.expert_parameters()))
    wrapper = DistributedDataParallel(model) if how == "DDP" else model
    for _ in range(2):
        model.zero_grad()
        (cross_entropy(wrapper(ids), targets) + handle.aux_loss()).backward()
    return whole_gradients(model, handle)


@pytest.mark.parametrize("how", ["fully_shard", "fully_shard, all", "DDP"])
def test_the_dense_part_may_be_left_to_others(how: str) -> None:
    expected, _, _ = backward_on_one(1)
    for grads in run_ranks(2, backward_with_the_dense_part_wrapped, how):
        assert_all_close(grads, {} if how == "fully_shard, all" else expected)


def train_on_ranks(rank: int, solver: str, optimizer_name: str, num_steps: int) -> list[float]:
    model, handle = wrapped(solver)
    return losses_on_ranks(rank, model, handle, make_optimizer(model, optimizer_name), num_steps)


def losses_on_ranks(rank: int, model: nn.Module, handle: Handle, optimizer: torch.optim.Optimizer, num_steps: int) -> list[float]:
    """The loss of the global batch at every step."""
    world_size = dist.get_world_size()
    losses = []
    for step in range(num_steps):
        ids, targets = (rank_slice(t, rank, world_size) for t in global_batch(step))
        loss = cross_entropy(model(ids).float(), targets)
        (loss + handle.aux_loss()).backward()
        handle.clip_grad_norm_(1.0)
        optimizer.step()
        optimizer.zero_grad()
        handle.step()
        mean = loss.detach().double()
        dist.all_reduce(mean)
        losses.append(mean.item() / world_size)
    return losses


def make_optimizer(model: nn.Module, name: str) -> torch.optim.Optimizer:
    if name == "sgd":
        return torch.optim.SGD(model.parameters(), lr=0.2)
    return torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.01)


def train_on_one(optimizer_name: str, num_steps: int) -> list[float]:
    model = make_model()
    optimizer = make_optimizer(model, optimizer_name)
    losses = []
    for step in range(num_steps):
        ids, targets = global_batch(step)
        loss = cross_entropy(model(ids), targets)
        (loss + sum(block.moe.aux_loss for block in model.blocks)).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


@pytest.mark.parametrize(
    "solver,optimizer,num_steps,rtol",
    [("static", "sgd", 10, 1e-5), ("random", "sgd", 10, 1e-5), ("random", "adamw", 20, 5e-4)],
)
def test_loss_curves_agree_over_world_sizes(solver: str, optimizer: str, num_steps: int, rtol: float) -> None:
    """One seed, one global batch: 1, 2, 3 and 4 processes walk the curve of the unsharded model."""
    expected = train_on_one(optimizer, num_steps)
    assert expected[-1] < 0.98 * expected[0]
    for world_size in (1, 2, 3, 4):
        assert run_ranks(world_size, train_on_ranks, solver, optimizer, num_steps)[0] == pytest.approx(expected, rel=rtol)


@pytest.mark.parametrize("world_size", [2, 4])
def test_two_runs_are_bitwise_equal(world_size: int) -> None:
    """Invariant 7, copies and clipping included."""
    first, second = (run_ranks(world_size, train_on_ranks, "random", "adamw", 8) for _ in range(2))
    assert first == second


def save_after_training(rank: int, num_steps: int) -> dict[str, Tensor]:
    """A state after some AdamW steps, whole on every rank."""
    _, _, state = trained(rank, num_steps)
    everybody: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everybody, {key: whole(value).clone() for key, value in state.items()})
    return {key: value for part in everybody for key, value in part.items()}


def trained(rank: int, num_steps: int) -> tuple[Model, torch.optim.Optimizer, dict[str, Tensor]]:
    world_size = dist.get_world_size()
    model, handle = wrapped("random")
    optimizer = make_optimizer(model, "adamw")
    for step in range(num_steps):
        ids, targets = (rank_slice(t, rank, world_size) for t in global_batch(step))
        cross_entropy(model(ids), targets).backward()
        optimizer.step()
        optimizer.zero_grad()
        handle.step()
    return model, optimizer, handle.state_dict(optimizer)


def load_through_checkpoint(rank: int, folder: str, save_first: bool) -> dict[str, Tensor]:
    """Save with torch.distributed.checkpoint, or load into a fresh model and optimizer; return the whole state."""
    import torch.distributed.checkpoint as dcp

    if save_first:
        dcp.save(trained(rank, 3)[2], checkpoint_id=folder)
        return save_after_training(rank, 3)
    model, handle = wrapped("static")
    optimizer = make_optimizer(model, "adamw")
    handle.prepare_optimizer(optimizer)
    state = handle.state_dict(optimizer)
    dcp.load(state, checkpoint_id=folder)
    handle.load_state_dict(state, optimizer)
    everybody: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everybody, {k: whole(v).clone() for k, v in handle.state_dict(optimizer).items()})
    return {key: value for part in everybody for key, value in part.items()}


@pytest.mark.parametrize("saved_at,loaded_at", [(2, 3), (3, 1), (1, 4)])
def test_state_moves_between_world_sizes(saved_at: int, loaded_at: int, tmp_path: Any) -> None:
    """Weights and AdamW state of every expert and every dense parameter, saved at one world size, loaded at another."""
    saved = run_ranks(saved_at, load_through_checkpoint, str(tmp_path), True)[0]
    loaded = run_ranks(loaded_at, load_through_checkpoint, str(tmp_path), False)[0]
    assert sum(key.startswith("optimizer.") for key in saved) > len(saved) / 2
    assert_all_close(loaded, saved, rtol=0.0)


def state_after_evaluation(rank: int) -> tuple[bool, dict[str, float]]:
    """Whether the dense state is sharded, right after a forward without backward, and the training traffic it caused."""
    model, handle = wrapped("random")
    optimizer = make_optimizer(model, "sgd")
    cross_entropy(model(global_batch(0)[0]), global_batch(0)[1]).backward()
    optimizer.step()
    handle.step()
    model.eval()
    with torch.no_grad():
        model(global_batch(1)[0])
    state = handle.state_dict(optimizer)
    handle.step()
    sharded = all(isinstance(state[f"model.{name}"], DTensor) for name in ("embed.weight", "head.weight", "blocks.0.mix.weight"))
    return sharded, {key: value for key, value in handle.metrics().items() if key.startswith("bytes_")}


def test_evaluation_leaves_state_sharded_and_is_not_counted() -> None:
    for sharded, traffic in run_ranks(2, state_after_evaluation):
        assert sharded
        assert traffic == {}


def refuse_incomplete_state(rank: int) -> str:
    _, handle = wrapped()
    state = dict(handle.state_dict())
    state.pop("model.head.weight")
    with pytest.raises(ValueError, match="lacks 1 of") as refused:
        handle.load_state_dict(state)
    return str(refused.value)


def test_incomplete_state_is_refused() -> None:
    assert "'model.head.weight'" in run_ranks(2, refuse_incomplete_state)[0]


def count_bytes(rank: int) -> dict[str, Any]:
    """Traffic and metrics of one training step in which every expert is everywhere."""
    world_size = dist.get_world_size()
    model, handle = wrapped("everywhere")
    optimizer = make_optimizer(model, "sgd")
    for step in range(2):
        handle.telemetry.clock.enabled = True
        ids, targets = (rank_slice(t, rank, world_size) for t in global_batch(step))
        cross_entropy(model(ids), targets).backward()
        optimizer.step()
        optimizer.zero_grad()
        handle.step()
    return {"metrics": handle.metrics(), "loads": handle.telemetry.loads(), "seconds": dict(handle.telemetry.clock.seconds)}


@pytest.mark.parametrize("world_size", [2, 3])
def test_bytes_are_those_of_the_plan(world_size: int) -> None:
    """With every expert everywhere each weight leaves its owner R-1 times, each gradient comes back, and no row travels."""
    results = run_ranks(world_size, count_bytes)
    expert_bytes = 3 * 16 * 24 * 4
    total = {key: sum(r["metrics"].get(key, 0.0) for r in results) for key in ("bytes_gather", "bytes_reduce", "bytes_dispatch")}
    copies = 2 * NUM_EXPERTS * (world_size - 1)
    # The busiest rank has no less to do than the bound says, and one node has no other to send to.
    assert all(0 < r["metrics"]["gather_bound_bytes"] <= r["metrics"]["gather_busiest_bytes"] for r in results)
    assert all(r["metrics"]["cross_node_bytes_gather"] == 0.0 for r in results)
    assert all(sum(r["metrics"][f"gathers_{name}"] for name in SCHEDULES) == 1.0 for r in results)
    assert total == {"bytes_gather": copies * expert_bytes, "bytes_reduce": copies * expert_bytes, "bytes_dispatch": 0.0}
    for result in results:
        assert result["metrics"]["copies_per_layer"] == NUM_EXPERTS * (world_size - 1)
        assert result["metrics"]["max_over_mean"] < 1.05 <= result["metrics"]["max_over_mean_static"]
        assert np.array_equal(result["loads"], results[0]["loads"])
        assert result["loads"].sum() == 2 * 24 * 6 * 2  # layers * global batch * length * top-k
        assert set(result["seconds"]) == {"route", "plan", "materialize", "dispatch", "experts", "combine", "reduce"}


def refuse(rank: int, what: str) -> str:
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    if what == "no moe":
        with pytest.raises(ValueError, match="no MoE block") as refused:
            shard_experts(nn.Sequential(nn.Linear(3, 3), nn.ReLU()), mesh=mesh)
    elif what == "twice":
        model, _ = wrapped()
        with pytest.raises(ValueError, match="sharded already") as refused:
            shard_experts(model, mesh=mesh)
    else:
        grid = init_device_mesh("cpu", (2, 1, 1), mesh_dim_names=("pipeline", "replicate", "shard"))
        part, match = (grid, "3 dimensions") if what == "grid" else (grid["replicate", "shard"], "1 of 2 ranks")
        if what == "grid without names":
            part, match = init_device_mesh("cpu", (2, 1)), "2 dimensions without names"
        with pytest.raises(ValueError, match=match) as refused:
            shard_experts(make_model(), mesh=part)
    return str(refused.value)


@pytest.mark.parametrize("what", ["no moe", "twice", "grid", "part of a grid", "grid without names"])
def test_wrong_use_is_one_line_on_every_rank(what: str) -> None:
    messages = run_ranks(2, refuse, what)
    assert messages[0] == messages[1]
    assert "\n" not in messages[0]
    assert ("register_adapter" in messages[0]) == (what == "no moe")


def share_after_refusals(group: RankGroup) -> None:
    layer, owners = MoELayer(8, 6, 4, 2), OwnerMap.contiguous(1, 4, 2)
    placement = Placement.everywhere(owners.expert_to_owner_LE[0], 2)
    share = partial(share_experts, {"moe": layer}, group, solver=everywhere)
    with pytest.raises(ValueError, match="puts 2 copies on rank 0, which has 1 slots"):
        share(config=RuntimeConfig(slots=1), owners=owners, placements=[placement])
    assert not layer.experts.is_sharded
    weights = {f"experts.{e}.{weight}" for e in range(4) for weight in ("gate_up", "down")}
    assert dict(layer.named_parameters()).keys() == {"router.weight", *weights}
    share(config=RuntimeConfig(slots=2), owners=owners, placements=[placement])
    assert layer.runtime.planner.place().placement == placement


def test_a_refused_call_moves_nothing_and_the_corrected_one_works() -> None:
    run_threads(2, share_after_refusals)


def warned(rank: int) -> list[str]:
    """Of what FSDP2 warns where MoE layers are its units."""
    model = nn.Sequential(nn.Linear(8, 8), MoELayer(8, 6, 4, 2), MoELayer(8, 6, 4, 2))
    shard_experts(model, mesh=init_device_mesh("cpu", (2,)))
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        for x in (torch.randn(3, 2, 8), torch.randn(6, 8)):
            y = model(x)
            assert y.shape == x.shape
            y.sum().backward()
    return [str(warning.message) for warning in seen if "view" in str(warning.message)]


def test_fsdp2_finds_nothing_to_warn_of() -> None:
    assert run_ranks(2, warned) == [[], []]
