"""Migration: the moves, that no loss changes (invariant 8), that moves must pay (invariant 11), and what is refused."""

import functools
import re
import subprocess
import sys
from collections import Counter
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh

from moesaic import Handle, MigrationConfig, MoELayer, RuntimeConfig, shard_experts
from moesaic.collectives import LocalTransport
from moesaic.placement import ExpertLoad, LayerShape, OwnerMap, Problem, Topology
from moesaic.placement.cost import prices_of
from moesaic.placement.online.propose import Proposal, Question, _smallest_question, propose, saved_s
from moesaic.runtime.experts.bank import Bank
from moesaic.runtime.experts.expert import ExpertShape
from moesaic.runtime.experts.migrate import bytes_to_migrate, expert_states, migrate, rounds_of
from moesaic.runtime.group import RankGroup
from moesaic.runtime.stages import StageClock
from moesaic.runtime.wrap import migration_policy
from tests.helpers.cases import share_experts
from tests.helpers.configs import runtime_config
from tests.helpers.model import cross_entropy, global_batch, make_model, rank_slice
from tests.helpers.ranks import run_ranks
from tests.helpers.threads import run_threads
from tests.runtime.test_shard import SOLVERS


def for_experts(kind: type[torch.optim.Optimizer], groups: Any) -> torch.optim.Optimizer:
    """An optimizer of torch's for the experts alone, as it takes no vectors or no DTensors; dense parameters get plain SGD."""
    dense, experts = groups
    optimizer = kind(experts["params"], lr=0.01)  # type: ignore[call-arg]

    @torch.no_grad()
    def step_dense(*_: Any) -> None:
        for parameter in dense["params"]:
            parameter.add_(parameter.grad, alpha=-0.01)
            parameter.grad = None

    optimizer.register_step_post_hook(step_dense)
    return optimizer


OPTIMIZERS = {
    "adamw": lambda groups: torch.optim.AdamW(groups, lr=0.01, foreach=False),
    "adamw_foreach": lambda groups: torch.optim.AdamW(groups, lr=0.01, foreach=True),
    "adamw_fused": lambda groups: torch.optim.AdamW(groups, lr=0.01, fused=True),
    "sgd_momentum": lambda groups: torch.optim.SGD(groups, lr=0.05, momentum=0.9),
    "muon": lambda groups: for_experts(torch.optim.Muon, groups),  # orthogonalizes whole matrices
    "adafactor": lambda groups: for_experts(torch.optim.Adafactor, groups),  # factored, and norms of whole matrices
}


# Rows of 64 bytes or a multiple: a BLAS may add in another order where an expert's rows begin at another alignment.
FFN_DIM = 32


def shuffled(current: OwnerMap, seed: int) -> OwnerMap:
    """The same number of experts for every rank, in a random order."""
    owners = np.random.default_rng(seed).permutation(current.expert_to_owner_LE.ravel())
    return OwnerMap(owners.reshape(current.expert_to_owner_LE.shape), current.num_ranks)


@settings(deadline=None)
@given(
    layers=st.integers(1, 3),
    experts=st.integers(1, 12),
    ranks=st.integers(1, 6),
    seed=st.integers(0, 10**6),
    rows_in_flight=st.integers(1, 4),
)
def test_rounds_move_everything_and_stay_small(layers: int, experts: int, ranks: int, seed: int, rows_in_flight: int) -> None:
    current = OwnerMap.contiguous(layers, experts, ranks)
    wanted = shuffled(current, seed)
    rounds = rounds_of(current, wanted, rows_in_flight=rows_in_flight)
    moves = [move for round_ in rounds for move in round_.moves]
    assert sorted(moves, key=lambda m: (m.layer, m.expert)) == current.moves_to(wanted)
    for round_ in rounds:
        gives, takes = Counter(m.src for m in round_.moves), Counter(m.dst for m in round_.moves)
        assert gives == takes
        assert max(gives.values()) <= rows_in_flight
    assert rounds == rounds_of(current, wanted, rows_in_flight=rows_in_flight)


def test_a_rank_keeps_its_number_of_experts() -> None:
    with pytest.raises(ValueError, match="rank 0 owns 2 experts and would own 3; migration keeps every rank's number"):
        rounds_of(OwnerMap(np.array([[0, 0, 1]]), 2), OwnerMap(np.array([[0, 0, 0]]), 2))


def move_twice(group: RankGroup, seed: int) -> dict[tuple[int, int], tuple[float, float]]:
    """Fill rows and optimizer state with what says whose they are, move twice, and read both back by logical id."""
    owners = OwnerMap.contiguous(3, 7, group.world_size)
    bank = Bank(ExpertShape(2, 3), owners, group.rank)
    optimizer = torch.optim.AdamW([{"params": list(bank.parameters())}])
    for parameter in bank.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    for (layer, expert), row in bank.rows.items():
        for tensor in everything(bank, optimizer, row):
            tensor.fill_(10 * layer + expert)
    for turn in range(2):
        migrate(bank, optimizer, shuffled(owners, seed + turn), group.experts)
    assert bank.owners == shuffled(owners, seed + 1)
    found = {}
    for pair, row in bank.rows.items():
        values = torch.cat([tensor.flatten() for tensor in everything(bank, optimizer, row)])
        found[pair] = (values.min().item(), values.max().item())
    return found


def everything(bank: Bank, optimizer: torch.optim.Optimizer, row: int) -> list[Tensor]:
    """Weights, gradients, first and second moments and step counts of the expert in a row."""
    found = []
    for parameter in bank.experts[row].parameters():
        assert parameter.grad is not None
        state = optimizer.state[parameter]
        found += [parameter.detach(), parameter.grad, state["exp_avg"], state["exp_avg_sq"], state["step"]]
    return found


@pytest.mark.parametrize("world_size", [1, 2, 3, 5, 16])
def test_rows_and_optimizer_state_arrive(world_size: int) -> None:
    for seed in range(5):
        found: dict[tuple[int, int], tuple[float, float]] = {}
        for part in run_threads(world_size, move_twice, seed):
            assert not found.keys() & part.keys()
            found |= part
        assert found == {(layer, e): (10 * layer + e, 10 * layer + e) for layer in range(3) for e in range(7)}


def train(rank: int, optimizer_name: str, solver: str, migrates: bool, steps: int) -> list[float]:
    world_size = dist.get_world_size()
    model = make_model(ffn_dim=FFN_DIM)
    config = RuntimeConfig(policy="static", slots=0 if solver == "none" else 5, timeout_s=60)
    mesh = init_device_mesh("cpu", (world_size,))
    handle = shard_experts(model, mesh=mesh, config=config, solver=SOLVERS.get(solver))
    optimizer = OPTIMIZERS[optimizer_name](handle.parameter_groups())
    losses = []
    for step in range(steps):
        ids, targets = (rank_slice(t, rank, world_size) for t in global_batch(step))
        loss = cross_entropy(model(ids), targets) + handle.aux_loss()
        loss.backward()
        optimizer.step()
        if migrates and step % 2:
            optimizer.zero_grad()  # with gradients and without
        handle.step()
        if migrates:
            handle.migrate([shuffled(owners, step) for owners in handle.owner_maps], optimizer)
        optimizer.zero_grad()
        losses.append(mean_over_ranks(loss.detach()))
    return losses


def mean_over_ranks(loss: Tensor) -> float:
    parts: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(parts, loss.item())
    return sum(parts) / len(parts)


@functools.cache
def plain(optimizer: str) -> list[float]:
    """The losses of 14 steps on two ranks without copies, whose owners stay."""
    return run_ranks(2, train, optimizer, "none", False, 14)[0]


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_a_curve_with_owners_that_move_every_step_is_the_curve_without(optimizer: str) -> None:
    """Invariant 8, without copies: with top-2 routing every sum has the same two parts, so the bits are the same.

    Without clipping, whose norm adds up rows in the order in which they lie.
    """
    assert run_ranks(2, train, optimizer, "none", True, 12)[0] == plain(optimizer)[:12]


@pytest.mark.parametrize("world_size", [2, 3])
def test_a_curve_with_copies_that_change_agrees(world_size: int) -> None:
    stayed, moved = (run_ranks(world_size, train, "adamw", "random", migrates, 12)[0] for migrates in (False, True))
    torch.testing.assert_close(torch.tensor(moved), torch.tensor(stayed), rtol=1e-5, atol=0)


def migrate_two_banks(group: RankGroup) -> None:
    layers = {str(ffn_dim): MoELayer(4, ffn_dim, 4, 2) for ffn_dim in (6, 8)}
    config, clock = RuntimeConfig(policy="static", slots=0), StageClock()
    banks = share_experts(layers, group, config=config, clock=clock)
    experts = {name: layer.experts for name, layer in layers.items()}
    handle = Handle(nn.ModuleList(layers.values()), experts, banks, group, config, clock)
    before = handle.owner_maps
    other, unfit = OwnerMap(np.array([[1, 1, 0, 0]]), 2), OwnerMap(np.array([[0, 0, 0, 1]]), 2)
    with pytest.raises(ValueError, match="rank 0 owns 2 experts and would own 3"):
        handle.migrate([other, unfit])
    with pytest.raises(ValueError, match="1 owner maps for 2 banks; give one for each"):
        handle.migrate([other])
    with pytest.raises(ValueError, match="SGD does not hold the experts' gate_up"):
        handle.migrate([other, other], torch.optim.SGD(banks[0].parameters()))
    assert handle.owner_maps == before
    handle.migrate([other, other])
    assert handle.owner_maps == [other, other]


def test_a_refused_migration_moves_no_bank() -> None:
    run_threads(2, migrate_two_banks)


class Odd(torch.optim.SGD):
    """Keeps a piece of state that is neither a tensor nor a number."""

    def step(self, closure: Any = None) -> None:
        super().step()
        for group in self.param_groups:
            for parameter in group["params"]:
                self.state[parameter]["history"] = [1.0]


def test_state_that_cannot_follow_is_refused() -> None:
    bank = Bank(ExpertShape(2, 3), OwnerMap.contiguous(1, 4, 1), 0)
    optimizer = Odd(bank.parameters(), lr=0.1)
    optimizer.step()
    with pytest.raises(ValueError, match=r"state 'history' of Odd is a list, which cannot follow an expert; use an") as refused:
        migrate(bank, optimizer, bank.owners, LocalTransport())
    assert "\n" not in str(refused.value)


def test_an_optimizer_that_lacks_a_weight_is_refused() -> None:
    """Unless the weight is frozen, and so has no state."""
    bank = Bank(ExpertShape(2, 3), OwnerMap.contiguous(1, 4, 1), 0)
    optimizer = torch.optim.SGD([next(bank.parameters())])
    with pytest.raises(ValueError, match=r"SGD does not hold the experts' down, .*; give the optimizer"):
        migrate(bank, optimizer, bank.owners, LocalTransport())
    for parameter in bank.parameters():
        parameter.requires_grad_(False)
    assert [len(state.tensors) for state in expert_states(bank, optimizer)] == [2] * 4


def proposal_of(owners: OwnerMap) -> Proposal:
    return Proposal(owners, "milp", objective_s=2.0, bound_s=1.5, gap=0.25, seconds=0.5)


def owners_of(answer: Proposal | str) -> OwnerMap:
    assert isinstance(answer, Proposal), answer
    return answer.owners


class Proposer:
    """Always proposes the same exchange, late by some looks; it stands in for the process that would search."""

    def __init__(self, num_late: int):
        self.num_late = num_late

    def ask(self, question: Question) -> None:
        assert all(p.load.total > 0 for p in question.problems)
        self.owners = OwnerMap(np.stack([p.expert_to_owner_E for p in question.problems])[:, ::-1].copy(), 2)
        self.num_looks = 0

    def answer(self) -> Proposal | None:
        self.num_looks += 1
        return proposal_of(self.owners) if self.num_looks > self.num_late else None

    def give_up(self) -> None:
        pass


def migrate_while_training(
    rank: int, saved_s: float, mesh_shape: tuple[int, ...] = (2,), num_late: int = 0, num_steps: int = 14
) -> tuple[list[str], list[float], list[tuple[int, int]]]:
    """Train with proposals that save so many seconds a step; reasons, losses, and (step, experts moved) of every decision."""
    model = make_model(ffn_dim=FFN_DIM)
    config = RuntimeConfig(policy="static", slots=0, migration=MigrationConfig(every=4), timeout_s=60)
    names = ("replicate", "shard")[-len(mesh_shape) :]
    mesh = init_device_mesh("cpu", mesh_shape, mesh_dim_names=names)
    losses = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(migration_policy, "_Solver", lambda: Proposer(num_late))
        patch.setattr(migration_policy, "saved_s", lambda problems, owners, policy: saved_s)
        handle: Handle = shard_experts(model, mesh=mesh, config=config)
        optimizer = torch.optim.AdamW(handle.parameter_groups(), lr=0.01, foreach=False)
        for step in range(num_steps):
            ids, targets = (rank_slice(t, rank, dist.get_world_size()) for t in global_batch(step))
            loss = cross_entropy(model(ids), targets) + handle.aux_loss()
            loss.backward()
            optimizer.step()
            handle.step(optimizer)
            moves = [decision.step for decision in handle.telemetry.migrations() if decision.moved]
            seen_of = step - 1 if rank == 0 and step - 1 in moves else None  # two steps after it, as half an interval has
            assert handle.metrics().get("migration_step") == seen_of
            optimizer.zero_grad()
            losses.append(mean_over_ranks(loss.detach()))
    return (
        [d.reason for d in handle.telemetry.migrations()],
        losses,
        [(d.step, d.moved) for d in handle.telemetry.migrations()],
    )


def test_a_move_that_pays_is_made_and_explained() -> None:
    (reasons, losses, moved), (_, _, moved_elsewhere) = run_ranks(2, migrate_while_training, 0.5)
    assert [step for step, _ in moved] == [6, 10, 14]  # asked after steps 4, 8 and 12
    assert all(reason.startswith("experts migrate: ") and "would save 2 s over 4 steps and take" in reason for reason in reasons)
    assert all(reason.endswith("to migrate, by the load of the 2 steps since the solver was asked") for reason in reasons)
    assert moved == moved_elsewhere
    assert all(num_moved for _, num_moved in moved)
    assert losses == plain("adamw")


def test_a_move_that_does_not_pay_is_refused_and_explained() -> None:
    (reasons, losses, moved), _ = run_ranks(2, migrate_while_training, 1e-12)
    assert all(reason.startswith("owners stay: ") and "would save 4e-12 s over 4 steps and take" in reason for reason in reasons)
    assert moved == [(6, 0), (10, 0), (14, 0)]
    assert losses == plain("adamw")


def test_a_late_answer_is_taken_and_one_that_never_comes_is_given_up() -> None:
    """Looked for at every step from the sixth on, as a tenth of 4 is less than one, until ten intervals have passed."""
    (reasons, losses, moved), (_, _, moved_elsewhere) = run_ranks(2, migrate_while_training, 0.5, (2,), 4)
    assert [step for step, _ in moved] == [10]  # the next question is asked after step 12
    assert reasons[0].endswith("to migrate, by the load of the 6 steps since the solver was asked")
    assert moved == moved_elsewhere
    assert moved[0][1]
    assert losses == plain("adamw")
    (reasons, _, moved), (_, _, moved_elsewhere) = run_ranks(2, migrate_while_training, 0.5, (2,), 99, 44)
    assert moved == moved_elsewhere == [(44, 0)]
    assert reasons == ["owners stay: the solver had no answer 40 steps after it was asked, and 40 are allowed"]


def refusals_after_a_stall(group: RankGroup) -> int:
    """How often the same proposal is refused after the only move so far, which took 20 s."""
    layer = MoELayer(4, 6, 4, 2)
    config = RuntimeConfig(policy="static", slots=0, migration=MigrationConfig(every=50))
    (bank,) = share_experts({"moe": layer}, group, config=config)
    migrator = migration_policy.Migrator(bank, [layer.experts], group, config)
    migrator._loads, migrator._num_steps = np.ones((1, 2, 4), np.int64), 1
    proposal, row_bytes = proposal_of(OwnerMap(np.array([[1, 1, 0, 0]]), 2)), 1000
    assert migrator._decide(1, proposal, row_bytes)[1].moved
    migrator._rate.measure(2 * row_bytes / 20)
    return next(n for n in range(1000) if migrator._decide(n, proposal, row_bytes)[1].moved)


def test_one_slow_move_does_not_end_migration(monkeypatch: pytest.MonkeyPatch) -> None:
    """A proposal that saves half a second is refused until the 20 s have faded: 1.1 ** 39 > 40."""
    monkeypatch.setattr(migration_policy, "_Solver", lambda: Proposer(0))
    monkeypatch.setattr(migration_policy, "saved_s", lambda problems, owners, policy: 0.01)
    assert run_threads(2, refusals_after_a_stall) == [39, 39]
    rate = migration_policy.MigrationRate(100.0)
    for measured, expected in ((80.0, 80.0), (1.0, 80.0), (90.0, 90.0), (2.0, 90.0), (3.0, 90.0), (4.0, 4.0), (120.0, 120.0)):
        rate.measure(measured)
        assert rate.bytes_per_s == expected
    for _ in range(100):
        rate.refuse()
    assert rate.bytes_per_s == 120.0  # never lowered
    for _ in range(2):
        rate.measure(1.0)
    rate.measure(1.0)
    for _ in range(100):
        rate.refuse()
    assert rate.bytes_per_s == 100.0  # and never above the topology's


def test_a_migration_between_nodes_takes_their_link() -> None:
    """Four times as slow as a rank inside its node: 2 experts leave each node, or none does."""
    topology = Topology(2, 2, device_bytes_per_s=1000.0, node_bytes_per_s=250.0, latency_s=0.0, flops_per_s=1.0)
    owners, across, inside = (OwnerMap(np.array([map_E]), 4) for map_E in ([0, 1, 2, 3], [2, 3, 0, 1], [1, 0, 2, 3]))
    assert bytes_to_migrate(owners, across, 10, topology) == 2 * 4 * 10
    assert bytes_to_migrate(owners, inside, 10, topology) == 10
    fast = replace(topology, node_costs=(50, 50))
    assert bytes_to_migrate(owners, across, 10, fast) == 4 * 10
    assert bytes_to_migrate(owners, owners, 10, topology) == 0


def fields_of_a_question(group: RankGroup) -> None:
    """Rank 0 asks what it costs to move an expert of this optimizer at the measured rate, and limits the time by the interval."""
    layer = MoELayer(4, 6, 4, 2)
    config = RuntimeConfig(policy="static", slots=0, migration=MigrationConfig(every=50, solver="milp"))
    (bank,) = share_experts({"moe": layer}, group, config=config)
    migrator = migration_policy.Migrator(bank, [layer.experts], group, config)
    migrator._loads, migrator._num_steps, migrator._expert_bytes = np.ones((1, 2, 4), np.int64), 1, 1000
    migrator._rate.measure(500.0)
    migrator._times._seconds.extend([0.5, 0.25, 9.0])
    question = migrator._question()
    prices = prices_of(question.problems[0])
    assert prices.state_bytes / prices.device_bytes_per_s == pytest.approx(1000 / 500.0)
    assert question.problems[0].move_horizon_steps == 50
    assert question.move_s == pytest.approx(1000 / 500.0 / 50)
    assert (question.solver, question.time_limit_s) == ("milp", pytest.approx(0.4 * 50 * 0.5))
    owners, decision = migrator._decide(3, "the solver ended with -11: gone", 1000)
    assert owners == bank.owners
    assert decision.to_dict() == {
        "solver": "",
        "moved": 0,
        "objective": 0.0,
        "bound": 0.0,
        "gap": 0.0,
        "seconds": 0.0,
        "saved_s_predicted": 0.0,
        "move_s": 0.0,
        "reason": "owners stay: the solver ended with -11: gone",
    }
    assert migrator._question().solver == "joint"
    noted = replace(proposal_of(OwnerMap(np.array([[1, 1, 0, 0]]), 2)), note="the exact planner failed: no engine")
    decision = migrator._decide(4, noted, 1000)[1]
    assert decision.reason.endswith("since the solver was asked; the exact planner failed: no engine")
    assert (decision.solver, decision.objective, decision.bound, decision.gap, decision.seconds) == ("milp", 2.0, 1.5, 0.25, 0.5)
    assert migrator._question().solver == "milp"


def test_what_is_asked_and_what_is_left_when_no_answer_comes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(migration_policy, "_Solver", lambda: Proposer(0))
    run_threads(2, fields_of_a_question)


def test_what_a_migration_saved_is_the_median_before_less_the_median_after(monkeypatch: pytest.MonkeyPatch) -> None:
    """Six steps between questions, so three before and three after; what happens between the end of a step and the next begin is
    none of them."""
    now_s = [0.0]
    monkeypatch.setattr(migration_policy, "run_seconds", lambda: now_s[0])
    times, shown = migration_policy._StepTimes(6), []
    for step, seconds in enumerate([90.0, 3.0, 5.0, 4.0, 9.0, 1.0, 2.0, 7.0, 7.0], start=1):
        now_s[0] += seconds
        shown.append(times.end(step))
        if step == 4:
            times.asked()
        if step == 5:
            times.migrated(step)
        now_s[0] += 1000.0
        times.begin()
    assert shown == [{}] * 7 + [{"saved_s_observed": (4.0 - 2.0) * 6, "migration_step": 5.0}, {}]


def train_with_the_solver(rank: int, solver: str) -> tuple[list[str], list[float], list[tuple[str, int]]]:
    """Seven steps with the real solver, on a link so fast that moves pay; rank 0 waits for it, which only a test may."""
    migration = MigrationConfig(every=4, solver=solver, time_limit_s=20.0)  # type: ignore[arg-type]
    config = runtime_config(policy="static", slots=0, migration=migration, migration_effort=0.05, timeout_s=60)
    model = make_model(ffn_dim=FFN_DIM)
    handle = shard_experts(model, mesh=init_device_mesh("cpu", (2,)), config=config)
    optimizer = torch.optim.AdamW(handle.parameter_groups(), lr=0.01, foreach=False)
    (migrator,) = handle._migrators
    migrator._rate.measure(1e12)
    losses = []
    for step in range(7):
        ids, targets = (rank_slice(t, rank, 2) for t in global_batch(step))
        loss = cross_entropy(model(ids), targets) + handle.aux_loss()
        loss.backward()
        optimizer.step()
        if migrator._solver is not None and migrator._solver._thread is not None:
            migrator._solver._thread.join()
        handle.step(optimizer)
        optimizer.zero_grad()
        losses.append(mean_over_ranks(loss.detach()))
    decisions = handle.telemetry.migrations()
    return [f"{d.step} {d.reason}" for d in decisions], losses, [(d.solver, d.moved) for d in decisions]


def test_what_the_real_solver_proposes_is_priced_and_decided() -> None:
    propose(_smallest_question())  # compiles what the solver's process then loads
    (((reason,), losses, (decided,)), (other, _, (followed,))) = run_ranks(2, train_with_the_solver, "milp")
    numbers = r"\d+ experts would save \S+ s over 4 steps and take \S+ s to migrate, by the load of the 2 steps since"
    assert re.match(rf"6 experts migrate: {numbers}", reason), reason
    assert other == ["6 decided by rank 0"]
    assert decided == ("milp", followed[1])
    assert followed[1] > 0
    assert losses == plain("adamw")[:7]


def step_without_an_optimizer(rank: int) -> None:
    config = RuntimeConfig(policy="static", slots=0, migration=MigrationConfig(every=2), timeout_s=60)
    handle = shard_experts(make_model(), mesh=init_device_mesh("cpu", (2,)), config=config)
    with pytest.raises(ValueError, match=r"migration.every is 2, but handle.step\(\) got no optimizer"):
        handle.step()


def test_migration_needs_the_optimizer() -> None:
    run_ranks(2, step_without_an_optimizer)


def question() -> Question:
    rng = np.random.default_rng(3)
    shape = LayerShape(num_experts=8, top_k=2, dim=64, ffn_dim=128)
    loads = [rng.integers(0, 2000, (4, 8)) * (np.arange(8) < 3) + 1 for _ in range(3)]
    owners_LE = OwnerMap.contiguous(3, 8, 4).expert_to_owner_LE
    return Question(
        tuple(
            Problem(ExpertLoad(load_RE), owner_E, Topology.preset("cpu", 4), shape, slots=1)
            for load_RE, owner_E in zip(loads, owners_LE, strict=True)
        ),
        "quota",
        0.05,
    )


def answer_of(solver: migration_policy._Solver) -> Proposal | str:
    assert solver._thread is not None
    solver._thread.join()
    answer = solver.answer()
    assert answer is not None
    return answer


def test_the_solver_works_in_a_process_of_its_own() -> None:
    """One process for several questions, which nobody waits for; one that ends, by itself or not, is followed by another."""
    solver = migration_policy._Solver()
    pid = solver._process.pid
    for _ in range(2):
        solver.ask(question())
        assert solver.answer() is None
        assert owners_of(answer_of(solver)) == propose(question()).owners
        assert solver._process.pid == pid
    solver.ask(question())
    solver.give_up()
    assert solver._process.wait() < 0
    solver.ask(Question((), "quota", 1.0))
    assert solver._process.pid != pid
    reason = answer_of(solver)
    assert str(reason).startswith("the solver ended with 1: ValueError: need at least one array to stack")
    solver.ask(question())
    assert owners_of(answer_of(solver)) == propose(question()).owners


def test_an_answer_that_cannot_be_read_is_not_the_one_before() -> None:
    solver = migration_policy._Solver()
    solver.ask(question())
    assert isinstance(answer_of(solver), Proposal)
    solver._process.kill()
    nonsense = "import sys; sys.stdout.write('cnowhere\\nbar\\n.'); sys.stdout.flush(); sys.stdin.read()"
    solver._process = subprocess.Popen([sys.executable, "-c", nonsense], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    solver.ask(question())
    assert answer_of(solver) == "the solver's answer cannot be read: ModuleNotFoundError(\"No module named 'nowhere'\")"
    assert solver._process.wait() < 0


def test_the_solver_needs_no_torch() -> None:
    script = f"import sys, {propose.__module__}; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", script], check=True)


def test_a_proposal_saves_time_and_keeps_the_numbers() -> None:
    owners, current = propose(question()).owners, OwnerMap.contiguous(3, 8, 4)
    assert owners.num_rows_R.tolist() == current.num_rows_R.tolist()
    assert saved_s(question().problems, owners, "quota") > 0
    assert saved_s(question().problems, current, "quota") == 0
    dear = tuple(replace(problem, state_multiplier=1e18) for problem in question().problems)
    assert propose(replace(question(), problems=dear)).owners == current
    assert propose(replace(question(), policy="auto")).owners == owners  # priced as by quota
