"""A small residual model with MoE blocks and a dense rest, and its batches: what `shard_experts` is tested on."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from moesaic import MoELayer, RouterConfig

DIM, FFN_DIM, SHARED_DIM, NUM_EXPERTS, TOP_K = 16, 24, 20, 5, 2
BATCH, LENGTH, CLASSES = 24, 6, 11


class SharedExpert(nn.Module):
    """A SwiGLU expert of every token."""

    def __init__(self) -> None:
        super().__init__()
        self.gate_up = nn.Parameter(torch.randn(2 * SHARED_DIM, DIM) * DIM**-0.5)
        self.down = nn.Parameter(torch.randn(DIM, SHARED_DIM) * SHARED_DIM**-0.5)

    def forward(self, x: Tensor) -> Tensor:
        gate, up = (x @ self.gate_up.T).chunk(2, dim=-1)
        return (F.silu(gate) * up) @ self.down.T


class Block(nn.Module):
    def __init__(self, router: RouterConfig, ffn_dim: int, has_shared: bool):
        super().__init__()
        self.norm = nn.RMSNorm(DIM)
        self.mix = nn.Linear(DIM, DIM)
        self.moe = MoELayer(DIM, ffn_dim, NUM_EXPERTS, TOP_K, router=router, shared=SharedExpert() if has_shared else None)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.mix(x).tanh()
        return x + self.moe(self.norm(x))


class Model(nn.Module):
    """Embedding, two MoE blocks, of which the first has a shared expert, a classifier over the positions."""

    def __init__(self, router: RouterConfig | None = None, use_checkpoint: bool = False, ffn_dim: int = FFN_DIM):
        super().__init__()
        router = router or RouterConfig(aux_loss_coef=0.02, z_loss_coef=0.001)
        self.use_checkpoint = use_checkpoint
        self.embed = nn.Embedding(CLASSES, DIM)
        self.blocks = nn.ModuleList(Block(router, ffn_dim, has_shared) for has_shared in (True, False))
        self.head = nn.Linear(DIM, CLASSES, bias=False)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids)
        for block in self.blocks:
            x = checkpoint(block, x, use_reentrant=False) if self.use_checkpoint else block(x)
        return self.head(x)


def make_model(router: RouterConfig | None = None, use_checkpoint: bool = False, ffn_dim: int = FFN_DIM) -> Model:
    """The same weights in every process."""
    torch.manual_seed(1)
    return Model(router, use_checkpoint, ffn_dim)


def global_batch(step: int) -> tuple[Tensor, Tensor]:
    """Ids and targets of one step, [BATCH, LENGTH] each: the targets are a fixed function of the ids, so they can be learnt."""
    generator = torch.Generator().manual_seed(100 + step)
    ids = torch.randint(0, CLASSES, (BATCH, LENGTH), generator=generator)
    return ids, (ids.cumsum(1) * 3 + 1) % CLASSES


def rank_slice(tensor: Tensor, rank: int, world_size: int) -> Tensor:
    """The rows of a global batch that belong to a rank."""
    rows = tensor.shape[0] // world_size
    return tensor[rank * rows : (rank + 1) * rows]


def cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    return F.cross_entropy(logits.flatten(0, 1), targets.flatten())
