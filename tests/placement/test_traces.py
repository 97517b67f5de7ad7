"""Trace files: round trips, what the writer refuses, and damaged files."""

from __future__ import annotations

import json
import random
import zipfile
from dataclasses import asdict, replace

import numpy as np
import pytest

from moesaic.placement import Trace, TraceMeta, TraceWriter, write_trace

META = TraceMeta(num_layers=3, num_experts=8, top_k=2, num_ranks=4, dim=16, ffn_dim=32, source="a test")


def make_loads(num_steps: int, seed: int = 0) -> np.ndarray:
    """Loads [S, L, R, E] of 50 tokens per rank."""
    rng = np.random.default_rng(seed)
    return rng.multinomial(50 * META.top_k, rng.dirichlet(np.ones(8)), size=(num_steps, META.num_layers, META.num_ranks))


def write_raw(path, arrays: dict[str, np.ndarray]) -> None:
    np.savez(path, **arrays)


def meta_text(**changes: object) -> np.ndarray:
    return np.array(json.dumps({"schema": "moesaic-trace/1", "steps": 2, **asdict(META), **changes}))


def test_writer_round_trip(tmp_path):
    loads_SLRE = make_loads(5)
    path = tmp_path / "trace.npz"
    with TraceWriter(path, META) as writer:
        for loads_LRE in loads_SLRE:
            writer.append(loads_LRE)
            assert not path.exists()
    trace = Trace(path)
    assert (trace.meta, trace.num_steps) == (META, 5)
    assert np.array_equal(np.stack(list(trace.steps())), loads_SLRE)
    assert not trace.has_topk_ids
    assert [p.name for p in tmp_path.iterdir()] == ["trace.npz"]
    stored = np.load(path, allow_pickle=False)
    assert stored["loads"].dtype == np.int32
    assert json.loads(str(stored["meta"]))["steps"] == 5


def test_optional_arrays_round_trip(tmp_path):
    ids_TLK = np.random.default_rng(0).integers(0, 8, (10, 3, 2))
    pairs_LEE = np.arange(2 * 8 * 8).reshape(2, 8, 8)
    write_trace(tmp_path / "t.npz", META, make_loads(2), topk_ids_TLK=ids_TLK, pair_counts_LEE=pairs_LEE)
    trace = Trace(tmp_path / "t.npz")
    assert trace.has_topk_ids
    assert trace.has_pair_counts
    assert np.array_equal(trace.topk_ids(), ids_TLK)
    assert np.array_equal(trace.pair_counts(), pairs_LEE)


def without_some(loads_SLRE: np.ndarray) -> np.ndarray:
    """The same loads, a few assignments dropped."""
    loads_SLRE = loads_SLRE.copy()
    loads_SLRE[1, 2, 3] //= 2
    return loads_SLRE


def test_dropped_assignments_round_trip_with_the_tokens_they_belong_to(tmp_path):
    meta, loads_SLRE, tokens_SR = replace(META, dropped=True, layers=(1, 2, 5)), without_some(make_loads(3)), np.full((3, 4), 50)
    with TraceWriter(tmp_path / "streamed.npz", meta) as writer:
        for loads_LRE, tokens_R in zip(loads_SLRE, tokens_SR, strict=True):
            writer.append(loads_LRE, tokens_R)
    write_trace(tmp_path / "whole.npz", meta, loads_SLRE, tokens_SR=tokens_SR)
    for name in ("streamed.npz", "whole.npz"):
        trace = Trace(tmp_path / name)
        assert trace.meta == meta
        assert np.array_equal(np.stack(list(trace.steps())), loads_SLRE)
        assert np.array_equal(trace.tokens_SR, tokens_SR)
        assert json.loads(str(np.load(tmp_path / name)["meta"]))["schema"] == "moesaic-trace/2"
    assert Trace(tmp_path / "whole.npz").meta.layers == (1, 2, 5)


def test_only_a_trace_that_says_so_may_lack_assignments(tmp_path):
    lacking = without_some(make_loads(2))
    with pytest.raises(ValueError, match="are not tokens x top-k"):
        write_trace(tmp_path / "t.npz", META, lacking)
    with pytest.raises(ValueError, match="takes the tokens of each step and rank"):
        write_trace(tmp_path / "t.npz", replace(META, dropped=True), lacking)
    with pytest.raises(ValueError, match="takes the tokens of each step and rank"):
        write_trace(tmp_path / "t.npz", META, make_loads(2), tokens_SR=np.full((2, 4), 50))
    with (
        TraceWriter(tmp_path / "t.npz", replace(META, dropped=True)) as writer,
        pytest.raises(ValueError, match="takes the tokens of each step and rank"),
    ):
        writer.append(lacking[1])
    assert not list(tmp_path.iterdir())


def test_plain_traces_say_neither_dropped_nor_layers(tmp_path):
    """They are read by what reads the first schema alone."""
    write_trace(tmp_path / "t.npz", META, make_loads(2))
    said = json.loads(str(np.load(tmp_path / "t.npz")["meta"]))
    assert said["schema"] == "moesaic-trace/1"
    assert not {"dropped", "layers"} & said.keys()


@pytest.mark.parametrize("wide_step", [0, 2])
def test_loads_above_int32_are_kept_as_int64(tmp_path, wide_step):
    """From whichever step they come, those that waited on disk as int32 included."""
    loads_SLRE = make_loads(4)
    loads_SLRE[wide_step] *= 10**9
    with TraceWriter(tmp_path / "streamed.npz", META) as writer:
        for loads_LRE in loads_SLRE:
            writer.append(loads_LRE)
    write_trace(tmp_path / "whole.npz", META, loads_SLRE)
    for name in ("streamed.npz", "whole.npz"):
        stored = np.load(tmp_path / name)
        assert stored["loads"].dtype == np.int64
        assert json.loads(str(stored["meta"]))["schema"] == "moesaic-trace/2"
        assert np.array_equal(np.stack(list(Trace(tmp_path / name).steps())), loads_SLRE)


def test_an_interrupted_run_keeps_its_steps(tmp_path):
    def record() -> None:
        with TraceWriter(tmp_path / "t.npz", META) as writer:
            writer.append(make_loads(1)[0])
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        record()
    assert Trace(tmp_path / "t.npz").num_steps == 1


def test_no_steps_write_no_trace_and_keep_the_old_one(tmp_path):
    write_trace(tmp_path / "t.npz", META, make_loads(2))
    TraceWriter(tmp_path / "t.npz", META).close()
    assert Trace(tmp_path / "t.npz").num_steps == 2
    assert [p.name for p in tmp_path.iterdir()] == ["t.npz"]


def test_an_error_at_the_end_leaves_no_partial_file(tmp_path, monkeypatch):
    def full(*_: object) -> None:
        raise OSError("no space left")

    monkeypatch.setattr("moesaic.placement.traces.format.write_npz", full)
    with pytest.raises(OSError, match="no space left"):
        write_trace(tmp_path / "t.npz", META, make_loads(2))
    assert list(tmp_path.iterdir()) == []


def test_closing_twice_is_fine_and_appending_after_is_not(tmp_path):
    writer = TraceWriter(tmp_path / "t.npz", META)
    writer.append(make_loads(1)[0])
    writer.close()
    writer.close()
    with pytest.raises(ValueError, match="is closed; open a new TraceWriter"):
        writer.append(make_loads(1)[0])


def changed(at: tuple[int, int, int], value: int) -> np.ndarray:
    loads_LRE = make_loads(1)[0].copy()
    loads_LRE[at] += value
    return loads_LRE


@pytest.mark.parametrize(
    "loads_LRE, message",
    [
        (make_loads(1)[0].astype(float), "loads must be integers, got float64"),
        (make_loads(1)[0][:, :, :7], r"shape \(3, 4, 7\), the trace \[L, R, E\] = \(3, 4, 8\)"),
        (changed((1, 2, 3), -1000), "negative load"),
        (changed((1, 2, 3), 2), r"layer 1, rank 2: 102 assignments are not tokens x top-k \(layer 0 has 100, top-k is 2\)"),
        (np.full((3, 4, 8), 2**49), "a layer's loads above 9007199254740992 are not supported"),
    ],
)
def test_the_writer_refuses_what_routing_cannot_give(tmp_path, loads_LRE, message):
    with TraceWriter(tmp_path / "t.npz", META) as writer, pytest.raises(ValueError, match=message):
        writer.append(loads_LRE)


@pytest.mark.parametrize(
    "arrays, message",
    [
        ({"loads": make_loads(2).astype(np.int32)}, "it has no meta"),
        ({"meta": meta_text()}, "it has no loads"),
        ({"meta": meta_text(dropped=True), "loads": make_loads(2)}, "dropped assignments need the schema 'moesaic-trace/2'"),
        ({"meta": meta_text(schema="moesaic-trace/2", dropped=True), "loads": make_loads(2)}, "it has no tokens"),
        (
            {"meta": meta_text(schema="moesaic-trace/2", dropped=True), "loads": make_loads(2), "tokens": np.full((2, 4), 49)},
            "step 0, layer 0, rank 0: 100 assignments are more than 49 tokens x top-2",
        ),
        (
            {"meta": meta_text(schema="moesaic-trace/2", dropped=True), "loads": make_loads(2), "tokens": np.full((2, 3), 50)},
            r"tokens are \(2, 3\), not \(2, 4\)",
        ),
        (
            {"meta": meta_text(schema="moesaic-trace/2", dropped=True), "loads": make_loads(2), "tokens": np.full((2, 4), -1)},
            r"step 0 has tokens \[-1, -1, -1, -1\] on 4 ranks",
        ),
        ({"meta": meta_text(dropped="yes"), "loads": make_loads(2)}, "dropped must be true or false, got 'yes'"),
        ({"meta": meta_text(layers=[0, 1]), "loads": make_loads(2)}, "layers must be 3 rising numbers"),
        ({"meta": meta_text(layers=[0, 2, 1]), "loads": make_loads(2)}, "layers must be 3 rising numbers"),
        ({"meta": meta_text(layers=3), "loads": make_loads(2)}, "layers must be a list of numbers, got int"),
        ({"meta": meta_text(schema="other/9"), "loads": make_loads(2)}, "its schema is 'other/9', not 'moesaic-trace/1'"),
        ({"meta": np.array("{"), "loads": make_loads(2)}, "meta cannot be read"),
        ({"meta": np.array("[" * 100000), "loads": make_loads(2)}, "meta cannot be read|above the limit"),
        ({"meta": np.array("[]"), "loads": make_loads(2)}, "its schema is 'list'"),
        ({"meta": meta_text(steps=3), "loads": make_loads(2)}, r"loads are \(2, 3, 4, 8\), its meta says \(3, 3, 4, 8\)"),
        ({"meta": meta_text(num_experts=9), "loads": make_loads(2)}, "its meta says"),
        ({"meta": meta_text(num_experts="8"), "loads": make_loads(2)}, "num_experts must be an integer of at least 1, got '8'"),
        ({"meta": meta_text(num_ranks=10**9), "loads": make_loads(2)}, "above the supported"),
        ({"meta": meta_text(top_k=9), "loads": make_loads(2)}, "top_k 9 is above num_experts 8"),
        ({"meta": meta_text(), "loads": make_loads(2).astype(float)}, r"loads is float64 \(2, 3, 4, 8\)"),
        ({"meta": meta_text(), "loads": np.full((2, 3, 4, 8), np.nan)}, "loads is float64"),
        ({"meta": meta_text(), "loads": make_loads(2) * -1}, "step 0 holds a negative load"),
        ({"meta": meta_text(), "loads": make_loads(2) + np.arange(3)[:, None, None]}, "are not tokens x top-k"),
        ({"meta": meta_text(), "loads": make_loads(2), "topk_ids": np.full((5, 3, 2), 8)}, "expert outside 0 to 7"),
        ({"meta": meta_text(), "loads": make_loads(2), "topk_ids": np.zeros((5, 2, 2), int)}, r"must be \[T, 3, 2\]"),
        ({"meta": meta_text(), "loads": make_loads(2), "pair_counts": np.full((2, 8, 8), -1)}, "negative count, -1"),
    ],
)
def test_bad_traces_are_one_clear_line(tmp_path, arrays, message):
    write_raw(tmp_path / "t.npz", arrays)
    with pytest.raises(ValueError, match=message) as caught:
        read_all(tmp_path / "t.npz")
    assert "\n" not in str(caught.value)
    assert str(caught.value).count("is not a usable trace") == 1


def read_all(path) -> None:
    trace = Trace(path)
    assert sum(1 for _ in trace.steps()) == trace.num_steps
    if trace.has_topk_ids:
        trace.topk_ids()
    if trace.has_pair_counts:
        trace.pair_counts()


def test_pickles_are_never_read(tmp_path):
    np.savez(tmp_path / "t.npz", meta=np.array([{"a": 1}], dtype=object))
    with pytest.raises(ValueError, match="is not a usable trace"):
        Trace(tmp_path / "t.npz")


def test_a_header_that_promises_more_than_the_file_holds(tmp_path):
    """A huge shape is refused by its byte count, before anything is allocated."""
    with zipfile.ZipFile(tmp_path / "t.npz", "w") as archive, archive.open("loads.npy", "w") as member:
        np.lib.format.write_array_header_1_0(member, {"descr": "<i4", "fortran_order": False, "shape": (10**9, 3, 4, 8)})
    with pytest.raises(ValueError, match="its header accounts for 384000000128"):
        Trace(tmp_path / "t.npz")


def test_missing_and_foreign_files(tmp_path):
    with pytest.raises(ValueError, match="there is no trace at"):
        Trace(tmp_path / "none.npz")
    with pytest.raises(ValueError, match="it is a folder; give a file in it"):
        Trace(tmp_path)
    (tmp_path / "text.npz").write_text("hello")
    with pytest.raises(ValueError, match="damaged, unreadable or no"):
        Trace(tmp_path / "text.npz")


def test_damaged_files_never_escape_as_another_error(tmp_path):
    """Bit flips and truncations: a correct answer or one clear line."""
    write_trace(tmp_path / "good.npz", META, make_loads(3), topk_ids_TLK=np.zeros((4, 3, 2), dtype=int))
    good = (tmp_path / "good.npz").read_bytes()
    rng, messages = random.Random(7), []
    for _ in range(500):
        data = bytearray(good)
        if rng.random() < 0.2:
            del data[rng.randrange(len(data)) :]
        else:
            for _ in range(rng.randint(1, 4)):
                data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
        (tmp_path / "bad.npz").write_bytes(data)
        try:
            read_all(tmp_path / "bad.npz")
        except ValueError as error:
            messages.append(str(error))
    assert len(messages) > 300
    assert not any("\n" in message for message in messages)
