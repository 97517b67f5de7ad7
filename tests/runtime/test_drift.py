"""The drift guard: every planted difference is found and named on every rank, and nothing is where ranks differ by design."""

import re
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any
from unittest.mock import patch

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from torch.nn.parallel import DistributedDataParallel

from moesaic import Handle, RuntimeConfig, shard_experts
from moesaic.runtime.agreement import HEADER_INTS as H
from moesaic.runtime.group import RankGroup
from moesaic.runtime.wrap import drift
from moesaic.runtime.wrap.drift import DriftError, DriftGuard
from tests.helpers.model import NUM_EXPERTS, Model, cross_entropy, global_batch, rank_slice
from tests.helpers.ranks import run_ranks
from tests.helpers.threads import run_threads

CPU = torch.device("cpu")
NUM_RANKS = 4


class Held:
    """What one rank of a mesh of two replicas with two ranks each holds: the same on all, but for the experts' owners."""

    def __init__(self, rank: int):
        generator = torch.Generator().manual_seed(5)

        def random(*size: int) -> Tensor:
            return torch.randn(size, generator=generator)

        self.dense: dict[str, Tensor] = {
            "embed.weight": nn.Parameter(random(7, 3)),
            "frozen.weight": nn.Parameter(random(5).bfloat16(), requires_grad=False),
            "scalar": nn.Parameter(random(1).reshape(())),
            "router.e_score_correction_bias": random(4).double(),
            "norm.running_mean": random(6).half(),
            "rotary.cos": random(8, 9).t(),
            "norm.num_batches_tracked": torch.tensor(3),
            "mask": random(11) > 0,
            "phases": torch.complex(random(3), random(3)),
            "nothing": random(0, 4),
            "unbuilt": torch.empty(3, device="meta"),
        }
        self.dense["head.weight"] = self.dense["embed.weight"]  # tied
        self.owned = rank % 2
        experts = [nn.Parameter(random(3, 2)) for _ in range(4)]
        self.experts: dict[str, Tensor] = {f"moe.experts.{e}.down": experts[e] for e in (2 * self.owned, 2 * self.owned + 1)}
        self.optimizer: torch.optim.Optimizer | None = torch.optim.AdamW(
            [{"params": [self.dense["embed.weight"], self.dense["scalar"]]}, {"params": list(self.experts.values()), "lr": 0.02}],
            lr=0.01,
        )
        for group in self.optimizer.param_groups:
            for parameter in group["params"]:
                self.optimizer.state[parameter] = {"step": torch.tensor(9.0), "exp_avg": torch.zeros_like(parameter)}

    def flip(self, name: str, element: int = 0, bit: int = 0) -> None:
        """Change one bit of one element, in logical order."""
        tensor = (self.dense | self.experts)[name].detach()
        real = torch.view_as_real(tensor) if tensor.is_complex() else tensor
        bits = real.view({1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[real.element_size()])
        index = () if bits.ndim == 0 else tuple(int(i) for i in torch.unravel_index(torch.tensor(element), bits.shape))
        bits[index] ^= 1 << bit

    def group(self, index: int) -> dict[str, Any]:
        assert self.optimizer is not None
        return self.optimizer.param_groups[index]

    def state(self, name: str) -> dict[str, Any]:
        assert self.optimizer is not None
        return self.optimizer.state[(self.dense | self.experts)[name]]


def check_on_rank(
    group: RankGroup, plant: Callable[[Held, int], Any], steps: Sequence[int], every: int, ignored: Sequence[str]
) -> tuple[int, str] | None:
    """The step and message of the error, if there is one."""
    rank = group.replicas.rank * group.world_size + group.rank
    held = Held(rank)
    plant(held, rank)
    guard = DriftGuard(group, every=every, ignored=ignored)
    for step in steps:
        try:
            guard.after_step(step, held.dense.items(), held.experts.items(), held.optimizer, CPU)
        except DriftError as error:
            return step, str(error)
    return None


def found(
    plant: Callable[[Held, int], Any], *, steps: Sequence[int] = (1,), every: int = 100, ignored: Sequence[str] = ()
) -> tuple[int, str] | None:
    """What a check finds after `plant(held, rank)` on every rank, which must be the same on all."""
    results = run_threads(2, check_on_rank, plant, steps, every, ignored, num_replicas=2)
    assert len(results) == NUM_RANKS
    assert all(result == results[0] for result in results)
    return results[0]


def on_rank(rank: int, change: Callable[[Held], Any]) -> Callable[[Held, int], None]:
    def plant(held: Held, here: int) -> None:
        if here == rank:
            change(held)

    return plant


def message(plant: Callable[[Held, int], Any], **options: Any) -> str:
    result = found(plant, **options)
    assert result is not None
    assert "\n" not in result[1]
    return result[1]


def test_ranks_that_agree_pass() -> None:
    """Experts differ between the ranks of a replica, one tensor is tied, one is on the meta device."""
    assert found(lambda held, rank: None, steps=range(1, 7), every=2) is None


TENSORS = {name: tensor.numel() for name, tensor in Held(0).dense.items() if tensor.numel() and not tensor.is_meta}


@pytest.mark.parametrize("rank", [0, 3])
@pytest.mark.parametrize("name", [name for name in TENSORS if name != "head.weight"])
def test_one_bit_in_any_tensor(name: str, rank: int) -> None:
    """The lowest bit of the first, the middle and the last element, on the first rank or on the last."""
    for element in sorted({0, TENSORS[name] // 2, TENSORS[name] - 1}):
        text = message(on_rank(rank, partial(Held.flip, name=name, element=element)))
        a, b = (1, 0) if rank == 0 else (0, 3)
        assert f"by step 1: the values of '{name}' differ between ranks {a} and {b} of the mesh" in text
        assert f"(1 of 4 ranks differ from rank {a}); in all 1 tensors differ, and the optimizer's numbers for 0 param" in text
        assert "handle.clip_grad_norm_" in text
        assert "a step that one rank skipped alone" in text
        assert "learning rate" in text
        assert "weights set on one rank only" in text
        assert "runtime.check_replicas_except" in text


def test_a_tied_weight_is_one() -> None:
    """Changed under its second name, it is told of once, under its first."""
    text = message(on_rank(2, lambda held: held.flip("head.weight")))
    assert "the values of 'embed.weight' differ" in text
    assert "in all 1 tensors" in text


def test_payloads_of_nan_are_bits() -> None:
    """NaNs on every rank pass; one bit in one of them does not."""

    def nan(held: Held, rank: int, changed: int | None) -> None:
        held.dense["embed.weight"].detach().fill_(torch.nan)
        if rank == changed:
            held.flip("embed.weight", 4)

    assert found(partial(nan, changed=None)) is None
    assert "'embed.weight'" in message(partial(nan, changed=1))


def test_an_expert_of_a_replica() -> None:
    """Owned by ranks 1 and 3, the second of each replica."""
    text = message(on_rank(3, lambda held: held.flip("moe.experts.2.down", 5, bit=30)))
    assert "the values of 'moe.experts.2.down' differ between ranks 1 and 3 of the mesh (1 of 2 ranks differ" in text


def test_owners_that_replicas_do_not_share() -> None:
    def other_owners(held: Held) -> None:
        held.experts = {"moe.experts.0.down": held.experts["moe.experts.0.down"]}

    text = message(on_rank(2, other_owners))
    assert "'moe.experts.1.down' is float32 [3, 2] with requires_grad on rank 0 and missing on rank 2" in text
    assert "missing on rank 2" in message(on_rank(2, lambda held: held.experts.clear()))


def replace(held: Held, name: str, tensor: Tensor) -> None:
    held.dense[name] = tensor


PROPERTIES = {
    "dtype": (
        lambda held: replace(held, "mask", held.dense["mask"].to(torch.uint8)),
        "'mask' is bool [11] with no requires_grad on rank 0 and uint8 [11] with no requires_grad on rank 2",
    ),
    "shape": (
        lambda held: replace(held, "nothing", torch.empty(4, 0)),
        "'nothing' is float32 [0, 4] with no requires_grad on rank 0 and float32 [4, 0] with no requires_grad on rank 2",
    ),
    "requires_grad": (
        lambda held: held.dense["frozen.weight"].requires_grad_(),
        "'frozen.weight' is bfloat16 [5] with no requires_grad on rank 0 and bfloat16 [5] with requires_grad on rank 2",
    ),
    "requires_grad of an expert": (
        lambda held: held.experts["moe.experts.1.down"].requires_grad_(False),
        "'moe.experts.1.down' is float32 [3, 2] with requires_grad on rank 0 and float32 [3, 2] with no requires_grad on rank 2",
    ),
    "missing": (
        lambda held: held.dense.pop("mask"),
        "'mask' is bool [11] with no requires_grad on rank 0 and missing on rank 2",
    ),
    "on one rank only": (
        lambda held: replace(held, "bias", torch.zeros(2)),
        "'bias' is float32 [2] with no requires_grad on rank 2 and missing on rank 0",
    ),
    "nothing at all": (lambda held: held.__dict__.update(dense={}, experts={}), "missing on rank 2"),
    "not tied": (
        lambda held: replace(held, "head.weight", held.dense["embed.weight"].detach().clone()),
        "'head.weight' is float32 [7, 3] with no requires_grad on rank 2 and missing on rank 0",
    ),
}


@pytest.mark.parametrize("case", PROPERTIES)
def test_properties(case: str) -> None:
    change, expected = PROPERTIES[case]
    text = message(on_rank(2, change))
    assert expected in text.replace(" of the mesh", "")
    assert "alike on all ranks" in text


def without_state(held: Held) -> None:
    assert held.optimizer is not None
    held.optimizer.state.pop(held.dense["scalar"])


SETTINGS = {
    "lr": (
        lambda held: held.group(0).update(lr=0.03),
        "settings for 'embed.weight' have lr = 0.01 on rank 0 and lr = 0.03 on rank 2",
    ),
    "betas": (
        lambda held: held.group(0).update(betas=(0.9, 0.95)),
        "'embed.weight' have betas = (0.9, 0.999) on rank 0 and betas = (0.9, 0.95) on rank 2",
    ),
    "flag": (lambda held: held.group(0).update(amsgrad=True), "have amsgrad = False on rank 0 and amsgrad = True on rank 2"),
    "a tensor": (
        lambda held: held.group(0).update(lr=torch.tensor(0.5)),
        "have lr = 0.01 on rank 0 and lr = 0.5 on rank 2",
    ),
    "a number more": (lambda held: held.group(0).update(extra=1), "have fewer values on rank 0 and extra = 1.0 on rank 2"),
    "lr of experts": (
        lambda held: held.group(1).update(lr=0.04),
        "settings for 'moe.experts.*.down' have lr = 0.02 on rank 0 and lr = 0.04 on rank 2",
    ),
    "one parameter's group": (
        lambda held: held.group(1)["params"].append(held.group(0)["params"].pop(0)),
        "settings for 'embed.weight' have lr = 0.01 on rank 0 and lr = 0.02 on rank 2",
    ),
    "no optimizer": (
        lambda held: held.__dict__.update(optimizer=None),
        "an optimizer stepped 'embed.weight' on rank 0 and none did on rank 2",
    ),
    "step count": (
        lambda held: held.state("scalar")["step"].sub_(1),
        "the optimizer has counted 9.0 steps of 'scalar' on rank 0 and 8.0 on rank 2",
    ),
    "step count of an expert": (
        lambda held: held.state("moe.experts.0.down").update(step=10),
        "the optimizer has counted 9.0 steps of 'moe.experts.0.down' on rank 0 and 10.0 on rank 2",
    ),
    "no state": (without_state, "an optimizer stepped 'scalar' on rank 0 and none did on rank 2"),
}


@pytest.mark.parametrize("case", SETTINGS)
def test_numbers_of_the_optimizer(case: str) -> None:
    change, expected = SETTINGS[case]
    text = message(on_rank(2, change))
    assert expected in text.replace(" of the mesh", "")
    assert "in all 0 tensors differ" in text


def test_experts_of_any_rank_have_the_same_settings() -> None:
    """Rank 1 owns other experts of the layer than rank 0, in both replicas."""
    text = message(lambda held, rank: held.group(1).update(lr=0.02 + 0.01 * held.owned))
    assert "settings for 'moe.experts.*.down' have lr = 0.02 on rank 0 and lr = 0.03 on rank 1" in text.replace(
        " of the mesh", ""
    )


def test_settings_may_differ_by_expert() -> None:
    """One expert of each rank at a rate of its own, another one on each."""

    def by_expert(held: Held, rank: int) -> None:
        assert held.optimizer is not None
        experts = held.optimizer.param_groups[1]["params"]
        held.optimizer.add_param_group({"params": [experts.pop()], "lr": 0.1 + 0.1 * held.owned})

    assert found(by_expert) is None


def uneven(held: Held, rank: int) -> None:
    """The second rank of each replica owns experts of another layer, at another rate; the first has its groups reversed."""
    assert held.optimizer is not None
    if held.owned == 0:
        held.optimizer.param_groups.reverse()
        return
    held.experts = {"moe_2.experts.0.down": nn.Parameter(torch.ones(2))}
    held.optimizer.param_groups[1] |= {"params": list(held.experts.values()), "lr": 0.7}
    held.optimizer.add_param_group({"params": []})


def test_groups_need_not_be_alike() -> None:
    """Settings are those of parameters: how they are grouped, and of which layers a rank owns experts, does not matter."""
    assert found(uneven) is None

    def and_different(held: Held, rank: int) -> None:
        uneven(held, rank)
        held.group(0)["lr"] += 0.03 if rank == 2 else 0.0

    text = message(and_different)
    assert "settings for 'moe.experts.*.down' have lr = 0.02 on rank 0 and lr = 0.05 on rank 2 of the mesh (1 of 2 ranks" in text


def test_causes_are_told_before_effects() -> None:
    """Everything differs: the weights do because of the learning rate, that because of what was frozen."""

    def everything(held: Held) -> None:
        held.flip("embed.weight")
        held.flip("mask")
        held.group(0)["lr"] = 0.5
        held.state("scalar")["step"] += 1

    text = message(on_rank(1, everything))
    assert "settings for 'embed.weight' have lr = 0.01" in text
    assert "in all 2 tensors differ, and the optimizer's numbers for 2 parameters" in text
    assert "'frozen.weight' is" in message(
        on_rank(1, lambda held: (everything(held), held.dense["frozen.weight"].requires_grad_()))
    )


def test_the_rank_that_stands_alone_is_named() -> None:
    """Two of four against two: those of the lowest rank count as the others."""
    assert "ranks 1 and 0 of the mesh (1 of 4 ranks" in message(on_rank(0, lambda held: held.flip("mask")))
    assert "ranks 0 and 2 of the mesh (1 of 4 ranks" in message(on_rank(2, lambda held: held.flip("mask")))
    two = message(lambda held, rank: held.flip("mask") if rank % 2 else None)
    assert "ranks 0 and 1 of the mesh (2 of 4 ranks" in two


def different_buffers(held: Held, rank: int) -> None:
    for bit in range(rank):
        held.flip("norm.running_mean", bit=bit)
        held.flip("norm.num_batches_tracked", bit=bit)


@pytest.mark.parametrize("ignored", [["norm.running_mean", "norm.num_batches_tracked"], ["*.running_mean", "norm.num_*"]])
def test_what_differs_on_purpose_is_left_out(ignored: list[str]) -> None:
    assert "'norm.running_mean'" in message(different_buffers)
    assert "'norm.num_batches_tracked'" in message(different_buffers, ignored=ignored[:1])
    assert found(different_buffers, ignored=ignored) is None


def test_an_ignored_parameter_may_have_settings_of_its_own() -> None:
    def different(held: Held, rank: int) -> None:
        held.flip("embed.weight", bit=rank)
        held.group(0)["lr"] = 0.1 * rank
        held.state("embed.weight")["step"] += rank
        del held.group(0)["params"][1]

    assert found(different, ignored=["embed.weight", "head.weight", "scalar"]) is None


@pytest.mark.parametrize("every, expected", [(0, None), (1, 2), (3, 3), (4, 4), (100, None)])
def test_when_it_is_checked(every: int, expected: int | None) -> None:
    """After the first step, and then every so many."""
    differ = on_rank(1, lambda held: held.flip("mask"))
    result = found(differ, steps=range(2, 8), every=every)
    assert (result and result[0]) == expected
    first = found(differ, steps=range(1, 8), every=every)
    assert (first and first[0]) == (1 if every else None)


def exchanges(group: RankGroup, num_tensors: int, changed: bool) -> list[list[int]]:
    """The integers in each exchange of a check, by transport."""
    sizes: list[list[int]] = [[], []]
    for transport, counted in ((group.tokens, sizes[0]), (group.replicas, sizes[1])):

        def gather(values: Tensor, *, where: str, gather: Any = transport.all_gather_ints, counted: Any = counted) -> Tensor:
            assert where == "the drift check after step 1"
            counted.append(values.numel())
            return gather(values, where=where)

        transport.all_gather_ints = gather
    tensors = [(f"t{index}", torch.zeros(2)) for index in range(num_tensors)]
    if changed and group.rank == 1:
        tensors[0][1][0] = 1.0
    try:
        DriftGuard(group, every=1).after_step(1, tensors, [], None, CPU)
    except DriftError:
        assert changed
    return sizes


def test_ranks_that_agree_exchange_some_hundred_bytes() -> None:
    """Once, after a header, however many tensors there are; details follow only where something differs."""
    few, many = (run_threads(2, exchanges, n, False, num_replicas=2) for n in (1, 300))
    assert few == many == [[[H, 14], [H, 28]]] * NUM_RANKS
    different = run_threads(2, exchanges, 300, True, num_replicas=2)
    assert different == [[[H, 14, H, 4 * 600, H, 128], [H, 28, H, 8 * 600, H, 256]]] * NUM_RANKS


def alone(group: RankGroup) -> None:
    """One rank: nothing to compare, nothing looked at."""

    def tensors() -> Any:
        raise AssertionError("looked at")
        yield

    DriftGuard(group, every=1).after_step(1, tensors(), tensors(), None, CPU)


def test_one_rank_is_not_checked() -> None:
    run_threads(1, alone)


# On real processes


class WithBuffers(Model):
    """With buffers that ranks share: one in the state dict, one not in it."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("scale", torch.ones(3))
        self.register_buffer("table", torch.arange(4), persistent=False)


def wrapped(shape: Sequence[int], **options: Any) -> tuple[WithBuffers, Handle]:
    torch.manual_seed(1)
    model = WithBuffers()
    mesh = init_device_mesh("cpu", tuple(shape), mesh_dim_names=("replicate", "shard")[-len(shape) :])
    config = RuntimeConfig(policy="static", slots=NUM_EXPERTS, timeout_s=60, **options)
    return model, shard_experts(model, mesh=mesh, config=config)


def backward(model: nn.Module, handle: Handle, step: int, num_batches: int = 1) -> None:
    for batch in range(num_batches):
        handle.set_requires_all_reduce(batch == num_batches - 1)
        ids, targets = (rank_slice(t, dist.get_rank(), dist.get_world_size()) for t in global_batch(num_batches * step + batch))
        loss = cross_entropy(model(ids), targets) + handle.aux_loss()
        (loss / num_batches).backward()


def train(model: nn.Module, handle: Handle, optimizer: torch.optim.Optimizer, steps: Sequence[int], num_batches: int = 1) -> None:
    for step in steps:
        backward(model, handle, step, num_batches)
        handle.clip_grad_norm_(0.1)
        optimizer.step()
        optimizer.zero_grad()
        handle.step()


def adamw(handle: Handle) -> torch.optim.Optimizer:
    return torch.optim.AdamW(handle.parameter_groups(), lr=0.01)


def refused(step: Callable[[], None]) -> str:
    with pytest.raises(DriftError) as error:
        step()
    return str(error.value)


def right_runs(rank: int, shape: Sequence[int], shard_dense: bool) -> None:
    """Many steps with copies, accumulation, clipping, evaluation, owners that change, a state that is loaded: no alarm."""
    model, handle = wrapped(shape, check_replicas_every=1, shard_dense=shard_dense)
    trained: nn.Module = model if shard_dense else DistributedDataParallel(model)
    optimizer = adamw(handle)
    for round_ in range(4):
        train(trained, handle, optimizer, range(3 * round_, 3 * round_ + 3), num_batches=1 + round_ % 2)
        owners = [type(o)(o.expert_to_owner_LE[:, ::-1].copy(), o.num_ranks) for o in handle.owner_maps]
        if all((new.num_rows_R == old.num_rows_R).all() for new, old in zip(owners, handle.owner_maps, strict=True)):
            handle.migrate(owners, optimizer)
        with torch.no_grad():
            model(global_batch(0)[0])
        handle.load_state_dict(handle.state_dict(optimizer), optimizer)


@pytest.mark.parametrize("shape, shard_dense", [((2,), True), ((2,), False), ((2, 2), True), ((2, 2), False), ((1, 2), True)])
def test_runs_that_are_right_pass(shape: tuple[int, ...], shard_dense: bool) -> None:
    run_ranks(torch.Size(shape).numel(), right_runs, shape, shard_dense)


def planted(rank: int, shape: Sequence[int], shard_dense: bool, key: str, where: int) -> str:
    """One bit changes on one rank in the second step, after an evaluation."""
    model, handle = wrapped(shape, check_replicas_every=2, shard_dense=shard_dense)
    trained = model if shard_dense else DistributedDataParallel(model)
    optimizer = adamw(handle)
    train(trained, handle, optimizer, [0])
    backward(trained, handle, 1)
    optimizer.step()
    tensors: dict[str, Tensor] = dict((*model.named_parameters(), *model.named_buffers()))
    tensors |= {name.removeprefix("model."): tensor for name, tensor in handle.state_dict().items()}
    with torch.no_grad():
        model(global_batch(0)[0])
    if rank == where:
        tensor = tensors[key].detach()
        local = tensor.to_local() if isinstance(tensor, DTensor) else tensor
        local.view(-1).view({4: torch.int32, 8: torch.int64}[local.element_size()])[-1] ^= 1
    return refused(handle.step)


@pytest.mark.parametrize(
    "shape, shard_dense, key, where, said",
    [
        ((2,), True, "scale", 1, "'scale' differ between ranks 0 and 1"),
        ((2,), True, "table", 0, "'table' differ between ranks 0 and 1"),
        ((2,), False, "blocks.0.mix.bias", 1, "'blocks.0.mix.bias' differ between ranks 0 and 1"),
        ((2, 2), True, "head.weight", 3, "'head.weight' differ between ranks 1 and 3"),
        ((2, 2), True, "blocks.1.moe.experts.0.down", 2, "'blocks.[01].moe.*down' differ between ranks 0 and 2"),
        ((2, 2), False, "embed.weight", 2, "'embed.weight' differ between ranks 0 and 2"),
    ],
)
def test_a_bit_is_found_wherever_it_is(shape: tuple[int, ...], shard_dense: bool, key: str, where: int, said: str) -> None:
    """Buffers, dense weights whole and in shards of a replica, experts of a replica; in models that were wrapped."""
    messages = run_ranks(torch.Size(shape).numel(), planted, shape, shard_dense, key, where)
    assert re.search(f"by step 2: the values of {said} of the mesh", messages[0])
    assert "in all 1 tensors differ" in messages[0]
    assert all(text == messages[0] for text in messages)


def drifts(rank: int, how: str) -> str:
    """A first step that goes wrong in one of the usual ways, with the dense part whole on both ranks."""
    model, handle = wrapped((2,), shard_dense=False)
    trained = model if how == "nothing averages" else DistributedDataParallel(model)
    optimizer = adamw(handle) if how != "learning rate" else torch.optim.AdamW(handle.parameter_groups(), lr=0.01 + 0.01 * rank)
    backward(trained, handle, 0)
    if how == "clipped by own norm":
        # torch's own asks all ranks for the gradients of experts; this is what people write by hand.
        grads = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
        norm = sum(float(grad.square().sum()) for grad in grads) ** 0.5
        for grad in grads:
            grad.mul_(0.1 / norm)
    if how != "skipped" or rank == 0:
        optimizer.step()
    if how == "optimizer given":
        optimizer.state[model.head.weight]["step"] += rank
    return refused(lambda: handle.step(optimizer if how == "optimizer given" else None))


@pytest.mark.parametrize(
    "how, said",
    [
        ("clipped by own norm", "the values of 'embed.weight' differ between ranks 0 and 1"),
        ("nothing averages", "the values of 'embed.weight' differ between ranks 0 and 1"),
        ("learning rate", "settings for 'embed.weight' have lr = 0.01 on rank 0 and lr = 0.02 on rank 1"),
        ("skipped", "an optimizer stepped 'embed.weight' on rank 0 and none did on rank 1"),
        ("optimizer given", "the optimizer has counted 1.0 steps of 'head.weight' on rank 0 and 2.0 on rank 1"),
    ],
)
def test_a_drift_that_begins_in_the_first_step_is_found_after_it(how: str, said: str) -> None:
    messages = run_ranks(2, drifts, how)
    assert f"by step 1: {said} of the mesh" in messages[0].replace("the optimizer's settings", "settings")
    assert messages[1] == messages[0]


def parts_by_hand(rank: int, max_parts: int) -> list[str]:
    """A tensor for each way to place it on two dimensions, one of them changed on rank 3, where another rank holds the same."""
    grid, line = init_device_mesh("cpu", (2, 2), mesh_dim_names=("replicate", "shard")), init_device_mesh("cpu", (4,))
    places = {
        "sharded": (grid, [Replicate(), Shard(0)]),
        "across": (grid, [Shard(0), Replicate()]),
        "both": (grid, [Shard(0), Shard(1)]),
        "whole": (grid, [Replicate(), Replicate()]),
        "line": (line, [Shard(0)]),
        "inside": (grid["shard"], [Shard(1)]),
    }
    _, handle = wrapped((2, 2))
    messages = []
    for changed in ("", *places):
        tensors = {name: distribute_tensor(torch.arange(16.0).view(4, 4), *place) for name, place in places.items()}
        if changed and rank == 3:
            tensors[changed].to_local().view(torch.int32)[0] ^= 1
        with patch.object(drift, "_MAX_PARTS", max_parts):
            try:
                DriftGuard(handle._group, every=1).after_step(1, tensors.items(), [], None, CPU)
                messages.append("")
            except DriftError as error:
                messages.append(str(error))
    return messages


@pytest.mark.parametrize("max_parts", [drift._MAX_PARTS, 1])
def test_shards_are_compared_with_those_that_hold_the_same(max_parts: int) -> None:
    """Also where a rank has more kinds of parts than there are sums."""
    results = run_ranks(4, parts_by_hand, max_parts)
    assert all(messages == results[0] for messages in results)
    pairs = [re.search(r"'(\w+)' differ between ranks (\d) and (\d)", text) for text in results[0]]
    expected = [None, ("sharded", "1", "3"), ("across", "2", "3"), None, ("whole", "0", "3"), None, ("inside", "1", "3")]
    assert [pair and pair.groups() for pair in pairs] == expected


def test_configuration() -> None:
    assert RuntimeConfig(check_replicas_except=["a", "b.*"]) == RuntimeConfig(check_replicas_except=("a", "b.*"))
    with pytest.raises(ValueError, match=r"check_replicas_every is -1; it must be 0 \(never\) or"):
        RuntimeConfig(check_replicas_every=-1)
    with pytest.raises(ValueError, match=r"check_replicas_except is 'a'; give a list: \['a'\]"):
        RuntimeConfig(check_replicas_except="a")
