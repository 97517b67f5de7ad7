"""Copies that micro-batches share: what is gathered, and when nothing may be shared. Parity is part of test_parity.py."""

import numpy as np
import pytest
import torch
import torch.distributed as dist

from moesaic import RuntimeConfig
from moesaic.runtime.group import group_of_process_group, single_rank_group
from moesaic.runtime.stages import StageClock
from moesaic.runtime.wrap.shard import share_experts
from tests.helpers.cases import Case
from tests.helpers.configs import runtime_config
from tests.helpers.ranks import run_ranks

CASE = Case(
    world_size=3,
    num_experts=7,
    top_k=2,
    num_layers=1,
    tokens_R=(9, 0, 5),
    placement="random",
    hot_expert=False,
    any_owner=True,
    normalize=True,
    seed=4,
)
MICRO_BATCHES, STEPS = 4, 2


def train(rank: int, reuse_copies: bool) -> tuple[list[torch.Tensor], list[tuple[int, np.ndarray]]]:
    """Outputs, and of every micro-batch the bytes that this rank sent for copies and who held which."""
    assert dist.group.WORLD is not None
    group = group_of_process_group(dist.group.WORLD, timeout_s=60, topology=CASE.topology())
    (layer,) = CASE.layers()
    config = runtime_config(slots=CASE.slots, calibrate="never", reuse_copies=reuse_copies)
    (bank,) = share_experts({"0": layer}, group, config=config, solver=CASE.solver(), clock=StageClock(), owners=CASE.owners())
    optimizer = torch.optim.SGD([{"params": list(bank.parameters())}], lr=0.1)  # rank 0 owns no expert
    unrelated = torch.optim.SGD([torch.zeros(1, requires_grad=True)])
    outputs, sent, traffic = [], [], group.experts.traffic
    for batch in range(MICRO_BATCHES * STEPS):
        before = traffic.total_bytes().get("gather", 0)
        y = layer(CASE.tokens(rank, batch))
        y.square().sum().backward()
        outputs.append(y.detach())
        assert layer.runtime.latest_pass is not None
        copies_RE = layer.runtime.latest_pass.plan.placement.copies_RE
        sent.append((traffic.total_bytes().get("gather", 0) - before, copies_RE))
        with torch.no_grad():
            layer.eval()(CASE.tokens(rank, batch))  # an evaluation in between
        layer.train()
        if rank == 0:
            unrelated.step()  # of no experts, and on this rank alone
        if batch % MICRO_BATCHES == MICRO_BATCHES - 1:
            optimizer.step()
            optimizer.zero_grad()
    return outputs, sent


def test_only_what_is_new_is_gathered() -> None:
    """The bytes of copies that the micro-batch before did not have; all of them after an optimizer step; the same bits."""
    reused, plain = (run_ranks(CASE.world_size, train, reuse) for reuse in (True, False))
    copy_bytes = 3 * CASE.dim * CASE.ffn_dim * 4
    placements = [copies_RE for _, copies_RE in plain[0][1]]
    saved = 0
    for batch, copies_RE in enumerate(placements):
        assert all(np.array_equal(sent[batch][1], copies_RE) for _, sent in (*reused, *plain))
        is_first = batch % MICRO_BATCHES == 0
        new_RE = copies_RE if is_first else copies_RE & ~placements[batch - 1]
        assert sum(sent[batch][0] for _, sent in plain) == copies_RE.sum() * copy_bytes
        assert sum(sent[batch][0] for _, sent in reused) == new_RE.sum() * copy_bytes
        saved += int(copies_RE.sum() - new_RE.sum())
    assert saved > 0
    for (mine, _), (theirs, _) in zip(reused, plain, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(mine, theirs, strict=True))


def test_weights_that_change_unseen_by_other_ranks_are_refused() -> None:
    """An optimizer's step, and what says so, is no such change."""
    (layer,) = CASE.layers()
    config = RuntimeConfig(slots=1, reuse_copies=True, policy="static")
    (bank,) = share_experts({"0": layer}, single_rank_group(), config=config, solver=CASE.solver(), clock=StageClock())
    x = CASE.tokens(0)
    for change in (torch.optim.SGD(bank.parameters(), lr=0.0).step, bank.weights_changed):
        layer(x)
        with torch.no_grad():
            layer.experts[0].down.mul_(0.5)
        change()
    layer(x)
    with torch.no_grad():
        layer.experts[0].down.mul_(0.5)
    with pytest.raises(
        RuntimeError, match=r"step 0, 0, plan 0, pass 3: experts' weights were changed in place .*; call handle.step\(\)"
    ):
        layer(x)
