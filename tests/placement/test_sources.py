"""Loads from traces and foreign recordings at any number of ranks."""

import json

import numpy as np
import pytest

from moesaic.placement.traces.dealing import apportion, deal
from moesaic.placement.traces.foreign import Reading, Sizes
from moesaic.placement.traces.format import Trace, TraceMeta, TraceWriter, write_trace
from moesaic.placement.traces.sources import ResizedSource, open_source, pair_counts_of
from moesaic.placement.traces.tokens import TokenFile

META = TraceMeta(num_layers=2, num_experts=6, top_k=2, num_ranks=4, dim=8, ffn_dim=16)


def make_ids(num_tokens: int = 30) -> np.ndarray:
    rng = np.random.default_rng(0)
    return np.stack([[rng.permutation(6)[:2] for _ in range(2)] for _ in range(num_tokens)]).astype(np.int8)


def save(path, **arrays: np.ndarray) -> str:
    meta = {"n_experts": 6, "source": "a test"}
    np.savez(path, meta=np.array(json.dumps(meta)), **arrays)
    return str(path)


def naive_loads(ids_TLK: np.ndarray, num_ranks: int) -> np.ndarray:
    """Count token by token: token t of a step of T belongs to rank t * R // T."""
    loads_LRE = np.zeros((2, num_ranks, 6), dtype=np.int64)
    for token, ids_LK in enumerate(ids_TLK):
        for layer, ids_K in enumerate(ids_LK):
            for expert in ids_K:
                loads_LRE[layer, token * num_ranks // len(ids_TLK), expert] += 1
    return loads_LRE


@pytest.mark.parametrize("num_ranks", [1, 3, 4, 12])
def test_tokens_are_dealt_to_any_number_of_ranks(tmp_path, num_ranks):
    ids_TLK = make_ids()
    source = open_source(save(tmp_path / "t.npz", topk_ids=ids_TLK), num_ranks, Reading(tokens_per_step=12))
    assert (source.num_steps, source.meta.step_shape) == (2, (2, num_ranks, 6))
    for step, loads_LRE in enumerate(source.steps()):
        assert np.array_equal(loads_LRE, naive_loads(ids_TLK[12 * step : 12 * step + 12], num_ranks))


def test_shuffled_tokens_are_the_same_tokens(tmp_path):
    path = save(tmp_path / "t.npz", topk_ids=make_ids())
    totals = [
        sum(open_source(path, 3, Reading(tokens_per_step=15, shuffle_seed=seed)).steps()).sum(axis=1) for seed in (None, 0, 1)
    ]
    assert np.array_equal(totals[0], totals[1])
    first = [next(open_source(path, 3, Reading(tokens_per_step=15, shuffle_seed=seed)).steps()) for seed in (0, 0, 1)]
    assert np.array_equal(first[0], first[1])
    assert not np.array_equal(first[0], first[2])


def test_pair_counts_follow_every_token(tmp_path):
    ids_TLK = make_ids()
    source = open_source(save(tmp_path / "t.npz", topk_ids=ids_TLK), 2, Reading(tokens_per_step=30))
    assert isinstance(source, TokenFile)
    expected = np.zeros((1, 6, 6), dtype=np.int64)
    for before_K, after_K in ids_TLK:
        for before in before_K:
            for after in after_K:
                expected[0, before, after] += 1
    assert np.array_equal(pair_counts_of(source), expected)
    assert np.array_equal(pair_counts_of(open_source(source.path, 2, Reading(tokens_per_step=30), sizes=Sizes(dim=4))), expected)


def test_counts_and_shares_are_dealt_evenly(tmp_path):
    counts_SLE = np.array([[[3, 1, 0, 4, 8, 0], [16, 0, 0, 0, 0, 0]], [[2, 2, 2, 2, 4, 4], [1, 2, 3, 4, 5, 1]]])
    source = open_source(save(tmp_path / "c.npz", counts=counts_SLE), 4, sizes=Sizes(top_k=2))
    for loads_LRE, counts_LE in zip(source.steps(), counts_SLE, strict=True):
        assert np.array_equal(loads_LRE.sum(axis=1), counts_LE)
        assert (loads_LRE.sum(axis=2) == 4).all()
        assert (loads_LRE.max(axis=1) - loads_LRE.min(axis=1) <= 1).all()
    shares = open_source(
        save(tmp_path / "s.npz", shares=counts_SLE[:, None] / 16.0), 4, Reading(tokens_per_step=8), sizes=Sizes(top_k=2)
    )
    for loads_LRE, counts_LE in zip(shares.steps(), counts_SLE, strict=True):
        assert np.array_equal(loads_LRE, deal(counts_LE, 4))


def test_deal_and_apportion_by_hand():
    assert deal(np.array([[3, 1]]), 2).tolist() == [[[2, 0], [1, 1]]]
    assert apportion(np.array([[0.5, 0.3, 0.2]]), 7).tolist() == [[4, 2, 1]]


def test_a_trace_on_other_ranks(tmp_path):
    """Neighbours merge; a rank's assignments are dealt to several; other numbers are refused."""
    loads_SLRE = np.random.default_rng(0).multinomial(8, np.full(6, 1 / 6), size=(3, 2, 4))
    write_trace(tmp_path / "t.npz", META, loads_SLRE)
    merged = open_source(tmp_path / "t.npz", 2)
    assert isinstance(merged, ResizedSource)
    assert np.array_equal(np.stack(list(merged.steps())), loads_SLRE.reshape(3, 2, 2, 2, 6).sum(axis=3))
    split = np.stack(list(open_source(tmp_path / "t.npz", 8).steps()))
    assert np.array_equal(split.reshape(3, 2, 4, 2, 6).sum(axis=3), loads_SLRE)
    assert (split.sum(axis=3) == 4).all()
    with pytest.raises(ValueError, match=r"recorded on 4 ranks without topk_ids; .* not on 6"):
        open_source(tmp_path / "t.npz", 6)
    thin = np.stack(list(open_source(tmp_path / "t.npz", 32).steps()))
    assert np.array_equal(thin.reshape(3, 2, 4, 8, 6).sum(axis=3), loads_SLRE)
    assert (thin.sum(axis=3) == np.tile([2] * 4 + [0] * 4, 4)).all()


def test_converted_traces_keep_pair_counts_and_are_discarded_on_error(tmp_path):
    pairs_LEE = np.arange(36).reshape(1, 6, 6)
    with TraceWriter(tmp_path / "t.npz", META, pair_counts_LEE=pairs_LEE) as writer:
        writer.append(np.full((2, 4, 6), 2))
    trace = Trace(tmp_path / "t.npz")
    assert np.array_equal(trace.pair_counts(), pairs_LEE)
    assert np.array_equal(pair_counts_of(open_source(tmp_path / "t.npz", 2)), pairs_LEE)
    before = (tmp_path / "t.npz").read_bytes()
    writer = TraceWriter(tmp_path / "t.npz", META)
    writer.append(np.full((2, 4, 6), 4))
    writer.discard()
    writer.close()
    assert [path.name for path in tmp_path.iterdir()] == ["t.npz"]
    assert (tmp_path / "t.npz").read_bytes() == before


@pytest.mark.parametrize(
    "arrays, options, message",
    [
        (
            {"other": np.zeros((2, 2, 2))},
            {},
            r"has no topk_ids, counts or shares \(its arrays: meta, other\); name one with --array",
        ),
        ({"topk_ids": make_ids()}, {"num_ranks": None}, "does not say how many ranks there are; give --ranks"),
        (
            {"topk_ids": make_ids()},
            {"reading": Reading(tokens_per_step=4096)},
            "holds 30 tokens, less than one step of 4096; lower --tokens-per-",
        ),
        (
            {"topk_ids": make_ids() + 1},
            {"reading": Reading(tokens_per_step=30)},
            r"holds expert 6 \(token \d+, layer \d\), outside 0 to 5; correct",
        ),
        ({"counts": np.full((1, 2, 6), 3)}, {}, "does not say its experts and top-k; give --experts and --top-k"),
        (
            {"counts": np.full((1, 2, 6), 3)},
            {"sizes": Sizes(top_k=4)},
            "counts 18 assignments in every layer of step 0, not tokens x top-4; correct --top-k",
        ),
        (
            {"shares": np.full((1, 2, 6), np.nan)},
            {"sizes": Sizes(top_k=2)},
            r"holds nan \(step 0, layer 0, expert 0\): loads are",
        ),
        ({"shares": np.zeros((1, 2, 6))}, {"sizes": Sizes(top_k=2)}, "holds no load at all, only zeros"),
        ({"counts": np.full((1, 2, 6), 2)}, {"num_ranks": 10**6, "sizes": Sizes(top_k=2)}, "above the supported 2097152 cells"),
    ],
)
def test_what_cannot_be_read_is_one_clear_line(tmp_path, arrays, options, message):
    with pytest.raises(ValueError, match=message) as caught:
        list(open_source(save(tmp_path / "t.npz", **arrays), **{"num_ranks": 2, **options}).steps())
    assert "\n" not in str(caught.value)
