"""When gathers are launched: early enough that the copies travel under other work.

The copies of MoE layer l are launched when layer l-1 is done, so they travel under whatever lies between (the attention
of layer l); those of the first layer when the model's forward begins. In backward the same between layer l and layer l-1, if
layer l-1 has released its copies. Nothing else launches copies ahead.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import nn

from .._compat import outside_graphs
from ..layer import MoELayer
from ..sharded_experts import ShardedExperts
from ..step.replay import is_recomputing


def prefetch_in_order(model: nn.Module, layers: Sequence[ShardedExperts], with_losses: Sequence[MoELayer] = ()) -> None:
    """Hook `model` and the experts of its MoE layers, given in the order of the forward.

    `with_losses`: the layers whose router losses are those of one forward.

    A layer that runs without having been prefetched launches its own gather, so another order is slower but not wrong. A compiled
    model leaves the hooks as they are.
    """

    @outside_graphs
    def before_model(module: nn.Module, inputs: tuple[Any, ...]) -> None:
        if is_recomputing():
            return
        # A forward that broke off, or skipped a layer, may have left gathers of weights that have changed since. Router losses of
        # the one before keep its graph, and would be taken for this one's where a layer is skipped.
        for layer in layers:
            layer.runtime.drop_prefetched()
        for losing in with_losses:
            # An evaluation between a training forward and its loss leaves that one's.
            if torch.is_grad_enabled() or losing.aux_loss is None or not losing.aux_loss.requires_grad:
                losing.aux_loss = None
        layers[0].runtime.prefetch(is_training=layers[0].training)

    model.register_forward_pre_hook(before_model)
    for layer, following in pairwise(layers):

        @outside_graphs
        def after_layer(
            module: nn.Module,
            inputs: tuple[Any, ...],
            output: Any,
            *,
            layer: ShardedExperts = layer,
            following: ShardedExperts = following,
        ) -> None:
            if is_recomputing():
                return
            launched = following.runtime.prefetch(is_training=following.training)
            if (this := layer.runtime.latest_pass) is not None:
                launched.after_backward = this.gather_again

        layer.register_forward_hook(after_layer)
