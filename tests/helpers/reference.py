"""The oracle: a MoE layer on one process, token by token, expert by expert, with whatever autograd makes of it."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moesaic import MoELayer


class DenseMoE(nn.Module):
    """The dumbest MoE: for every token and choice, add weight * expert(token). Parameters under logical names."""

    def __init__(self, layer: MoELayer):
        super().__init__()
        assert layer.experts is not None
        self.top_k = layer.top_k
        self.normalize = layer.router.config.normalize_weights
        self.bias_E = getattr(layer.router, "bias_E", 0.0)
        self.router = nn.Parameter(layer.router.weight.detach().clone())
        self.gate_up = nn.ParameterList([row.detach().clone() for row in layer.experts.gate_up])
        self.down = nn.ParameterList([row.detach().clone() for row in layer.experts.down])

    def forward(self, x: Tensor) -> Tensor:
        x_TD = x.reshape(-1, x.shape[-1])
        logits_TE = x_TD @ self.router.T
        ids_TK = (logits_TE + self.bias_E).topk(self.top_k, dim=-1).indices
        scores_TE = logits_TE.softmax(dim=-1)
        rows = []
        for t, token in enumerate(x_TD):
            weights_K = scores_TE[t, ids_TK[t]]
            if self.normalize:
                weights_K = weights_K / weights_K.sum()
            rows.append(sum(w * self.expert(int(e), token) for w, e in zip(weights_K, ids_TK[t], strict=True)))
        y_TD = torch.stack(rows) if rows else x_TD * 1.0
        return y_TD.view_as(x)

    def expert(self, e: int, token: Tensor) -> Tensor:
        gate, up = (self.gate_up[e] @ token).chunk(2)
        return self.down[e] @ (F.silu(gate) * up)
