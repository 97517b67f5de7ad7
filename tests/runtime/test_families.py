"""Families of transformers through the interface of its experts: what they compute wrapped, and their files."""

import importlib
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from moesaic import ExpertShape, MoELayer, RouterConfig, RuntimeConfig, ShardedExperts, shard_experts
from moesaic.kernels import Clamp
from moesaic.launch.doctor.families import FamilyState, check_family
from moesaic.launch.doctor.family_models import family_names, small_model
from moesaic.launch.run.process import Process
from moesaic.runtime.adapters import experts_modules, find_layers
from tests.helpers.compare import assert_all_close, assert_bitwise, assert_close
from tests.helpers.families import make_family_model, random_copies
from tests.helpers.model import rank_slice
from tests.helpers.ranks import run_ranks

pytest.importorskip("transformers", reason="transformers is not installed: pip install 'moesaic[hf]'")
save_file = pytest.importorskip("safetensors.torch", reason="safetensors is not installed: pip install 'moesaic[hf]'").save_file

# Every layout and kind of function that the installed transformers has, and both ways that checkpoints keep experts.
SAMPLE = (
    "mixtral",  # matrices apart, the block by another name
    "qwen3_moe",  # matrices apart
    "granitemoe",  # fused, by another name
    "jamba",  # beside layers of another kind
    "aria",  # transposed
    "gpt_oss",  # transposed and interleaved, with biases and a clamp
    "openai_privacy_filter",  # transposed, with biases and a clamp
    "minimax_m3_vl",  # a clamp without biases
    "deepseek_v4",  # a clamped SiLU
    "inkling2",  # a function of gate and up
    "gemma4",  # GELU
    "nemotron_h",  # without a gate
)


def process_of(rank: int) -> tuple[Process, DeviceMesh]:
    world_size = dist.get_world_size()
    process = Process(rank, world_size, rank, world_size, None, torch.device("cpu"))
    return process, init_device_mesh("cpu", (world_size,))


def state_of(rank: int, family: str) -> FamilyState:
    return check_family(*process_of(rank), family)


@pytest.mark.parametrize("family", SAMPLE)
def test_family_computes_what_it_does_unwrapped(family: str) -> None:
    """Logits, loss and every gradient."""
    states = run_ranks(2, state_of, family)
    assert states[0] == states[1]
    assert states[0].state == "pass", states[0]


def state_of_a_wrong_one(rank: int) -> FamilyState:
    """Experts whose up is multiplied by 1.001."""
    right = experts_modules._activation_of
    experts_modules._activation_of = lambda module: (
        lambda gate_up: nn.functional.silu(gate_up.chunk(2, 1)[0]) * (gate_up.chunk(2, 1)[1] * 1.001)
    )
    try:
        return state_of(rank, "mixtral")
    finally:
        experts_modules._activation_of = right


def test_a_family_that_computes_something_else_fails() -> None:
    state, _ = run_ranks(2, state_of_a_wrong_one)
    assert (state.state, state.block) == ("fail", "MixtralExperts")
    assert state.worst is not None and 1e-5 < state.worst < 1e-1


def test_families_without_the_interface_say_so() -> None:
    (state,) = run_ranks(1, state_of, "dbrx")
    assert state.state == "unsupported"
    assert "register_adapter" in state.reason
    assert {"dbrx", *SAMPLE} <= set(family_names())


def files_on_ranks(rank: int, family: str, folder: str) -> dict[str, Tensor]:
    """Transformers' files into a wrapped model without values, and out again as ours."""
    _, mesh = process_of(rank)
    model = small_model(family)
    with torch.no_grad():
        for tensor in (*model.parameters(), *model.buffers()):
            tensor.zero_()
    handle = shard_experts(model, mesh=mesh, config=RuntimeConfig(policy="static", slots=0, timeout_s=60))
    assert handle.weights.load_safetensors(f"{folder}/theirs") == ()
    handle.weights.save_safetensors(f"{folder}/ours")
    return handle.weights.state_dict()


@pytest.mark.parametrize("family", SAMPLE)
def test_files_are_transformers_own(family: str, tmp_path: Path) -> None:
    """Both read the other's, bit by bit, under the names of transformers' conversion mapping."""
    model: Any = small_model(family)
    model.save_pretrained(tmp_path / "theirs")
    state, _ = run_ranks(2, files_on_ranks, family, str(tmp_path))
    assert_bitwise(state, model.state_dict())
    assert_bitwise(type(model).from_pretrained(tmp_path / "ours", dtype=torch.float32).state_dict(), model.state_dict())


def model_with_vision() -> Any:
    """Transformers' mapping for it transposes a tensor unless it has the model's shape."""
    transformers = importlib.import_module("transformers")
    text = dict(vocab_size=48, hidden_size=32, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=2, head_dim=16)
    experts = dict(num_experts=5, num_experts_per_tok=2, moe_intermediate_size=24, intermediate_size=40)
    vision = dict(depth=1, hidden_size=16, intermediate_size=16, num_heads=2, out_hidden_size=32, deepstack_visual_indexes=[])
    torch.manual_seed(0)
    config = transformers.Qwen3VLMoeConfig(text_config=text | experts, vision_config=vision)
    return transformers.Qwen3VLMoeForConditionalGeneration(config)


def load_both_layouts(rank: int) -> tuple[tuple[str, ...], list[dict[str, Tensor]]]:
    _, mesh = process_of(rank)
    model = model_with_vision()
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    handle = shard_experts(model, mesh=mesh, config=RuntimeConfig(policy="static", slots=0, shard_dense=False, timeout_s=60))
    transposed = {name: tensor.mT.contiguous() if ".experts." in name else tensor for name, tensor in state.items()}
    unused, found = (), []
    for each in (state, transposed):
        with torch.no_grad():
            for parameter in handle.parameters():
                parameter.zero_()
        unused += handle.weights.load_state_dict(each)
        found.append(handle.weights.state_dict())
    return unused, found


def test_a_mapping_that_goes_by_the_models_shapes() -> None:
    ((unused, found),) = run_ranks(1, load_both_layouts)
    assert unused == ()
    for state in found:
        assert_bitwise(state, model_with_vision().state_dict())


def load_apart(rank: int, folder: str) -> tuple[str, ...]:
    """A model of fused files reads those with experts apart."""
    _, mesh = process_of(rank)
    model = type(small_model("mixtral")).from_pretrained(f"{folder}/fused", dtype=torch.float32)
    handle = shard_experts(model, mesh=mesh, config=RuntimeConfig(policy="static", slots=0, timeout_s=60))
    return handle.weights.load_safetensors(f"{folder}/apart")


def test_a_model_of_fused_files_reads_experts_apart(tmp_path: Path) -> None:
    model: Any = small_model("mixtral")
    model.save_pretrained(tmp_path / "apart")
    model.config.save_pretrained(tmp_path / "fused")
    state = {name: tensor.contiguous() for name, tensor in model.state_dict().items()}
    save_file(state, tmp_path / "fused" / "model.safetensors", {"format": "pt"})
    assert run_ranks(2, load_apart, str(tmp_path)) == [(), ()]


class Named(nn.Module):
    """Transformers' experts by another name than `experts`, in a model that is not transformers' own."""

    base_model_prefix = "model"

    def __init__(self) -> None:
        super().__init__()
        self.bank = make_family_model("mixtral").model.layers[0].mlp.experts


def names_on_ranks(rank: int) -> tuple[set[str], set[str]]:
    _, mesh = process_of(rank)
    model = Named()
    before = set(model.state_dict())
    handle = shard_experts(model, mesh=mesh, config=RuntimeConfig(policy="static", slots=0, shard_dense=False, timeout_s=60))
    return before, set(handle.weights.state_dict())


def test_experts_by_another_name_keep_it() -> None:
    ((before, after),) = run_ranks(1, names_on_ranks)
    assert after == before == {"bank.gate_up_proj", "bank.down_proj"}


def test_layers_may_choose_different_numbers_of_experts() -> None:
    """As HunYuan's configuration allows; the number only prices."""
    assert experts_modules.top_k_of(SimpleNamespace(moe_topk=[2, 4, 3])) == 4
    assert experts_modules.top_k_of(SimpleNamespace(num_experts_per_tok=2)) == 2
    assert experts_modules.top_k_of(SimpleNamespace()) == 1


def test_models_without_experts_of_transformers_do_not_ask_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever version is installed, or none."""

    class Other(nn.Module):
        base_model_prefix = "model"

    model = Other()
    model.layer = MoELayer(8, 6, 4, 2)
    monkeypatch.setitem(sys.modules, "transformers.conversion_mapping", None)
    assert [layer.name for layer in find_layers(model)] == ["layer"]


def drop_on_ranks(rank: int) -> tuple[Tensor, Tensor]:
    _, mesh = process_of(rank)
    model = make_family_model("mixtral")
    ids, gates, x = torch.tensor([[0, 5], [5, 5], [4, 1]]), torch.rand(3, 2), torch.randn(3, 32)
    expected = model.model.layers[0].mlp.experts(x, ids, gates)
    shard_experts(model, mesh=mesh, config=RuntimeConfig(policy="static", slots=0, shard_dense=False, timeout_s=60))
    return model.model.layers[0].mlp.experts(x, ids, gates).detach(), expected.detach()


def test_an_assignment_to_no_expert_is_dropped() -> None:
    """Of five experts number 5, as transformers' own experts take it."""
    for actual, expected in run_ranks(2, drop_on_ranks):
        assert_close("output", actual, expected)
        assert not actual[1].any()


def squared(up: Tensor) -> Tensor:
    return up.relu().square()


def geglu(gate_up: Tensor) -> Tensor:
    gate, up = gate_up.chunk(2, dim=-1)
    return nn.functional.gelu(gate) * up


class OtherActivations(nn.Module):
    """Two layers of one's own: two matrices and a squared ReLU, and a gate with a GELU."""

    def __init__(self) -> None:
        super().__init__()
        self.two = MoELayer(6, 5, 3, 2, activation=squared, has_gate=False, router=RouterConfig(aux_loss_coef=0.0))
        self.gated = MoELayer(6, 5, 3, 2, activation=geglu, router=RouterConfig(aux_loss_coef=0.0))

    def forward(self, x: Tensor) -> Tensor:
        return self.gated(x + self.two(x))


def train_other_activations(rank: int) -> dict[str, Tensor]:
    torch.manual_seed(2)
    model = OtherActivations()
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    handle = shard_experts(model, mesh=mesh, config=RuntimeConfig(policy="static", slots=2, timeout_s=60), solver=random_copies)
    optimizer = torch.optim.SGD(handle.parameter_groups(), lr=0.3)
    for step in range(3):
        x = torch.randn(8, 6, generator=torch.Generator().manual_seed(step))
        model(rank_slice(x, rank, dist.get_world_size())).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        handle.step()
    return {name: tensor.clone() for name, tensor in handle.weights.state_dict().items()}


def test_layers_of_ones_own_with_another_activation() -> None:
    """Shared among two ranks, with copies, they train as they do unwrapped."""
    torch.manual_seed(2)
    model = OtherActivations()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.3)
    for step in range(3):
        x = torch.randn(8, 6, generator=torch.Generator().manual_seed(step))
        model(x).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    found, _ = run_ranks(2, train_other_activations)
    assert_all_close(found, model.state_dict())
    for layer, size in ((model.two, (5, 6)), (model.gated, (10, 6))):
        assert layer.experts[0].gate_up.shape == size
    with pytest.raises(ValueError, match="clamp is an activation"):
        MoELayer(6, 5, 3, 2, activation=geglu, clamp=Clamp(1.702, 7.0))


def test_experts_of_ones_own_with_another_activation() -> None:
    """Two matrices and a function between them; without one they are refused."""
    experts = ShardedExperts(ExpertShape(4, 3, has_gate=False), 2, 1, activation=nn.functional.gelu)
    experts.runtime.bank.reset_parameters()
    x, ids, gates = torch.randn(5, 4), torch.tensor([[0], [1], [0], [1], [1]]), torch.rand(5, 1)
    rows = [(experts[int(e)].down @ nn.functional.gelu(experts[int(e)].gate_up @ row)) for row, e in zip(x, ids, strict=True)]
    torch.testing.assert_close(experts(x, ids, gates), torch.stack(rows) * gates)
    with pytest.raises(ValueError, match="no SwiGLU; give their activation"):
        ShardedExperts(ExpertShape(4, 3, has_gate=False), 2, 1)
    with pytest.raises(ValueError, match="PReLU has parameters"):
        ShardedExperts(ExpertShape(4, 3, has_gate=False), 2, 1, activation=nn.PReLU())
