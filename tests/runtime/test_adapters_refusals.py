"""What adapters refuse, in one line that says what to do, and how little memory a model from the meta device takes."""

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode

from moesaic import MoELayer, RuntimeConfig, shard_experts
from moesaic.runtime.adapters import find_layers
from moesaic.runtime.adapters.meta import allocate_meta
from tests.helpers.families import batch_ids, forward, make_family_model
from tests.helpers.ranks import run_ranks

pytest.importorskip("transformers", reason="transformers is not installed: pip install 'moesaic[hf]'")
pytest.importorskip("safetensors", reason="safetensors is not installed: pip install 'moesaic[hf]'")


def test_models_without_known_blocks_are_refused() -> None:
    """A dense model, and a block that no adapter knows, are listed with what is known."""
    import transformers

    sizes = dict(vocab_size=8, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1)
    with torch.device("meta"):
        dense = transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes))
        unknown = transformers.Llama4ForCausalLM(transformers.Llama4TextConfig(**sizes, num_key_value_heads=1, head_dim=8))
    for model, seen in ((dense, "LlamaMLP"), (unknown, "Llama4TextExperts")):
        with pytest.raises(ValueError, match=f"{seen}.*experts modules of transformers.*register_adapter") as refused:
            find_layers(model)
        assert "\n" not in str(refused.value)


def test_buffers_that_nothing_restores_are_refused() -> None:
    model = nn.Module()
    model.register_buffer("table", torch.empty(3, device="meta"), persistent=False)
    with pytest.raises(ValueError, match=r"no state dict holds.*on a real device"):
        allocate_meta(model, torch.device("cpu"))


class Allocations(TorchDispatchMode):
    """Bytes on this rank of every new tensor outside the meta device, and of every tensor that is copied."""

    def __init__(self) -> None:
        super().__init__()
        self.created: dict[int, Tensor] = {}  # by address; kept alive, so that no address is used again
        self.copied: list[int] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if func is torch.ops.aten.copy_.default:
            self.copied.append(args[1].nbytes)
        elif isinstance(result, Tensor) and not result.is_meta:
            local = result.to_local() if isinstance(result, DTensor) else result
            self.created.setdefault(local.untyped_storage().data_ptr(), local)
        return result


def local_bytes(model: nn.Module) -> int:
    return sum((t.to_local() if isinstance(t, DTensor) else t).nbytes for t in (*model.parameters(), *model.buffers()))


def shard_from_meta(rank: int, folder: str) -> dict[str, Any]:
    """Bytes that sharding and loading allocate, and what wrong folders and states are told."""
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    with Allocations() as allocations:
        model = make_family_model("mixtral", device="meta")
        handle = shard_experts(model, mesh=mesh, config=RuntimeConfig(policy="static", slots=0, timeout_s=60))
    # Weights are what counts: the integers that transports show each other take the same few pages whatever the model.
    sharding = sum(tensor.nbytes for tensor in allocations.created.values() if tensor.is_floating_point())
    with Allocations() as allocations:
        handle.weights.load_safetensors(f"{folder}/theirs")
    loading = max(allocations.copied)
    model(input_ids=batch_ids(0))
    messages = []
    state = {name: torch.zeros(t.shape) for name, t in make_family_model("mixtral", device="meta").state_dict().items()}
    gate, down = "model.layers.1.mlp.gate.weight", "model.layers.0.mlp.experts.down_proj"
    for change in ({}, {gate: None}, {down: torch.zeros(4, 32, 24)}, {gate: torch.zeros(5, 32, dtype=torch.int8)}):
        changed = {name: t for name, t in (state | change).items() if t is not None} | {"model.extra": torch.zeros(1)}
        try:
            messages.append(" ".join(handle.weights.load_state_dict(changed)))
        except ValueError as error:
            messages.append(str(error))
    for refused in (lambda: handle.weights.load_safetensors(folder), lambda: handle.weights.save_safetensors(f"{folder}/theirs")):
        with pytest.raises(ValueError) as error:
            refused()
        messages.append(str(error.value))
    return {"local": local_bytes(model), "sharding": sharding, "loading": loading, "messages": messages}


def test_a_model_from_the_meta_device_is_never_whole(tmp_path: Path) -> None:
    """A rank allocates about its part, and reads single tensors; wrong states and folders are one line."""
    model = make_family_model("mixtral")
    model.save_pretrained(tmp_path / "theirs")
    largest = 24 * 32 * 4 * 2  # one expert's gate and up; rows of the embedding are fewer
    for result in run_ranks(2, shard_from_meta, str(tmp_path)):
        assert result["local"] < 0.65 * local_bytes(model)  # five experts: one rank owns three
        assert result["sharding"] < 1.2 * result["local"]
        assert result["loading"] <= largest
        expected = [
            "model.extra",
            "lacks 'model.layers.1.mlp.gate.weight'",
            "shape (4, 32, 24) in the state and (5, 32, 24) in the model",
            "is torch.int8, a quantized weight; dequantize",
            "holds no safetensors file",
            "holds safetensors files already; give an empty folder",
        ]
        for message, part in zip(result["messages"], expected, strict=True):
            assert part in message
            assert "\n" not in message


def own_layers_through_the_same_doors(rank: int, folder: str) -> tuple[dict[str, Tensor], list[bool]]:
    """The state of moesaic's own layer; states that are loaded: that one, files, and one tensor for all experts as once."""
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    torch.manual_seed(0)
    plain = nn.Sequential(nn.Linear(8, 8), MoELayer(8, 8, 3, 1))
    state = {name: t.clone() for name, t in plain.state_dict().items()}
    fused = {name: t for name, t in state.items() if ".experts." not in name}
    for weight in ("gate_up", "down"):
        fused[f"1.experts.{weight}"] = torch.stack([state[f"1.experts.{e}.{weight}"] for e in range(3)])
    handle = shard_experts(plain, mesh=mesh)
    found = handle.weights.state_dict()
    handle.weights.save_safetensors(folder)
    loaded = []
    for load, source in (
        (handle.weights.load_state_dict, state),
        (handle.weights.load_safetensors, folder),
        (handle.weights.load_state_dict, fused),
    ):
        with torch.no_grad():
            for parameter in plain.parameters():
                parameter.zero_()
        assert load(source) == ()
        whole = handle.weights.state_dict()
        loaded.append(whole.keys() == found.keys() and all(torch.equal(whole[name], found[name]) for name in whole))
    with pytest.raises(ValueError, match=r"the state lacks '1\.experts\.\d\.gate_up'"):
        handle.weights.load_state_dict({name: t for name, t in state.items() if ".gate_up" not in name})
    assert rank != 0 or found.keys() == state.keys()
    return {name: found[name] - state[name] for name in found}, loaded


def test_own_layers(tmp_path: Path) -> None:
    for differences, loaded in run_ranks(2, own_layers_through_the_same_doors, str(tmp_path / "files")):
        assert all(not difference.any() for difference in differences.values())
        assert loaded == [True] * 3


def checkpoint_gradients(rank: int) -> bool:
    """Gradient checkpointing of transformers repeats the routing."""
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    grads = []
    for use_checkpoint in (False, True):
        model = make_family_model("deepseek_v3")
        if use_checkpoint:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        shard_experts(model, mesh=mesh, config=RuntimeConfig(policy="static", slots=0))
        model.train()
        forward(model, batch_ids(rank)).loss.backward()
        grads.append([p.grad.to_local() if isinstance(p.grad, DTensor) else p.grad for p in model.parameters()])
    return all((a is None) == (b is None) and (a is None or torch.equal(a, b)) for a, b in zip(*grads, strict=True))


def test_gradient_checkpointing() -> None:
    assert run_ranks(2, checkpoint_gradients) == [True, True]


def save_a_state_without_experts(rank: int, folder: str) -> str:
    """As that of a rank which owns none is."""
    model = make_family_model("mixtral")
    shard_experts(model, mesh=init_device_mesh("cpu", (2,)), config=RuntimeConfig(shard_dense=False))
    state = {name: tensor for name, tensor in model.state_dict().items() if ".experts." not in name}
    with pytest.raises(RuntimeError) as refused:
        model.save_pretrained(f"{folder}/{rank}", state_dict=state)
    return str(refused.value)


def test_a_state_without_experts_is_no_checkpoint(tmp_path: Path) -> None:
    for message in run_ranks(2, save_a_state_without_experts, str(tmp_path)):
        assert "lacks 5 of 5 experts of model.layers." in message
    assert not any(path.suffix == ".safetensors" for path in tmp_path.rglob("*"))
