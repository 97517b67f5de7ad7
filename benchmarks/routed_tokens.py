"""The op `token_rows` of `moesaic bench collectives`: dispatch and combine of routed tokens, by each route.

Every rank has `bytes` of tokens, and every rank computes an expert for each token, the case in which the route by node saves
most. A timed piece is the dispatch metadata, the dispatch and the combine of a forward; experts return their input.

Shape letters: T tokens, D model dim, R ranks.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from math import gcd

import numpy as np
import torch
from torch import Tensor

from ..collectives import Transport
from ..placement import ExpertLoad, Placement, Topology, split_exact
from ..runtime.dispatch.by_node import by_node_handle
from ..runtime.dispatch.direct import direct_handle

ROUTES = ("direct", "by_node")
_MOST_COLUMNS = 1024


def exchange(transport: Transport, route: str, x: Tensor, y: Tensor, topology: Topology) -> Callable[[], None]:
    """A function that sends the tokens of `x` to all ranks and writes their sum, R times `x`, to `y`; flat fp32 tensors."""
    num_ranks = transport.world_size
    x_TD = x.view(-1, gcd(x.numel(), _MOST_COLUMNS))
    num_tokens = x_TD.shape[0]
    placement = Placement.owners_only(np.arange(num_ranks), num_ranks)
    split = split_exact(ExpertLoad(np.full((num_ranks, num_ranks), num_tokens)), placement, topology)
    ids_TK = torch.arange(num_ranks).repeat(num_tokens, 1)
    weights_TK = torch.ones(num_tokens, num_ranks)
    make_handle = partial(by_node_handle, ranks_per_node=topology.ranks_per_node) if route == "by_node" else direct_handle

    def forward() -> None:
        handle = make_handle(ids_TK, weights_TK, split, [transport.rank], transport, "describe", "")
        rows_ND = handle.send(x_TD, transport, "dispatch", "").wait()
        y.copy_(handle.send_back(rows_ND, transport, "combine", "").wait().x_TD.view(-1))

    return forward


def crossing_bytes(topology: Topology, size: int) -> int:
    """Bytes that must leave and enter each node for dispatch and combine by any route: each token once to every other node."""
    return 2 * size * topology.ranks_per_node * (topology.num_nodes - 1)
