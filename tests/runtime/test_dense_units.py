"""What FSDP2 gathers together: one unit for each repeated block, wherever a model holds its blocks."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule

from moesaic import MoELayer, RuntimeConfig, shard_experts
from moesaic.runtime.wrap.dense import dense_units
from tests.helpers.ranks import run_ranks

DIM = 8


def layer() -> MoELayer:
    return MoELayer(DIM, 6, 4, 2)


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.proj, self.moe = nn.Linear(DIM, DIM), layer()

    def forward(self, x: Tensor) -> Tensor:
        return x + self.moe(self.proj(x))


class Net(nn.Module):
    """`blocks`, each of which `call` applies to the tokens, and a head."""

    def __init__(self, blocks: nn.Module, call: Callable[[nn.Module, Tensor], Tensor]):
        super().__init__()
        self.blocks, self.call, self.head = blocks, call, nn.Linear(DIM, DIM)

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks.values() if isinstance(self.blocks, nn.ModuleDict) else self.blocks.children():
            x = self.call(block, x)
        return self.head(x)


class TwoTowers(nn.Module):
    """Blocks in two places, at different depths."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Sequential(Block(), Block())
        self.decoder = nn.ModuleDict({"first": Block(), "inner": nn.ModuleDict({"second": Block()})})

    def forward(self, x: Tensor) -> Tensor:
        return self.decoder["inner"]["second"](self.decoder["first"](self.encoder(x)))


class ByAttributes(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.head = Block(), Block(), nn.Linear(DIM, DIM)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.second(self.first(x)))


def called(block: nn.Module, x: Tensor) -> Tensor:
    return block(x)


MODELS: dict[str, tuple[Callable[[], nn.Module], list[list[str]]]] = {
    "a list of blocks": (lambda: Net(nn.ModuleList([Block(), Block()]), called), [["blocks.0"], ["blocks.1"]]),
    "a dict of blocks": (lambda: Net(nn.ModuleDict({"a": Block(), "b": Block()}), called), [["blocks.a"], ["blocks.b"]]),
    "a sequence of blocks": (lambda: Net(nn.Sequential(Block(), Block()), called), [["blocks.0"], ["blocks.1"]]),
    "a list of lists": (
        lambda: Net(nn.ModuleList([nn.ModuleList([nn.Linear(DIM, DIM), layer()]) for _ in range(2)]), lambda b, x: b[1](b[0](x))),
        [["blocks.0.0", "blocks.0.1"], ["blocks.1.0", "blocks.1.1"]],
    ),
    "a list of dicts": (
        lambda: Net(
            nn.ModuleList([nn.ModuleDict({"a": nn.Linear(DIM, DIM), "b": layer()}) for _ in range(2)]),
            lambda block, x: block["b"](block["a"](x)),
        ),
        [["blocks.0.a", "blocks.0.b"], ["blocks.1.a", "blocks.1.b"]],
    ),
    "a list of layers": (lambda: Net(nn.ModuleList([layer(), layer()]), called), [["blocks.0"], ["blocks.1"]]),
    "attributes": (ByAttributes, [["first"], ["second"]]),
    "two towers": (TwoTowers, [["encoder.0"], ["encoder.1"], ["decoder.first"], ["decoder.inner.second"]]),
}


@pytest.mark.parametrize("name", MODELS)
def test_a_unit_for_each_block(name: str) -> None:
    make, expected = MODELS[name]
    model = make()
    names = {id(module): inner for inner, module in model.named_modules()}
    layers = [inner for inner, module in model.named_modules() if isinstance(module, MoELayer)]
    assert [[names[id(module)] for module in unit] for unit in dense_units(model, layers)] == expected


def forward_of(rank: int, name: str) -> bool:
    """Whether a sharded model is FSDP2's, and returns what it does unsharded."""
    torch.manual_seed(0)
    plain = MODELS[name][0]()
    torch.manual_seed(0)
    model, x = MODELS[name][0](), torch.randn(6, DIM)
    shard_experts(model, mesh=init_device_mesh("cpu", (2,)))
    y = model(x)
    y.square().sum().backward()
    torch.testing.assert_close(y, plain(x))
    return all(isinstance(model.get_submodule(inner), FSDPModule) for unit in MODELS[name][1] for inner in unit)


@pytest.mark.parametrize("name", MODELS)
def test_blocks_compute_what_they_do_unsharded(name: str) -> None:
    assert run_ranks(2, forward_of, name) == [True, True]


def refusals_of_ddp(rank: int, dense: str) -> list[str]:
    """Of the model itself, and of a module that holds it."""
    model = ByAttributes()
    shard_experts(model, mesh=init_device_mesh("cpu", (2,)), config=RuntimeConfig(shard_dense=dense == "fsdp"))
    found = []
    for wrapped in (model, nn.Sequential(model)):
        try:
            nn.parallel.DistributedDataParallel(wrapped)
            found.append("")
        except ValueError as error:
            found.append(str(error).removeprefix("DistributedDataParallel "))
    return found


@pytest.mark.parametrize("dense", ["fsdp", "ddp"])
def test_ddp_is_refused_where_it_would_take_shards_or_experts_for_copies(dense: str) -> None:
    sharded = "around a model whose dense part FSDP2 shards already; leave it out, or call shard_experts with "
    sharded += "RuntimeConfig(shard_dense=False)"
    holds = "around Sequential, which holds the ByAttributes that shard_experts was given, would overwrite "
    holds += "experts; call shard_experts with the module that DistributedDataParallel gets"
    expected = [sharded, sharded] if dense == "fsdp" else ["", holds]
    assert run_ranks(2, refusals_of_ddp, dense) == [expected] * 2
