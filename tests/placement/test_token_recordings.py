"""Recordings of single tokens: ids of every type, padding, dense layers and routing maps are counted as what they are."""

import numpy as np
import pytest

from moesaic.placement.traces.sources import pair_counts_of
from tests.placement.recordings import NUM_EXPERTS, loads_of, make_ids, naive_loads, open_saved


@pytest.mark.parametrize("dtype", ["u1", "u2", "u4", "u8", "i1", "i2", "i4", "i8", ">i4", ">u2", "f4", "f8"])
@pytest.mark.parametrize("order", ["C", "F", "slice"])
def test_ids_of_every_type_and_order_are_taken(tmp_path, dtype, order):
    ids_TLK = make_ids()
    stored = np.array(ids_TLK.astype(dtype), order="F" if order == "F" else "C")
    if order == "slice":
        stored = np.repeat(stored, 2, axis=0)[::2]
    source = open_saved(tmp_path / "t.npz", experts=NUM_EXPERTS, tokens_per_step=24, topk_ids=stored)
    assert np.array_equal(loads_of(source)[0], naive_loads(ids_TLK, 2))
    assert source.notes == ()


def test_ids_of_no_expert_are_dropped_and_counted(tmp_path):
    """-1, what it becomes in unsigned types, and what the user names; rows of zeros, which K different experts cannot be."""
    ids_TLK = make_ids()
    ids_TLK[-4:] = -1
    ids_TLK[3, 1, 0] = -1
    expected = naive_loads(ids_TLK, 3)
    options = {"experts": NUM_EXPERTS, "tokens_per_step": 24}
    for dtype in ("i2", "u1", "u2", "u4", "u8", "f4"):
        stored = ids_TLK.astype(dtype) if dtype != "f4" else np.where(ids_TLK < 0, 255, ids_TLK).astype(dtype)
        source = open_saved(tmp_path / "t.npz", 3, topk_ids=stored, **options)
        assert np.array_equal(loads_of(source)[0], expected)
        assert "lacks 25 of 144 assignments, kept as dropped" in source.notes[0]
        assert "4 tokens name no expert in any layer" in source.notes[0]
    named = open_saved(tmp_path / "t.npz", 3, topk_ids=np.where(ids_TLK < 0, 77, ids_TLK), none_ids=(77,), **options)
    assert np.array_equal(loads_of(named)[0], expected)
    assert "ids 77 stand for none" in named.notes[0]
    assert np.array_equal(named.tokens_SR, [[8, 8, 8]])

    zeros = np.where((ids_TLK < 0).all(axis=2, keepdims=True), 0, ids_TLK)
    padded = open_saved(tmp_path / "t.npz", 3, routed_experts=zeros, **options)
    assert np.array_equal(loads_of(padded)[0], expected)
    assert "12 rows of zeros are taken as not recorded" in padded.notes[0]
    assert pair_counts_of(padded).sum() == (ids_TLK >= 0).sum(axis=2)[:, :2].prod(axis=1).sum() + (
        (ids_TLK >= 0).sum(axis=2)[:, 1:].prod(axis=1).sum()
    )


def test_a_single_expert_per_token_may_be_expert_0(tmp_path):
    source = open_saved(tmp_path / "t.npz", 2, top_k=1, experts=4, topk_ids=np.zeros((6, 2, 1), dtype=np.uint8))
    assert loads_of(source)[0, :, :, 0].tolist() == [[3, 3], [3, 3]]
    assert source.notes == ("its 6 tokens are taken as one step; cut them with --tokens-per-step",)


@pytest.mark.parametrize("fill", [0, -1])
def test_dense_layers_of_token_recordings_are_left_out(tmp_path, fill):
    """vLLM fills them with zeros, SGLang with -1."""
    ids = np.full((24, 5, 2), fill)
    ids[:, [1, 3, 4]] = make_ids()
    source = open_saved(tmp_path / "t.npz", experts=NUM_EXPERTS, tokens_per_step=24, routed_experts=ids)
    assert np.array_equal(loads_of(source)[0], naive_loads(make_ids(), 2))
    assert (source.meta.layers, source.meta.dropped) == ((1, 3, 4), False)
    assert source.notes[0].startswith("routed_experts has no load in layers 0, 2 of 5 (dense layers): left out")


def test_slots_beyond_top_k_are_not_dropped_assignments(tmp_path):
    """SGLang always writes 8 slots; --top-k says how many the model uses."""
    ids = np.full((24, 3, 8), -1)
    ids[:, :, :2] = make_ids()
    plain = {"experts": NUM_EXPERTS, "tokens_per_step": 24, "topk_ids": ids}
    source = open_saved(tmp_path / "t.npz", **plain)
    assert (source.meta.top_k, source.meta.dropped, source.notes) == (2, False, ())
    guessed = open_saved(tmp_path / "t.npz", top_k=None, **{**plain, "experts": 9})
    assert "no token names more than 2: if that is the model's top-k, give --top-k 2" in guessed.notes[0]
    with pytest.raises(ValueError, match=r"names up to 2 experts \(token 0, layer 0\), top-k is 1; correct --top-k"):
        open_saved(tmp_path / "t.npz", top_k=1, **plain)


def test_routing_maps_are_counted(tmp_path):
    """Rows that are all false are dropped tokens; top-k is the fullest row's."""
    ids_TLK = make_ids()
    ids_TLK[5, 1] = -1
    map_TLE = np.zeros((24, 3, NUM_EXPERTS), dtype=bool)
    for token, layer, slot in np.ndindex(ids_TLK.shape):
        if ids_TLK[token, layer, slot] >= 0:
            map_TLE[token, layer, ids_TLK[token, layer, slot]] = True
    for stored in (map_TLE, np.asfortranarray(map_TLE), map_TLE.astype(np.uint8), map_TLE.astype(np.float32)):
        source = open_saved(tmp_path / "t.npz", 3, top_k=None, routing_map=stored, tokens_per_step=12)
        assert np.array_equal(loads_of(source), [naive_loads(half, 3) for half in (ids_TLK[:12], ids_TLK[12:])])
        assert source.meta.top_k == 2
        assert "lacks 2 of 144 assignments" in source.notes[0]
    unnamed = open_saved(tmp_path / "t.npz", 3, mine=map_TLE, array="mine")
    assert np.array_equal(loads_of(unnamed)[0], naive_loads(ids_TLK, 3))
    with pytest.raises(ValueError, match=r"names up to 2 experts \(token 0, layer 0\), top-k is 1"):
        open_saved(tmp_path / "t.npz", top_k=1, routing_map=map_TLE)
    with pytest.raises(ValueError, match="is a routing map, but holds more than 0 and 1"):
        open_saved(tmp_path / "t.npz", routing_map=map_TLE * 2)


def test_tokens_of_large_steps_are_read_in_small_blocks(tmp_path, monkeypatch):
    """Blocks that end inside a step and across steps count the same."""
    ids_TLK = make_ids(50)
    monkeypatch.setattr("moesaic.placement.traces.tokens._BLOCK_CELLS", 7 * 6)
    for shuffle_seed in (None, 0):
        source = open_saved(
            tmp_path / "t.npz", 3, experts=NUM_EXPERTS, tokens_per_step=16, shuffle_seed=shuffle_seed, topk_ids=ids_TLK
        )
        order = np.arange(50) if shuffle_seed is None else np.random.default_rng(0).permutation(50)
        expected = [naive_loads(ids_TLK[order[start : start + 16]], 3) for start in (0, 16, 32)]
        assert np.array_equal(loads_of(source), expected)
        assert source.notes == ("the last 2 of 50 tokens make no whole step: left out",)
