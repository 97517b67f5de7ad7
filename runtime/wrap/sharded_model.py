"""A model whose experts are in banks: what has to happen before its weights are read, or after they were written."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import nn
from torch.distributed.fsdp import FSDPModule

from ..experts.bank import Bank
from ..group import RankGroup
from ..sharded_experts import ShardedExperts


@dataclass(frozen=True, eq=False)
class ShardedModel:
    """The model, the banks of its experts, and the ranks that share them."""

    model: nn.Module
    layers: Mapping[str, ShardedExperts]
    """The experts of every MoE layer by its name, in the order of the model."""
    banks: Sequence[Bank]
    group: RankGroup

    @property
    def device(self) -> torch.device:
        """The device of the experts."""
        return self.banks[0].device

    def layers_of(self, bank: Bank) -> list[ShardedExperts]:
        """The layers whose experts are in a bank, in its order."""
        layers = [layer for layer in self.layers.values() if layer.runtime.bank is bank]
        return sorted(layers, key=lambda layer: layer.runtime.layer)

    def drop_prefetched(self) -> None:
        """Drop copies that were gathered ahead; they are of the weights as they were."""
        for layer in self.layers.values():
            layer.runtime.drop_prefetched()

    def reshard(self) -> None:
        """Have the root's parameters be shards: FSDP2 leaves them whole after a forward that had no backward."""
        if isinstance(self.model, FSDPModule):
            self.model.reshard()

    def claim(self) -> None:
        """Have the banks' memory hold what the parameters do, which may have been given other memory; see `Bank.claim`."""
        for bank in self.banks:
            for layer in range(bank.owners.num_layers):
                bank.claim(layer)

    def weights_changed(self) -> None:
        """Have the experts' weights count as changed; see `Bank.weights_changed`."""
        for bank in self.banks:
            bank.weights_changed()
