"""The router's losses of a forward are those of all its calls, each once, whatever was called, repeated or evaluated."""

from collections.abc import Sequence

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.utils.checkpoint import checkpoint

from moesaic import MoELayer, RouterConfig, RuntimeConfig, shard_experts
from tests.helpers.compare import assert_close
from tests.helpers.ranks import run_ranks

DIM = 8


class Net(nn.Module):
    """Calls its MoE layers in an order that the caller wants, each as often as it is named."""

    def __init__(self) -> None:
        super().__init__()
        self.proj = nn.Linear(DIM, DIM)
        self.moe = nn.ModuleList(MoELayer(DIM, 6, 4, 2, router=RouterConfig(aux_loss_coef=0.5)) for _ in range(2))

    def forward(self, x: Tensor, order: Sequence[int], with_checkpoints: bool = False) -> Tensor:
        x = self.proj(x)
        for index in order:
            layer = self.moe[index]
            x = x + (checkpoint(layer, x, use_reentrant=False) if with_checkpoints else layer(x))
        return x


def net() -> Net:
    torch.manual_seed(0)
    return Net()


def tokens(rank: int, seed: int = 0) -> Tensor:
    return torch.randn(6, DIM, generator=torch.Generator().manual_seed(10 * seed + rank))


def by_hand(order: Sequence[int], seed: int = 0) -> tuple[Tensor, Tensor]:
    """On one process, over the tokens of both ranks: the sum of the calls' losses, and its gradient for the first router."""
    model = net()
    x, total = model.proj(torch.cat([tokens(rank, seed) for rank in range(2)])), torch.zeros(())
    for index in order:
        x = x + model.moe[index](x)
        total = total + model.moe[index].aux_loss
    total.backward()
    return total.detach(), model.moe[0].router.weight.grad


def compare(rank: int, order: Sequence[int], before: str, with_checkpoints: bool) -> None:
    model = net()
    handle = shard_experts(model, mesh=init_device_mesh("cpu", (2,)), config=RuntimeConfig(timeout_s=60))
    if before == "a micro-batch of all layers":
        (model(tokens(rank, 1), (0, 1)).square().sum() + handle.aux_loss()).backward()
        model.moe[0].router.weight.grad = None
    y = model(tokens(rank), order, with_checkpoints)
    if before == "an evaluation meanwhile":
        with torch.no_grad():
            model.eval()(tokens(rank, 2), (0, 1))
        model.train()
    loss = handle.aux_loss()
    (0.0 * y.sum() + loss).backward()
    assert torch.equal(handle.aux_loss(), loss), "a recomputation counted again"
    mean = loss.detach().clone()
    dist.all_reduce(mean)
    expected, expected_grad = by_hand(order)
    assert_close("loss", mean / 2, expected)
    assert_close("grad", model.moe[0].router.weight.grad.full_tensor(), expected_grad, rtol=1e-4)


@pytest.mark.parametrize("with_checkpoints", [False, True])
@pytest.mark.parametrize(
    "order, before",
    [
        ((0, 1), ""),
        ((0, 0, 0), ""),
        ((0, 1, 0, 1), ""),
        ((0,), "a micro-batch of all layers"),
        ((0, 1), "an evaluation meanwhile"),
    ],
    ids=["each once", "one three times", "in turns", "one is skipped", "evaluation"],
)
def test_losses_of_all_calls(order: Sequence[int], before: str, with_checkpoints: bool) -> None:
    run_ranks(2, compare, order, before, with_checkpoints)
