"""The demo language model: a small decoder-only transformer over bytes with Mixture-of-Experts layers.

- RMSNorm before attention and experts, rotary position embedding, causal SDPA attention, SwiGLU experts behind a top-k router
- queries and keys are normalised before the rotation, which keeps a small model stable at a high learning rate
- no biases, no dropout, untied byte embedding and output head
"""

# B batch, L sequence length, D model dim, H heads, C channels per head, V vocabulary (256 bytes)

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ...runtime import MoELayer, RouterConfig
from ..config import ModelConfig

VOCAB_SIZE = 256


def rope_tables(seq_len: int, head_dim: int, theta: float) -> tuple[Tensor, Tensor]:
    """Cosines and sines of the rotary embedding (Su et al., 2021), each [L, C / 2], fp32."""
    frequencies = theta ** (-torch.arange(0, head_dim, 2, dtype=torch.float32) / head_dim)
    angles = torch.outer(torch.arange(seq_len, dtype=torch.float32), frequencies)
    return angles.cos(), angles.sin()


@dataclass(frozen=True, eq=False)
class Rope:
    """The tables of one sequence length, in a dataclass because FSDP2 would cast bare tensors to the compute dtype."""

    cos: Tensor
    sin: Tensor


def apply_rope(x_BHLC: Tensor, rope: Rope) -> Tensor:
    """Rotate the channel pairs (i, i + C / 2) of `x_BHLC` by the angle of their position, in fp32."""
    first, second = x_BHLC.chunk(2, dim=-1)
    rotated = torch.cat((first * rope.cos - second * rope.sin, second * rope.cos + first * rope.sin), dim=-1)
    return rotated.to(x_BHLC.dtype)


class Attention(nn.Module):
    """Causal multi-head self-attention with rotary positions."""

    def __init__(self, dim: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.qkv = nn.Linear(dim, 3 * dim, bias=False)
        self.out = nn.Linear(dim, dim, bias=False)
        self.q_norm = nn.RMSNorm(dim // num_heads)
        self.k_norm = nn.RMSNorm(dim // num_heads)

    def forward(self, x_BLD: Tensor, rope: Rope) -> Tensor:
        """[B, L, D] -> [B, L, D]."""
        B, L, D = x_BLD.shape
        qkv = self.qkv(x_BLD).view(B, L, 3, self.num_heads, D // self.num_heads)
        q_BHLC, k_BHLC, v_BHLC = qkv.permute(2, 0, 3, 1, 4).unbind(0)
        q_BHLC = apply_rope(self.q_norm(q_BHLC), rope)
        k_BHLC = apply_rope(self.k_norm(k_BHLC), rope)
        y_BHLC = F.scaled_dot_product_attention(q_BHLC, k_BHLC, v_BHLC, is_causal=True)
        return self.out(y_BHLC.transpose(1, 2).reshape(B, L, D))


class Block(nn.Module):
    """One transformer layer: attention, then the MoE feed-forward, both residual."""

    def __init__(self, config: ModelConfig, router: RouterConfig) -> None:
        super().__init__()
        self.attention_norm = nn.RMSNorm(config.dim)
        self.attention = Attention(config.dim, config.num_heads)
        self.moe_norm = nn.RMSNorm(config.dim)
        self.moe = MoELayer(
            config.dim,
            config.ffn_dim,
            config.num_experts,
            config.top_k,
            router=router,
            capacity_factor=config.capacity_factor,
            drop_policy=config.drop_policy,
        )

    def forward(self, x_BLD: Tensor, rope: Rope) -> Tensor:
        """[B, L, D] -> [B, L, D]."""
        x_BLD = x_BLD + self.attention(self.attention_norm(x_BLD), rope)
        return x_BLD + self.moe(self.moe_norm(x_BLD))


class Transformer(nn.Module):
    """Bytes in, logits over the next byte out."""

    cos: Tensor
    sin: Tensor

    def __init__(self, config: ModelConfig, router: RouterConfig, seq_len: int) -> None:
        super().__init__()
        self.activation_checkpoint = config.activation_checkpoint
        self.embedding = nn.Embedding(VOCAB_SIZE, config.dim)
        self.blocks = nn.ModuleList(Block(config, router) for _ in range(config.num_layers))
        self.norm = nn.RMSNorm(config.dim)
        self.head = nn.Linear(config.dim, VOCAB_SIZE, bias=False)
        cos, sin = rope_tables(seq_len, config.dim // config.num_heads, config.rope_theta)
        self.register_buffer("cos", cos, persistent=False)
        self.register_buffer("sin", sin, persistent=False)

    def forward(self, ids_BL: Tensor) -> Tensor:
        """Byte ids int64 [B, L] -> logits [B, L, V]."""
        rope = Rope(self.cos[: ids_BL.shape[1]], self.sin[: ids_BL.shape[1]])
        x_BLD = self.embedding(ids_BL)
        for block in self.blocks:
            if self.activation_checkpoint and self.training:
                x_BLD = checkpoint(block, x_BLD, rope, use_reentrant=False)
            else:
                x_BLD = block(x_BLD, rope)
        return self.head(self.norm(x_BLD))


def build_model(config: ModelConfig, router: RouterConfig, *, seq_len: int, seed: int) -> Transformer:
    """The model on the CPU, a function of its arguments alone: all ranks build the same one; the caller's RNG is unchanged.

    Matrices are normal(0, 0.02); those that write to the residual stream are scaled down by sqrt(2 * num_layers) (GPT-2).
    The experts and the router initialise themselves (`MoELayer`).
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = Transformer(config, router, seq_len)
        nn.init.normal_(model.embedding.weight, std=0.02)
        nn.init.normal_(model.head.weight, std=0.02)
        for block in model.blocks:
            assert isinstance(block, Block)
            nn.init.normal_(block.attention.qkv.weight, std=0.02)
            nn.init.normal_(block.attention.out.weight, std=0.02 / (2 * config.num_layers) ** 0.5)
    return model
