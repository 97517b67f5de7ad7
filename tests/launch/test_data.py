"""The text: which files, how it is cut, and batches that are disjoint, world-size independent and resumable."""

import threading
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from moesaic.launch.config import DataConfig
from moesaic.launch.run.data import (
    BatchShape,
    TrainingData,
    Windows,
    cut_point,
    find_documents,
    permutation,
    prepare_text,
    validation_batches,
)


def write_texts(folder: Path, sizes: list[int]) -> dict[str, bytes]:
    """Files of these sizes with different content; name to content."""
    random = np.random.default_rng(0)
    texts = {f"sub{i % 3}/text{i}.txt": random.bytes(size) for i, size in enumerate(sizes)}
    for name, content in texts.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)
    return texts


def data_config(tmp_path: Path, **values: object) -> DataConfig:
    settings = {"path": str(tmp_path / "texts"), "cache_folder": str(tmp_path / "cache"), "seq_len": 8} | values
    return DataConfig(**settings)  # type: ignore[arg-type]


# Documents and the joined text


def test_joined_text_holds_every_document_once_and_whole(tmp_path: Path) -> None:
    """Training and validation text together are the documents in their order; no document lies in both."""
    contents = write_texts(tmp_path / "texts", [100, 50, 0, 80, 120, 70, 90, 60])
    config = data_config(tmp_path, val_fraction=0.2)
    text = prepare_text(config)
    expected = b"".join(contents[document.name] for document in find_documents(config))
    assert text.train().tobytes() + text.validation().tobytes() == expected
    assert (text.num_documents, text.num_bytes) == (8, 570)
    edges = np.cumsum([len(contents[document.name]) for document in find_documents(config)])
    assert text.train_bytes in edges


def test_document_order_does_not_depend_on_the_folder(tmp_path: Path) -> None:
    """The order comes from names inside the text alone, so that two machines agree."""
    write_texts(tmp_path / "a", [10] * 9)
    write_texts(tmp_path / "b", [10] * 9)
    names = [[d.name for d in find_documents(DataConfig(path=str(tmp_path / folder)))] for folder in "ab"]
    assert names[0] == names[1]
    assert names[0] != sorted(names[0])


def test_default_text_is_the_standard_library() -> None:
    documents = find_documents(DataConfig())
    names = {document.name for document in documents}
    assert "argparse.py" in names
    assert "asyncio/base_events.py" in names
    assert all(name.endswith(".py") for name in names)
    assert not [name for name in names if {"site-packages", "test", "tests"} & set(name.split("/"))]
    assert sum(document.path.stat().st_size for document in documents) > 5_000_000


def test_pattern_and_hidden_files(tmp_path: Path) -> None:
    for name in ("a.md", "b.txt", ".hidden.md", ".git/c.md", "sub/d.md"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("text")
    names = {document.name for document in find_documents(DataConfig(path=str(tmp_path), pattern="*.md"))}
    assert names == {"a.md", "sub/d.md"}


@given(sizes=st.lists(st.integers(0, 1000), min_size=1, max_size=30), val_fraction=st.floats(0.01, 0.99))
def test_cut_point(sizes: list[int], val_fraction: float) -> None:
    """At a document's edge if one is near, else at the wanted byte; the validation share is off by at most half."""
    total = sum(sizes)
    wanted = round(val_fraction * total)
    val_bytes = total - cut_point(sizes, val_fraction)
    assert 2 * abs(val_bytes - wanted) <= wanted
    assert cut_point(sizes, val_fraction) in {total - wanted, *np.cumsum(sizes).tolist()}


@pytest.mark.parametrize("sizes, cut", [([50, 30, 15, 5], 95), ([100], 90), ([95, 5], 95), ([99, 1], 90), ([0, 0], 0)])
def test_cut_point_examples(sizes: list[int], cut: int) -> None:
    assert cut_point(sizes, 0.1) == cut


def test_changed_text_is_joined_anew(tmp_path: Path) -> None:
    write_texts(tmp_path / "texts", [100, 100])
    config = data_config(tmp_path, val_fraction=0.5)
    first = prepare_text(config)
    assert prepare_text(config) == first
    (tmp_path / "texts" / "more.txt").write_bytes(b"x" * 100)
    second = prepare_text(config)
    assert (second.num_bytes, second.path == first.path, second.digest == first.digest) == (300, False, False)


@pytest.mark.parametrize(
    "suffix, content",
    [(".bin", None), (".bin", b"cut"), (".json", None), (".json", b""), (".json", b"[1]"), (".json", b'{"a": 1}')],
)
def test_a_damaged_cache_is_joined_anew(tmp_path: Path, suffix: str, content: bytes | None) -> None:
    """Either of its two files is gone, cut, or another program's."""
    write_texts(tmp_path / "texts", [100, 100])
    config = data_config(tmp_path, val_fraction=0.5)
    first = prepare_text(config)
    whole = first.path.read_bytes()
    file = first.path.with_suffix(suffix)
    file.unlink()
    if content is not None:
        file.write_bytes(content)
    assert prepare_text(config) == first
    assert first.path.read_bytes() == whole


def test_digest_is_content_not_place(tmp_path: Path) -> None:
    for place in "ab":
        write_texts(tmp_path / place, [100, 100])
    digests = {prepare_text(data_config(tmp_path, path=str(tmp_path / place))).digest for place in "ab"}
    assert len(digests) == 1


def test_ranks_of_one_machine_may_join_at_once(tmp_path: Path) -> None:
    write_texts(tmp_path / "texts", [5000] * 20)
    texts = []
    threads = [threading.Thread(target=lambda: texts.append(prepare_text(data_config(tmp_path)))) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(texts) == 8
    assert len(set(texts)) == 1
    assert {path.suffix for path in (tmp_path / "cache").iterdir()} == {".bin", ".json"}


def test_a_broken_join_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A document that cannot be read is an error, and no half of a text stays in the cache."""
    write_texts(tmp_path / "texts", [100, 100])
    config = data_config(tmp_path)
    broken = find_documents(config)[1].path
    read_bytes = Path.read_bytes

    def read(path: Path) -> bytes:
        if path == broken:
            raise OSError("bad sector")
        return read_bytes(path)

    monkeypatch.setattr(Path, "read_bytes", read)
    with pytest.raises(ValueError, match=r"cannot join the text in .*bad sector.*data.cache_folder"):
        prepare_text(config)
    assert list((tmp_path / "cache").iterdir()) == []


@pytest.mark.parametrize(
    "sizes, values, message",
    [
        ([], {"path": "/nowhere/text"}, "'/nowhere/text' does not exist: give a text file or a folder"),
        ([10], {"pattern": "*.md"}, r"holds no file that matches data.pattern '\*.md'"),
        ([0, 0], {}, r"training text has 0 bytes, one window needs 9 \(data.seq_len \+ 1\)"),
        ([20], {"val_fraction": 0.3}, "validation text has 6 bytes, one window needs 9"),
        ([20], {"seq_len": 64}, "training text has 19 bytes, one window needs 65"),
    ],
)
def test_wrong_text_gets_one_line(tmp_path: Path, sizes: list[int], values: dict[str, object], message: str) -> None:
    (tmp_path / "texts").mkdir()
    write_texts(tmp_path / "texts", sizes)
    with pytest.raises(ValueError, match=message) as caught:
        prepare_text(data_config(tmp_path, **values))
    assert "\n" not in str(caught.value)


def test_a_single_file_is_a_text(tmp_path: Path) -> None:
    path = tmp_path / "text.txt"
    path.write_bytes(bytes(range(100)))
    text = prepare_text(data_config(tmp_path, path=str(path), val_fraction=0.25))
    assert text.train().tolist() == list(range(75))
    assert text.validation().tolist() == list(range(75, 100))


# Batches


def counting_windows(num_windows: int, seq_len: int = 4) -> Windows:
    return Windows((np.arange(num_windows * seq_len + 1) % 256).astype(np.uint8), seq_len)


def step_ids(data: TrainingData) -> list[list[int]]:
    """Window ids of the next step's micro-batches on this rank; the position moves on."""
    ids = [data.window_ids(data.shape.indices(micro)).tolist() for micro in range(data.shape.micro_batches)]
    data.position += data.shape.batch_size
    return ids


def test_windows_and_targets() -> None:
    """Window i is bytes [4i, 4i + 4), its targets one byte further; the tail that fills no window is left out."""
    windows = Windows(np.arange(11, dtype=np.uint8), 4)
    assert windows.num_windows == 2
    batch = windows.read(np.array([1, 0]))
    assert batch.ids_BL.tolist() == [[4, 5, 6, 7], [0, 1, 2, 3]]
    assert batch.targets_BL.tolist() == [[5, 6, 7, 8], [1, 2, 3, 4]]


shapes = st.tuples(st.integers(1, 4), st.integers(1, 3), st.integers(1, 3))


@given(shape=shapes, num_windows=st.integers(1, 50), seed=st.integers(0, 2**40), steps=st.integers(1, 5))
def test_global_batch_is_independent_of_world_size(shape: tuple[int, int, int], num_windows: int, seed: int, steps: int) -> None:
    """The ranks' rows, in rank order, are the rows that one process takes, micro-batch by micro-batch."""
    world_size, micro_batches, rows = shape
    batch_size = world_size * micro_batches * rows
    windows = counting_windows(num_windows)
    alone = TrainingData(windows, BatchShape(batch_size, micro_batches, 0, 1), seed=seed)
    ranks = [TrainingData(windows, BatchShape(batch_size, micro_batches, r, world_size), seed=seed) for r in range(world_size)]
    for _ in range(steps):
        parts = [step_ids(data) for data in ranks]
        joined = [[i for part in parts for i in part[micro]] for micro in range(micro_batches)]
        assert joined == step_ids(alone)


@given(shape=shapes, num_windows=st.integers(1, 60), seed=st.integers(0, 2**40))
def test_an_epoch_visits_every_window_once_over_all_ranks(shape: tuple[int, int, int], num_windows: int, seed: int) -> None:
    """Ranks are disjoint: two epochs' rows are each window twice, the first epoch's each window once."""
    world_size, micro_batches, rows = shape
    batch_size = world_size * micro_batches * rows
    windows = counting_windows(num_windows)
    ranks = [TrainingData(windows, BatchShape(batch_size, micro_batches, r, world_size), seed=seed) for r in range(world_size)]
    seen: list[int] = []
    while len(seen) < 2 * num_windows:
        parts = [step_ids(data) for data in ranks]
        seen += [i for micro in range(micro_batches) for part in parts for i in part[micro]]
    assert sorted(seen[:num_windows]) == list(range(num_windows))
    assert sorted(seen[num_windows : 2 * num_windows]) == list(range(num_windows))


def test_epochs_have_their_own_order() -> None:
    orders = [permutation(100, seed=1, epoch=epoch).tolist() for epoch in range(3)] + [permutation(100, seed=2, epoch=0).tolist()]
    assert len({tuple(order) for order in orders}) == 4
    assert permutation(100, seed=1, epoch=0).tolist() == orders[0]


def test_order_never_changes() -> None:
    """A checkpoint's position means the same windows in every release: the order itself is pinned."""
    assert permutation(8, seed=1, epoch=0).tolist() == [6, 2, 3, 7, 1, 4, 5, 0]
    assert permutation(8, seed=2**33 + 1, epoch=2).tolist() == [2, 5, 4, 7, 3, 0, 1, 6]


@given(consumed=st.integers(0, 7), num_windows=st.integers(1, 40))
def test_resume_from_position(consumed: int, num_windows: int) -> None:
    """A run that starts at a position reads what the uninterrupted run reads there."""
    windows, shape = counting_windows(num_windows), BatchShape(6, 2, 1, 3)
    straight = TrainingData(windows, shape, seed=5)
    for _ in range(consumed):
        list(straight.next_step())
    resumed = TrainingData(windows, shape, seed=5, position=straight.position)
    for expected, batch in zip(straight.next_step(), resumed.next_step(), strict=True):
        assert expected.ids_BL.equal(batch.ids_BL)
        assert expected.targets_BL.equal(batch.targets_BL)
    assert resumed.position == straight.position == 6 * (consumed + 1)


@given(world_size=st.integers(1, 4), num_windows=st.integers(1, 50), num_batches=st.integers(1, 4))
def test_validation_windows_are_fixed_and_shared_out(world_size: int, num_windows: int, num_batches: int) -> None:
    """Over all ranks the same windows as on one, spread over the whole validation text, the same every time."""
    windows = counting_windows(num_windows)
    alone = validation_batches(windows, BatchShape(12, 1, 0, 1), num_batches)
    parts = [validation_batches(windows, BatchShape(12, 1, rank, world_size), num_batches) for rank in range(world_size)]
    for number, expected in enumerate(alone):
        joined = np.concatenate([part[number].ids_BL.numpy() for part in parts])
        assert joined.tolist() == expected.ids_BL.tolist()
    firsts = np.concatenate([batch.ids_BL[:, 0].numpy() for batch in alone]) // 4
    if num_windows <= 12 * num_batches:
        assert set(firsts.tolist()) == set(range(num_windows))
