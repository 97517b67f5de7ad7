"""The oracle: a MoE layer on one process, token by token, expert by expert, with whatever autograd makes of it."""

import copy
import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moesaic import MoELayer
from moesaic.runtime.routing.router import balanced_ids


class DenseMoE(nn.Module):
    """The dumbest MoE: for every token and choice, add weight * expert(token). Parameters under logical names.

    `rounds` rounds to bf16 what experts compute with, their weights and tokens, and nothing else.
    """

    def __init__(self, layer: MoELayer, rounds: bool = False):
        super().__init__()
        assert not layer.experts.is_sharded
        self.rounds = rounds
        self.force_balance = layer.router.config.force_balance
        self.top_k = layer.top_k
        self.normalize = layer.router.config.normalize_weights
        self.bias_E = getattr(layer.router, "bias_E", 0.0)
        self.capacity = layer.capacity
        self.router = nn.Parameter(layer.router.weight.detach().clone())
        self.gate_up = nn.ParameterList([row.detach().clone() for row in layer.experts.gate_up])
        self.down = nn.ParameterList([row.detach().clone() for row in layer.experts.down])
        self.shared = copy.deepcopy(layer.shared)

    def forward(self, x: Tensor) -> Tensor:
        x_TD = x.reshape(-1, x.shape[-1])
        logits_TE = at_least_fp32(x_TD) @ at_least_fp32(self.router).T
        ids_TK = (logits_TE + self.bias_E).topk(self.top_k, dim=-1).indices
        if self.force_balance:
            ids_TK = balanced_ids(*logits_TE.shape, self.top_k)
        scores_TE = logits_TE.softmax(dim=-1)
        weights_TK = scores_TE.gather(1, ids_TK)
        if self.normalize:
            weights_TK = weights_TK / weights_TK.sum(1, keepdim=True)
        kept = self.kept(ids_TK, weights_TK)
        rows = []
        for t, token in enumerate(x_TD):
            row = 0.0 * token
            for weight, e in zip(weights_TK[t], ids_TK[t].tolist(), strict=True):
                if (t, e) in kept:
                    row = row + weight * self.expert(e, token)
            rows.append(row)
        y_TD = torch.stack(rows) if rows else x_TD * 1.0
        if self.shared is not None:
            y_TD = y_TD + self.shared(x_TD)
        return y_TD.view_as(x)

    def kept(self, ids_TK: Tensor, weights_TK: Tensor) -> set[tuple[int, int]]:
        """The (token, expert) that are within the experts' capacities."""
        choices: dict[int, list[tuple[float, int]]] = {}
        for t, (ids_K, weights_K) in enumerate(zip(ids_TK.tolist(), weights_TK.tolist(), strict=True)):
            for e, weight in zip(ids_K, weights_K, strict=True):
                choices.setdefault(e, []).append((-weight if self.capacity.drop_policy == "probs" else 0.0, t))
        most = ids_TK.numel()
        if math.isfinite(self.capacity.factor):
            most = math.ceil(ids_TK.numel() / len(self.gate_up) * self.capacity.factor)
        return {(t, e) for e, found in choices.items() for _, t in sorted(found)[:most]}

    def expert(self, e: int, token: Tensor) -> Tensor:
        gate_up_w, down_w = self.gate_up[e], self.down[e]
        if self.rounds:
            gate_up_w, down_w, token = rounded(gate_up_w), rounded(down_w), rounded(token)
        gate, up = (gate_up_w @ token).chunk(2)
        return down_w @ (F.silu(gate) * up)


def at_least_fp32(tensor: Tensor) -> Tensor:
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def rounded(tensor: Tensor) -> Tensor:
    """The tensor with the values of bf16, its gradient as if nothing had been rounded."""
    return tensor + (tensor.bfloat16().to(tensor.dtype) - tensor).detach()
