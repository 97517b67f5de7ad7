"""Small random models of the families of Hugging Face transformers, and their batches."""

from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from moesaic.placement import Placement, Problem

VOCABULARY, BATCH, LENGTH = 48, 8, 6
_COMMON = dict(
    vocab_size=VOCABULARY,
    hidden_size=32,
    num_attention_heads=2,
    num_key_value_heads=2,
    num_experts_per_tok=2,
    max_position_embeddings=32,
    initializer_range=0.2,
    pad_token_id=0,
    bos_token_id=1,
    eos_token_id=2,
)
_DEEPSEEK = dict(
    _COMMON,
    num_hidden_layers=3,
    first_k_dense_replace=1,
    intermediate_size=40,
    moe_intermediate_size=24,
    n_routed_experts=6,
    n_shared_experts=2,
    n_group=3,
    topk_group=2,
    num_experts_per_tok=3,
    q_lora_rank=16,
    kv_lora_rank=16,
    qk_nope_head_dim=8,
    qk_rope_head_dim=8,
    v_head_dim=8,
    routed_scaling_factor=1.5,
)
_QWEN = dict(_COMMON, num_hidden_layers=2, intermediate_size=40, moe_intermediate_size=24, num_experts=5, head_dim=16)

# Family: its class in transformers without "Config" and "ForCausalLM", and its configuration.
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "mixtral": ("Mixtral", dict(_COMMON, num_hidden_layers=2, intermediate_size=24, num_local_experts=5)),
    "qwen2_moe": ("Qwen2Moe", dict(_QWEN, shared_expert_intermediate_size=28, norm_topk_prob=False)),
    "qwen3_moe": ("Qwen3Moe", dict(_QWEN, norm_topk_prob=True, mlp_only_layers=[], tie_word_embeddings=True)),
    "olmoe": ("Olmoe", dict(_COMMON, num_hidden_layers=2, intermediate_size=24, num_experts=5)),
    "deepseek_v2": ("DeepseekV2", dict(_DEEPSEEK, topk_method="group_limited_greedy")),
    "deepseek_v3": ("DeepseekV3", dict(_DEEPSEEK, norm_topk_prob=True)),
    "gpt_oss": (
        "GptOss",
        dict(_COMMON, num_hidden_layers=2, intermediate_size=24, num_local_experts=5, head_dim=16, swiglu_limit=0.5),
    ),
}


def make_family_model(family: str, *, device: str = "cpu", **changes: Any) -> Any:
    """The same random weights in every process; on the meta device none. `changes` go into the configuration."""
    import transformers

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    prefix, options = FAMILIES[family]
    config = getattr(transformers, prefix + "Config")(**(options | changes))
    config._experts_implementation = "eager"
    torch.manual_seed(3)
    with torch.device(device):
        model = getattr(transformers, prefix + "ForCausalLM")(config)
    if device != "meta":
        for name, buffer in model.named_buffers():
            if name.endswith("e_score_correction_bias"):
                buffer.uniform_(-0.2, 0.2)
    return model


def batch_ids(step: int) -> Tensor:
    """Token ids of one step, [BATCH, LENGTH], with a pattern that can be learnt."""
    generator = torch.Generator().manual_seed(step)
    first = torch.randint(3, VOCABULARY, (BATCH, 1), generator=generator)
    return 3 + (first + 5 * torch.arange(LENGTH)) % (VOCABULARY - 3)


def forward(model: nn.Module, ids: Tensor) -> Any:
    """Logits and loss, the family's own auxiliary loss included where it has one."""
    options = {"output_router_logits": True} if hasattr(model.config, "router_aux_loss_coef") else {}
    return model(input_ids=ids, labels=ids, use_cache=False, **options)


def random_copies(problem: Problem) -> Any:
    """A solver whose copies follow from the load, so that they change from step to step but are the same on all ranks."""
    from types import SimpleNamespace

    random = np.random.default_rng(int(problem.load.load_RE[0].sum() + 7 * problem.load.totals_E[0]))
    owners = Placement.owners_only(problem.expert_to_owner_E, problem.num_ranks)
    copies = random.random(owners.replicas_RE.shape) < 0.5
    return SimpleNamespace(placement=Placement(problem.expert_to_owner_E, owners.replicas_RE | copies))
