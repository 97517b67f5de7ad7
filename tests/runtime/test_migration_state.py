"""What goes along when experts change their owner, whatever optimizer keeps it; experts that cannot take another's place."""

import logging
from collections import Counter
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from moesaic.placement import Move, OwnerMap
from moesaic.runtime.experts.bank import Bank
from moesaic.runtime.experts.expert import ExpertShape
from moesaic.runtime.experts.migrate import migrate, rounds_of
from moesaic.runtime.group import RankGroup
from moesaic.runtime.state import state_of
from tests.helpers.compare import assert_bitwise
from tests.helpers.threads import run_threads
from tests.runtime.test_migration import shuffled
from tests.runtime.test_state import Averaging

NUM_LAYERS, NUM_EXPERTS, NUM_STEPS = 2, 5, 6
# Weights of at least 4096 elements, as torchao quantizes the moments of no smaller ones.
SHAPE = ExpertShape(64, 64)


class History(torch.optim.SGD):
    """Keeps a tensor whose shape has nothing to do with the parameter's, and a Python number and a truth value."""

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            for parameter in (p for p in group["params"] if p.grad is not None):
                state = self.state[parameter]
                history = state.setdefault("history", torch.zeros(3, dtype=torch.float64))
                history.copy_(torch.cat([history[1:], parameter.grad.double().norm().view(1)]))
                state["largest"] = max(state.get("largest", 0.0), history[-1].item())
                state["is_growing"] = bool(history[-1] > history[-2])
                parameter.sub_(parameter.grad, alpha=group["lr"] / state["largest"] * (1 + state["is_growing"]))


def eight_bit(parameters: Any) -> torch.optim.Optimizer:
    optim = pytest.importorskip("torchao.optim")
    made: torch.optim.Optimizer = optim.AdamW8bit(parameters, lr=0.01)
    return made


OPTIMIZERS = {
    "adamw": lambda parameters: torch.optim.AdamW(parameters, lr=0.01, foreach=False, amsgrad=True),
    "adafactor": lambda parameters: torch.optim.Adafactor(parameters, lr=0.01),  # factored, and norms of whole matrices
    "muon": lambda parameters: torch.optim.Muon(parameters, lr=0.01),
    "adamw 8 bit": eight_bit,  # blocks of codes with a scale each, in a tensor subclass
    "python numbers": lambda parameters: Averaging(parameters, lr=0.1),
    "any shape": lambda parameters: History(parameters, lr=0.1),
}


def random(*key: Any) -> Tensor:
    """A matrix of an expert, the same wherever the expert lives."""
    *seeds, name = key
    generator = torch.Generator().manual_seed(sum(seed * 97**place for place, seed in enumerate(seeds)))
    return torch.randn(SHAPE.tensor_sizes()[name], generator=generator)


def has_gradient(step: int, layer: int, expert: int) -> bool:
    """Experts are left out of some steps, so that their step counts differ; not of the first, which makes their state."""
    return step == 0 or (step + layer) % (expert + 1) == 0


def everything(parameter: nn.Parameter, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """A parameter and its optimizer state in plain tensors."""
    found = {"weight": parameter.detach().clone()}
    for field, value in optimizer.state[parameter].items():
        is_quantized = type(value).__name__ == "OptimState8bit"
        found[field] = (value.dequantize() if is_quantized else torch.as_tensor(value)).clone()
    return found


def trained_on_ranks(group: RankGroup, optimizer_name: str, keeps_gradients: bool) -> dict[str, Tensor]:
    """Train experts that change their owner after every step."""
    owners = OwnerMap.contiguous(NUM_LAYERS, NUM_EXPERTS, group.world_size)
    bank = Bank(SHAPE, owners, group.rank)
    for (layer, expert), row in bank.rows.items():
        for name in bank.weight_names:
            bank.experts[row].parameter(name).data.copy_(random(99, layer, expert, name))
    optimizer = OPTIMIZERS[optimizer_name](list(bank.parameters()))
    for step in range(NUM_STEPS):
        for (layer, expert), row in bank.rows.items():
            for name in bank.weight_names:
                grad = random(step, layer, expert, name) if has_gradient(step, layer, expert) else None
                bank.experts[row].parameter(name).grad = grad
        optimizer.step()
        if not keeps_gradients:
            optimizer.zero_grad()
        wanted = shuffled(owners, step)
        migrate(bank, optimizer, wanted, group.experts)
        if not keeps_gradients or step == 0:
            assert bank.owners == wanted
        for (layer, expert), row in bank.rows.items():
            for name in bank.weight_names if keeps_gradients else ():
                grad = bank.experts[row].parameter(name).grad
                assert (grad is not None) == has_gradient(step, layer, expert)
                assert grad is None or torch.equal(grad, random(step, layer, expert, name))
    return {
        f"{layer}.{expert}.{name}.{field}": value
        for (layer, expert), row in bank.rows.items()
        for name in bank.weight_names
        for field, value in everything(bank.experts[row].parameter(name), optimizer).items()
    }


def trained_alone(optimizer_name: str) -> dict[str, Tensor]:
    """The same experts, an optimizer for every weight, on one process."""
    found: dict[str, Tensor] = {}
    for layer in range(NUM_LAYERS):
        for expert in range(NUM_EXPERTS):
            for name in SHAPE.tensor_sizes():
                parameter = nn.Parameter(random(99, layer, expert, name))
                optimizer = OPTIMIZERS[optimizer_name]([parameter])
                for step in range(NUM_STEPS):
                    parameter.grad = random(step, layer, expert, name) if has_gradient(step, layer, expert) else None
                    optimizer.step()
                state = everything(parameter, optimizer)
                found |= {f"{layer}.{expert}.{name}.{field}": value for field, value in state.items()}
    return found


@pytest.mark.parametrize("keeps_gradients", [False, True])
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_experts_that_move_train_as_experts_that_stay(
    optimizer: str, keeps_gradients: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """To the bits, weights and every piece of optimizer state: step counts of one expert alone, numbers, quantized blocks."""
    monkeypatch.setattr(torch, "compile", lambda function, **_: function)  # which torchao's optimizers call for every step
    found: dict[str, Tensor] = {}
    for part in run_threads(2, trained_on_ranks, optimizer, keeps_gradients):
        assert not found.keys() & part.keys()
        found |= part
    expected = trained_alone(optimizer)
    assert_bitwise(found, expected)
    if optimizer == "adamw":
        assert len({expected[f"0.{e}.down.step"].item() for e in range(NUM_EXPERTS)}) > 1


def moved_bank(group: RankGroup, special: dict[int, str]) -> tuple[list[int], dict[int, Any]]:
    """Ask for owners [1, 1, 0, 0, 0, 1] of six experts, of which some are trained otherwise than the rest. What the owners are
    then, and what the experts owned here hold and how they are trained."""
    bank = Bank(ExpertShape(2, 3), OwnerMap(np.array([[0, 0, 0, 1, 1, 1]]), 2), group.rank)
    groups: dict[str, list[nn.Parameter]] = {"usual": [], "another group": [], "another schedule": []}
    for (_, expert), row in bank.rows.items():
        how = special.get(expert, "usual")
        for parameter in bank.experts[row].parameters():
            nn.init.constant_(parameter, expert)
            groups[how if how in groups else "usual"].append(parameter)
            parameter.grad = None if how == "no state" else torch.zeros_like(parameter)
        bank.experts[row].down.requires_grad_(how != "frozen")
    optimizer = torch.optim.SGD(
        [
            {"params": groups["usual"], "lr": 0.0},
            {"params": groups["another group"], "lr": 0.0, "weight_decay": 0.5},
            {"params": groups["another schedule"], "lr": 0.0},
        ],
        momentum=0.9,
    )
    torch.optim.lr_scheduler.LambdaLR(optimizer, [lambda _: 1.0, lambda _: 1.0, lambda step: 0.5**step])
    optimizer.step()
    optimizer.zero_grad()
    migrate(bank, optimizer, OwnerMap(np.array([[1, 1, 0, 0, 0, 1]]), 2), group.experts, where="a test")
    name_of = {id(p): name for name, group in zip(groups, optimizer.param_groups, strict=True) for p in group["params"]}
    found: dict[int, Any] = {}
    for (_, expert), row in bank.rows.items():
        for parameter in bank.experts[row].parameters():
            assert (parameter == expert).all()
        down = bank.experts[row].down
        how = name_of[id(down)] if down.requires_grad else "frozen"
        found[expert] = how if optimizer.state.get(down) else "no state"
    return bank.owners.expert_to_owner_LE[0].tolist(), found


@pytest.mark.parametrize("how", ["frozen", "another group", "another schedule", "no state"])
def test_an_expert_takes_the_place_of_one_that_is_trained_alike(how: str, caplog: pytest.LogCaptureFixture) -> None:
    """An expert without its like on the other rank stays, which a line tells; the rest of the move happens."""

    def move(*special: int) -> tuple[list[int], dict[int, str]]:
        (owners, found), (owners_elsewhere, found_elsewhere) = run_threads(2, moved_bank, dict.fromkeys(special, how))
        assert owners == owners_elsewhere
        assert not found.keys() & found_elsewhere.keys()
        assert found | found_elsewhere == {e: how if e in special else "usual" for e in range(6)}
        return owners, found

    with caplog.at_level(logging.WARNING, "moesaic.migration"):
        owners, _ = move(0)
        assert owners in ([0, 1, 0, 0, 1, 1], [0, 1, 0, 1, 0, 1])
        (record,) = caplog.records
        assert record.getMessage() == (
            "a test: 2 of 4 experts stay: those whose place they would take are trained otherwise (frozen, another parameter "
            "group, or other optimizer state)"
        )
        caplog.clear()
        for special in ((), (0, 4), (0, 1, 3, 4), (2, 5)):
            assert move(*special)[0] == [1, 1, 0, 0, 0, 1]
        assert not caplog.records


@given(
    experts=st.integers(1, 12), ranks=st.integers(1, 5), num_kinds=st.integers(1, 4), seed=st.integers(0, 10**6),
    rows_in_flight=st.integers(1, 4),
)  # fmt: skip
def test_rounds_give_and_take_experts_of_a_kind(experts: int, ranks: int, num_kinds: int, seed: int, rows_in_flight: int) -> None:
    """On every rank as many of each kind; what is left out could not have moved: no cycle of a kind is among it."""
    current = OwnerMap.contiguous(2, experts, ranks)
    wanted = shuffled(current, seed)
    kinds_LE = np.random.default_rng(seed + 1).integers(0, num_kinds, current.expert_to_owner_LE.shape)

    def kind(move: Move) -> int:
        return int(kinds_LE[move.layer, move.expert])

    rounds = rounds_of(current, wanted, rows_in_flight=rows_in_flight, kinds_LE=kinds_LE)
    for round_ in rounds:
        gives = Counter((m.src, kind(m)) for m in round_.moves)
        assert gives == Counter((m.dst, kind(m)) for m in round_.moves)
        assert max(Counter(m.src for m in round_.moves).values()) <= rows_in_flight
    moves = [move for round_ in rounds for move in round_.moves]
    all_moves = current.moves_to(wanted)
    assert not Counter(moves) - Counter(all_moves)
    left = [move for move in all_moves if move not in moves]
    for one in range(num_kinds):
        edges = {(m.src, m.dst) for m in left if kind(m) == one}
        while edges:
            onward = {(src, dst) for src, dst in edges if any(dst == other for other, _ in edges)}
            assert onward < edges, "a cycle was left out"
            edges = onward
    assert num_kinds > 1 or not left


def test_state_of_any_shape_is_saved_under_its_parameter() -> None:
    """Live, beside Python numbers; nothing is asked of its shape."""
    bank = Bank(ExpertShape(2, 3), OwnerMap.contiguous(1, 2, 1), 0)
    model = nn.ModuleList(bank.experts)
    optimizer = History(bank.parameters(), lr=0.1)
    for parameter in bank.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    state = state_of(model, optimizer)
    for name, parameter in model.named_parameters():
        assert state[f"optimizer.{name}.history"] is optimizer.state[parameter]["history"]
        assert state[f"optimizer.{name}.largest"] == pytest.approx(parameter.numel() ** 0.5)


def move_transposed(group: RankGroup) -> list[list[Tensor]]:
    """A momentum whose columns are contiguous on rank 0 and whose rows are on rank 1, by expert, before and after all move."""
    bank = Bank(ExpertShape(2, 3), OwnerMap.contiguous(1, 2, 2), group.rank)
    optimizer = torch.optim.SGD(bank.parameters(), lr=0.1, momentum=0.9)
    for parameter in bank.parameters():
        buffer = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(group.rank))
        optimizer.state[parameter]["momentum_buffer"] = buffer if group.rank else buffer.mT.contiguous().mT

    def momenta() -> list[Tensor]:
        return [optimizer.state[parameter]["momentum_buffer"].clone() for parameter in bank.parameters()]

    before = momenta()
    migrate(bank, optimizer, OwnerMap(np.array([[1, 0]]), 2), group.experts)
    return [before, momenta()]


def test_ranks_may_hold_a_state_in_different_orders() -> None:
    (first, first_after), (second, second_after) = run_threads(2, move_transposed)
    for after, sent in ((first_after, second), (second_after, first)):
        assert all(torch.equal(here, there) for here, there in zip(after, sent, strict=True))
