from __future__ import annotations

import pytest
import torch
from torch import Tensor

from moesaic.kernels import split_tokens

CASES = [(1, 1, 1, 1), (7, 2, 3, 2), (63, 1, 5, 3), (129, 4, 16, 8), (1025, 2, 7, 1)]  # T, K, E, R


def random_flow(topk_ids_TK: Tensor, E: int, R: int) -> Tensor:
    """Each expert's load cut into R random pieces, some of them empty."""
    flow_ER = torch.zeros(E, R, dtype=torch.int64)
    for expert in topk_ids_TK.flatten().tolist():
        flow_ER[expert, torch.randint(0, R, (1,)) // 2 * 2 % R] += 1
    return flow_ER


def naive_split(topk_ids_TK: Tensor, flow_ER: Tensor, anchors_TK: Tensor | None = None) -> list[int]:
    """Walk over the assignments, smallest anchor first, give each the first rank with room, then sort."""
    room, ids_N = flow_ER.tolist(), topk_ids_TK.flatten().tolist()
    anchors_N = [0] * len(ids_N) if anchors_TK is None else anchors_TK.flatten().tolist()
    keyed = []
    for n in sorted(range(len(ids_N)), key=lambda n: (anchors_N[n], n)):
        if ids_N[n] < len(room):
            rank = next(r for r, left in enumerate(room[ids_N[n]]) if left > 0)
            room[ids_N[n]][rank] -= 1
            keyed.append((rank, ids_N[n], anchors_N[n], n))
    return [n for *_, n in sorted(keyed)]


@pytest.mark.parametrize("T,K,E,R", CASES)
def test_order_follows_the_flow(T: int, K: int, E: int, R: int) -> None:
    topk_ids_TK = torch.randint(0, E, (T, K))
    flow_ER = random_flow(topk_ids_TK, E, R)
    order_N = split_tokens(topk_ids_TK, flow_ER)
    assert order_N.tolist() == naive_split(topk_ids_TK, flow_ER)
    assert sorted(order_N.tolist()) == list(range(T * K))
    assert torch.equal(order_N, split_tokens(topk_ids_TK.int(), flow_ER.int()))
    gaps_TK = torch.stack([topk_ids_TK] * 2, dim=2)[..., 0]
    assert torch.equal(order_N, split_tokens(gaps_TK, flow_ER.t().contiguous().t()))


@pytest.mark.parametrize("T,K,E,R", CASES)
def test_anchors_come_first_and_ids_of_no_expert_not_at_all(T: int, K: int, E: int, R: int) -> None:
    topk_ids_TK, anchors_TK = torch.randint(0, E + 1, (T, K)), torch.randint(0, R, (T, K))
    flow_ER = random_flow(topk_ids_TK, E + 1, R)[:E]
    order_A = split_tokens(topk_ids_TK, flow_ER, anchors_TK, num_sent=int(flow_ER.sum()))
    assert order_A.tolist() == naive_split(topk_ids_TK, flow_ER, anchors_TK)


def test_the_documented_examples() -> None:
    ids_TK, flow_ER = torch.tensor([[1], [0], [1]]), torch.tensor([[0, 1], [1, 1]])
    assert split_tokens(ids_TK, flow_ER).tolist() == [0, 1, 2]
    assert split_tokens(ids_TK, flow_ER, torch.tensor([[1], [0], [0]])).tolist() == [2, 1, 0]


def test_no_tokens() -> None:
    assert split_tokens(torch.zeros(0, 2, dtype=torch.int64), torch.zeros(3, 2, dtype=torch.int64)).shape == (0,)


def test_a_flow_that_does_not_sum_to_the_load_is_named() -> None:
    with pytest.raises(ValueError, match=r"flow sums to \[1, 1\] per expert, but the tokens chose \[0, 2\]"):
        split_tokens(torch.tensor([[1], [1]]), torch.tensor([[1, 0], [0, 1]]))
    with pytest.raises(ValueError, match="num_sent is 2, but 1 assignments name an expert"):
        split_tokens(torch.tensor([[1], [2]]), torch.tensor([[0, 0], [0, 1]]), num_sent=2)
    with pytest.raises(ValueError, match=r"anchors are \(1, 1\), must be like the ids \(2, 1\)"):
        split_tokens(torch.tensor([[1], [1]]), torch.tensor([[1, 0], [0, 1]]), torch.zeros(1, 1, dtype=torch.int64))
