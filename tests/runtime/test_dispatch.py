"""Dispatch: what travels, once; and the index arithmetic against plain loops."""

import threading
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from moesaic import MoELayer, RouterConfig, RuntimeConfig
from moesaic.kernels import bags_of, split_tokens
from moesaic.placement import ExpertLoad, Placement, get_solver, split_exact
from moesaic.runtime.dispatch.assignments import anchor_ranks
from moesaic.runtime.dispatch.layouts import segment_transpose
from moesaic.runtime.group import RankGroup
from moesaic.runtime.stages import StageClock
from tests.helpers.cases import Case, cases, share_experts
from tests.helpers.configs import runtime_config
from tests.helpers.threads import run_threads


@given(counts=st.lists(st.lists(st.integers(0, 4), min_size=3, max_size=3), max_size=5))
def test_segment_transpose_regroups(counts: list[list[int]]) -> None:
    """The elements of segment (a, b), in order, for every b and then every a."""
    counts_AB = np.array(counts, np.int64).reshape(-1, 3)
    segments: dict[tuple[int, int], list[int]] = {}
    position = 0
    for a, row in enumerate(counts_AB):
        for b, size in enumerate(row):
            segments[a, b] = list(range(position, position + size))
            position += size
    expected = [i for b in range(3) for a in range(len(counts_AB)) for i in segments[a, b]]
    assert segment_transpose(counts_AB, torch.device("cpu")).tolist() == expected


def forward_and_count(group: RankGroup, case: Case) -> tuple[dict[str, int], int, np.ndarray, np.ndarray]:
    """One forward and backward of one layer after a warm-up that lets copies appear."""
    (layer,) = case.layers()
    solver, clock = case.solver(), StageClock()
    share_experts({"moe": layer}, group, config=RuntimeConfig(slots=case.slots), solver=solver, clock=clock, owners=case.owners())
    layer(case.tokens(group.rank, 0))
    group.tokens.traffic.reset()
    x = case.tokens(group.rank, 1).requires_grad_()
    y = layer(x)
    assert layer.runtime.latest_pass is not None
    plan = layer.runtime.latest_pass.planned
    y.sum().backward()
    traffic = group.tokens.traffic
    routing = layer.router(x.detach())
    own = layer.capacity.kept_ids(routing.topk_ids_TK, routing.weights_TK.detach(), case.num_experts).numpy()
    return traffic.total_bytes(), sum(traffic.messages_R("dispatch")), own, plan.placement.replicas_RE


@settings(max_examples=60, deadline=None)
@given(case=cases())
def test_a_row_crosses_once_and_returns_once(case: Case) -> None:
    """Bytes of every direction are those of the distinct (token, rank) pairs; replayed here by a loop over tokens."""
    case = replace(case, num_layers=1)
    results = run_threads(case.world_size, forward_and_count, case, topology=case.topology())
    load_RE = np.stack([np.bincount(ids.ravel(), minlength=case.num_experts)[: case.num_experts] for _, _, ids, _ in results])
    placement = Placement(case.owners().expert_to_owner_LE[0], results[0][3])
    split = split_exact(ExpertLoad(load_RE), placement, case.topology())
    row_bytes = case.dim * 4
    returned = 0
    for rank, (sent_bytes, messages, ids_TK, _) in enumerate(results):
        bound = {e: int(d) for e, d in enumerate(placement.expert_to_owner_E) if placement.num_replicas_E[e] == 1 and d != rank}
        anchors = [max([bound[e] for e in row if e in bound], default=rank) for row in ids_TK.tolist()]
        crossing = crossing_pairs(split.sends(rank), ids_TK, rank, sorted(range(len(ids_TK)), key=lambda t: anchors[t]))
        returned += len(crossing)
        assert sent_bytes.get("dispatch", 0) == len(crossing) * row_bytes
        assert sent_bytes.get("combine_backward", 0) == len(crossing) * row_bytes
        assert messages == len({d for _, d in crossing})
    assert sum(r[0].get("combine", 0) for r in results) == returned * row_bytes


def crossing_pairs(sends_ER: np.ndarray, ids_TK: np.ndarray, rank: int, tokens: Iterable[int]) -> set[tuple[int, int]]:
    """(token, destination) of every row that leaves `rank` when `tokens` fill each expert's destinations in this order."""
    queues = [[d for d, n in enumerate(row) for _ in range(n)] for row in sends_ER]
    pairs = Counter((t, queues[e].pop(0)) for t in tokens for e in ids_TK[t] if e < len(queues))
    return {(t, d) for t, d in pairs if d != rank}


def test_rows_are_shared_where_they_can_be() -> None:
    """Rank 0 must send two assignments of expert 0, which both ranks hold: it sends those of the tokens that cross anyway.

    Tokens 0 and 1 choose experts 0 and 1 (both here), tokens 2 and 3 choose experts 0 and 2 (owned by rank 1 alone).
    """
    owners_E = np.array([0, 0, 1])
    placement = Placement(owners_E, np.array([[True, True, False], [True, False, True]]))
    load = ExpertLoad(np.array([[4, 2, 2], [0, 0, 0]]))
    split = split_exact(load, placement, Case(2, 3, 2, 1, (4, 0), "static", False, False, True, 1).topology())
    assert split.sends(0)[0].tolist() == [2, 2]
    ids_TK = torch.tensor([[0, 1], [0, 1], [0, 2], [2, 0]])
    anchors = anchor_ranks(ids_TK, split, rank=0).flatten().tolist()
    assert anchors == [0, 0, 1, 1]
    ordered = crossing_pairs(split.sends(0), ids_TK.numpy(), 0, sorted(range(4), key=lambda t: anchors[t]))
    assert ordered == {(2, 1), (3, 1)}


class HostWaits(TorchDispatchMode):
    """Lists the ops whose result has a size, or a value, that a host would wait for a GPU to learn."""

    def __init__(self) -> None:
        super().__init__()
        self.waits: list[str] = []
        self.is_on = False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name, kwargs = func.overloadpacket.__name__, kwargs or {}
        indices = args[1] if name in ("index", "index_put", "index_put_") else []
        if (
            name in ("nonzero", "_local_scalar_dense", "masked_select", "bincount", "equal")
            or name.startswith("unique")
            or (name == "repeat_interleave" and kwargs.get("output_size") is None)
            or any(index is not None and index.dtype == torch.bool for index in indices)
        ):
            self.note(name)
        return func(*args, **kwargs)

    def note(self, name: str) -> None:
        if self.is_on:
            self.waits.append(name)


def waits_of_a_dispatch(group: RankGroup, case: Case, watches_R: list[HostWaits]) -> list[str]:
    """The host's waits while one rank describes its rows."""
    (layer,) = case.layers()
    config, solver, clock = runtime_config(slots=case.slots), case.solver(), StageClock()
    share_experts({"moe": layer}, group, config=config, solver=solver, clock=clock, owners=case.owners())
    watch, build = watches_R[group.rank], layer.runtime.context.make_handle
    threading.current_thread().name = f"rank {group.rank}"

    def watched(*args: Any) -> Any:
        with watch:
            watch.is_on = True
            return build(*args)

    layer.runtime.context.make_handle = watched
    layer(case.tokens(group.rank))
    return watch.waits


@pytest.mark.parametrize("placement", ["static", "everywhere"])
def test_the_host_waits_once_to_learn_how_many_rows_travel(placement: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the split doesn't say about sizes is learnt in one go. The two ops with kernels of their own are theirs to watch."""
    watches_R = [HostWaits() for _ in range(3)]

    def watch_of_this_rank() -> HostWaits:
        name = threading.current_thread().name
        return watches_R[int(name.removeprefix("rank "))] if name.startswith("rank ") else HostWaits()

    def unwatched(op: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            watch = watch_of_this_rank()
            watch.is_on = False
            result = op(*args, **kwargs)
            watch.is_on = True
            return result

        return call

    def noted(tensor: torch.Tensor, tolist: Callable[..., Any] = torch.Tensor.tolist) -> Any:
        watch_of_this_rank().note("tolist")
        return tolist(tensor)

    monkeypatch.setattr("moesaic.runtime.dispatch.assignments.split_tokens", unwatched(split_tokens))
    monkeypatch.setattr("moesaic.runtime.dispatch.layouts.bags_of", unwatched(bags_of))
    monkeypatch.setattr(torch.Tensor, "tolist", noted)
    case = Case(3, 5, 2, 1, (9, 0, 4), placement, hot_expert=True, any_owner=False, normalize=True, seed=1)
    waits_R = run_threads(3, waits_of_a_dispatch, case, watches_R, topology=case.topology())
    assert waits_R == [["tolist"]] * 3


def test_a_layer_without_tokens_still_enters_every_collective() -> None:
    """Zero tokens on every rank but one, and a rank that owns nothing: no rank is left waiting."""
    case = Case(4, 3, 2, 1, (0, 0, 5, 0), "quota", hot_expert=True, any_owner=False, normalize=True, seed=1)
    results = run_threads(4, forward_and_count, case, topology=case.topology())
    assert len(results) == 4


@pytest.mark.parametrize("shape", [(0, 8), (1, 8), (2, 3, 8), (2, 0, 8)])
def test_any_leading_shape(shape: tuple[int, ...]) -> None:
    """The layer works on [..., D]."""
    layer = MoELayer(8, 12, 3, 2, router=RouterConfig())
    x = torch.randn(shape, requires_grad=True)
    y = layer(x)
    (y.sum() + layer.aux_loss).backward()
    assert y.shape == x.shape
    assert x.grad is not None
    assert all(parameter.grad is not None for parameter in layer.experts.parameters())


@pytest.mark.parametrize("shape", [(4, 16), (8, 4), ()])
def test_another_width_is_refused(shape: tuple[int, ...]) -> None:
    """Also where the elements would make up whole tokens."""
    with pytest.raises(ValueError, match=r"layer takes tokens of width 8, but x is \(.*\); project x, or build") as refused:
        MoELayer(8, 12, 3, 2)(torch.randn(shape))
    assert "\n" not in str(refused.value)


def test_policies_are_found_by_name() -> None:
    with pytest.raises(ValueError, match="did you mean 'quota'"):
        get_solver("quotta")
