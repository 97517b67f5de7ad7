"""Ranks that do different things at one moment, as real processes: every rank raises a named error within the time limit.

Each case is what two ranks do, one a batch behind, in another layer, in another phase. Nobody gets rows of another layer, and
nobody waits for ever, also where FSDP2 would.
"""

import os
import re
from collections.abc import Callable, Iterator, Sequence
from datetime import timedelta
from functools import partial
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.utils.checkpoint import checkpoint

from moesaic import Handle, MoELayer, RuntimeConfig, shard_experts
from moesaic.collectives import CollectiveError
from moesaic.runtime._compat import time_limit_s
from tests.helpers.configs import runtime_config
from tests.helpers.ranks import RankPool, run_ranks

DIM = 8
# Ample for a rank that comes; and how long the others wait, in cases where one does not.
TIMEOUT_S, SHORT_S = 50.0, 3.0

PLACES = r"^rank {rank}: the ranks are at different places of the program: "
# Of a gather, and of a message over shared memory.
SAME_GATHER = "; unless a rank has failed: give every rank as many batches"
ABSENT = (
    r"^rank {rank}: gather of \d+ integers at step 1, the beginning of {place}: rank {other} is absent after 3 s" + SAME_GATHER
)
SAME_ORDER = r"; the ranks are at different places of the program: every rank must run the same layers in the same order"
TORCH = (
    r"Timed out waiting 3000ms.*\nrank {rank} was in a collective of torch.distributed, step 1, forward 2 of the model; "
    r"the last stage of a MoE layer that it completed: materialize of step 1, blocks\.1\.moe, plan 0, pass 0$"
)


class Block(nn.Module):
    def __init__(self, num_experts: int):
        super().__init__()
        self.mix = nn.Linear(DIM, DIM)
        self.moe = MoELayer(DIM, DIM, num_experts, 2)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.moe(self.mix(x))


class Net(nn.Module):
    """Blocks in the order that the caller wants; or, as `branches`, each on the input alone, with an output of its own."""

    def __init__(self, experts: Sequence[int] = (4, 4)):
        super().__init__()
        self.inner = nn.Linear(DIM, DIM)
        self.blocks = nn.ModuleList(Block(num_experts) for num_experts in experts)
        self.head = nn.Linear(DIM, DIM)

    def forward(self, x: Tensor, order: Sequence[int] = (0, 1), branches: bool = False, fail_before: int = -1) -> Any:
        x = self.inner(x)
        if branches:
            return [self.blocks[index](x) for index in order]
        for index in order:
            if index == fail_before:
                raise KeyError("a mistake of the user's")
            x = self.blocks[index](x)
        return self.head(x)


def groups_of_fsdp2(model: nn.Module) -> list[dist.ProcessGroup]:
    """What it gathers over. The mesh of a DTensor does not say: torch gives equal meshes for each other."""
    states = [unit._get_fsdp_state() for unit in model.modules() if isinstance(unit, FSDPModule)]
    units = [unit for state in states for unit in getattr(state, "_fsdp_param_groups", None) or [state._fsdp_param_group]]
    return [unit.mesh_info.shard_process_group for unit in units if unit is not None]


class Loop:
    """A user's training loop on one rank."""

    def __init__(self, rank: int, transport: str, shard_dense: bool, experts: Sequence[int] = (4, 4), **options: Any):
        torch.manual_seed(1)
        self.rank, self.net = rank, Net(experts)
        given = {"check_replicas_every": 0, **options}  # of a dense part that is left alone nothing averages the gradients
        config = runtime_config(timeout_s=TIMEOUT_S, transport=transport, shard_dense=shard_dense, **given)
        self.handle: Handle = shard_experts(self.net, mesh=init_device_mesh("cpu", (2,)), config=config)
        self.optimizer = torch.optim.SGD(self.handle.parameter_groups(), lr=1e-2)
        self._generator = torch.Generator().manual_seed(rank)
        self.step()

    def wait_no_longer(self) -> None:
        """Shorten every limit, now that all that takes long at first has been done."""
        for group in groups_of_fsdp2(self.net):
            assert group is not dist.group.WORLD
            dist.distributed_c10d._set_pg_timeout(timedelta(seconds=SHORT_S), group)
        for transport in (self.handle._group.tokens, self.handle._group.experts):
            transport.timeout_s = SHORT_S  # type: ignore[attr-defined]

    def batch(self) -> Tensor:
        return torch.randn(6, DIM, generator=self._generator)

    def loss(self, **options: Any) -> Tensor:
        return self.net(self.batch(), **options).square().mean()

    def update(self) -> None:
        self.handle.clip_grad_norm_(1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.handle.step(self.optimizer)

    def step(self, **options: Any) -> None:
        self.loss(**options).backward()
        self.update()


def drop_layers_alone(loop: Loop) -> None:
    loop.step(order=(0, 1) if loop.rank == 0 else (1,))


def take_layers_in_another_order(loop: Loop) -> None:
    loop.step(order=(0, 1) if loop.rank == 0 else (1, 0))


def run_a_layer_once_more(loop: Loop) -> None:
    loop.step(order=(0, 1, 1) if loop.rank == 0 else (0, 1))


def evaluate_alone(loop: Loop) -> None:
    if loop.rank == 0:
        loop.net.eval()
        with torch.no_grad():
            loop.net(loop.batch())
    loop.step()


def forget_a_layer_in_evaluation_mode(loop: Loop) -> None:
    if loop.rank == 1:
        loop.net.blocks[1].eval()
    loop.step()


def have_a_batch_less(loop: Loop) -> None:
    for _ in range(2 - loop.rank):
        loop.step()
    if loop.rank == 1:
        loop.handle.clip_grad_norm_(1.0)  # of an epoch's end, say


def have_a_micro_batch_less(loop: Loop) -> None:
    for _ in range(3 - loop.rank):
        loop.loss().backward()
    loop.update()


def skip_backward(loop: Loop) -> None:
    loss = loop.loss()
    if loop.rank == 0:
        loss.backward()
    loop.update()
    loop.step()


def lose_the_way_to_the_layers(loop: Loop) -> None:
    """The loss of rank 1 does not come from what the model returned; its loop goes on."""
    x = loop.batch()
    y = loop.net(x)
    (y if loop.rank == 0 else loop.net.inner(x) * y.detach()).square().mean().backward()
    loop.step()


def lose_the_way_to_one_layer(loop: Loop) -> None:
    """All ranks return the same, but the first layer is no part of the loss of rank 1, which goes on."""
    first, second = loop.net(loop.batch(), branches=True)
    (first + second if loop.rank == 0 else first.detach() + second).square().mean().backward()
    loop.step()


def go_back_through_branches_in_another_order(loop: Loop) -> None:
    """Two backward passes through layers that do not depend on each other."""
    losses = [y.square().mean() for y in loop.net(loop.batch(), branches=True)]
    for loss in losses if loop.rank == 0 else reversed(losses):
        loss.backward(retain_graph=True)
    loop.update()


def go_back_through_micro_batches_in_another_order(loop: Loop) -> None:
    losses = [loop.loss() for _ in range(2)]
    for loss in losses if loop.rank == 0 else reversed(losses):
        loss.backward()
    loop.update()


def go_on_alone_after_an_exception(loop: Loop) -> None:
    """The loop of rank 1 catches what its forward raised between two layers, and takes the next batch."""
    try:
        loop.loss(fail_before=1 if loop.rank == 1 else -1).backward()
    except KeyError:
        loop.loss().backward()
    loop.update()


def forget_handle_step(loop: Loop) -> None:
    loop.loss().backward()
    if loop.rank == 0:
        loop.handle.step(loop.optimizer)
    loop.step()


# What the error of every rank says.
CASES: dict[Callable[[Loop], None], str] = {
    drop_layers_alone: r"rank 0: blocks\.0\.moe.*rank 1: blocks\.1\.moe.*seed that alike",
    take_layers_in_another_order: r"rank 0: blocks\.0\.moe.*rank 1: blocks\.1\.moe.*seed that alike",
    evaluate_alone: (
        r"rank 0: the beginning of forward 2 .*\(evaluation\).*rank 1: the beginning of forward 2 .*\(training\)"
        r".*Call model\.train\(\)"
    ),
    forget_a_layer_in_evaluation_mode: (
        r"rank 0: blocks\.1\.moe.*\(training\).*rank 1: blocks\.1\.moe.*\(evaluation\).*Call model\.train\(\)"
    ),
    have_a_batch_less: r"rank 0: the beginning of forward 3 .*rank 1: clip_grad_norm_, step 2, after forward 2 .*as many batches",
    have_a_micro_batch_less: r"rank 0: the beginning of forward 4 .*rank 1: clip_grad_norm_, step 1, after forward 3 .*as many ",
    skip_backward: r"rank 0: the beginning of the backward of forward 2 .*rank 1: clip_grad_norm_, step 1, after forward 2 ",
    lose_the_way_to_the_layers: r"rank 0: the beginning of the backward of forward 2 .*rank 1: the beginning of forward 3 ",
    go_back_through_micro_batches_in_another_order: r"rank 0: .*backward of forward 2 .*rank 1: .*backward of forward 3 ",
    forget_handle_step: r"rank 0: .*forward 3 .*step 2 .*rank 1: .*forward 3 .*step 1 .*Call handle\.step\(\) on all ranks",
}


class Ranks:
    """Two ranks for one case after another: each has a model and groups of its own, and ends on both ranks before the next."""

    def __init__(self) -> None:
        self._pool: RankPool | None = None

    def run(self, body: Callable[..., Any], *args: Any) -> list[Any]:
        """See `RankPool.run`."""
        self._pool = self._pool or RankPool(2)
        try:
            return self._pool.run(body, *args)
        except BaseException:
            # A rank may still wait for one that failed: the next case gets others.
            self.stop()
            raise

    def stop(self) -> None:
        if self._pool is not None:
            self._pool.stop()
        self._pool = None


@pytest.fixture(scope="module")
def ranks() -> Iterator[Ranks]:
    two_ranks = Ranks()
    yield two_ranks
    two_ranks.stop()


def fail_on_rank(
    rank: int, case: str, transport: str, shard_dense: bool, impatient: Sequence[int], options: dict[str, Any]
) -> str:
    """The error that ends a rank's part of a case, with its notes."""
    loop = Loop(rank, transport, shard_dense, **options)
    if impatient:
        dist.barrier()
    if rank in impatient:
        loop.wait_no_longer()
    with pytest.raises(RuntimeError) as failed:
        globals()[case](loop)
    return "\n".join([str(failed.value), *getattr(failed.value, "__notes__", ())])


def check(
    ranks: Ranks,
    case: Callable[[Loop], None],
    said: Sequence[str],
    *,
    transport: str,
    shard_dense: bool,
    impatient: Sequence[int] = (),
    **options: Any,
) -> None:
    """Assert that the errors of both ranks say this. Those that are impatient have a short time limit."""
    texts = ranks.run(fail_on_rank, case.__name__, transport, shard_dense, impatient, options)
    for rank, (text, expected) in enumerate(zip(texts, said, strict=True)):
        pattern = expected.replace("{rank}", str(rank)).replace("{other}", str(1 - rank))
        assert re.search(pattern, text, re.DOTALL), f"rank {rank}: {text}"


@pytest.mark.parametrize("shard_dense", [True, False], ids=["fsdp2", "left"])
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.__name__)
def test_every_rank_names_what_differs(ranks: Ranks, case: Callable[[Loop], None], shard_dense: bool) -> None:
    """At once, and the same on both."""
    check(ranks, case, [PLACES + CASES[case]] * 2, transport="shm", shard_dense=shard_dense)


@pytest.mark.parametrize("case", [drop_layers_alone, have_a_batch_less, skip_backward], ids=lambda case: case.__name__)
def test_over_gloo_too(ranks: Ranks, case: Callable[[Loop], None]) -> None:
    check(ranks, case, [PLACES + CASES[case]] * 2, transport="c10d", shard_dense=True)


@pytest.mark.parametrize("transport", ["shm", "c10d"])
def test_layers_of_different_sizes(ranks: Ranks, transport: str) -> None:
    """A rank counts the tokens of 3 experts, the other one of 7."""
    said = [PLACES + CASES[drop_layers_alone]] * 2
    check(ranks, drop_layers_alone, said, transport=transport, shard_dense=False, experts=(3, 7))


def test_copies_of_another_layer(ranks: Ranks) -> None:
    """Copies are on their way when ranks part."""
    said = [PLACES + CASES[drop_layers_alone]] * 2
    options = {"policy": "balance", "calibrate": "always"}
    check(ranks, drop_layers_alone, said, transport="shm", shard_dense=False, **options)


def test_backward_passes_through_branches_in_another_order(ranks: Ranks) -> None:
    """No gather is between them: what the messages say they are about differs."""
    said = [
        r"^rank {rank}: combine_backward at step 1, blocks\.{rank}\.moe, plan 0, pass 0: "
        r"rank {other} sent combine_backward at step 1, blocks\.{other}\.moe, plan 0, pass 0" + SAME_ORDER
    ] * 2
    check(ranks, go_back_through_branches_in_another_order, said, transport="shm", shard_dense=False)


def test_backward_passes_through_branches_in_another_order_over_gloo(ranks: Ranks) -> None:
    """There each waits for what never comes, and says so. Gloo has the other fail with the one whose limit is over first."""
    said = [
        r"^rank {rank}: combine_backward at step 1, blocks\.{rank}\.moe, plan 0, pass 0 " + ending + " "
        r"\(received 0 of \d+ B, \d+ B from rank {other} are missing, \d+ B to rank {other} were not taken\)"
        for ending in ("did not complete within 3 s", "failed")
    ]
    check(ranks, go_back_through_branches_in_another_order, said, transport="c10d", shard_dense=False, impatient=[0])


def test_backward_passes_through_branches_in_another_order_between_gathers_of_fsdp2(ranks: Ranks) -> None:
    """Rank 1 fetches the weights of the branch that it would go through next, which rank 0 will not."""
    said = [ABSENT.replace("{place}", "the backward of forward 2"), "Timed out waiting 3000ms"]
    check(ranks, go_back_through_branches_in_another_order, said, transport="shm", shard_dense=True, impatient=[0, 1])


def test_a_loss_that_reaches_some_layers_only(ranks: Ranks) -> None:
    """The layer's backward waits for the rank, which is at the next gather by then."""
    said = [
        r"^rank 0: combine_backward at step 1, blocks\.0\.moe, .* did not complete within 3 s .* B from rank 1 are missing",
        ABSENT.replace("{place}", r"forward 3 \(training\)"),
    ]
    check(ranks, lose_the_way_to_one_layer, said, transport="shm", shard_dense=False, impatient=[0, 1])


def test_a_rank_goes_on_alone_after_an_exception(ranks: Ranks) -> None:
    places = r"rank 0: blocks\.1\.moe, step 1, pass 0, forward 2 .*rank 1: the beginning of forward 3 .*no rank go on alone after"
    check(ranks, go_on_alone_after_an_exception, [PLACES + places] * 2, transport="shm", shard_dense=False)


def test_while_fsdp2_waits_in_the_middle_of_a_forward(ranks: Ranks) -> None:
    """Rank 0 is in a block's all-gather: its limit is that of the runtime, and its error gets a note of where that was."""
    said = [TORCH, ABSENT.replace("{place}", r"forward 3 \(training\)")]
    check(ranks, go_on_alone_after_an_exception, said, transport="shm", shard_dense=True, impatient=[0, 1])


def test_a_layer_runs_once_more_on_one_rank(ranks: Ranks) -> None:
    places = r"rank 0: blocks\.1\.moe, step 1, pass 1.*rank 1: the beginning of the backward of forward 2 "
    check(ranks, run_a_layer_once_more, [PLACES + places] * 2, transport="shm", shard_dense=False)


@pytest.mark.parametrize("transport", ["shm", "c10d"])
def test_a_rank_checks_replicas_while_the_other_goes_on(ranks: Ranks, transport: str) -> None:
    places = (
        r"rank 0: handle\.step\(\) after step 2, where ranks compare what they hold; "
        r"rank 1: the beginning of forward 3 of the model, step 1 .*call handle\.step\(\) on all ranks equally often"
    )
    check(ranks, forget_handle_step, [PLACES + places] * 2, transport=transport, shard_dense=True, check_replicas_every=2)


def have_a_batch_less_and_wait(rank: int, transport: str, shard_dense: bool) -> str:
    """Rank 1 waits in the user's own barrier, as long as the user's group lets it."""
    loop, text = Loop(rank, transport, shard_dense), ""
    loop.wait_no_longer()
    if rank == 0:
        with pytest.raises(CollectiveError) as failed:
            loop.step()
        text = str(failed.value)
    dist.barrier()
    return text


@pytest.mark.parametrize("transport, shard_dense", [("shm", True), ("c10d", False)], ids=["shm-fsdp2", "gloo-left"])
def test_a_rank_that_does_not_come_is_named(ranks: Ranks, transport: str, shard_dense: bool) -> None:
    text, nothing = ranks.run(have_a_batch_less_and_wait, transport, shard_dense)
    missing = {
        "shm": "rank 1 is absent after 3 s",
        "c10d": r"did not complete within 3 s \(received 0 of 104 B, 104 B from rank 1 are missing, 104 B to rank 1 were not ",
    }
    assert nothing == ""
    assert re.search(r"^rank 0: gather of 13 integers at step 1, the beginning of forward 2 \(training\)", text)
    assert re.search(missing[transport], text)
    assert "give every rank as many batches" in text


def end_in_the_middle(rank: int) -> str:
    """Rank 1 ends between two blocks, while rank 0 gathers the second one's dense weights."""
    loop = Loop(rank, "shm", True)
    if rank == 1:
        loop.net.blocks[0].register_forward_hook(lambda *_: os._exit(0))
    with pytest.raises(RuntimeError) as failed:
        loop.loss()
    return "\n".join([str(failed.value), *failed.value.__notes__])


def test_fsdp2s_own_error_says_where_it_was() -> None:
    pool = RankPool(2, may_end=True)
    try:
        text, _ = pool.run(end_in_the_middle)
    finally:
        pool.stop()
    assert re.search(
        r"\nrank 0 was in a collective of torch\.distributed, step 1, forward 2 of the model; "
        r"the last stage of a MoE layer that it completed: materialize of step 1, blocks\.1\.moe, plan 0, pass 0$",
        text,
    ), text


def batches_of_replicas(rank: int) -> str:
    """Two groups of one rank each, of which the second has one batch less."""
    torch.manual_seed(1)
    net, mesh = Net(), init_device_mesh("cpu", (2, 1), mesh_dim_names=("replicate", "shard"))
    handle = shard_experts(net, mesh=mesh, config=RuntimeConfig(timeout_s=TIMEOUT_S))
    net(torch.randn(6, DIM)).square().mean().backward()
    handle.step()
    with pytest.raises(CollectiveError) as failed:
        handle.clip_grad_norm_(1.0) if rank else net(torch.randn(6, DIM))
    return str(failed.value)


def test_a_batch_less_in_another_group_of_replicas(ranks: Ranks) -> None:
    texts = ranks.run(batches_of_replicas)
    for rank, text in enumerate(texts):
        places = r"rank 0: the router's losses of blocks\.0\.moe, step 1, .*rank 1: clip_grad_norm_, step 1"
        assert re.search(PLACES.replace("{rank}", str(rank)) + places, text), text


def limits(rank: int, user_s: float) -> tuple[set[float], float, bool]:
    """Of the groups that the dense part is gathered over, and of the user's; and whether these are one."""
    users = dist.new_group([0, 1], timeout=timedelta(seconds=user_s))
    net = Net()
    shard_experts(net, mesh=DeviceMesh.from_group(users, "cpu"), config=RuntimeConfig(timeout_s=20.0))
    used = groups_of_fsdp2(net)
    assert len(used) == 3  # the blocks and the rest
    return {time_limit_s(group, "cpu") for group in used}, time_limit_s(users, "cpu"), all(group is users for group in used)


def test_fsdp2_waits_no_longer_than_the_runtime_and_the_users_group_as_long_as_ever(ranks: Ranks) -> None:
    """On groups of its own where the user's wait longer; on the user's where they do not."""
    assert ranks.run(limits, 50.0) == [({20.0}, 50.0, False)] * 2
    assert ranks.run(limits, 10.0) == [({10.0}, 10.0, True)] * 2


def shard_the_dense_part_later(rank: int) -> tuple[list[str], list[str]]:
    """What comes first in the first forward after a `fully_shard` by the user, and in the second."""
    torch.manual_seed(1)
    net, mesh, seen = Net(), init_device_mesh("cpu", (2,)), []
    handle = shard_experts(net, mesh=mesh, config=RuntimeConfig(shard_dense=False, timeout_s=TIMEOUT_S))
    fully_shard(net, mesh=mesh, ignored_params=set(handle.expert_parameters()))
    agreement, gather = handle.layers["blocks.0.moe"].runtime.agreement, dist.all_gather_into_tensor
    all_gather_comm = torch.distributed.fsdp._fully_shard._fsdp_collectives.foreach_all_gather
    del gather
    rounds = []
    for _ in range(2):
        seen = []

        def note(name: str, call: Callable[..., Any]) -> Callable[..., Any]:
            def noted(*args: Any, **kwargs: Any) -> Any:
                seen.append(name)  # noqa: B023 (called in this round)
                return call(*args, **kwargs)

            return noted

        with (
            mock.patch.object(agreement, "begin_forward", note("meet", agreement.begin_forward)),
            mock.patch(
                "torch.distributed.fsdp._fully_shard._fsdp_param_group.foreach_all_gather", note("fsdp2", all_gather_comm)
            ),
        ):
            net(torch.randn(6, DIM)).square().mean().backward()
        rounds.append(seen[:2])
    return rounds[0], rounds[1]


def test_ranks_meet_before_fsdp2_also_where_the_user_shards_later() -> None:
    assert run_ranks(2, shard_the_dense_part_later) == [(["fsdp2", "meet"], ["meet", "fsdp2"])] * 2


def count_gathers(rank: int, way: str) -> list[str]:
    """What ranks gather for, in a forward and its backward."""
    torch.manual_seed(1)
    net = Net()
    handle = shard_experts(net, mesh=init_device_mesh("cpu", (2,)), config=RuntimeConfig(timeout_s=TIMEOUT_S))
    places: list[str] = []
    tokens = handle._group.tokens
    gather = tokens.all_gather_ints

    def noted(values: Tensor, *, where: str = "") -> Tensor:
        places.append(where)
        assert values.nbytes == 8 * (9 + 4)
        return gather(values, where=where)

    x = torch.randn(6, DIM)
    with mock.patch.object(tokens, "all_gather_ints", noted):
        if way == "checkpoint":
            checkpoint(net, x, use_reentrant=False).square().mean().backward()
        elif way == "inner":
            net.blocks[1](net.blocks[0](x)).square().mean().backward()
        elif way == "twice":
            loss = net(x).square().mean()
            loss.backward(retain_graph=True)
            loss.backward()
        elif way == "outputs":
            sum(y.square().mean() for y in net(x, branches=True)).backward()
        else:
            with torch.no_grad():
                net(x)
    return places


LAYER_GATHERS = [f"step 0, blocks.{i}.moe, plan 0, pass 0" for i in range(2)]
FORWARD_GATHERS = ["step 0, the beginning of forward 1 (training)", *LAYER_GATHERS]
BACKWARD_GATHER = "step 0, the beginning of the backward of forward 1"


@pytest.mark.parametrize(
    "way, gathers",
    [
        ("no_grad", FORWARD_GATHERS),
        ("checkpoint", [*FORWARD_GATHERS, BACKWARD_GATHER]),
        ("outputs", [*FORWARD_GATHERS, BACKWARD_GATHER]),
        ("twice", [*FORWARD_GATHERS, BACKWARD_GATHER, BACKWARD_GATHER]),
    ],
)
def test_one_small_gather_a_forward_a_layer_and_a_backward(way: str, gathers: list[str]) -> None:
    """Also under a checkpoint of the whole model, whose recomputation is none, and with several outputs."""
    assert run_ranks(2, count_gathers, way) == [gathers] * 2


def test_without_the_models_own_forward_layers_meet_alone() -> None:
    assert run_ranks(2, count_layers_alone) == [LAYER_GATHERS] * 2


def count_layers_alone(rank: int) -> list[str]:
    """Blocks that are called one by one, with the dense part left to the user."""
    with mock.patch(f"{__name__}.RuntimeConfig", partial(RuntimeConfig, shard_dense=False)):
        return count_gathers(rank, "inner")


class ReturnsItsParameter(nn.Module):
    """As models that are trained to compare images and texts return their scale."""

    def __init__(self) -> None:
        super().__init__()
        self.moe = MoELayer(DIM, 6, 4, 2)
        self.scale = nn.Parameter(torch.ones(()))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return self.moe(x), self.scale


def return_parameter(rank: int) -> int:
    """Hooks on a parameter that the model returns, after three forwards."""
    model = ReturnsItsParameter()
    shard_experts(model, mesh=init_device_mesh("cpu", (2,)), config=RuntimeConfig(shard_dense=False))
    for _ in range(3):
        y, scale = model(torch.randn(6, DIM))
        (y.square().mean() * scale).backward()
    return len(model.scale._backward_hooks or ())


def test_a_parameter_that_a_model_returns_gets_no_hooks() -> None:
    assert run_ranks(2, return_parameter) == [0, 0]
