"""Collectives that break off on the way: what a second wait finds."""

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from moesaic.collectives import sparse_all_gather, sparse_reduce_scatter
from moesaic.collectives.hops import Copies
from moesaic.collectives.schedules.relay import chain_hops
from moesaic.placement import Placement
from moesaic.runtime.group import RankGroup
from tests.helpers.threads import ThreadWorld, run_threads


class BreaksOff:
    """The mailboxes of a rank whose third message is interrupted before it is taken."""

    def __init__(self, world: ThreadWorld):
        self._world, self._calls = world, 0

    def __getattr__(self, name: str) -> Any:
        return getattr(self._world, name)

    def take(self, key: tuple[Any, ...], about: str) -> Tensor:
        self._calls += 1
        if self._calls == 3:
            raise KeyboardInterrupt
        return self._world.take(key, about)


@pytest.mark.parametrize("is_reduce", [False, True], ids=["gather", "reduce"])
def test_a_collective_that_was_interrupted_is_carried_on_by_the_next_wait(is_reduce: bool) -> None:
    """A chain 0, 2, 1 of five chunks, and its transpose: rank 2 is interrupted in the middle of it."""
    gather = chain_hops(Copies.of(Placement.everywhere(np.zeros(1, np.int64), 3))).cut(5).schedule()

    def body(group: RankGroup) -> Tensor:
        rank, transport = group.rank, group.experts
        item = [torch.arange(20.0) if is_reduce or rank == 0 else torch.full((20,), torch.nan)]
        if rank == 2:
            transport.world = BreaksOff(transport.world)  # type: ignore[attr-defined]
        owned, others = ({0: item}, {}) if rank == 0 else ({}, {0: item})
        if is_reduce:
            schedule = gather.transpose().limit_receives(2)
            staging = [[torch.empty(20)] for _ in range(2)]
            pending = sparse_reduce_scatter(schedule, transport, others, owned, staging, op="reduce")
        else:
            pending = sparse_all_gather(gather, transport, owned, others, op="gather")
        if rank == 2:
            with pytest.raises(KeyboardInterrupt):
                pending.wait()
        pending.wait()
        return item[0]

    results = run_threads(3, body)
    if is_reduce:
        assert torch.equal(results[0], 3 * torch.arange(20.0))
    else:
        assert all(torch.equal(result, torch.arange(20.0)) for result in results)
