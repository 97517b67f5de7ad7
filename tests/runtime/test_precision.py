"""bf16 compute over fp32 masters: casts, bytes, dtypes, and parity with one process that casts alike."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from hypothesis import given, settings
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.func import functional_call

from moesaic import Handle, MoELayer, RouterConfig, RuntimeConfig, shard_experts
from moesaic.placement import OwnerMap
from moesaic.runtime.experts.bank import Bank
from moesaic.runtime.experts.expert import ExpertShape, ExpertTensors
from moesaic.runtime.experts.migrate import migrate
from moesaic.runtime.group import RankGroup, single_rank_group
from tests.helpers.cases import Case, cases, share_experts
from tests.helpers.compare import assert_all_close
from tests.helpers.families import FAMILIES, batch_ids, forward, make_family_model
from tests.helpers.model import NUM_EXPERTS, Model, cross_entropy, global_batch, make_model, rank_slice
from tests.helpers.ranks import run_ranks
from tests.helpers.reference import DenseMoE
from tests.helpers.threads import run_threads
from tests.runtime.test_parity import reference, train
from tests.runtime.test_shard import SOLVERS, losses_on_ranks, whole_gradients

# Of the largest element. Each of up to eight values in a row is rounded to bf16 (2 ** -9 of it), and sums may cancel.
RTOL = 2**-5


@settings(max_examples=15, deadline=None)
@given(case=cases())
def test_a_layer_in_bf16_equals_the_reference_with_rounded_weights_and_tokens(case: Case) -> None:
    """Outputs, input gradients and fp32 expert gradients over three micro-batches, for any owners and copies."""
    case = replace(case, num_layers=1)
    results = train(case, compute_dtype="bf16")
    assert all(results[name].dtype == torch.float32 for name in results)
    assert_all_close(results, reference(case, rounds=True), rtol=RTOL)


def optimizer_step(make: Callable[..., torch.optim.Optimizer]) -> Callable[[Bank], None]:
    def step(bank: Bank) -> None:
        for parameter in bank.parameters():
            parameter.grad = torch.ones_like(parameter)
        make(bank.parameters(), lr=0.1).step()

    return step


def load(bank: Bank) -> None:
    bank.load_rows({(0, 1): ExpertTensors(gate_up=torch.full((6, 2), 0.3), down=torch.full((2, 3), 0.7))})


def migrate_all(bank: Bank) -> None:
    def swap(group: RankGroup) -> None:
        migrate(bank, None, OwnerMap.contiguous(1, 4, 1), group.experts)

    run_threads(1, swap)
    with torch.no_grad():
        bank.experts[1].gate_up.fill_(2.5)
        bank.experts[0].down.fill_(3.5)


CHANGES = {
    "sgd": optimizer_step(torch.optim.SGD),
    "adamw": optimizer_step(torch.optim.AdamW),
    "adamw foreach": optimizer_step(lambda p, lr: torch.optim.AdamW(p, lr=lr, foreach=True)),
    "adamw fused": optimizer_step(lambda p, lr: torch.optim.AdamW(p, lr=lr, fused=True)),
    "loading": load,
    "migration": migrate_all,
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES.keys())
def test_a_row_is_cast_once_until_its_masters_change(change: Callable[[Bank], None]) -> None:
    bank = Bank(ExpertShape(2, 3), OwnerMap.contiguous(1, 4, 1), 0, compute_dtype=torch.bfloat16)
    bank.reset_parameters()

    def assert_cast() -> None:
        for expert in range(4):
            masters, cast = bank.weights(0, expert).tensors(), bank.compute_weights(0, expert).tensors()
            assert all(torch.equal(c, m.bfloat16()) for c, m in zip(cast, masters, strict=True))

    assert_cast()
    bank.compute_weights(0, 1).down.fill_(torch.nan)
    assert bank.compute_weights(0, 1).down.isnan().all()  # nothing changed, nothing was cast
    change(bank)
    assert_cast()
    bank.storage["gate_up"].data.mul_(2.0)  # unseen, until a step is closed
    bank.weights_changed()
    assert_cast()


def test_a_layer_computes_in_the_dtype_that_it_is_converted_to() -> None:
    """In fp64 to the last digits, with one expert a token, whose gate weight is 1; in bf16 without casts beside the masters."""
    torch.manual_seed(0)
    layer, x = MoELayer(16, 24, 5, 1), torch.randn(6, 16, dtype=torch.float64)
    expected = DenseMoE(layer).double()(x)
    assert_all_close({"y": layer.double()(x)}, {"y": expected}, rtol=1e-14)
    assert layer.bfloat16()(x.bfloat16()).dtype == layer.runtime.bank.compute_dtype == torch.bfloat16
    assert layer.runtime.bank.cast_bytes == 0


def test_experts_that_ranks_share_keep_their_dtype() -> None:
    layer = MoELayer(16, 24, 5, 2)
    share_experts({"0": layer}, single_rank_group(), config=RuntimeConfig())
    with pytest.raises(ValueError, match=r"float32 and cannot become torch.bfloat16; .* before shard_experts") as refused:
        layer.to(torch.bfloat16)
    assert "\n" not in str(refused.value)
    assert layer.float().to("cpu").runtime.bank.compute_dtype == torch.float32


def wrapped(solver: str, compute_dtype: Any, router: RouterConfig | None = None, **options: Any) -> tuple[Model, Handle]:
    model = make_model(router=router)
    config = RuntimeConfig(policy="static", slots=NUM_EXPERTS, timeout_s=60, compute_dtype=compute_dtype, **options)
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    return model, shard_experts(model, mesh=mesh, config=config, solver=SOLVERS[solver])


BALANCED = RouterConfig(force_balance=True, aux_loss_coef=0.0)  # no choice that hangs on the rounding of a score


def backward_on_ranks(rank: int) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Gradients of two micro-batches in bf16, copies of every expert everywhere, and what was sent and kept."""
    world_size = dist.get_world_size()
    model, handle = wrapped("everywhere", "bf16", router=BALANCED)
    optimizer = torch.optim.AdamW(handle.parameter_groups(), lr=0.0, foreach=False)
    model(rank_slice(global_batch(0)[0], rank, world_size))  # so that copies exist
    handle.step()
    for batch in range(2):
        ids, targets = (rank_slice(t, rank, world_size) for t in global_batch(batch))
        logits = model(ids)
        assert logits.dtype == torch.bfloat16
        cross_entropy(logits.float(), targets).div(2).backward()
    grads = whole_gradients(model, handle)
    optimizer.step()
    handle.step()
    state = [value for key, value in handle.state_dict(optimizer).items() if not key.endswith(".step")]
    assert {t.dtype for t in (*state, *grads.values())} == {torch.float32}
    return grads, handle.metrics()


def backward_on_one(world_size: int) -> dict[str, Tensor]:
    """The same of the dense reference: every parameter rounded to bf16, every activation in it, fp32 sums of gradients."""
    model = make_model(router=BALANCED)
    for block in model.blocks:
        block.moe = DenseMoE(block.moe)
    narrow = {name: p.detach().bfloat16().requires_grad_() for name, p in model.named_parameters()}
    total = {name: torch.zeros(p.shape) for name, p in narrow.items()}
    for rank in range(world_size):
        for batch in range(2):
            ids, targets = (rank_slice(t, rank, world_size) for t in global_batch(batch))
            loss = cross_entropy(functional_call(model, narrow, (ids,)).float(), targets) / 2 / world_size
            for name, grad in zip(narrow, torch.autograd.grad(loss, list(narrow.values())), strict=True):
                total[name] += grad.float()
    return total


def logical(name: str) -> str:
    """A name of the dense reference as the sharded model has it."""
    for weight in ("gate_up", "down"):
        prefix, found, expert = name.partition(f".moe.{weight}.")
        if found:
            return f"{prefix}.moe.experts.{expert}.{weight}"
    return name.replace(".moe.router", ".moe.router.weight")


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_a_model_in_bf16_equals_one_process_that_casts_alike(world_size: int) -> None:
    """Every gradient by name; copies travel in half the bytes of their gradients, and the bound on slots holds."""
    expected = {logical(name): grad for name, grad in backward_on_one(world_size).items()}
    results = run_ranks(world_size, backward_on_ranks)
    copies, expert_elements = 2 * 2 * NUM_EXPERTS * (world_size - 1), 3 * 16 * 24
    for grads, metrics in results:
        assert_all_close(grads, expected, rtol=RTOL)
        assert 0 <= metrics["slot_bytes_peak"] <= metrics["slot_bytes_bound"]
    sent = {op: sum(metrics.get(f"bytes_{op}", 0.0) for _, metrics in results) for op in ("gather", "reduce", "dispatch")}
    assert sent == {"gather": copies * expert_elements * 2, "reduce": copies * expert_elements * 4, "dispatch": 0.0}


def train_on_ranks(rank: int, compute_dtype: str, num_steps: int) -> list[float]:
    model, handle = wrapped("random", compute_dtype)
    return losses_on_ranks(rank, model, handle, torch.optim.AdamW(handle.parameter_groups(), lr=3e-3), num_steps)


def test_a_run_in_bf16_follows_the_run_in_fp32_and_repeats_its_bits() -> None:
    fp32, first = (run_ranks(2, train_on_ranks, compute_dtype, 30)[0] for compute_dtype in ("as_is", "bf16"))
    assert run_ranks(2, train_on_ranks, "bf16", 8)[0] == first[:8]
    assert first[-1] < 0.9 * first[0]
    assert first == pytest.approx(fp32, rel=0.02)
    assert first != fp32


def losses_after_evaluation(rank: int, without_grad: Any) -> list[list[float]]:
    """Of two steps, by compute dtype, where the first forward of all, which makes casts and slots, ran in `without_grad`."""
    losses = []
    for compute_dtype in ("bf16", "as_is"):
        model, handle = wrapped("everywhere", compute_dtype, shard_dense=False, check_replicas_every=0, transport="c10d")
        with without_grad():
            model.eval()(global_batch(1)[0])
        optimizer = torch.optim.SGD(handle.parameter_groups(), lr=0.1)
        losses.append(losses_on_ranks(rank, model.train(), handle, optimizer, 2))
    return losses


def test_what_inference_mode_allocates_serves_training() -> None:
    assert run_ranks(2, losses_after_evaluation, torch.inference_mode) == run_ranks(2, losses_after_evaluation, torch.no_grad)


def losses_of_families(rank: int, compute_dtype: str) -> list[tuple[float, float]]:
    """Loss and global gradient norm of one batch of every family."""
    results = []
    for family in FAMILIES:
        model = make_family_model(family)
        config = RuntimeConfig(timeout_s=60, compute_dtype=compute_dtype)  # type: ignore[arg-type]
        handle = shard_experts(model, mesh=init_device_mesh("cpu", (1,)), config=config)
        loss = forward(model, batch_ids(0)).loss
        loss.backward()
        results.append((loss.item(), handle.clip_grad_norm_(1.0).item()))
    return results


def test_every_family_runs_in_bf16() -> None:
    pytest.importorskip("transformers")
    fp32, bf16 = (run_ranks(1, losses_of_families, dtype)[0] for dtype in ("as_is", "bf16"))
    assert all(pair == pytest.approx(expected, rel=0.01) for pair, expected in zip(bf16, fp32, strict=True))
    assert all(pair != expected for pair, expected in zip(bf16, fp32, strict=True))
