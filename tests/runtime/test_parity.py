"""Invariant 1: on any ranks, with any copies, the layers compute what the dense reference computes on one process."""

from collections.abc import Iterable
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from moesaic import DebugConfig, MoELayer
from moesaic.collectives import SCHEDULES
from moesaic.runtime.experts.memory import BankSize, SlotPlan
from moesaic.runtime.group import RankGroup
from moesaic.runtime.wrap.prefetch import prefetch_in_order
from tests.helpers.cases import PLACEMENTS, Case, cases, share_experts
from tests.helpers.compare import assert_all_close, assert_bitwise
from tests.helpers.configs import runtime_config
from tests.helpers.reference import DenseMoE
from tests.helpers.threads import run_threads

NUM_BATCHES = 3


def reference(case: Case, rounds: bool = False, dtype: torch.dtype = torch.float64) -> dict[str, Tensor]:
    """Outputs, input gradients, and gradients of the mean of the ranks' losses, after all micro-batches."""
    layers = [DenseMoE(layer, rounds).to(dtype) for layer in case.layers()]
    results: dict[str, Tensor] = {}
    for batch in range(NUM_BATCHES):
        for rank in range(case.world_size):
            x = case.tokens(rank, batch).to(dtype).requires_grad_()
            y = x
            for layer in layers:
                y = y + layer(y)
            (rank_loss(y) / case.world_size).backward()
            results[f"y {rank} {batch}"] = y.detach()
            assert x.grad is not None
            results[f"dx {rank} {batch}"] = x.grad * case.world_size
    return results | reference_gradients(layers)


def reference_gradients(layers: list[DenseMoE]) -> dict[str, Tensor]:
    named = {f"d {i}.{name}": parameter for i, layer in enumerate(layers) for name, parameter in layer.named_parameters()}
    return {name: torch.zeros_like(p) if p.grad is None else p.grad for name, p in named.items()}


def gradients(layers: Iterable[MoELayer]) -> dict[str, Tensor]:
    """The same names of sharded layers: what this rank has, the experts that it owns and all the rest."""
    results: dict[str, Tensor] = {}
    for i, layer in enumerate(layers):
        runtime = layer.runtime
        for name, parameter in layer.named_parameters():
            if name.startswith(("router.", "shared.")):
                name = name.replace("router.weight", "router")
                results[f"d {i}.{name}"] = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
        for e in runtime.owned_experts if any(p.grad is not None for p in layer.experts.parameters()) else ():
            grads = runtime.bank.grads(i, e)
            results[f"d {i}.gate_up.{e}"] = grads.gate_up.clone()
            results[f"d {i}.down.{e}"] = grads.down.clone()
            if "down_bias" in grads:
                results[f"d {i}.biases.{e}"] = torch.cat([grads["gate_up_bias"], grads["down_bias"]])
    return results


def rank_loss(y: Tensor) -> Tensor:
    """A loss that weighs every element of the output differently."""
    return (y * torch.linspace(-1, 1, y.numel(), dtype=y.dtype).view_as(y)).sum() + 0.1 * y.square().sum()


class Stack(nn.Module):
    """Residual MoE layers."""

    def __init__(self, layers: list[MoELayer]):
        super().__init__()
        self.layers = nn.ModuleList(layers)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = x + layer(x)
        return x


def train_on_ranks(
    group: RankGroup, case: Case, order: str, use_checkpoint: bool, options: dict[str, Any], is_frozen: bool = False
) -> dict[str, Tensor]:
    """The same on one rank of a group. `order` says when backwards run: after each forward, or after all, newest last.

    With frozen experts the bytes that were reduced stand in place of the experts' gradients.
    """
    model = Stack(case.layers()).train()
    layers = dict(enumerate(model.layers))
    share_experts(
        {str(i): layer for i, layer in layers.items()},
        group,
        config=runtime_config(slots=case.slots, **options),
        solver=case.solver(),
        owners=case.owners(),
    )
    prefetch_in_order(model, model.layers)
    for layer in layers.values():
        layer.experts.requires_grad_(not is_frozen)
    results: dict[str, Tensor] = {}

    def backward(batch: int, x: Tensor, y: Tensor) -> None:
        rank_loss(y).backward()
        results[f"y {group.rank} {batch}"] = y.detach()
        assert x.grad is not None
        results[f"dx {group.rank} {batch}"] = x.grad

    waiting = []
    for batch in range(NUM_BATCHES):
        x = case.tokens(group.rank, batch).requires_grad_()
        y = checkpoint(model, x, use_reentrant=False) if use_checkpoint else model(x)
        waiting.append((batch, x, y))
        if order == "each":
            backward(*waiting.pop())
    for item in waiting:
        backward(*item)
    results |= gradients(layers.values())
    if is_frozen:
        assert all(parameter.grad is None for parameter in layers[0].runtime.bank.parameters())
        results[f"reduce {group.rank}"] = torch.tensor(group.experts.traffic.total_bytes().get("reduce", 0))
    # Invariant 6: what one forward in flight may borrow, times the forwards in flight.
    num_in_flight = 1 if order == "each" else NUM_BATCHES
    pool = layers[0].runtime.pool
    assert pool.peak_bytes <= pool.predicted_bytes * num_in_flight
    assert len(pool._free) == len(pool._alive), "slots that never came back"
    return results


def merged(case: Case, per_rank: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    """All ranks' results under one roof: dense gradients averaged, as data parallelism does; everything else exists once."""
    results: dict[str, Tensor] = {}
    for name in {name for rank in per_rank for name in rank}:
        found = [rank[name] for rank in per_rank if name in rank]
        if name.endswith(".router") or ".shared." in name:
            results[name] = torch.stack(found).mean(0)
        else:
            assert len(found) == 1, f"{name} on {len(found)} ranks"
            results[name] = found[0]
    return results


def train(case: Case, order: str = "each", use_checkpoint: bool = False, num_nodes: int = 0, **options: Any) -> dict[str, Any]:
    """On `num_nodes` nodes, or as many as divide the ranks, up to two. `options` are RuntimeConfig's."""
    num_nodes = num_nodes or (2 if case.world_size % 2 == 0 else 1)
    topology = replace(case.topology(), num_nodes=num_nodes, ranks_per_node=case.world_size // num_nodes)
    return merged(case, run_threads(case.world_size, train_on_ranks, case, order, use_checkpoint, options, topology=topology))


def check(case: Case, order: str = "each", use_checkpoint: bool = False, **options: Any) -> dict[str, Any]:
    results, expected = train(case, order, use_checkpoint, **options), reference(case)
    if not all_close(results, expected):
        # Terms may cancel so far that the reference misses the tolerance as well when it computes in fp32: one seed in thousands.
        assume(all_close(reference(case, dtype=torch.float32), expected, rtol=5e-6))
    assert_all_close(results, expected)
    return results


def all_close(actual: dict[str, Tensor], expected: dict[str, Tensor], rtol: float = 1e-5) -> bool:
    try:
        assert_all_close(actual, expected, rtol)
    except AssertionError:
        return False
    return True


@settings(max_examples=80, deadline=None)
@given(case=cases(), materialize=st.sampled_from(("keep", "rematerialize")))
def test_any_case_equals_the_reference(case: Case, materialize: str) -> None:
    """Outputs, input gradients and all parameter gradients, over three accumulated micro-batches."""
    check(case, materialize=materialize)


@settings(max_examples=25, deadline=None)
@given(case=cases())
def test_interleaved_micro_batches_keep_their_plans(case: Case) -> None:
    """All forwards before all backwards: each backward follows its own forward's plan."""
    check(case, order="interleaved")


@settings(max_examples=25, deadline=None)
@given(case=cases())
def test_activation_checkpointing_repeats_the_routing(case: Case) -> None:
    """Recomputed forwards change no gradient, bit for bit, though the load predictor has moved on meanwhile."""
    plain = check(case, order="interleaved")
    assert_bitwise(train(case, order="interleaved", use_checkpoint=True), plain)


@settings(max_examples=20, deadline=None)
@given(case=cases())
def test_two_runs_are_bitwise_equal(case: Case) -> None:
    assert_bitwise(train(case), train(case))


@settings(max_examples=8, deadline=None)
@given(case=cases(), order=st.sampled_from(("each", "interleaved")), use_checkpoint=st.booleans())
def test_materialization_modes_are_bitwise_equal(case: Case, order: str, use_checkpoint: bool) -> None:
    """Copies that are kept, or gathered again for all layers but the last, or for as many as a budget says: the same weights."""
    case = replace(case, num_layers=3)
    expected = train(case, order, use_checkpoint)
    assert_bitwise(train(case, order, use_checkpoint, materialize="rematerialize"), expected)
    expert_bytes = 3 * case.dim * case.ffn_dim * 4
    budget = SlotPlan(case.slots, 2, 3).peak_bytes([BankSize(expert_bytes, expert_bytes, case.world_size, (0, 1, 2))])
    assert_bitwise(train(case, order, use_checkpoint, materialize="auto", slot_bytes=max(budget, 1)), expected)


@settings(max_examples=4, deadline=None)
@given(case=cases(), order=st.sampled_from(("each", "interleaved")), use_checkpoint=st.booleans())
def test_frozen_experts_that_are_gathered_again(case: Case, order: str, use_checkpoint: bool) -> None:
    """Outputs and all other gradients are those of experts that learn; copies travel, their gradients do not."""
    case = replace(case, num_layers=3, placement="random")
    options = {"materialize": "rematerialize"}
    expected = train(case, order, use_checkpoint, num_nodes=1, **options)
    found = merged(
        case, run_threads(case.world_size, train_on_ranks, case, order, use_checkpoint, options, True, topology=case.topology())
    )
    assert sum(int(found.pop(f"reduce {rank}")) for rank in range(case.world_size)) == 0
    assert_bitwise(found, {name: expected[name] for name in found})
    assert found.keys() == {name for name in expected if ".gate_up." not in name and ".down." not in name}


@settings(max_examples=25, deadline=None)
@given(case=cases(max_world_size=6), schedule=st.sampled_from(SCHEDULES))
def test_every_schedule_equals_the_reference(case: Case, schedule: str) -> None:
    """However copies and gradients travel, with gradients of earlier micro-batches in the totals."""
    check(replace(case, placement="random"), schedule=schedule)


@settings(max_examples=15, deadline=None)
@given(case=cases())
def test_relays_train_to_the_same_bits_as_direct_messages(case: Case) -> None:
    """Chains in rank order add up as the owner would."""
    case = replace(case, placement="everywhere")
    assert_bitwise(train(case, schedule="relay"), train(case, schedule="direct"))


@settings(max_examples=15, deadline=None)
@given(case=cases())
def test_gradients_that_travel_in_bf16(case: Case) -> None:
    """Outputs do not change, expert gradients by the rounding of the copies' part: 2 ** -8 of it."""
    case = replace(case, placement="everywhere")
    rounded, expected = train(case, reduce_wire="bf16"), train(case)
    grads = {name for name in expected if ".gate_up." in name or ".down." in name}
    assert_bitwise({n: rounded[n] for n in rounded.keys() - grads}, {n: expected[n] for n in expected.keys() - grads})
    assert_all_close({n: rounded[n] for n in grads}, {n: expected[n] for n in grads}, rtol=0.05)


@settings(max_examples=25, deadline=None)
@given(case=cases(min_world_size=2), use_checkpoint=st.booleans())
def test_calibration_changes_no_result(case: Case, use_checkpoint: bool) -> None:
    """Copies that the exact load adds, gathered late, reduced with the others, and used again by a recomputation."""
    case = replace(case, hot_expert=True)
    check(case, order="interleaved", use_checkpoint=use_checkpoint, calibrate="always")


@settings(max_examples=15, deadline=None)
@given(
    case=cases(min_world_size=3, max_world_size=6),
    schedule=st.sampled_from(SCHEDULES),
    calibrate=st.sampled_from(("always", "auto")),
    materialize=st.sampled_from(("keep", "rematerialize")),
    order=st.sampled_from(("each", "interleaved")),
    use_checkpoint=st.booleans(),
    overlap=st.booleans(),
)
def test_options_together(case: Case, schedule: str, order: str, use_checkpoint: bool, **options: Any) -> None:
    """Relays pass copies on while ranks calibrate, prefetch, gather again and recompute: nobody waits for ever."""
    case = replace(case, placement="random", hot_expert=True, num_layers=2)
    check(case, order, use_checkpoint, schedule=schedule, **options)


def calibrated_traffic(group: RankGroup, case: Case, calibrate: str) -> dict[str, int]:
    """Bytes that one training step of one layer sends between all ranks, by operation, and the copies it made."""
    (layer,) = case.layers()
    config = runtime_config(slots=case.slots, calibrate=calibrate)
    share_experts({"0": layer}, group, config=config, solver=case.solver())
    layer(case.tokens(group.rank)).sum().backward()
    counters = layer.runtime.counters
    return group.experts.traffic.total_bytes() | {"copies": counters.num_copies, "added": counters.num_added}


@pytest.mark.parametrize("calibrate", ["auto", "never"])
def test_the_first_forward_is_calibrated(calibrate: str) -> None:
    """Nothing is predicted yet, so no copy is gathered early: calibration makes them all, and only they travel, once each way."""
    case = Case(
        world_size=4,
        num_experts=8,
        top_k=2,
        num_layers=1,
        tokens_R=(40, 40, 40, 40),
        placement="quota",
        hot_expert=True,
        any_owner=False,
        normalize=True,
        seed=3,
    )
    found = run_threads(4, calibrated_traffic, case, calibrate, topology=case.topology())
    total = {key: sum(rank.get(key, 0) for rank in found) for key in ("gather", "calibrate", "reduce")}
    copies = found[0]["added"]
    assert (copies > 0) == (calibrate == "auto")
    assert all(rank["copies"] == rank["added"] == copies for rank in found)
    moved = copies * 3 * case.dim * case.ffn_dim * 4
    assert total == {"gather": 0, "calibrate": moved, "reduce": moved}


def test_bf16_on_the_wire_does_not_go_through_relays() -> None:
    with pytest.raises(ValueError, match=r"runtime.debug.schedule 'relay' forwards sums.*set runtime.debug.reduce_wire='as_is'"):
        DebugConfig(schedule="relay", reduce_wire="bf16")


NAMED = {
    "five experts on three ranks": dict(world_size=3, num_experts=5, top_k=2, tokens_R=(5, 4, 6)),
    "fewer experts than ranks": dict(world_size=4, num_experts=2, top_k=1, tokens_R=(3, 3, 3, 3)),
    "a rank without tokens": dict(world_size=3, num_experts=4, top_k=2, tokens_R=(7, 0, 5)),
    "no tokens anywhere": dict(world_size=2, num_experts=4, top_k=2, tokens_R=(0, 0)),
    "all tokens to one expert": dict(world_size=4, num_experts=6, top_k=1, tokens_R=(6, 6, 6, 6), hot_expert=True),
    "every expert for every token": dict(world_size=2, num_experts=3, top_k=3, tokens_R=(4, 5)),
    "one expert": dict(world_size=2, num_experts=1, top_k=1, tokens_R=(4, 5)),
    "one token": dict(world_size=4, num_experts=4, top_k=2, tokens_R=(0, 1, 0, 0)),
}


@pytest.mark.parametrize("placement", PLACEMENTS)
@pytest.mark.parametrize("name", NAMED)
def test_named_edge_cases(name: str, placement: str) -> None:
    given = dict(num_layers=2, hot_expert=False, any_owner=False, normalize=True, seed=3) | NAMED[name]
    check(Case(placement=placement, **given))  # type: ignore[arg-type]


def test_sixteen_ranks() -> None:
    """More ranks than any test machine has cores, with copies drawn anew for every forward."""
    check(
        Case(
            world_size=16,
            num_experts=24,
            top_k=4,
            num_layers=2,
            tokens_R=tuple(range(16)),
            placement="random",
            hot_expert=True,
            any_owner=True,
            normalize=True,
            seed=5,
        )
    )
