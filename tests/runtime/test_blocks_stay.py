"""Blocks of transformers stay as they are when their experts are sharded: hooks, forwards, second names; and what is refused."""

import re
import types
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor
from torch.nn.utils import parametrizations, parametrize, prune, remove_weight_norm, weight_norm

from moesaic import Handle, MoELayer, RuntimeConfig, ShardedExperts, register_adapter, shard_experts
from moesaic.runtime.adapters import registry
from tests.helpers.compare import assert_all_close
from tests.helpers.families import batch_ids, forward, make_family_model
from tests.helpers.ranks import run_ranks

pytest.importorskip("transformers", reason="transformers is not installed: pip install 'moesaic[hf]'")

Change = Callable[[Any], Any]


def sharded(model: nn.Module) -> Handle:
    return shard_experts(model, mesh=init_device_mesh("cpu", (1,)), config=RuntimeConfig(policy="static", slots=0))


def run(model: nn.Module) -> dict[str, Tensor]:
    """Logits of a training step, and the gradients of the dense parameters by name."""
    torch.manual_seed(7)
    model.train()
    model.zero_grad()
    output = forward(model, batch_ids(0))
    output.loss.backward()
    grads = {n: p.grad for n, p in model.named_parameters() if ".experts." not in n and p.grad is not None}
    return {"logits": output.logits.detach()} | {
        n: (g.full_tensor() if isinstance(g, DTensor) else g).clone() for n, g in grads.items()
    }


def watch(model: Any) -> tuple[list[str], list[Any]]:
    """Every kind of hook on the first block, and on the experts of the second; they note their calls and change what passes."""
    calls: list[str] = []
    handles = []
    for name in ("0.mlp", "1.mlp.experts"):
        module = model.get_submodule(f"model.layers.{name}")

        def pre(module: nn.Module, args: Any, name: str = name) -> Any:
            calls.append(f"pre {name} {[tuple(a.shape) for a in args]}")
            return (args[0] * 1.5, *args[1:])

        def pre_with_kwargs(module: nn.Module, args: Any, kwargs: Any, name: str = name) -> Any:
            calls.append(f"pre with kwargs {name} {sorted(kwargs)}")
            return (args[0] + 0.25, *args[1:]), kwargs

        def after(module: nn.Module, args: Any, output: Any, name: str = name) -> Any:
            calls.append(f"after {name} {tuple(output.shape)}")
            return output * 0.75

        def after_with_kwargs(module: nn.Module, args: Any, kwargs: Any, output: Any, name: str = name) -> Any:
            calls.append(f"after with kwargs {name} {len(args)} {sorted(kwargs)}")
            return output + 0.125

        def before_backward(module: nn.Module, grads: Any, name: str = name) -> Any:
            calls.append(f"before backward {name} {[tuple(g.shape) for g in grads]}")
            return tuple(2 * g for g in grads)

        def after_backward(module: nn.Module, grads_in: Any, grads_out: Any, name: str = name) -> Any:
            calls.append(f"after backward {name} {[g is not None for g in grads_in]} {len(grads_out)}")
            return tuple(None if g is None else 3 * g for g in grads_in)

        handles += [
            module.register_forward_pre_hook(pre),
            module.register_forward_pre_hook(pre_with_kwargs, with_kwargs=True),
            module.register_forward_hook(after),
            module.register_forward_hook(after_with_kwargs, with_kwargs=True),
            module.register_full_backward_pre_hook(before_backward),
            module.register_full_backward_hook(after_backward),
        ]
    return calls, handles


def hooked(rank: int) -> None:
    plain, model = (make_family_model("mixtral") for _ in range(2))
    unhooked = run(plain)
    expected_calls, expected_handles = watch(plain)
    calls, handles = watch(model)
    sharded(model)
    expected = run(plain)
    assert (expected["logits"] - unhooked["logits"]).abs().max() > 1e-3
    assert_all_close(run(model), expected)
    assert calls == expected_calls
    assert len(calls) == 12
    for handle in (*handles, *expected_handles):
        handle.remove()
    assert_all_close(run(model), unhooked)
    assert len(calls) == 12
    # And those that come later.
    calls, handles = watch(model)
    assert_all_close(run(model), expected)
    assert calls == expected_calls


def test_hooks_are_called_as_before_and_can_be_removed() -> None:
    """On the block, which stays, and on the experts, whose place another module takes."""
    run_ranks(1, hooked)


def own_forward(self: Any, hidden_states: Tensor) -> Tensor:
    """A user's forward: another scale of the weights, keywords, a residual, and tokens in reverse."""
    tokens = hidden_states.reshape(-1, hidden_states.shape[-1]).flip(0)
    _, weights, ids = self.gate(tokens)
    y = self.experts(hidden_states=tokens, top_k_index=ids, top_k_weights=weights * 1.25)
    return y.flip(0).view_as(hidden_states) + 0.5 * hidden_states


def with_a_subclass(model: Any) -> None:
    from transformers.models.mixtral.modeling_mixtral import MixtralSparseMoeBlock

    class MyBlock(MixtralSparseMoeBlock):
        forward = own_forward

    for layer in model.model.layers:
        layer.mlp.__class__ = MyBlock


def with_a_patched_block(model: Any) -> None:
    for layer in model.model.layers:
        layer.mlp.forward = types.MethodType(own_forward, layer.mlp)


def with_shared_experts(model: Any) -> None:
    first, second = model.model.layers
    second.mlp.experts = first.mlp.experts


def with_second_names(model: Any) -> None:
    """The experts of one block are called under their second name, the other block under its own."""
    first, second = model.model.layers
    first.tokens_go_to = first.mlp.experts
    second.moe = second.mlp
    model.listed = nn.ModuleList([second.mlp.experts])

    def through_second_name(self: Any, hidden_states: Tensor) -> Tensor:
        tokens = hidden_states.reshape(-1, hidden_states.shape[-1])
        _, weights, ids = self.gate(tokens)
        return first.tokens_go_to(tokens, ids, weights).view_as(hidden_states) + 0.1 * model.listed[0](
            tokens, ids, weights
        ).view_as(hidden_states)

    first.mlp.forward = types.MethodType(through_second_name, first.mlp)


CHANGES: dict[str, Change] = {
    "subclass": with_a_subclass,
    "patched block": with_a_patched_block,
    "shared experts": with_shared_experts,
    "second names": with_second_names,
}


def fused_gradients(model: nn.Module, names: dict[str, str]) -> dict[str, Tensor]:
    """Gradients of whole experts modules, by the name that transformers has for them."""
    found = {}
    for module_name, name in names.items():
        experts = model.get_submodule(module_name)
        for theirs, ours in (("gate_up_proj", "gate_up"), ("down_proj", "down")):
            if isinstance(experts, ShardedExperts):
                found[f"{name}.{theirs}"] = torch.stack([expert.parameter(ours).grad.as_subclass(Tensor) for expert in experts])
            else:
                found[f"{name}.{theirs}"] = getattr(experts, theirs).grad
    return found


EXPERTS = {f"model.layers.{i}.mlp.experts": str(i) for i in range(2)}


def changed(rank: int, change: str, options: dict[str, Any]) -> None:
    plain, model = (make_family_model("mixtral", **options) for _ in range(2))
    unchanged = make_family_model("mixtral")
    if change:
        CHANGES[change](plain)
        CHANGES[change](model)
    sharded(model)
    expected = run(plain)
    assert (expected["logits"] - run(unchanged)["logits"]).abs().max() > 1e-3
    assert_all_close(run(model), expected)
    assert_all_close(fused_gradients(model, EXPERTS), fused_gradients(plain, EXPERTS))
    assert not any(type(module).__name__ == "MixtralExperts" for module in model.modules())
    same = {a == b: model.get_submodule(a) is model.get_submodule(b) for a in EXPERTS for b in EXPERTS}
    assert same == {True: True, False: change == "shared experts"}


@pytest.mark.parametrize("change", CHANGES)
def test_a_changed_block_computes_what_it_does_unwrapped(change: str) -> None:
    run_ranks(1, changed, change, {})


def test_router_jitter_is_that_of_the_seed() -> None:
    run_ranks(1, changed, "", {"router_jitter_noise": 0.1})


def test_experts_under_second_names_are_replaced_everywhere() -> None:
    """Wherever the model holds them, one module takes their place."""
    run_ranks(1, hold_twice)


class Plain(nn.Module):
    """A block that transformers does not have."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(3))


class PlainAdapter:
    name = "Plain"

    def matches(self, module: nn.Module) -> bool:
        return isinstance(module, Plain)

    def convert(self, module: nn.Module) -> MoELayer:
        return MoELayer(8, 8, 3, 1)


def hold_twice(rank: int) -> None:
    model = make_family_model("mixtral")
    with_second_names(model)
    sharded(model)
    first, second = model.model.layers
    assert isinstance(first.mlp.experts, ShardedExperts)
    assert first.tokens_go_to is first.mlp.experts
    assert second.moe is second.mlp
    assert model.listed[0] is second.moe.experts is second.mlp.experts
    # A block that an adapter replaces whole
    register_adapter(PlainAdapter())
    try:
        holder = nn.Module()
        holder.block = Plain()
        holder.again = nn.ModuleList([holder.block])
        sharded(holder)
    finally:
        registry._ADAPTERS.pop(0)
    assert isinstance(holder.block, MoELayer)
    assert holder.again[0] is holder.block


def patch_forward(experts: Any) -> Callable[[], None]:
    experts.forward = types.MethodType(lambda self, x, ids, weights: 2 * x, experts)
    return lambda: delattr(experts, "forward")


def override_forward(experts: Any) -> Callable[[], None]:
    before = type(experts)

    class Doubled(before):  # type: ignore[misc, valid-type]
        def forward(self, *args: Any) -> Tensor:
            return 2 * super().forward(*args)

    experts.__class__ = Doubled
    return lambda: setattr(experts, "__class__", before)


def parametrize_weight(experts: Any) -> Callable[[], None]:
    parametrizations.weight_norm(experts, "down_proj", dim=0)
    return lambda: parametrize.remove_parametrizations(experts, "down_proj")


def normalize_with_hooks(experts: Any) -> Callable[[], None]:
    weight_norm(experts, "down_proj", dim=0)
    return lambda: remove_weight_norm(experts, "down_proj")


def prune_weight(experts: Any) -> Callable[[], None]:
    prune.identity(experts, "gate_up_proj")
    return lambda: prune.remove(experts, "gate_up_proj")


def add_a_parameter(experts: Any) -> Callable[[], None]:
    experts.scale = nn.Parameter(torch.ones(()))
    return lambda: delattr(experts, "scale")


REFUSED: dict[str, tuple[Callable[[Any], Callable[[], None]], str]] = {
    "patched forward": (patch_forward, "MixtralExperts, has a forward of its own on the instance.*remove it"),
    "overridden forward": (override_forward, "Doubled, overrides forward, which would be lost; override that of the block"),
    "parametrized": (parametrize_weight, r"parametrized weights \(down_proj\).*remove_parametrizations first"),
    "weight norm of hooks": (
        normalize_with_hooks,
        r"has the weights .*down_proj_g.* where .* down_proj.*; undo what changed them",
    ),
    "pruned": (prune_weight, r"has the weights .*gate_up_proj_mask.* where .*; undo what changed them"),
    "another parameter": (add_a_parameter, r"has the weights .*scale.* where .*; undo what changed them"),
}


def refuse_and_retry(rank: int, what: str) -> str:
    """Refused with the model as it was, and shared once the change is undone."""
    change, _ = REFUSED[what]
    model = make_family_model("mixtral")
    expected = run(model)
    undo = change(model.model.layers[1].mlp.experts)
    before = dict(model.named_modules()), {n: (id(p), p.detach().clone()) for n, p in model.named_parameters()}
    with pytest.raises(ValueError, match=r"^model\.layers\.1\.mlp\.experts") as refused:
        sharded(model)
    assert dict(model.named_modules()) == before[0]
    after = {n: (id(p), p) for n, p in model.named_parameters()}
    assert {n: i for n, (i, _) in after.items()} == {n: i for n, (i, _) in before[1].items()}
    assert all(torch.equal(after[n][1], value) for n, (_, value) in before[1].items())
    undo()
    sharded(model)
    assert_all_close(run(model), expected)
    return str(refused.value)


@pytest.mark.parametrize("what", REFUSED)
def test_changed_experts_are_refused_and_nothing_moves(what: str) -> None:
    (message,) = run_ranks(1, refuse_and_retry, what)
    assert re.search(REFUSED[what][1], message), message
    assert "\n" not in message


def train_lora_on_attention(rank: int) -> dict[str, Tensor]:
    import peft

    lora = peft.LoraConfig(r=2, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    torch.manual_seed(5)
    adapted = peft.get_peft_model(make_family_model("mixtral"), lora)
    expected = run(adapted)
    shard_experts(adapted, mesh=init_device_mesh("cpu", (2,)))
    found = run(adapted)
    assert_all_close(found, expected)
    assert all(p.grad is None for name, p in adapted.named_parameters() if ".experts." in name)
    return found


def test_lora_on_attention() -> None:
    """Logits and gradients of the adapters are those of the model as it was; the frozen experts get none."""
    pytest.importorskip("peft", reason="peft is not installed: pip install peft")
    for found in run_ranks(2, train_lora_on_attention):
        names = [name for name in found if name != "logits"]
        assert names
        assert all(".lora_" in name for name in names)
        assert all(found[name].any() for name in names)
