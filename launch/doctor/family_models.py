"""Small random models of the MoE families of the installed transformers, for `moesaic doctor --families`."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

_VOCABULARY, _BATCH, _LENGTH = 48, 2, 6
_SEED = 0

# What makes a configuration small, where it has these; families count experts, and experts per token, under several names.
_EXPERTS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")
_COUNTS = dict.fromkeys(_EXPERTS, 6) | dict.fromkeys(
    ("num_experts_per_tok", "top_k_experts", "moe_topk", "moe_top_k", "moe_k"), 2
)
_SIZES: dict[str, Any] = {
    "vocab_size": _VOCABULARY,
    "vocab_size_per_layer_input": _VOCABULARY,
    "hidden_size": 32,
    "hidden_size_per_layer_input": 8,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 8,
    "v_head_dim": 8,
    "q_lora_rank": 16,
    "kv_lora_rank": 16,
    "index_head_dim": 16,
    "index_n_heads": 2,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
    "linear_num_heads": 4,
    "linear_head_dim": 8,
    "n_shared_experts": 1,
    "max_position_embeddings": 64,
    "sliding_window": 16,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "initializer_range": 0.1,
}
_AT_MOST: dict[str, int] = {"first_k_dense_replace": 1, "num_dense_layers": 1, "n_group": 2, "topk_group": 1}
# Of models whose fp32 rounding nears 1e-5 with more layers: measured against fp64 for qwen3_next, likely for the others.
_SHALLOW = {"num_hidden_layers": 2}
# What a family needs besides.
_OF_FAMILY: dict[str, dict[str, Any]] = {
    "dbrx": {
        "d_model": 32,
        "n_heads": 4,
        "n_layers": 2,
        "ffn_config": {"ffn_hidden_size": 24},
        "attn_config": {"rope_theta": 1e4, "clip_qkv": 8},
    },
    "deepseek_ocr2": {"mlp_layer_types": ["dense", "sparse", "sparse", "sparse"], "num_key_value_heads": 4},
    "diffusion_gemma": {"moe_intermediate_size": 24} | _SHALLOW,
    "doge": {"is_moe": True},
    "dots1": {"moe_intermediate_size": 24, "n_shared_experts": 1},
    "ernie4_5_vl_moe": {
        "moe_intermediate_size": [24, 24],
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [1, 1, 2]},
    },
    "gemma4": {"enable_moe_block": True, "moe_intermediate_size": 24} | _SHALLOW,
    "glm4v_moe": {"head_dim": 16, "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 1, 1]}},
    "glm5_next": {"head_dim": 0, "qk_rope_head_dim": 0},
    "hunyuan_v1_moe": {"head_dim": 8},
    "hy_v4": {"mlp_layer_types": ["sparse", "sparse"]} | _SHALLOW,
    "lfm2_moe": {"layer_types": ["conv", "full_attention", "conv", "full_attention"]},
    "mistral4": {"head_dim": 16},
    "muse_spark": {"moe_hidden_size": 24},
    "qwen3_5_moe": {"layer_types": ["linear_attention", "full_attention"]} | _SHALLOW,
    "qwen3_next": {"layer_types": ["linear_attention", "full_attention"]} | _SHALLOW,
    "qwen4_exp": {
        **_SHALLOW,
        "indexer_budget": 4,
        "indexer_compress_ratio": 2,
        "indexer_head_dim": 8,
        "indexer_kv_heads": 1,
        "indexer_n_heads": 2,
    },
    "step3p7": {"sliding_window": 16},
    "unlimited_ocr": {"num_key_value_heads": 4},
    "deepseek_v4": {"num_key_value_heads": 1},
    "granitemoehybrid": {"mamba_n_heads": 8, "mamba_d_state": 8, "mamba_chunk_size": 8},
    "nemotron_h": {
        "layers_block_type": ["mamba", "moe", "attention", "moe"],
        "mamba_num_heads": 8,
        "mamba_head_dim": 8,
        "n_groups": 2,
        "ssm_state_size": 8,
        "chunk_size": 8,
    },
    "zaya": {"num_experts_per_tok": 1, "router_hidden_size": 16},
}
# The classes that are tried, by what their names end in.
_HEADS = ("ForCausalLM", "TextModel", "ForTokenClassification", "ForConditionalGeneration", "Model", "Backbone")


def family_names() -> list[str]:
    """The families whose configuration counts experts, by their folders in `transformers.models`."""
    folder = Path(next(iter(import_module("transformers.models").__path__)))
    counts = re.compile(rf"\b({'|'.join(_EXPERTS)})\b")
    files = sorted(folder.glob("*/configuration_*.py"))
    return sorted({file.parent.name for file in files if counts.search(file.read_text(encoding="utf-8"))})


def small_model(family: str) -> nn.Module:
    """A model of a family with random weights, the same every time, in fp32 and without dropout.

    Raises:
        ValueError: none of its classes could be built and run on token ids, with what the first of them raised.
    """
    problem = ""
    for kind in _classes_of(family):
        try:
            model = _build(kind, _OF_FAMILY.get(family, {}))
            with torch.no_grad():
                run(model, random_ids(0))
            return model
        except Exception as error:
            problem = problem or f"{kind.__name__}: {type(error).__name__}: {' '.join(str(error).split())[:160]}"
    raise ValueError(problem or "transformers has no model of it")


def _classes_of(family: str) -> Iterator[Any]:
    transformers = import_module("transformers")
    folder = Path(next(iter(import_module(f"transformers.models.{family}").__path__)))
    modules = [import_module(f"transformers.models.{family}.{file.stem}") for file in sorted(folder.glob("modeling_*.py"))]
    kinds = [
        kind
        for module in modules
        for kind in vars(module).values()
        if isinstance(kind, type) and issubclass(kind, transformers.PreTrainedModel) and kind.__module__ == module.__name__
    ]
    for head in _HEADS:
        yield from (kind for kind in kinds if kind.__name__.endswith(head) and not kind.__name__.endswith("PreTrainedModel"))


def _build(kind: Any, changes: Mapping[str, Any]) -> nn.Module:
    config_class = kind.config_class
    default = config_class()
    if not any(name in dir(default) for name in (*_EXPERTS, "ffn_config")):
        raise ValueError(f"{config_class.__name__} counts no experts")
    options = {name: size for name, size in _SIZES.items() if _value(default, name) is not None}
    options |= {name: size for name, size in _COUNTS.items() if name in dir(default)}
    options |= {name: 24 for name in vars(default) if name.endswith("intermediate_size") and _value(default, name)}
    options |= {name: min(_value(default, name), most) for name, most in _AT_MOST.items() if _value(default, name)}
    if _value(default, "kv_lora_rank"):  # one latent for all heads
        options["num_key_value_heads"] = options["num_attention_heads"]
    config = config_class(**(options | dict(changes)))
    config._attn_implementation = config._experts_implementation = "eager"
    torch.manual_seed(_SEED)
    model: nn.Module = kind(config).float().eval()
    with torch.no_grad():
        for parameter in model.parameters():  # none is left at zero, or without a value
            parameter.copy_(parameter.nan_to_num(0.0, 0.0, 0.0) + 0.05 * torch.randn(parameter.shape))
    return model


def _value(config: Any, name: str) -> Any:
    try:
        return getattr(config, name, None)
    except Exception:  # it has one for each layer
        return None


def random_ids(seed: int) -> Tensor:
    """Token ids of a small batch."""
    return torch.randint(3, _VOCABULARY, (_BATCH, _LENGTH), generator=torch.Generator().manual_seed(seed))


def run(model: Any, ids: Tensor) -> tuple[Tensor, Tensor]:
    """Logits, or hidden states of a model without a head, and a loss: the model's own, where it has one."""
    options: dict[str, Any] = {"use_cache": False}
    if hasattr(model.config, "router_aux_loss_coef"):
        options["output_router_logits"] = True
    if type(model).__name__.endswith(("ForCausalLM", "ForConditionalGeneration")):
        options["labels"] = ids
    output = model(input_ids=ids, **options)
    logits = output["logits"] if "logits" in output else output["last_hidden_state"]
    return logits, output["loss"] if "labels" in options else logits.float().square().mean()
