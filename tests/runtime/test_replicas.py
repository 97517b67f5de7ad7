"""A two-dimensional mesh: experts shared inside groups, gradients averaged over the groups."""

import weakref
from typing import Any
from unittest.mock import patch

import pytest
import torch
import torch.distributed as dist
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from moesaic import Handle, MoELayer, RuntimeConfig, shard_experts
from moesaic.collectives import average, make_transports
from moesaic.collectives.reference import average_reference
from moesaic.collectives.transports.shm import ShmTransport
from moesaic.runtime.group import RankGroup
from tests.helpers.compare import assert_all_close, assert_bitwise
from tests.helpers.model import NUM_EXPERTS, Model, cross_entropy, global_batch, make_model, rank_slice
from tests.helpers.ranks import run_ranks
from tests.helpers.threads import run_threads
from tests.runtime.test_migration import migrate_while_training, shuffled
from tests.runtime.test_shard import SOLVERS, backward_on_one, make_optimizer, train_on_one, whole

MESH = (2, 2)
LAYERS = ("blocks.0.moe", "blocks.1.moe")


def average_on_rank(group: RankGroup, tensors_R: list[list[Tensor]], piece_bytes: int) -> tuple[list[Tensor], int]:
    tensors = [tensor.clone() for tensor in tensors_R[group.rank]]
    average(group.tokens, tensors, op="replicate", piece_bytes=piece_bytes)
    return tensors, group.tokens.traffic.total_bytes().get("replicate", 0)


@settings(max_examples=25, deadline=None)
@given(
    world_size=st.integers(1, 5),
    sizes=st.lists(st.tuples(st.integers(0, 5), st.integers(1, 7)), max_size=3),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float64]),
    piece_bytes=st.integers(1, 200),
)
def test_average_is_the_mean_in_rank_order(
    world_size: int, sizes: list[tuple[int, int]], dtype: torch.dtype, piece_bytes: int
) -> None:
    """The same bits on every rank, whatever the pieces, and 2 (R - 1) / R of the bytes sent by the ranks together."""
    tensors_R = [[torch.randn(size).to(dtype) for size in sizes] for _ in range(world_size)]
    expected = [average_reference(tensors) for tensors in zip(*tensors_R, strict=True)]
    results = run_threads(world_size, average_on_rank, tensors_R, piece_bytes)
    for tensors, _ in results:
        assert all(torch.equal(actual, mean) for actual, mean in zip(tensors, expected, strict=True))
    assert sum(sent for _, sent in results) == 2 * (world_size - 1) * sum(t.nbytes for t in expected)


class Living:
    """The most bytes of these tensors that lived at once."""

    def __init__(self) -> None:
        self.num_bytes = self.peak_bytes = 0

    def add(self, tensor: Tensor) -> Tensor:
        self._count(tensor.untyped_storage().nbytes())
        weakref.finalize(tensor.untyped_storage(), self._count, -tensor.untyped_storage().nbytes())
        return tensor

    def _count(self, num_bytes: int) -> None:
        self.num_bytes += num_bytes
        self.peak_bytes = max(self.peak_bytes, self.num_bytes)


class MadeHere(TorchDispatchMode):
    """Adds the tensors that operations make, other than views, to `living`."""

    def __init__(self, living: Living):
        super().__init__()
        self._living = living

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        known = {tensor.untyped_storage().data_ptr() for tensor in args if isinstance(tensor, Tensor)}
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor) and tensor.untyped_storage().data_ptr() not in known:
                self._living.add(tensor)
        return result


def average_over_shm(rank: int, tensors_R: list[Tensor], piece_bytes: int) -> tuple[Tensor, int, int]:
    group = dist.group.WORLD
    assert group is not None
    (transport,) = make_transports("shm", group, num_transports=1, timeout_s=60)
    assert isinstance(transport, ShmTransport)
    tensor, made, staged = tensors_R[rank].clone(), Living(), Living()
    stage = transport._arena.empty
    with MadeHere(made), patch.object(transport._arena, "empty", lambda *shape: staged.add(stage(*shape))):
        average(transport, [tensor], op="replicate", piece_bytes=piece_bytes)
    return tensor, made.peak_bytes, staged.peak_bytes


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("world_size", [2, 3])
def test_average_keeps_to_its_memory(dtype: torch.dtype, world_size: int) -> None:
    """Over shared memory, which copies what is sent: the buffers of one piece, however many there are."""
    piece_bytes = 3 << 10
    tensors_R = [torch.randn(5 << 9).to(dtype) for _ in range(world_size)]
    for tensor, made, staged in run_ranks(world_size, average_over_shm, tensors_R, piece_bytes):
        assert torch.equal(tensor, average_reference(tensors_R))
        assert 0 < made <= piece_bytes
        assert 0 < staged <= piece_bytes


def wrapped(use_checkpoint: bool = False, **options: Any) -> tuple[Model, Handle]:
    model = make_model(use_checkpoint=use_checkpoint)
    mesh = init_device_mesh("cpu", MESH, mesh_dim_names=("replicate", "shard"))
    config = RuntimeConfig(policy="static", slots=NUM_EXPERTS, timeout_s=60, **options)
    return model, shard_experts(model, mesh=mesh, config=config, solver=SOLVERS["random"])


def gradients(model: Model, handle: Handle) -> dict[str, Tensor]:
    """Every gradient under its logical name; replicas, and what ranks share, must agree bit for bit."""
    mine = {name: whole(p.grad).clone() for name, p in model.named_parameters()}
    everybody: list[dict[str, Tensor]] = [{}] * dist.get_world_size()
    dist.all_gather_object(everybody, mine)
    grads: dict[str, Tensor] = {}
    for part in everybody:
        common = grads.keys() & part.keys()
        assert_bitwise({name: part[name] for name in common}, {name: grads[name] for name in common})
        grads |= part
    return grads


def backward_on_mesh(rank: int, num_batches: int, use_checkpoint: bool, only_last: bool) -> Any:
    model, handle = wrapped(use_checkpoint)
    model(rank_slice(global_batch(0)[0], rank, 4))  # so that copies exist
    handle.step()
    for batch in range(num_batches):
        ids, targets = (rank_slice(t, rank, 4) for t in global_batch(batch))
        handle.set_requires_all_reduce(not only_last or batch == num_batches - 1)
        loss = cross_entropy(model(ids), targets) + handle.aux_loss()
        (loss / num_batches).backward()
    grads = gradients(model, handle)
    norm = handle.clip_grad_norm_(0.5)
    clipped = gradients(model, handle)
    handle.step()
    return grads, norm, clipped, handle.metrics().get("bytes_replicate", 0.0)


@pytest.mark.parametrize("num_batches,use_checkpoint,only_last", [(1, False, False), (3, True, False), (3, False, True)])
def test_gradients_and_norm_equal_one_process(num_batches: int, use_checkpoint: bool, only_last: bool) -> None:
    """Losses of the global batch included; the averaging happens after every micro-batch, or after the last alone."""
    expected = backward_on_one(num_batches)
    results = run_ranks(4, backward_on_mesh, num_batches, use_checkpoint, only_last)
    for grads, norm, clipped, _ in results:
        assert_all_close(grads, expected[0])
        assert norm.item() == pytest.approx(expected[1].item(), rel=1e-5)
        assert_all_close(clipped, expected[2])
    # Half of each rank's gradients to its replica, half of the means back; two layers of all experts on each pair.
    num_averages = 1 if only_last else num_batches
    assert sum(sent for *_, sent in results) == num_averages * 2 * (2 * NUM_EXPERTS * 3 * 16 * 24 * 4)


def clip_placed_by_hand(rank: int) -> list[tuple[float, float]]:
    """The global norm, and a part's largest element after clipping to half of it: dense gradients of ones, one for each way to
    place them, and experts', on one group of all ranks and on two."""
    line, grid = init_device_mesh("cpu", (4,)), init_device_mesh("cpu", MESH, mesh_dim_names=("replicate", "shard"))
    placed = [(line, [Replicate()]), (line, [Shard(0)]), (grid, [Replicate(), Shard(0)]), (grid, [Shard(0), Replicate()])]
    placed += [(grid["shard"], [Shard(0)]), (grid["shard"], [Replicate()])]
    results = []
    for mesh in (line, grid):
        model = nn.Sequential(MoELayer(16, 24, 4, 2), nn.Linear(8, 8, bias=False))
        handle = shard_experts(model, mesh=mesh, config=RuntimeConfig(shard_dense=False, timeout_s=60))
        whole = [distribute_tensor(torch.ones(8, 8), *place) for place in placed]
        model.extend(nn.ParameterList([tensor]) for tensor in whole)
        for parameter in model.parameters():
            parameter.grad = torch.ones_like(parameter)
        norm = handle.clip_grad_norm_(8.0)
        results.append((norm.item(), model[2][0].grad.to_local().max().item() * norm.item()))
    return results


def test_every_placement_of_dense_gradients_counts_once() -> None:
    """Sharded and replicated over all ranks, over groups, inside them, and whole."""
    num_ones = 4 * 3 * 16 * 24 + 4 * 16 + 7 * 8 * 8
    expected = [(num_ones**0.5, 8.0)] * 2
    results = run_ranks(4, clip_placed_by_hand)
    assert all(result == results[0] for result in results)
    assert [pytest.approx(pair) for pair in expected] == results[0]


def train_on_mesh(rank: int, folder: str) -> list[float]:
    """Ten steps with AdamW and owners that change; a checkpoint after the fifth, which a fresh model goes on from."""
    import torch.distributed.checkpoint as dcp

    model, handle = wrapped()
    optimizer = make_optimizer(model, "adamw")
    losses = []
    for step in range(10):
        if step == 5:
            dcp.save(handle.state_dict(optimizer), checkpoint_id=folder)
            model, handle = wrapped()
            optimizer = make_optimizer(model, "adamw")
            handle.prepare_optimizer(optimizer)
            state = handle.state_dict(optimizer)
            dcp.load(state, checkpoint_id=folder)
            handle.load_state_dict(state, optimizer)
        ids, targets = (rank_slice(t, rank, 4) for t in global_batch(step))
        loss = cross_entropy(model(ids), targets)
        (loss + handle.aux_loss()).backward()
        handle.clip_grad_norm_(1.0)
        optimizer.step()
        optimizer.zero_grad()
        handle.step()
        handle.migrate([shuffled(owners, step) for owners in handle.owner_maps], optimizer)
        mean = loss.detach().double()
        dist.all_reduce(mean)
        losses.append(mean.item() / 4)
    check_export(rank, handle, f"{folder}/safetensors")
    return losses


def check_export(rank: int, handle: Handle, folder: str) -> None:
    """The whole state is on rank 0 alone; what one replica writes, all of a fresh model read."""
    assert bool(handle.weights.state_dict()) == (rank == 0)
    handle.weights.save_safetensors(folder)
    _, fresh = wrapped()
    assert fresh.weights.load_safetensors(folder) == ()
    fresh.migrate(handle.owner_maps)
    expected = handle.state_dict()
    assert all(tensor.device_mesh.ndim == 2 for tensor in expected.values() if isinstance(tensor, DTensor))
    assert_bitwise({k: whole(v) for k, v in fresh.state_dict().items()}, {k: whole(v) for k, v in expected.items()})


def test_a_curve_with_replicas_is_that_of_one_process(tmp_path: Any) -> None:
    """AdamW, clipping, a checkpoint, owners that move."""
    results = run_ranks(4, train_on_mesh, str(tmp_path))
    assert results[0] == pytest.approx(train_on_one("adamw", 10), rel=5e-4)


def test_replicas_follow_one_decision() -> None:
    """Each group observes its own loads; owners must stay the same in all of them."""
    reasons, losses, moved = zip(*run_ranks(4, migrate_while_training, 0.5, MESH), strict=True)
    assert all(num_moved for _, num_moved in moved[0])
    assert all(m == moved[0] for m in moved)
    assert all(reason.startswith("experts migrate: ") for reason in reasons[0])
    assert set(reasons[1] + reasons[2] + reasons[3]) == {"decided by rank 0"}
    assert losses[0] == pytest.approx(run_ranks(2, migrate_while_training, 0.5)[0][1], rel=5e-4)
