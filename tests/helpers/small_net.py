"""The smallest model with what training meets: two blocks, each a dense layer and a Mixture of Experts, and a dense head."""

from torch import Tensor, nn

from moesaic import MoELayer, RouterConfig

DIM, EXPERTS = 8, 4


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.proj = nn.Linear(DIM, DIM)
        self.moe = MoELayer(DIM, 12, EXPERTS, 2, router=RouterConfig(aux_loss_coef=0.0))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.moe(self.proj(x))


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Block() for _ in range(2))
        self.out = nn.Linear(DIM, 2)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        return self.out(x)
