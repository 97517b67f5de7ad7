"""Recordings of other systems: every kind of array that they write is taken exactly, or refused with its true reason."""

import json

import numpy as np
import pytest

from moesaic.placement.traces.dealing import deal, split_tokens
from moesaic.placement.traces.foreign import Reading, Sizes
from moesaic.placement.traces.format import Trace, TraceWriter
from moesaic.placement.traces.sources import open_source
from tests.placement.recordings import NUM_EXPERTS, changed, loads_of, make_counts, make_ids, naive_loads, open_saved


@pytest.mark.parametrize(
    "dtype", ["u1", "u2", "u4", "u8", "i1", "i2", "i4", "i8", ">i4", ">u8", ">i2", "f2", "f4", "f8", ">f8", "f16"]
)
@pytest.mark.parametrize("order", ["C", "F", "slice"])
def test_counts_of_every_type_and_order_are_kept_exactly(tmp_path, dtype, order):
    counts_SLE = make_counts()
    stored = np.array(counts_SLE.astype(dtype), order="F" if order == "F" else "C")
    if order == "slice":
        stored = np.repeat(stored, 2, axis=2)[:, :, ::2]
    source = open_saved(tmp_path / "t.npz", counts=stored)
    assert np.array_equal(loads_of(source).sum(axis=2), counts_SLE)
    assert source.notes == ()
    assert not source.meta.dropped


def test_compressed_archives_are_taken(tmp_path):
    np.savez_compressed(tmp_path / "t.npz", logical_count=np.asfortranarray(make_counts()))
    source = open_source(tmp_path / "t.npz", 2, sizes=Sizes(top_k=2))
    assert np.array_equal(loads_of(source).sum(axis=2), make_counts())


@pytest.mark.parametrize("name", ["counts", "logical_count", "weight", "weights", "tokens_per_expert", "loads"])
def test_loads_by_known_names_need_no_array_option(tmp_path, name):
    source = open_saved(tmp_path / "t.npz", **{name: make_counts(), "meta": np.array("no JSON"), "rank": np.array(3)})
    assert np.array_equal(loads_of(source).sum(axis=2), make_counts())
    single = open_saved(tmp_path / "t.npz", **{name: make_counts()[0]})
    assert np.array_equal(loads_of(single).sum(axis=2), make_counts()[:1])


def test_loads_with_source_ranks_keep_them(tmp_path):
    """The user says which of the dims are ranks; without that they are refused, whatever the sums and the number of ranks."""
    counts_SLRE = np.stack([make_counts(4, tokens) for tokens in (8, 5, 9, 2)], axis=2)
    source = open_saved(tmp_path / "t.npz", None, counts=counts_SLRE, axes="SLRE")
    assert np.array_equal(loads_of(source), counts_SLRE)
    merged = open_saved(tmp_path / "t.npz", 2, counts=counts_SLRE.astype(np.float64), axes="SLRE")
    assert np.array_equal(loads_of(merged), counts_SLRE.reshape(4, 3, 2, 2, 6).sum(axis=3))
    swapped = open_saved(tmp_path / "t.npz", None, counts=counts_SLRE.transpose(2, 0, 3, 1), axes="RSEL")
    assert np.array_equal(loads_of(swapped), counts_SLRE)

    grouped = open_saved(tmp_path / "t.npz", 2, counts=counts_SLRE.transpose(0, 2, 1, 3), axes="SSLE")
    assert np.array_equal(loads_of(grouped).sum(axis=2), counts_SLRE.transpose(0, 2, 1, 3).reshape(16, 3, 6))

    for num_ranks in (2, 4):
        with pytest.raises(ValueError, match="say which, --axes SLRE or --axes SSLE"):
            open_saved(tmp_path / "t.npz", num_ranks, counts=counts_SLRE)


def test_counts_above_int32_and_below_are_exact(tmp_path):
    counts_SLE = make_counts() * 10**12 + 0
    source = open_saved(tmp_path / "t.npz", 3, counts=counts_SLE.astype(np.uint64))
    assert np.array_equal(loads_of(source).sum(axis=2), counts_SLE)
    with pytest.raises(
        ValueError, match=r"sums to 1.6e\+16 \(step 0, layer 0\), above 9007199254740992; divide it, and give --shares"
    ):
        open_saved(tmp_path / "t.npz", counts=make_counts() * 10**15)
    with pytest.raises(ValueError, match="above 9007199254740992; divide it"):
        open_saved(tmp_path / "t.npz", counts=np.full((1, 2, 4), 2**63, dtype=np.uint64))


def test_dense_layers_and_empty_steps_are_left_out_and_named(tmp_path):
    """As SGLang's recorder writes them: dense layers and unused slots of its ring buffer stay zero."""
    counts_SLE = np.zeros((7, 8, NUM_EXPERTS), dtype=np.int32)
    counts_SLE[:4, [2, 3, 6]] = make_counts()
    source = open_saved(tmp_path / "t.npz", logical_count=counts_SLE)
    assert np.array_equal(loads_of(source).sum(axis=2), make_counts())
    assert (source.num_steps, source.meta.num_layers, source.meta.layers) == (4, 3, (2, 3, 6))
    assert not source.meta.dropped
    assert source.notes == (
        "logical_count has no load in layers 0 to 1, 4 to 5, 7 of 8 (dense layers): left out; the meta's layers keep the numbers "
        "of the others",
        "logical_count has no load in 3 of 7 steps: left out",
    )
    with TraceWriter(tmp_path / "out.npz", source.meta) as writer:
        for loads_LRE in source.steps():
            writer.append(loads_LRE)
    assert Trace(tmp_path / "out.npz").meta.layers == (2, 3, 6)


@pytest.mark.parametrize("num_ranks", [1, 2, 3, 5, 16])
def test_tokens_that_ranks_do_not_divide_are_split_as_evenly_as_can_be(tmp_path, num_ranks):
    counts_SLE = make_counts(tokens=13)
    loads_SLRE = loads_of(open_saved(tmp_path / "t.npz", num_ranks, counts=counts_SLE))
    assert np.array_equal(loads_SLRE.sum(axis=2), counts_SLE)
    tokens_SLR = loads_SLRE.sum(axis=3) / 2
    assert (tokens_SLR == tokens_SLR[:1, :1]).all()
    assert sorted(tokens_SLR[0, 0], reverse=True) == tokens_SLR[0, 0].tolist()
    assert tokens_SLR[0, 0].max() - tokens_SLR[0, 0].min() == (13 % num_ranks != 0)


def test_deal_gives_every_rank_its_share_of_every_expert():
    """Over generated counts: rows never above a rank's tokens, full where nothing was dropped, columns exact, entries even."""
    rng = np.random.default_rng(3)
    for _ in range(300):
        num_ranks, num_experts, top_k = int(rng.integers(1, 9)), int(rng.integers(1, 8)), int(rng.integers(1, 4))
        tokens_N = rng.integers(0, 200, 3)
        wanted_N = np.array([tokens_N[0] * top_k, tokens_N[1] * top_k, rng.integers(0, tokens_N[2] * top_k + 1)])
        counts_NE = np.stack([rng.multinomial(wanted, rng.dirichlet(np.ones(num_experts))) for wanted in wanted_N])
        dealt_NRE, tokens_NR = deal(counts_NE, num_ranks, tokens_N, top_k), split_tokens(tokens_N, num_ranks)
        assert np.array_equal(dealt_NRE.sum(axis=1), counts_NE)
        assert np.array_equal(dealt_NRE[:2].sum(axis=2), tokens_NR[:2] * top_k)
        assert (dealt_NRE[2].sum(axis=1) <= tokens_NR[2] * top_k).all()
        assert dealt_NRE.min() >= 0
        share_RE = counts_NE[0] * tokens_NR[0][:, None] / max(tokens_N[0], 1)
        assert np.abs(dealt_NRE[0] - share_RE).max() < 2.5
    assert deal(np.array([[2, 1]]), 2, np.array([3]), 1).tolist() == [[[2, 0], [0, 1]]]
    assert split_tokens(np.array([5, 0, 6]), 3).tolist() == [[2, 2, 1], [0, 0, 0], [2, 2, 2]]


@pytest.mark.parametrize("num_ranks", [1, 3, 4])
def test_dropped_assignments_are_counted_and_not_made_up(tmp_path, num_ranks):
    counts_SLE = make_counts()
    counts_SLE[1, 2, counts_SLE[1, 2].argmax()] -= 1
    counts_SLE[3, 0] = 0
    source = open_saved(tmp_path / "t.npz", num_ranks, counts=counts_SLE)
    (note,) = source.notes
    assert note.startswith("counts lacks 17 of 192 assignments (32 tokens, as many as the fullest layers need, x top-2 in every")
    assert np.array_equal(loads_of(source).sum(axis=2), counts_SLE)
    assert source.meta.dropped
    with TraceWriter(tmp_path / "out.npz", source.meta) as writer:
        for loads_LRE, tokens_R in zip(source.steps(), source.tokens_SR, strict=True):
            writer.append(loads_LRE, tokens_R)
    trace = open_source(tmp_path / "out.npz", num_ranks * 2)
    assert np.array_equal(loads_of(trace).sum(axis=2), counts_SLE)
    assert (trace.tokens_SR.sum(axis=1) == 8).all()
    assert (loads_of(trace).sum(axis=3) <= 2 * trace.tokens_SR[:, None]).all()


def test_whole_numbers_are_shares_only_where_the_user_or_the_name_says_so(tmp_path):
    """What is rescaled says so in a line; what is not, keeps its sum, and takes no number of tokens."""
    counts = make_counts().astype(np.float64)
    kept = open_saved(tmp_path / "t.npz", logical_count=counts)
    assert np.array_equal(loads_of(kept).sum(axis=2), counts)
    with pytest.raises(ValueError, match=r"logical_count holds counts, .* leave out --tokens-per-step, or rescale them"):
        open_saved(tmp_path / "t.npz", logical_count=counts, tokens_per_step=64)
    for given in (
        {"shares": counts},
        {"share": counts},
        {"logical_count": counts, "as_shares": True},
        {"counts": counts / 2 + 0.25},
    ):
        source = open_saved(tmp_path / "t.npz", tokens_per_step=64, **given)
        assert (loads_of(source).sum(axis=(2, 3)) == 128).all()
        assert "rescaled to 64 tokens x top-2 = 128 assignments a layer and step (--tokens-per-step)" in source.notes[0]
    grouped = open_saved(tmp_path / "t.npz", tokens_per_step=64, share=counts.reshape(2, 2, 3, 6))
    assert (len(grouped.notes), grouped.num_steps) == (1, 4)
    exact = open_saved(tmp_path / "t.npz", tokens_per_step=16, shares=counts)
    assert np.array_equal(loads_of(exact).sum(axis=2), 2 * counts)
    assert r"it holds 0.25" in open_saved(tmp_path / "t.npz", counts=np.where(counts == 0, 0.25, counts)).notes[0]


@pytest.mark.parametrize("dtype, most", [("f2", 2048), ("f4", 2**24)])
def test_small_floats_say_that_their_counts_may_have_been_rounded(tmp_path, dtype, most):
    counts_SLE = (make_counts(tokens=4) * most / 4).astype(dtype)
    (note,) = open_saved(tmp_path / "t.npz", counts=counts_SLE).notes
    assert f"whose counts above {most:,} may have been rounded before" in note


def test_dims_in_any_order_by_axes(tmp_path):
    ids_TLK, counts_SLE = make_ids(), make_counts()
    options = {"experts": NUM_EXPERTS, "tokens_per_step": 24}
    for axes in ("LTK", "KTL", "KLT"):
        order = ["TLK".index(letter) for letter in axes]
        source = open_saved(tmp_path / "t.npz", topk_ids=ids_TLK.transpose(order), axes=axes, **options)
        assert np.array_equal(loads_of(source)[0], naive_loads(ids_TLK, 2))
    by_layer = open_saved(tmp_path / "t.npz", topk_ids_of_layer=ids_TLK.transpose(1, 0, 2), **options)
    assert np.array_equal(loads_of(by_layer)[0], naive_loads(ids_TLK, 2))
    grouped = open_saved(tmp_path / "t.npz", mine=ids_TLK.reshape(2, 12, 3, 2), array="mine", axes="STLK", **options)
    assert np.array_equal(loads_of(grouped)[0], naive_loads(ids_TLK, 2))
    one_layer = open_saved(tmp_path / "t.npz", topk_ids=ids_TLK[:, 0], axes="TK", **options)
    assert np.array_equal(loads_of(one_layer)[0], naive_loads(ids_TLK[:, :1], 2))
    assert np.array_equal(loads_of(open_saved(tmp_path / "t.npz", counts=counts_SLE.T, axes="ELS")).sum(axis=2), counts_SLE)
    totals = loads_of(open_saved(tmp_path / "t.npz", counts=counts_SLE[:, 0], axes="SE")).sum(axis=2)
    assert np.array_equal(totals[:, 0], counts_SLE[:, 0])


def test_arrays_without_a_known_name_are_told_by_their_last_dim(tmp_path):
    ids_TLK, counts_SLE = make_ids(), make_counts()
    tokens = open_saved(tmp_path / "t.npz", experts=NUM_EXPERTS, arr_0=ids_TLK)
    assert np.array_equal(loads_of(tokens)[0], naive_loads(ids_TLK, 2))
    assert "arr_0 is read as [T, L, K], by its dims; if it is another, give --axes" in tokens.notes
    assert np.array_equal(loads_of(open_saved(tmp_path / "t.npz", mine=counts_SLE, array="mine")).sum(axis=2), counts_SLE)
    with pytest.raises(ValueError, match=r"its last dim is neither --experts 7 nor --top-k 3"):
        open_saved(tmp_path / "t.npz", experts=7, top_k=3, arr_0=ids_TLK)


def test_recordings_beside_objects_are_read_and_the_objects_are_not(tmp_path):
    np.savez(tmp_path / "t.npz", counts=make_counts(), info=np.array([{"a": 1}], dtype=object))
    assert np.array_equal(loads_of(open_source(tmp_path / "t.npz", 2, sizes=Sizes(top_k=2))).sum(axis=2), make_counts())
    with pytest.raises(ValueError, match="info holds Python objects, which are never read from a file; save it as numbers"):
        open_source(tmp_path / "t.npz", 2, Reading(array="info"), sizes=Sizes(top_k=2))


def test_traces_take_no_options_of_recordings(tmp_path):
    source = open_saved(tmp_path / "t.npz", counts=make_counts())
    with TraceWriter(tmp_path / "out.npz", source.meta) as writer:
        for loads_LRE in source.steps():
            writer.append(loads_LRE)
    for given in ({"axes": "SLE"}, {"none_ids": (255,)}, {"as_shares": True}):
        with pytest.raises(ValueError, match="is a trace, which says what it holds; leave out --axes, --none and --shares"):
            open_source(tmp_path / "out.npz", reading=Reading(**given))


def test_the_files_meta_says_what_the_user_does_not(tmp_path):
    meta = np.array(json.dumps({"n_experts": 6, "top_k": 2, "model": "a model"}))
    source = open_saved(tmp_path / "t.npz", top_k=None, topk_ids=make_ids(), meta=meta)
    assert (source.meta.num_experts, source.meta.top_k, source.meta.source) == (6, 2, "a model")
    for wrong in ("8", None, [], -1, float("nan"), True, 10**40):
        damaged = np.array(json.dumps({"n_experts": wrong, "top_k": wrong}))
        with pytest.raises(ValueError, match=r"must be an integer|does not say its experts|above"):
            open_saved(tmp_path / "t.npz", top_k=None, topk_ids=make_ids(), meta=damaged)


FLOATS = make_counts().astype(np.float64)
PAIR = np.zeros((2, 3, 6), dtype=[("a", "i4"), ("b", "i4")])


@pytest.mark.parametrize(
    "given, message",
    [
        (
            {"counts": changed((1, 2, 3), -3, make_counts())},
            r"counts holds -3 \(step 1, layer 2, expert 3\): loads are finite and",
        ),
        ({"counts": changed((1, 2, 3), np.nan, FLOATS)}, r"counts holds nan \(step 1, layer 2, expert 3\)"),
        ({"counts": changed((0, 0, 1), np.inf, FLOATS.astype(np.float16))}, r"counts holds inf \(step 0, layer 0, expert 1\)"),
        ({"counts": changed((0, 1, 2, 0), -1, np.ones((1, 2, 3, 4), int)), "axes": "SLRE"}, "layer 1, rank 2, expert 0"),
        ({"counts": make_counts(), "topk_ids": make_ids()}, "it has topk_ids and counts; name one with --array"),
        ({"counts": make_counts(), "array": "count"}, r"it has no count \(its arrays: counts\); name one with --array"),
        ({"counts": make_counts()[:, :, :0]}, r"counts is empty: \(4, 3, 0\)"),
        ({"counts": make_counts()[:0]}, r"counts is empty: \(0, 3, 6\)"),
        ({"counts": np.array(3)}, "counts is a single number"),
        ({"counts": np.arange(4)}, r"counts has dims \(4,\), not \[L, E\] or \[S, L, E\]"),
        ({"counts": PAIR}, r"counts is \[\('a', '<i4'\), \('b', '<i4'\)\]; tokens and loads are whole numbers, bools or floats"),
        ({"counts": make_counts().astype(complex)}, "counts is complex128; tokens and loads"),
        ({"counts": make_counts().astype(str)}, "counts is <U"),
        ({"counts": make_counts() > 2}, "counts is bool, which only routing maps"),
        ({"counts": make_counts(), "experts": 8}, "counts is by 6 experts, --experts says 8; leave it out"),
        ({"counts": make_counts(), "none_ids": (7,)}, "holds loads, no ids of experts; leave out --none"),
        ({"counts": make_counts(), "shuffle_seed": 0}, "counts no single tokens, which --shuffle could mix"),
        ({"counts": make_counts(), "axes": "SL"}, "--axes SL is no recording: tokens are T, L, K"),
        ({"counts": make_counts(), "axes": "SLX"}, "--axes SLX: give a letter for each dim"),
        ({"counts": make_counts(), "axes": "LE"}, r"counts has dims \(4, 3, 6\), not \[L, E\]; say what they are with --axes"),
        ({"shares": changed((1, 2), 0, FLOATS)}, "has no load in step 1, layer 2, where other steps have; leave the step out"),
        ({"shares": FLOATS, "tokens_per_step": 2**31}, "tokens per step x top-2 are above 2147483647; lower --tokens-per-step"),
        ({"counts": np.ones((1, 2, 3, 4)) / 3, "axes": "SLRE"}, "shares have no source ranks; sum it over its ranks first"),
        ({"topk_ids": make_ids(), "experts": 6, "as_shares": True}, "names the experts of tokens; leave out --shares"),
        (
            {"topk_ids": make_ids(), "experts": 6, "none_ids": (5,)},
            "--none 5 is one of the experts 0 to 5; give an id that is not",
        ),
        ({"topk_ids": make_ids(), "experts": 6, "top_k": 3}, "names 2 experts a token, top-k is 3; correct --top-k"),
        ({"topk_ids": make_ids()}, "does not say its experts and top-k; give --experts and --top-k"),
        (
            {"topk_ids": make_ids()[:, 0], "experts": 6},
            r"has dims \(24, 2\), not \[T, L, K\]; say what they are, such as --axes TK",
        ),
        (
            {"topk_ids": changed((7, 1, 0), 99, make_ids()), "experts": 6},
            r"holds expert 99 \(token 7, layer 1\), outside 0 to 5; correct --experts, or give --none 99 if it",
        ),
        (
            {"topk_ids": changed((7, 1), 4, make_ids()), "experts": 6},
            r"names expert 4 twice \(token 7, layer 1\), but a token chooses other experts",
        ),
        (
            {"topk_ids": changed((7, 1, 0), 1.5, make_ids().astype(float)), "experts": 6},
            r"holds 1.5 \(token 7, layer 1\); ids of",
        ),
        ({"topk_ids": changed((7, 1, 0), np.inf, make_ids().astype(float)), "experts": 6}, r"holds inf \(token 7, layer 1\)"),
        ({"topk_ids": np.full((24, 3, 2), -1), "experts": 6}, "names no expert in any of its 24 tokens"),
        (
            {"topk_ids": make_ids(300).transpose(1, 0, 2), "experts": 6},
            r"would be 3 tokens of 300 layers, more than any model has: its order seems to be \[L, T, K\], .* give --axes LTK",
        ),
        ({"routing_map": np.zeros((4, 3, 6), bool)}, "names no expert in any of its 4 tokens"),
    ],
)
def test_what_is_no_recording_is_one_line_with_value_place_and_cure(tmp_path, given, message):
    with pytest.raises(ValueError, match=message) as caught:
        open_saved(tmp_path / "t.npz", **given)
    assert "\n" not in str(caught.value)
