"""Files of serving systems: `.npy`, and the `.pt` files of SGLang's recorder; nothing in a file is run."""

import io
import pickle
import random
import zipfile

import numpy as np
import pytest
import torch

from moesaic.placement.traces.foreign import Reading, Sizes
from moesaic.placement.traces.sources import open_source
from tests.placement.recordings import NUM_EXPERTS, loads_of, make_counts, make_ids, naive_loads

TOP_2 = Sizes(top_k=2)


class Runs:
    """Unpickled, it writes a file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (open, (str(self.path), "w"))


@pytest.mark.parametrize("order", ["C", "F"])
def test_plain_npy_files_are_named_by_their_file_or_told_by_dims(tmp_path, order):
    """As vLLM hands them out: routed experts of every token, the narrowest type, no name."""
    ids_TLK, counts_SLE = make_ids(), make_counts()
    np.save(tmp_path / "routed_experts.npy", np.array(ids_TLK.astype(np.uint8), order=order))
    source = open_source(tmp_path / "routed_experts.npy", 2, sizes=Sizes(num_experts=NUM_EXPERTS))
    assert np.array_equal(loads_of(source)[0], naive_loads(ids_TLK, 2))
    np.save(tmp_path / "any.npy", np.array(ids_TLK.astype(np.int16), order=order))
    unnamed = open_source(tmp_path / "any.npy", 2, sizes=Sizes(num_experts=NUM_EXPERTS, top_k=2))
    assert np.array_equal(loads_of(unnamed)[0], naive_loads(ids_TLK, 2))
    np.save(tmp_path / "loads-of-today.npy", np.array(counts_SLE, order=order))
    counts = open_source(tmp_path / "loads-of-today.npy", 2, sizes=TOP_2)
    assert np.array_equal(loads_of(counts).sum(axis=2), counts_SLE)
    assert "loads-of-today is read as [S, L, E], by its dims" in counts.notes[0]


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64, torch.uint8, torch.float64, torch.bfloat16])
def test_sglang_stat_dumps_are_taken_as_they_are(tmp_path, dtype):
    """The file of the recorder's mode stat: a dict beside whose counts stands what is no tensor, views and strides included."""
    whole = torch.tensor(make_counts(8)).to(dtype)
    torch.save({"rank": 0, "logical_count": whole[::2], "average_utilization_rate_over_window": None}, tmp_path / "dump.pt")
    source = open_source(tmp_path / "dump.pt", 2, sizes=TOP_2)
    assert np.array_equal(loads_of(source).sum(axis=2), make_counts(8)[::2])
    torch.save(whole.permute(2, 0, 1), tmp_path / "alone.pt", _use_new_zipfile_serialization=False)
    alone = open_source(tmp_path / "alone.pt", 2, Reading(axes="ESL"), sizes=TOP_2)
    assert np.array_equal(loads_of(alone).sum(axis=2), make_counts(8))


def physical_map() -> np.ndarray:
    """Every layer's logical expert of 8 physical ones; two experts have copies."""
    rng = np.random.default_rng(4)
    return np.stack([rng.permutation([0, 1, 2, 3, 4, 5, 0, 3]) for _ in range(3)])


def test_sglang_records_of_tokens_are_mapped_to_logical_experts(tmp_path):
    """Mode per_token: 8 slots by layer first, -1 where unused, physical experts, passes of different lengths."""
    ids_TLK, logical_LP = make_ids(), physical_map()
    physical = np.full((3, 24, 8), -1)
    for token, layer, slot in np.ndindex(ids_TLK.shape):
        physical[layer, token, slot] = np.flatnonzero(logical_LP[layer] == ids_TLK[token, layer, slot])[-1]
    passes = [physical[:, :10], physical[:, 10:11], physical[:, 11:]]
    records = [
        {"forward_pass_id": index, "rank": 3, "input_ids": [1, 2], "topk_ids_of_layer": torch.tensor(part), "misc_objects": []}
        for index, part in enumerate(passes)
    ]
    dump = {"records": records, "last_physical_to_logical_map": torch.tensor(logical_LP)}
    torch.save(dump, tmp_path / "dump.pt")
    source = open_source(tmp_path / "dump.pt", 2, sizes=Sizes(num_experts=NUM_EXPERTS, top_k=2))
    assert np.array_equal(loads_of(source)[0], naive_loads(ids_TLK, 2))
    assert source.notes[0] == "3 recorded passes of rank 3 alone"
    assert not source.meta.dropped


def test_sglang_records_of_passes_are_mapped_to_logical_experts(tmp_path):
    counts_SLP = np.random.default_rng(5).integers(0, 9, (4, 3, 8))
    logical_LP, expected_SLE = physical_map(), np.zeros((4, 3, NUM_EXPERTS), dtype=np.int64)
    for step, layer, physical in np.ndindex(counts_SLP.shape):
        expected_SLE[step, layer, logical_LP[layer, physical]] += counts_SLP[step, layer, physical]
    records = [{"rank": 0, "global_physical_count": torch.tensor(counts_LP)} for counts_LP in counts_SLP]
    torch.save({"records": records, "last_physical_to_logical_map": torch.tensor(logical_LP)}, tmp_path / "dump.pt")
    source = open_source(tmp_path / "dump.pt", 2, sizes=TOP_2)
    assert np.array_equal(loads_of(source).sum(axis=2), expected_SLE)


def test_nothing_in_a_file_is_run(tmp_path):
    mark = tmp_path / "was-run"
    torch.save({"logical_count": torch.tensor(make_counts()), "more": Runs(mark)}, tmp_path / "dump.pt")
    (tmp_path / "plain.pt").write_bytes(pickle.dumps(Runs(mark)))
    np.save(tmp_path / "objects.npy", np.array([Runs(mark)], dtype=object), allow_pickle=True)
    for name, message in (
        ("dump.pt", "it holds more than tensors, numbers, lists and dicts, or is damaged, and nothing in a file is run"),
        ("plain.pt", "nothing in a file is run"),
        ("objects.npy", "objects holds Python objects, which are never read from a file"),
    ):
        with pytest.raises(ValueError, match=message) as caught:
            open_source(tmp_path / name, 2, sizes=TOP_2)
        assert "\n" not in str(caught.value)
    assert not mark.exists()


TOKENS = torch.zeros(3, 2, 8, dtype=torch.int32)
MAP = torch.zeros(3, 8, dtype=torch.int64)


@pytest.mark.parametrize(
    "dump, message",
    [
        ({"rank": 0, "text": "x"}, r"it holds no tensor, but rank \(int\), text \(str\)"),
        ([torch.ones(3)], r"it holds no tensor, but dump \(list\)"),
        ({"counts": torch.ones(2, 3).to_sparse()}, "counts is no plain dense tensor; save its dense values"),
        ({"counts": torch.ones(1).expand(10**11)}, r"counts is \(100000000000,\), above the limit of 2147483648 bytes"),
        ({"records": []}, "its records are empty or no list of dicts"),
        ({"records": [{"rank": 0}]}, r"neither topk_ids_of_layer nor global_physical_count, but rank \(int\)"),
        ({"records": [{"topk_ids_of_layer": 3}]}, "topk_ids_of_layer must be an integer tensor of 3 dims, got int"),
        ({"records": [{"topk_ids_of_layer": TOKENS}, {}]}, "topk_ids_of_layer must be an integer tensor of 3 dims, got NoneType"),
        (
            {"records": [{"topk_ids_of_layer": TOKENS}, {"topk_ids_of_layer": TOKENS[:2]}]},
            "topk_ids_of_layer changes its layers or experts from record to record",
        ),
        (
            {"records": [{"topk_ids_of_layer": TOKENS}], "last_physical_to_logical_map": MAP[:2]},
            "topk_ids_of_layer has 3 layers, last_physical_to_logical_map 2",
        ),
        (
            {"records": [{"topk_ids_of_layer": TOKENS + 8}], "last_physical_to_logical_map": MAP},
            "topk_ids_of_layer holds 8, its map has 8 physical experts",
        ),
        (
            {"records": [{"global_physical_count": MAP[:, :7]}], "last_physical_to_logical_map": MAP},
            r"global_physical_count is \(1, 3, 7\), last_physical_to_logical_map \(3, 8\)",
        ),
        (
            {"records": [{"global_physical_count": MAP}], "last_physical_to_logical_map": MAP + 10**12},
            "last_physical_to_logical_map names expert 1000000000000 of 8 physical ones",
        ),
    ],
)
def test_dumps_that_cannot_be_read_are_one_clear_line(tmp_path, dump, message):
    torch.save(dump, tmp_path / "dump.pt")
    with pytest.raises(ValueError, match=message) as caught:
        open_source(tmp_path / "dump.pt", 2, sizes=TOP_2)
    assert "\n" not in str(caught.value)


def test_an_archive_that_unpacks_to_more_than_the_limit_is_refused_unread(tmp_path, monkeypatch):
    buffer = io.BytesIO()
    torch.save({"counts": torch.zeros(1 << 20)}, buffer)
    with zipfile.ZipFile(buffer) as saved, zipfile.ZipFile(tmp_path / "dump.pt", "w", zipfile.ZIP_DEFLATED) as packed:
        for info in saved.infolist():
            packed.writestr(info.filename, saved.read(info))
    monkeypatch.setattr("moesaic.placement.traces.dumps._MAX_DUMP_BYTES", 1 << 20)
    assert (tmp_path / "dump.pt").stat().st_size < 1 << 16
    with pytest.raises(ValueError, match=r"it takes \d+ bytes, above the limit of 1048576; save its array alone as .npy"):
        open_source(tmp_path / "dump.pt", 2, sizes=TOP_2)


@pytest.mark.parametrize("name", ["dump.pt", "counts.npy"])
def test_damaged_dumps_never_escape_as_another_error(tmp_path, name):
    """Bit flips and truncations: a correct answer or one clear line."""
    buffer = io.BytesIO()
    if name == "dump.pt":
        torch.save({"logical_count": torch.tensor(make_counts())}, buffer)
    else:
        np.save(buffer, make_counts())
    rng, messages = random.Random(7), []
    for _ in range(200):
        data = bytearray(buffer.getvalue())
        if rng.random() < 0.2:
            del data[rng.randrange(len(data)) :]
        for _ in range(rng.randint(1, 4) if data else 0):
            data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
        (tmp_path / name).write_bytes(data)
        try:
            loads_of(open_source(tmp_path / name, 2, sizes=TOP_2))
        except ValueError as error:
            messages.append(str(error))
    assert len(messages) > 40
    assert not any("\n" in message for message in messages)
