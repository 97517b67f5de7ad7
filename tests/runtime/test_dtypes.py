"""Models of one dtype, and of several: sharded they compute what they do unsharded, and their norm is one number."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor

from moesaic import MoELayer, RuntimeConfig, shard_experts
from tests.helpers.ranks import run_ranks

DIM = 8


class Norm(nn.Module):
    """Its weight in any dtype; tokens keep theirs."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(DIM))

    def forward(self, x: Tensor) -> Tensor:
        return (x * self.weight).to(x.dtype)


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.proj, self.moe = Norm(), nn.Linear(DIM, DIM), MoELayer(DIM, 6, 4, 2)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.moe(self.proj(self.norm(x)))


def in_double(model: nn.Module) -> nn.Module:
    return model.double()


def in_half(model: nn.Module) -> nn.Module:
    return model.half()


def in_bf16_with_routers_in_fp32(model: nn.Module) -> nn.Module:
    model.bfloat16()
    for module in model.modules():
        if isinstance(module, MoELayer):
            module.router.float()
    return model


def in_bf16_with_norms_in_fp32(model: nn.Module) -> nn.Module:
    model.bfloat16()
    for module in model.modules():
        if isinstance(module, Norm):
            module.float()
    return model


def in_fp32_with_one_block_in_double(model: nn.Module) -> nn.Module:
    model[1].double()
    model[1].register_forward_pre_hook(lambda _, args: (args[0].double(),))
    model[1].register_forward_hook(lambda _, args, y: y.float())
    return model


KINDS: dict[Callable[[nn.Module], nn.Module], torch.dtype] = {
    in_double: torch.float64,
    in_half: torch.float16,
    in_bf16_with_routers_in_fp32: torch.bfloat16,
    in_bf16_with_norms_in_fp32: torch.bfloat16,
    in_fp32_with_one_block_in_double: torch.float32,
}


def compare(rank: int, kind: str, dtype: torch.dtype, shard_dense: bool) -> float:
    """Outputs and dense gradients against the model that is not sharded, which takes both ranks' tokens; the norm."""

    def model() -> nn.Module:
        torch.manual_seed(0)
        return globals()[kind](nn.Sequential(Block(), Block(), nn.Linear(DIM, DIM).to(dtype)))

    x = [torch.randn(6, DIM, generator=torch.Generator().manual_seed(r)).to(dtype) for r in range(2)]
    plain, sharded = model(), model()
    handle = shard_experts(
        sharded, mesh=init_device_mesh("cpu", (2,)), config=RuntimeConfig(shard_dense=shard_dense, check_replicas_every=0)
    )
    exact = torch.finfo(dtype).eps
    y, expected = sharded(x[rank]), [plain(part) for part in x]
    torch.testing.assert_close(y, expected[rank], rtol=8 * exact, atol=8 * exact)
    torch.stack([part.float().square().mean() for part in expected]).mean().backward()
    y.float().square().mean().backward()
    if shard_dense:
        for name, parameter in plain[0].named_parameters():
            if ".experts." not in f".{name}":
                grad = sharded[0].get_parameter(name).grad
                assert isinstance(grad, DTensor)
                torch.testing.assert_close(grad.full_tensor(), parameter.grad, rtol=64 * exact, atol=64 * exact)
    return handle.clip_grad_norm_(1.0).item()


@pytest.mark.parametrize("shard_dense", [True, False])
@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)
def test_models_of_any_dtype(kind: Callable[[nn.Module], nn.Module], shard_dense: bool) -> None:
    first, second = run_ranks(2, compare, kind.__name__, KINDS[kind], shard_dense)
    assert first > 0
    assert second > 0
    assert not shard_dense or first == second
