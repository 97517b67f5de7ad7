"""Families of Hugging Face transformers, wrapped on real processes, against the models that transformers runs."""

import functools
import json
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh

from moesaic import Handle, RuntimeConfig, shard_experts
from moesaic.runtime.adapters.weights import dense_tensors, whole
from tests.helpers.compare import assert_all_close, assert_bitwise, assert_close
from tests.helpers.families import BATCH, FAMILIES, batch_ids, forward, make_family_model, random_copies
from tests.helpers.model import rank_slice
from tests.helpers.ranks import run_ranks

pytest.importorskip("transformers", reason="transformers is not installed: pip install 'moesaic[hf]'")
pytest.importorskip("safetensors", reason="safetensors is not installed: pip install 'moesaic[hf]'")

NUM_STEPS = 6
# Gradients that are zero but for rounding (the bias of attention keys) must not become steps of full size.
ADAMW = dict(lr=1e-3, eps=1e-3)


def wrapped(family: str, device: str = "cpu") -> tuple[Any, Handle]:
    model = make_family_model(family, device=device)
    config = RuntimeConfig(policy="static", slots=6, timeout_s=60)
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    return model, shard_experts(model, mesh=mesh, config=config, solver=random_copies)


def gradients(model: nn.Module, handle: Handle) -> dict[str, Tensor]:
    """Whole gradients under the family's names."""
    grads = {}
    for dense in dense_tensors(model, handle.layers):
        if dense.tensor.requires_grad and dense.tensor.grad is not None:
            grads |= dict.fromkeys(dense.names, whole(dense.tensor.grad).clone())
    rows: dict[str, dict[int, Tensor]] = {}
    for block, layer in handle.layers.items():
        for weight, name in layer.naming.fused:
            rows[f"{block}.{name}"] = {
                e: layer.naming.to_original(weight, layer[e].parameter(weight).grad.clone()) for e in layer.runtime.owned_experts
            }
    everybody: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everybody, rows)
    for name in rows:
        experts = {e: grad for part in everybody for e, grad in part[name].items()}
        grads[name] = torch.stack([experts[e] for e in sorted(experts)])
    return grads


def train_on_ranks(rank: int, family: str) -> dict[str, Any]:
    """AdamW steps; of the second, the first with copies, logits and gradients."""
    world_size = dist.get_world_size()
    model, handle = wrapped(family)
    optimizer = torch.optim.AdamW(handle.parameter_groups(), **ADAMW)
    losses, found = [], {}
    copies = 0.0
    for step in range(NUM_STEPS):
        output = forward(model, rank_slice(batch_ids(step), rank, world_size))
        output.loss.backward()
        if step == 1:
            found = {"logits": output.logits.detach(), "gradients": gradients(model, handle)}
        losses.append(output.loss.item())
        optimizer.step()
        optimizer.zero_grad()
        handle.step()
        copies += handle.metrics()["copies_per_layer"]
    return found | {"losses": losses, "copies": copies, "state": handle.weights.state_dict()}


def train_on_one(family: str, world_size: int) -> dict[str, Any]:
    """The same with transformers alone. The loss is the mean of the ranks' losses: the auxiliary one is a micro-batch's own."""
    model = make_family_model(family)
    optimizer = torch.optim.AdamW(model.parameters(), **ADAMW)
    losses, found = [], {}
    for step in range(NUM_STEPS):
        outputs = [forward(model, rank_slice(batch_ids(step), rank, world_size)) for rank in range(world_size)]
        (sum(output.loss for output in outputs) / world_size).backward()
        if step == 1:
            grads = {n: p.grad.clone() for n, p in model.named_parameters(remove_duplicate=False) if p.grad is not None}
            found = {"logits": [output.logits.detach() for output in outputs], "gradients": grads}
        losses.append([output.loss.item() for output in outputs])
        optimizer.step()
        optimizer.zero_grad()
    return found | {"losses": losses, "state": model.state_dict()}


def warm_up(rank: int) -> None:
    """Import transformers and compile the planner, which takes longer than any test."""
    model, _ = wrapped("mixtral")
    forward(model, batch_ids(0)).loss.backward()


@functools.cache
def is_warm(world_size: int) -> None:
    """The ranks have done so."""
    run_ranks(world_size, warm_up)


# Every family on two ranks; on four also one with biases, and one with groups of experts and shared ones.
CASES = [*((family, 2) for family in FAMILIES), ("gpt_oss", 4), ("deepseek_v3", 4)]


@pytest.mark.parametrize("family,world_size", CASES)
def test_family_trains_as_it_does_unwrapped(family: str, world_size: int) -> None:
    """Logits, loss, every gradient by name, AdamW steps, and the weights after them, with copies that change."""
    is_warm(world_size)
    expected = train_on_one(family, world_size)
    results = run_ranks(world_size, train_on_ranks, family)
    for rank, result in enumerate(results):
        assert_close("logits", result["logits"], expected["logits"][rank])
        assert_all_close(result["gradients"], expected["gradients"])
        assert result["losses"] == pytest.approx([losses[rank] for losses in expected["losses"]], rel=1e-5)
        assert result["copies"] > 0
    assert_all_close(results[0]["state"], expected["state"], rtol=1e-4)
    assert all(result["state"] == {} for result in results[1:])


def round_trip_on_ranks(rank: int, family: str, folder: str) -> dict[str, Any]:
    """Out and in again, through the state dict, our files and transformers' own, the last into a model built on meta."""
    model, handle = wrapped(family)
    original = handle.weights.state_dict()
    handle.weights.save_safetensors(f"{folder}/ours", max_file_bytes=20_000)
    output = forward(model, batch_ids(0)).logits.detach()
    states: list[Any] = [original]
    dist.broadcast_object_list(states, src=0)
    outputs = []
    for source in (states[0], "ours", "theirs"):
        fresh, fresh_handle = wrapped(family, device="meta")
        unused = (
            fresh_handle.weights.load_state_dict(source)
            if isinstance(source, dict)
            else fresh_handle.weights.load_safetensors(f"{folder}/{source}")
        )
        assert unused == ()
        outputs.append(forward(fresh, batch_ids(0)).logits.detach())
    return {"state": original, "output": output, "outputs": outputs}


@pytest.mark.parametrize("family,world_size", CASES)
def test_weights_round_trip(family: str, world_size: int, tmp_path: Path) -> None:
    """The family's own state dict bit by bit, and files that transformers and moesaic read from each other."""
    model = make_family_model(family)
    model.save_pretrained(tmp_path / "theirs")
    results = run_ranks(world_size, round_trip_on_ranks, family, str(tmp_path))
    assert_bitwise(results[0]["state"], model.state_dict())
    assert_bitwise(type(model).from_pretrained(tmp_path / "ours").state_dict(), model.state_dict())
    index = json.loads((tmp_path / "ours" / "model.safetensors.index.json").read_text(encoding="utf-8"))
    files = list(index["weight_map"].values())
    assert set(files) == {path.name for path in (tmp_path / "ours").glob("*.safetensors")}
    assert all((tmp_path / "ours" / file).stat().st_size < 30_000 or files.count(file) == 1 for file in files)
    for result in results:
        for output in result["outputs"]:
            assert torch.equal(output, result["output"])
    assert results[0]["output"].shape[0] == BATCH
