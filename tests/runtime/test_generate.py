"""`generate` of wrapped models of transformers: the tokens of the unwrapped model, however many tokens each rank asks for."""

from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh

from moesaic import RuntimeConfig, shard_experts
from tests.helpers.families import VOCABULARY, forward, make_family_model, random_copies
from tests.helpers.ranks import run_ranks

pytest.importorskip("transformers", reason="transformers is not installed: pip install 'moesaic[hf]'")

# Of each rank: prompts, tokens of the longest of them, new tokens.
Shape = tuple[int, int, int]
EQUAL: tuple[Shape, ...] = ((2, 5, 6), (2, 5, 6))
UNEQUAL: tuple[Shape, ...] = ((3, 4, 9), (1, 7, 3))
WAYS: dict[str, dict[str, Any]] = {
    "greedy": {},
    "as asked for where forwards are collective": dict(synced_gpus=True),
    "without a cache": dict(use_cache=False),
    "beams": dict(num_beams=3, num_return_sequences=2),
    "sampled": dict(do_sample=True, top_k=8),
    "cache of a fixed size": dict(cache_implementation="static"),
    "prompts in chunks": dict(prefill_chunk_size=2),
    "assisted, which takes one prompt": dict(prompt_lookup_num_tokens=2),
}


def prompts(rank: int, shape: Shape) -> dict[str, Tensor]:
    """Random ids [B, L], of which the first prompt is one token shorter, padded on its left."""
    ids_BL = torch.randint(3, VOCABULARY, shape[:2], generator=torch.Generator().manual_seed(rank))
    mask_BL = torch.ones_like(ids_BL)
    ids_BL[0, 0] = mask_BL[0, 0] = 0
    return dict(input_ids=ids_BL, attention_mask=mask_BL)


def generated(model: Any, rank: int, shape: Shape, **way: Any) -> Tensor:
    torch.manual_seed(rank)
    given = prompts(rank, shape)
    if "prompt_lookup_num_tokens" in way:
        given = {"input_ids": given["input_ids"][-1:].repeat(1, 2)}
    tokens: Tensor = model.generate(**given, max_new_tokens=shape[2], **way)
    return tokens


def wrapped(family: str, *, shard_dense: bool = True) -> Any:
    model = make_family_model(family).eval()
    config = RuntimeConfig(policy="static", slots=6, timeout_s=30, shard_dense=shard_dense)
    shard_experts(model, mesh=init_device_mesh("cpu", (dist.get_world_size(),)), config=config, solver=random_copies)
    return model


def generate_on_ranks(rank: int, family: str, shapes: tuple[Shape, ...], shard_dense: bool) -> dict[str, Tensor]:
    model = wrapped(family, shard_dense=shard_dense)
    return {name: generated(model, rank, shapes[rank], **way) for name, way in WAYS.items()}


# GPT-OSS has windows of attention, and ends some sequences early; Qwen3-MoE has tied embeddings.
@pytest.mark.parametrize(
    "family,shapes,shard_dense",
    [("mixtral", EQUAL, True), ("gpt_oss", UNEQUAL, True), ("qwen3_moe", UNEQUAL, False)],
)
def test_tokens_are_those_of_the_unwrapped_model(family: str, shapes: tuple[Shape, ...], shard_dense: bool) -> None:
    model = make_family_model(family).eval()
    results = run_ranks(len(shapes), generate_on_ranks, family, shapes, shard_dense)
    for rank, found in enumerate(results):
        for name, tokens in found.items():
            way = {key: value for key, value in WAYS[name].items() if key != "synced_gpus"}
            assert torch.equal(tokens, generated(model, rank, shapes[rank], **way)), (rank, name)


def train_after(rank: int) -> tuple[Tensor, float]:
    """The first forward of all under inference mode, and a training step after it."""
    model = wrapped("mixtral")
    with torch.inference_mode():
        tokens = generated(model, rank, UNEQUAL[rank])
    loss = forward(model.train(), prompts(0, EQUAL[0])["input_ids"]).loss
    loss.backward()
    assert all(parameter.grad is not None for parameter in model.parameters())
    return tokens.clone(), loss.item()


def test_inference_mode_may_come_first() -> None:
    model = make_family_model("mixtral")
    loss = forward(model, prompts(0, EQUAL[0])["input_ids"]).loss.item()
    for rank, (tokens, found) in enumerate(run_ranks(2, train_after)):
        assert torch.equal(tokens, generated(model.eval(), rank, UNEQUAL[rank]))
        assert found == pytest.approx(loss, rel=1e-5)
