"""LoRA on attention and on experts, as peft makes it, against peft on the unwrapped model."""

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor

from moesaic import Handle, RuntimeConfig, shard_experts
from moesaic.placement import OwnerMap
from moesaic.runtime.experts.expert import num_elements
from tests.helpers.compare import assert_all_close, assert_close
from tests.helpers.families import batch_ids, forward, make_family_model, random_copies
from tests.helpers.model import rank_slice
from tests.helpers.pages import ROOT, Program
from tests.helpers.ranks import run_ranks
from tests.helpers.resident import peak_from_here
from tests.runtime.test_generate import UNEQUAL, generated

load_file = pytest.importorskip("safetensors.torch", reason="safetensors is not installed: pip install 'moesaic[hf]'").load_file
peft = pytest.importorskip("peft", reason="peft is not installed: pip install peft")

NUM_STEPS, MIGRATES_AFTER = 10, (2, 5)
# Gradients that are zero but for rounding must not become steps of full size.
ADAMW = dict(lr=1e-2, eps=1e-3)


def adapted(family: str, parameters: tuple[str, ...] = ("gate_up_proj", "down_proj"), **changes: Any) -> Any:
    """A small random model with random adapters, the same in every process. `changes` go into the model's configuration."""
    dtype = changes.pop("dtype", torch.float32)
    model = make_family_model(family, **changes).train().to(dtype)
    targets = [f"mlp.experts.{name}" for name in parameters]
    how = dict(target_modules=["q_proj", "v_proj"], target_parameters=targets, init_lora_weights=False)
    torch.manual_seed(11)
    return peft.get_peft_model(model, peft.LoraConfig(r=3, lora_alpha=2, **how))


def shard(model: Any, num_replicas: int = 1, **options: Any) -> Handle:
    config = RuntimeConfig(**(dict(slots=6, timeout_s=60) | options))
    shape = (num_replicas, dist.get_world_size() // num_replicas)
    mesh = init_device_mesh("cpu", shape, mesh_dim_names=("replicate", "shard"))
    return shard_experts(model, mesh=mesh if num_replicas > 1 else mesh["shard"], config=config, solver=random_copies)


def trained(parameters: list[Any]) -> list[Any]:
    return [parameter for parameter in parameters if parameter.requires_grad]


def gradients(model: Any, handle: Handle) -> dict[str, Tensor]:
    """Of every parameter that has one, whole, by the names of the unwrapped model."""
    grads = {
        name: parameter.grad.full_tensor()
        for name, parameter in model.named_parameters()
        if isinstance(parameter, DTensor) and parameter.grad is not None
    }
    for block, layer in handle.layers.items():
        for weight, name in layer.naming.fused:
            everybody: list[Any] = [None] * dist.get_world_size()
            mine = {e: layer[e].parameter(weight).grad for e in layer.runtime.owned_experts}
            dist.all_gather_object(everybody, {e: grad.as_subclass(Tensor) for e, grad in mine.items() if grad is not None})
            if found := {e: grad for part in everybody for e, grad in part.items()}:
                whole = torch.stack([found[e] for e in range(layer.num_experts)])
                grads[f"{block}.{name}"] = layer.naming.fuse(weight, whole)
    return grads


def exchanged(handle: Handle) -> list[OwnerMap]:
    """The owner maps, with each layer's first and last expert in each other's place."""
    maps = []
    for owners in handle.owner_maps:
        owners_LE = owners.expert_to_owner_LE.copy()
        owners_LE[:, [0, -1]] = owners_LE[:, [-1, 0]]
        maps.append(OwnerMap(owners_LE, owners.num_ranks))
    return maps


def logits_and_input_gradients(model: Any, ids: Tensor) -> tuple[Tensor, Tensor]:
    """The second of the loss, by the embedded tokens, which are random."""
    x = torch.randn(*ids.shape, 32, generator=torch.Generator().manual_seed(int(ids.sum()))).requires_grad_()
    output = model(inputs_embeds=x, labels=ids, use_cache=False)
    output.loss.backward()
    assert x.grad is not None
    return output.logits.detach(), x.grad


def train_on_ranks(rank: int, family: str, num_replicas: int, materialize: Any) -> dict[str, Any]:
    """AdamW steps while copies change and experts migrate."""
    world_size, model = dist.get_world_size(), adapted(family)
    handle = shard(model, num_replicas, materialize=materialize)
    optimizer = torch.optim.AdamW([{"params": trained(group["params"])} for group in handle.parameter_groups()], **ADAMW)
    grads, gathered, reduced = [], 0, 0
    for step in range(NUM_STEPS):
        forward(model, rank_slice(batch_ids(step), rank, world_size)).loss.backward()
        grads.append(gradients(model, handle))
        sent = handle._group.experts.traffic.total_bytes()
        gathered += sum(sent.get(op, 0) for op in ("gather", "calibrate"))
        reduced += sent.get("reduce", 0)
        optimizer.step()
        optimizer.zero_grad()
        handle.step()
        if step in MIGRATES_AFTER:
            before, wanted = handle.owner_maps, exchanged(handle)
            handle.migrate(wanted, optimizer)
            for old, new, now in zip(before, wanted, handle.owner_maps, strict=True):
                assert (now.expert_to_owner_LE == new.expert_to_owner_LE).all()
                assert (now.expert_to_owner_LE != old.expert_to_owner_LE).any()
    inputs = logits_and_input_gradients(model, rank_slice(batch_ids(0), rank, world_size))
    (bank,) = handle._banks
    sizes = [num_elements(sizes) for sizes in (bank.shape.tensor_sizes(), bank.shape.lora_sizes())]
    found = {"grads": grads, "inputs": inputs, "bytes": (gathered, reduced), "sizes": sizes, "memory": handle.telemetry.memory()}
    return found | {"scratch": len(bank.owned_grads._scratch), "state": handle.weights.state_dict()}


def train_on_one(family: str, world_size: int) -> dict[str, Any]:
    """The same with peft alone. The loss is the mean of the ranks' losses: the auxiliary one is a micro-batch's own."""
    model, grads = adapted(family), []
    optimizer = torch.optim.AdamW(trained(list(model.parameters())), **ADAMW)
    for step in range(NUM_STEPS):
        losses = [forward(model, rank_slice(batch_ids(step), rank, world_size)).loss for rank in range(world_size)]
        (sum(losses) / world_size).backward()
        grads.append({name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None})
        optimizer.step()
        optimizer.zero_grad()
    inputs = [logits_and_input_gradients(model, rank_slice(batch_ids(0), rank, world_size)) for rank in range(world_size)]
    return {"grads": grads, "inputs": inputs, "state": model.state_dict()}


@pytest.mark.parametrize(
    "family, world_size, num_replicas, materialize",
    [
        ("mixtral", 2, 1, "keep"),  # matrices [out, in], SwiGLU
        ("gpt_oss", 2, 1, "rematerialize"),  # [in, out], gate and up interleaved, with biases and a clamp
        ("qwen3_moe", 4, 2, "keep"),
        ("gpt_oss", 4, 1, "keep"),
    ],
)
def test_adapters_train_as_they_do_unwrapped(family: str, world_size: int, num_replicas: int, materialize: str) -> None:
    """Every gradient of ten steps, then weights, logits and gradients of inputs; only gradients of adapters travel."""
    expected, parts = train_on_one(family, world_size), run_ranks(world_size, train_on_ranks, family, num_replicas, materialize)
    for rank, found in enumerate(parts):
        assert any("lora_B" in name for name in found["grads"][0])
        for actual, wanted in zip(found["grads"], expected["grads"], strict=True):
            assert_all_close(actual, wanted)
        for actual, wanted in zip(found["inputs"], expected["inputs"][rank], strict=True):
            assert_close("logits or input gradients", actual, wanted)
        assert found["scratch"] == 0
    assert_all_close(parts[0]["state"], expected["state"])
    (gathered, reduced), (all_elements, adapters) = (sum(np.array(found["bytes"]) for found in parts), parts[0]["sizes"])
    assert gathered > 0
    assert reduced * all_elements == gathered * adapters


def generate_on_ranks(rank: int, shard_dense: bool) -> Tensor:
    model = adapted("mixtral").eval()
    shard(model, shard_dense=shard_dense)
    return generated(model, rank, UNEQUAL[rank])


@pytest.mark.parametrize("shard_dense", [True, False])
def test_generate_gives_the_tokens_of_the_unwrapped_model(shard_dense: bool) -> None:
    model = adapted("mixtral").eval()
    for rank, tokens in enumerate(run_ranks(2, generate_on_ranks, shard_dense)):
        assert torch.equal(tokens, generated(model, rank, UNEQUAL[rank]))


def train_in_bf16(rank: int) -> dict[str, tuple[float, float]]:
    """By gradient: how far off it is from that of the same weights in fp32, relative, here and in peft itself."""
    model, plain, exact = (
        adapted("mixtral", dtype=torch.bfloat16, num_experts_per_tok=5) for _ in range(3)
    )  # all: none is a near miss
    exact.to(torch.float32)
    handle = shard(model)
    for each in (model, plain, exact):
        forward(each, batch_ids(0)).loss.backward()
    expected, found = ({n: p.grad for n, p in m.named_parameters() if p.grad is not None} for m in (exact, plain))
    ours = gradients(model, handle)
    assert ours.keys() == expected.keys()
    assert {grad.dtype for grad in ours.values()} == {torch.float32}
    return {
        name: tuple(((grads[name] - grad).norm() / grad.norm()).item() for grads in (ours, found))  # type: ignore[misc]
        for name, grad in expected.items()
    }


def test_a_base_in_bf16_is_about_as_exact_as_in_peft() -> None:
    for errors in run_ranks(2, train_in_bf16):
        for name, (ours, theirs) in errors.items():
            assert ours <= 1.5 * theirs, f"{name}: off by {ours:.3g}, in peft by {theirs:.3g}"


def save_and_switch_off(rank: int, family: str, folder: str) -> dict[str, Any]:
    """Logits with the adapter, before and after; without it; the gradients while it is off; and what save_pretrained says."""
    model = adapted(family)
    handle = shard(model, materialize="rematerialize")
    ids = batch_ids(0)
    forward(model, ids).loss.backward()
    optimizer = torch.optim.SGD(trained(handle.parameters()), lr=1.0, foreach=False)
    optimizer.step()
    optimizer.zero_grad()
    handle.step()
    handle.weights.save_adapter(folder)
    whole = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
    if rank == 0:
        model.save_pretrained(f"{folder}/of-whole", state_dict=whole)
    saved = handle.weights.state_dict()
    with torch.no_grad():
        for parameter in trained(handle.parameters()):
            parameter.zero_()
    assert handle.weights.load_adapter(folder) == ()
    assert_all_close(handle.weights.state_dict(), saved, rtol=0)
    found = {"on": forward(model, ids).logits.detach()}
    with model.disable_adapter():
        off = forward(model, ids)
        found["off"] = off.logits.detach()
        handle.step()
    assert not any(parameter.grad is not None for parameter in handle.expert_parameters())
    assert_close("logits", forward(model, ids).logits.detach(), found["on"])
    refused = {
        "save the adapter": lambda: model.save_pretrained(f"{folder}/{rank}"),
        "merge adapters": model.merge_adapter,
        "merge or unload adapters": model.merge_and_unload,
        "add an adapter": lambda: model.add_adapter("second", model.peft_config["default"]),
        "delete an adapter": lambda: model.delete_adapter("default"),
        "make it active": lambda: model.base_model.set_adapter("second"),
    }
    found["messages"] = {}
    for what, call in refused.items():
        with pytest.raises(RuntimeError) as error:
            call()
        found["messages"][what] = str(error.value)
    return found


@pytest.mark.parametrize("family", ["mixtral", "gpt_oss"])
def test_adapters_that_are_saved_load_into_the_unwrapped_model(family: str, tmp_path: Path) -> None:
    """As peft itself reads them; `disable_adapter` gives the base model, and nothing learns meanwhile."""
    parts = run_ranks(2, save_and_switch_off, family, str(tmp_path))
    base = make_family_model(family).train()
    off = forward(base, batch_ids(0)).logits
    files = [load_file(tmp_path / folder / "adapter_model.safetensors") for folder in (".", "of-whole")]
    assert_all_close(*files, rtol=0)
    loaded = peft.PeftModel.from_pretrained(base, tmp_path, is_trainable=True)
    on = forward(loaded, batch_ids(0)).logits
    assert not torch.allclose(on, off, atol=1e-2)
    for found in parts:
        assert_close("logits", found["on"], on)
        assert_close("logits without the adapter", found["off"], off)
        messages = found["messages"]
        assert "handle.weights.save_adapter(folder) on every rank" in messages.pop("save the adapter")
        assert "has the adapter ['default'] alone" in messages.pop("make it active")
        for what, message in messages.items():
            assert f"peft cannot {what} once experts are shared" in message
            assert "\n" not in message


def refuse(rank: int) -> dict[str, str]:
    def without_experts_lora(**options: Any) -> Any:
        return peft.get_peft_model(make_family_model("mixtral"), peft.LoraConfig(r=2, **options))

    two, off, unfrozen, merged = (adapted("mixtral") for _ in range(4))
    two.add_adapter("second", two.peft_config["default"])
    off.base_model.disable_adapter_layers()
    unfrozen.requires_grad_(True)
    merged.merge_adapter()
    models = {
        "two": two,
        "off": off,
        "unfrozen": unfrozen,
        "merged": merged,
        "bias": adapted("gpt_oss", ("gate_up_proj_bias",)),
        "copy": without_experts_lora(target_modules=["q_proj"], modules_to_save=["experts"]),
    }
    messages = {}
    for case, model in models.items():
        before = {name: id(parameter) for name, parameter in model.named_parameters()}
        with pytest.raises(ValueError) as refused:
            shard(model)
        messages[case] = str(refused.value)
        assert before == {name: id(parameter) for name, parameter in model.named_parameters()}
    model = adapted("mixtral")
    handle = shard(model)
    handle.expert_parameters()[0].requires_grad_(True)
    with pytest.raises(RuntimeError) as error:
        forward(model, batch_ids(0)).loss.backward()
    messages["later"] = str(error.value)
    with pytest.raises(ValueError) as no_adapter:
        shard(make_family_model("mixtral")).weights.save_adapter("nowhere")
    return messages | {"none": str(no_adapter.value)}


def test_what_is_not_supported_is_refused_before_experts_move() -> None:
    (messages,) = run_ranks(1, refuse)
    for case, part in {
        "two": "has the adapters ['default', 'second'], active ['default'], but experts take one",
        "off": "disabled, but experts take one, which is active and not merged",
        "merged": "merged, but experts take one",
        "unfrozen": "requires a gradient, but of experts with adapters only these are trained",
        "bias": "adapts gate_up_proj_bias, but experts take LoRA on matrices: target_parameters of ['gate_up_proj', 'down_proj']",
        "copy": "is trained as a copy, by peft's ModulesToSaveWrapper",
        "later": "gate_up of expert 0 requires a gradient, but of experts with adapters only these are trained; freeze it again",
        "none": "MixtralForCausalLM has no adapters",
    }.items():
        assert part in messages[case], messages[case]
        assert "\n" not in messages[case]


BIG = dict(hidden_size=128, intermediate_size=2048, num_local_experts=16, num_hidden_layers=8, num_attention_heads=4)
BASE, RANK = 3 * 128 * 2048, 2  # adapters are small: whole ones, as they start, are not counted
LORA = RANK * (128 + 4096 + 2048 + 128)


def frozen_memory() -> dict[str, int]:
    """What two AdamW steps take with a frozen base in bf16: as counted, as predicted, and by how much the process grew."""
    torch.manual_seed(0)
    grown_bytes = peak_from_here()
    targets = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
    lora = peft.LoraConfig(r=RANK, target_modules=["q_proj", "v_proj"], target_parameters=targets)
    model = peft.get_peft_model(make_family_model("mixtral", device="meta", **BIG).to(torch.bfloat16), lora)
    # Over Gloo, since memory that ranks show each other would count in each.
    handle = shard(model, slots=8, materialize="rematerialize", transport="c10d")
    for parameter in handle.parameters():
        torch.nn.init.normal_(parameter.detach(), std=0.02)
    optimizer = torch.optim.AdamW([{"params": trained(group["params"])} for group in handle.parameter_groups()], fused=True)
    for step in range(2):
        forward(model, batch_ids(step)[:1]).loss.backward()  # few tokens, whose activations are not counted
        optimizer.step()
        handle.step()
    assert {p.dtype for p in handle.expert_parameters()} == {torch.bfloat16, torch.float32}
    assert all(p.grad is None for p in handle.expert_parameters() if not p.requires_grad)
    return handle.telemetry.memory(optimizer) | {"grown_bytes": grown_bytes()}


def frozen_memory_twice(rank: int) -> dict[str, int]:
    frozen_memory()  # what a first step loads and allocates for good
    return frozen_memory()


def test_memory_of_a_frozen_base_in_bf16() -> None:
    """2 bytes a weight; of adapters master, copy in bf16, gradient and two moments. Slots have gradients of adapters alone."""
    experts = 8 * 16 // 2
    for found in run_ranks(2, frozen_memory_twice):
        assert found["expert_bytes"] == experts * (2 * BASE + (4 + 2 + 4) * LORA)
        assert found["optimizer_bytes"] == pytest.approx(experts * 8 * LORA, rel=1e-3)
        assert found["slot_bytes_bound"] == 8 * 2 * (BASE + LORA) + 16 * 4 * LORA
        assert 0 < found["slot_bytes_peak"] <= found["slot_bytes_bound"]
        counted = found["expert_bytes"] + found["optimizer_bytes"] + found["slot_bytes_peak"]
        assert found["grown_bytes"] == pytest.approx(counted, rel=0.08)


def test_the_example_learns_and_saves(tmp_path: Path) -> None:
    path = ROOT / "examples/lora.py"
    assert path.read_text(encoding="utf-8").count("\n") <= 30
    command = ["torchrun", "--standalone", "--nproc-per-node", "2", str(path), str(tmp_path / "adapter")]
    output = Program(command, tmp_path, "example", cwd=ROOT).output()
    losses = [float(loss) for loss in re.findall(r"^\d+ loss ([\d.]+)$", output, re.MULTILINE)]
    assert len(losses) == 4
    assert losses[-1] < losses[0] - 0.3
    assert (tmp_path / "adapter" / "adapter_model.safetensors").exists()


def load_base(rank: int, family: str, folder: str) -> tuple[Tensor, dict[str, Tensor]]:
    """Logits and state of a model from the meta device that a checkpoint of the base was loaded into."""

    def built() -> Handle:
        model = make_family_model(family, device="meta").train()
        targets = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
        return shard(peft.get_peft_model(model, peft.LoraConfig(r=3, target_modules=["q_proj"], target_parameters=targets)))

    handle = built()
    assert handle.weights.load_safetensors(f"{folder}/base") == ()
    logits, state = forward(handle.model, batch_ids(0)).logits.detach(), handle.weights.state_dict()
    handle.weights.save_safetensors(f"{folder}/whole-{dist.get_world_size()}")
    torch.manual_seed(3)
    again = built()
    assert again.weights.load_safetensors(f"{folder}/whole-{dist.get_world_size()}") == ()
    assert_all_close(again.weights.state_dict(), state, rtol=0)
    return logits, state


@pytest.mark.parametrize("family", ["mixtral", "gpt_oss"])
def test_a_base_is_loaded_into_a_model_from_the_meta_device(family: str, tmp_path: Path) -> None:
    """Its adapters start as peft has them, without effect, and alike on any number of ranks."""
    base = make_family_model(family).train()
    base.save_pretrained(tmp_path / "base")
    expected = forward(base, batch_ids(0)).logits.detach()
    (_, of_one), *parts = [*run_ranks(1, load_base, family, str(tmp_path)), *run_ranks(2, load_base, family, str(tmp_path))]
    for logits, _ in parts:
        assert_close("logits", logits, expected)
    assert_all_close(parts[0][1], of_one, rtol=0)
    plain = {name.removeprefix("base_model.model.").replace("base_layer.", ""): tensor for name, tensor in of_one.items()}
    assert_all_close({name: tensor for name, tensor in plain.items() if "lora_" not in name}, base.state_dict(), rtol=0)
    for name, tensor in of_one.items():
        if "lora_A" in name:
            assert 0.9 < tensor.abs().max() * tensor.shape[1] ** 0.5 <= 1.0
            assert tensor.unique().numel() > 0.9 * tensor.numel()
        assert "lora_B" not in name or not tensor.any()


def refuse_on_meta(rank: int) -> str:
    lora = peft.LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights="gaussian")
    model = peft.get_peft_model(make_family_model("mixtral", device="meta"), lora)
    with pytest.raises(ValueError) as refused:
        shard(model)
    return str(refused.value)


def test_adapters_that_start_otherwise_need_a_real_device() -> None:
    (message,) = run_ranks(1, refuse_on_meta)
    assert "is on the meta device and starts with init_lora_weights='gaussian'" in message
    assert "\n" not in message
