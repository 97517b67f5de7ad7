"""What ranks gather says what it is about: every difference is named on all ranks, and nobody gets another place's numbers."""

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh

from moesaic import MoELayer, RuntimeConfig, shard_experts
from moesaic.collectives import CollectiveError, LocalTransport
from moesaic.placement import Topology
from moesaic.runtime.agreement import HEADER_INTS, Agreement, Doing, PassId
from moesaic.runtime.group import RankGroup
from tests.helpers.ranks import run_ranks
from tests.helpers.threads import ThreadTransport, ThreadWorld, run_threads

LAYERS = {"blocks.0.moe": 3, "blocks.1.moe": 7}
AS_MANY = "Give every rank as many batches and micro-batches"
SAME_LAYERS = "Run the same layers on every rank: where layers are dropped at random, seed that alike on all ranks"


def in_layer(index: int, number: int = 0, step: int = 0, *, is_training: bool = True) -> Callable[[Agreement, RankGroup], object]:
    """Gather the counts of a layer's tokens."""
    name, num_experts = list(LAYERS.items())[index]

    def act(agreement: Agreement, group: RankGroup) -> object:
        counts_E = torch.full((num_experts,), group.rank)
        return agreement.gather_counts(counts_E, PassId(name, number, step, 0, is_training), flags=group.rank)

    return act


def in_forward(*, is_training: bool = True) -> Callable[[Agreement, RankGroup], object]:
    return lambda agreement, group: agreement.begin_forward(0, is_training=is_training)


def in_backward(forward: int) -> Callable[[Agreement, RankGroup], object]:
    return lambda agreement, group: agreement.begin_backward(0, forward)


def outside(doing: Doing, step: int = 0) -> Callable[[Agreement, RankGroup], object]:
    return lambda agreement, group: agreement.gather(group.tokens, torch.tensor([1]), doing, step)


def gather_without_header(agreement: Agreement, group: RankGroup) -> None:
    group.tokens.all_gather_ints(torch.arange(HEADER_INTS + max(LAYERS.values())))


def act_on_ranks(group: RankGroup, actions: list[Callable[[Agreement, RankGroup], object]]) -> Any:
    """The error of this rank's action, or what it returned."""
    try:
        return actions[group.rank](Agreement(group, LAYERS), group)
    except CollectiveError as error:
        return str(error)


@pytest.mark.parametrize(
    "first, other, told, cure",
    [
        (
            in_layer(0),
            in_layer(1),
            "ranks 0, 2: blocks.0.moe, step 0, pass 0, forward 0 of the model (training); "
            "rank 1: blocks.1.moe, step 0, pass 0, forward 0 of the model (training)",
            SAME_LAYERS,
        ),
        (in_layer(1), in_layer(1, 1), "rank 1: blocks.1.moe, step 0, pass 1, forward 0 of the model (training)", AS_MANY),
        (
            in_layer(1),
            in_layer(1, is_training=False),
            "rank 1: blocks.1.moe, step 0, pass 0, forward 0 of the model (evaluation)",
            "Call model.train() and model.eval() on all ranks alike",
        ),
        (
            in_layer(1),
            in_layer(1, step=1),
            "rank 1: blocks.1.moe, step 1, pass 0, forward 0 of the model (training)",
            "Call handle.step() on all ranks equally often",
        ),
        (in_layer(0), in_forward(), "rank 1: the beginning of forward 1 of the model, step 0 (training)", AS_MANY),
        (
            in_forward(),
            in_forward(is_training=False),
            "ranks 0, 2: the beginning of forward 1 of the model, step 0 (training); "
            "rank 1: the beginning of forward 1 of the model, step 0 (evaluation)",
            "Call model.train() and model.eval() on all ranks alike",
        ),
        (in_forward(), in_backward(3), "rank 1: the beginning of the backward of forward 3 of the model, step 0", AS_MANY),
        (in_backward(2), in_backward(3), "rank 1: the beginning of the backward of forward 3 of the model, step 0", AS_MANY),
        (in_forward(), outside(Doing.CLIP), "rank 1: clip_grad_norm_, step 0, after forward 0 of the model", AS_MANY),
        (
            outside(Doing.CLIP),
            outside(Doing.OWNERS, 4),
            "rank 1: handle.step() after step 4, where experts may change their owner",
            AS_MANY,
        ),
        (
            in_forward(),
            outside(Doing.DRIFT, 1),
            "rank 1: handle.step() after step 1, where ranks compare what they hold",
            AS_MANY,
        ),
        (in_layer(0), gather_without_header, "rank 1: no header of this version of moesaic (0)", AS_MANY),
    ],
    ids=[
        "layer",
        "pass",
        "mode of a layer",
        "step",
        "layer and forward",
        "mode of a forward",
        "forward and backward",
        "backward",
        "forward and clipping",
        "clipping and owners",
        "forward and drift",
        "no header",
    ],
)
def test_every_difference_is_named_on_all_ranks(
    first: Callable[..., object], other: Callable[..., object], told: str, cure: str
) -> None:
    """Of three ranks, rank 1 is elsewhere. All raise the same, also where the layers differ in their number of experts."""
    texts = run_threads(3, act_on_ranks, [first, other, first])
    if other is gather_without_header:
        assert texts.pop(1) is None  # and compares none
        texts.insert(1, texts[0].replace("rank 0", "rank 1", 1))
    for rank, text in enumerate(texts):
        assert text.startswith(f"rank {rank}: the ranks are at different places of the program: ")
        assert told in text
        assert cure in text
        assert text.partition(": ")[2] == texts[0].partition(": ")[2]


def test_counts_and_flags_of_all_ranks() -> None:
    for gathered in run_threads(3, act_on_ranks, [in_layer(1)] * 3):
        assert gathered.values_Rn.tolist() == gathered.host_Rn.tolist() == [[rank] * 7 for rank in range(3)]
        assert gathered.flags_R.tolist() == [0, 1, 2]


def test_more_values_than_the_largest_layer_has_experts() -> None:
    def body(group: RankGroup) -> list[list[int]]:
        values = 100 * group.rank + torch.arange(20)
        gathered = Agreement(group, LAYERS).gather(group.tokens, values, Doing.OWNERS, 0)
        assert gathered.values_Rn.tolist() == gathered.host_Rn.tolist()
        return gathered.host_Rn.tolist()

    assert run_threads(2, body) == [[list(range(20)), list(range(100, 120))]] * 2


def test_every_gather_has_the_same_size() -> None:
    """That of a header and the model's largest layer: 8 bytes each, once a layer, a forward, a backward and a clipping."""
    sizes: list[int] = []

    class Sizes(LocalTransport):
        def all_gather_ints(self, values: torch.Tensor, *, where: str = "") -> torch.Tensor:
            sizes.append(values.nbytes)
            return super().all_gather_ints(values, where=where)

    group = RankGroup(Sizes(), LocalTransport(), Topology.preset("cpu", 1))
    agreement = Agreement(group, LAYERS)
    for action in (in_layer(0), in_layer(1), in_forward(), in_backward(1), outside(Doing.CLIP)):
        action(agreement, group)
    assert sizes == [8 * (9 + 7)] * 5
    assert HEADER_INTS == 9


def test_replicas_are_named_by_their_rank_of_all() -> None:
    """Two groups of two ranks; the second rank of the second group computes the losses of another layer."""

    def body(group: RankGroup) -> str:
        worlds, number = body.worlds, group.rank  # type: ignore[attr-defined]
        replica, rank = divmod(number, 2)
        inside = ThreadTransport(worlds[replica], rank, "tokens")
        between = ThreadTransport(worlds[2 + rank], replica, "replicas")
        topology = Topology.preset("cpu", 2)
        mine = RankGroup(inside, ThreadTransport(worlds[replica], rank, "experts"), topology, between, topology)
        name, num_experts = list(LAYERS.items())[number == 3]
        counts = torch.zeros(2 * num_experts, dtype=torch.int64)
        try:
            Agreement(mine, LAYERS).gather_loads(counts, PassId(name, 0, 0, 0, True))
        except CollectiveError as error:
            return str(error)
        return ""

    body.worlds = [ThreadWorld(2) for _ in range(4)]  # type: ignore[attr-defined]
    first, second, third, fourth = run_threads(4, body)
    assert first == third == ""
    told = (
        "rank 1: the router's losses of blocks.0.moe, step 0, pass 0, forward 0 of the model (training); "
        "rank 3: the router's losses of blocks.1.moe, step 0, pass 0, forward 0 of the model (training). " + SAME_LAYERS
    )
    assert second == f"rank 1: the ranks are at different places of the program: {told}"
    assert fourth == f"rank 3: the ranks are at different places of the program: {told}"


def test_of_many_places_some_are_named() -> None:
    actions = [in_layer(1, number) for number in range(10)]
    for text in run_threads(10, act_on_ranks, actions):
        assert text.count(": blocks.1.moe") == 8
        assert "; 2 more places. " in text
    (text,) = {t.partition(": ")[2] for t in run_threads(11, act_on_ranks, [in_layer(0)] * 10 + [in_layer(1)])}
    assert "ranks 0, 1, 2, 3, 4, 5, 6, 7 and 2 more: blocks.0.moe" in text


def test_passes_are_numbered_from_0_in_every_step() -> None:
    agreement = Agreement(SimpleNamespace(), LAYERS)  # type: ignore[arg-type]
    assert [agreement.next_pass("blocks.0.moe", 0) for _ in range(3)] == [0, 1, 2]
    assert agreement.next_pass("blocks.1.moe", 0) == 0
    assert agreement.next_pass("blocks.0.moe", 1) == 0
    assert agreement.next_pass("blocks.1.moe", 1) == 0


def share_other_models(rank: int, num_layers: int, num_experts: int) -> str:
    """Rank 1 builds another model."""
    num_layers, num_experts = (num_layers, num_experts) if rank else (2, 4)
    model = torch.nn.Sequential(*(MoELayer(8, 8, num_experts, 1) for _ in range(num_layers)))
    with pytest.raises(ValueError, match="differs between ranks") as refused:
        shard_experts(model, mesh=init_device_mesh("cpu", (2,)), config=RuntimeConfig(timeout_s=30))
    assert not any(layer.experts.is_sharded for layer in model)
    assert dist.get_world_size() == 2
    return str(refused.value)


@pytest.mark.parametrize(
    "num_layers, num_experts, told",
    [
        (2, 6, "MoE layer 0 of 2 differs between ranks: 0 is "),
        (3, 4, "MoE layer 2 of 3 differs between ranks: missing on rank 0, 2 is "),
    ],
)
def test_other_models_are_refused_on_all_ranks(num_layers: int, num_experts: int, told: str) -> None:
    first, second = run_ranks(2, share_other_models, num_layers, num_experts)
    assert first == second
    assert first.startswith(told)
    assert first.endswith(" on rank 1; build the same model on every rank")
