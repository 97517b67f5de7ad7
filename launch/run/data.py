"""Byte-level text: documents joined into one memory-mapped file, cut into windows, distributed over the ranks.

```
documents -> joined text -> train | validation -> windows of seq_len + 1 bytes -> permutation -> global batch -> windows of a rank
```
The global batch at a position depends on the seed and the position alone, never on the world size; rank r of R takes its windows
[r * B / R, (r + 1) * B / R), so ranks are disjoint and a run resumes from one integer.
"""

# B windows of a batch, L sequence length, V vocabulary (256 bytes)

import hashlib
import json
import os
import sysconfig
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from ..config import DataConfig

# Folders of the standard library that some machines lack, or with generated or installed files.
_STDLIB_SKIPPED = frozenset(
    {"site-packages", "dist-packages", "test", "tests", "idle_test", "__pycache__", "lib2to3", "pydoc_data"}
)


@dataclass(frozen=True)
class Document:
    """One file of the text: its path, and the name by which files are ordered (the path inside the text's folder)."""

    path: Path
    name: str


@dataclass(frozen=True)
class Text:
    """The joined text on disk: bytes [0, train_bytes) are for training, the rest for validation.

    `digest` is the SHA-256 of content and cut, equal on all machines with the same text.
    """

    path: Path
    num_documents: int
    num_bytes: int
    train_bytes: int
    digest: str

    def train(self) -> np.ndarray:
        """The training part, uint8 [train_bytes], memory-mapped read-only."""
        return np.memmap(self.path, dtype=np.uint8, mode="r", shape=(self.train_bytes,))

    def validation(self) -> np.ndarray:
        """The validation part, uint8 [num_bytes - train_bytes], memory-mapped read-only."""
        return np.memmap(self.path, dtype=np.uint8, mode="r", offset=self.train_bytes, shape=(self.num_bytes - self.train_bytes,))


@dataclass(frozen=True)
class Batch:
    """Model input and the byte that follows each of its bytes, int64 [B, L] each."""

    ids_BL: Tensor
    targets_BL: Tensor


def find_documents(config: DataConfig) -> list[Document]:
    """The files of the text, ordered by the SHA-256 of their names, so that a cut of the joined text samples all folders.

    Raises `ValueError` if the path does not exist or no file matches.
    """
    if config.path:
        root, pattern, skipped = Path(config.path).expanduser(), config.pattern, frozenset[str]()
    else:
        root, pattern, skipped = Path(sysconfig.get_path("stdlib")), "*.py", _STDLIB_SKIPPED
    if root.is_file():
        return [Document(root, root.name)]
    if not root.is_dir():
        raise ValueError(f"data.path {str(root)!r} does not exist: give a text file or a folder of text files")
    documents = []
    for folder, subfolders, files in os.walk(root):
        subfolders[:] = [name for name in subfolders if name not in skipped and not name.startswith(".")]
        paths = [Path(folder, name) for name in files if not name.startswith(".")]
        documents += [
            Document(path, path.relative_to(root).as_posix()) for path in paths if path.match(pattern) and path.is_file()
        ]
    if not documents:
        raise ValueError(f"data.path {str(root)!r} holds no file that matches data.pattern {pattern!r}")
    return sorted(documents, key=lambda document: hashlib.sha256(document.name.encode()).digest())


def cut_point(sizes: list[int], val_fraction: float) -> int:
    """Bytes of training text: the end of a document nearest to the wanted cut.

    If that misses the wanted validation size by more than half (one long document), the cut falls inside the document.
    Example: sizes [50, 30, 15, 5] with 0.1 are cut at 95; a single document of 100 at 90.
    """
    total = sum(sizes)
    wanted = total - round(val_fraction * total)
    edges = np.cumsum(sizes)[:-1]
    if len(edges):
        nearest = int(edges[np.abs(edges - wanted).argmin()])
        if 2 * abs(nearest - wanted) <= total - wanted:
            return nearest
    return wanted


def prepare_text(config: DataConfig) -> Text:
    """Find the joined text in the cache, or write it there, atomically: every rank of a machine may call this at once.

    Raises `ValueError` if the text is missing or too short, or cannot be read, or the cache cannot be written.
    """
    documents = find_documents(config)
    stats = [document.path.stat() for document in documents]
    listing = [[str(d.path.resolve()), stat.st_size, stat.st_mtime_ns] for d, stat in zip(documents, stats, strict=True)]
    key = hashlib.sha256(json.dumps([listing, config.val_fraction]).encode()).hexdigest()[:16]
    joined_path = cache_folder(config) / f"text-{key}.bin"
    record_path = joined_path.with_suffix(".json")
    text = _find_joined(joined_path, record_path)
    if text is None:
        try:
            joined_path.parent.mkdir(parents=True, exist_ok=True)
            text = _join(documents, config.val_fraction, joined_path, record_path)
        except OSError as error:
            raise ValueError(
                f"cannot join the text in {str(joined_path.parent)!r} ({error}): set data.cache_folder to a folder with "
                f"{sum(stat.st_size for stat in stats) / 1e6:.1f} MB to spare"
            ) from None
    _check_length(text, config)
    return text


def cache_folder(config: DataConfig) -> Path:
    """The folder of joined texts."""
    if config.cache_folder:
        return Path(config.cache_folder).expanduser()
    base = os.environ.get("XDG_CACHE_HOME", "")
    return (Path(base) if base else Path.home() / ".cache") / "moesaic"


def _find_joined(joined_path: Path, record_path: Path) -> Text | None:
    """The joined text; None if it is missing or incomplete, as after a cleaned cache or on a full disk."""
    try:
        text = Text(joined_path, **json.loads(record_path.read_text(encoding="utf-8")))
        return text if joined_path.stat().st_size == text.num_bytes else None
    except (OSError, ValueError, TypeError):
        return None


def _join(documents: list[Document], val_fraction: float, joined_path: Path, record_path: Path) -> Text:
    digest, sizes = hashlib.sha256(), []
    with tempfile.NamedTemporaryFile(dir=joined_path.parent, prefix=joined_path.stem, suffix=".tmp", delete=False) as file:
        try:
            for document in documents:
                content = document.path.read_bytes()
                digest.update(content)
                sizes.append(len(content))
                file.write(content)
        except BaseException:
            os.unlink(file.name)
            raise
    train_bytes = cut_point(sizes, val_fraction)
    digest.update(str(train_bytes).encode())
    text = Text(joined_path, len(sizes), sum(sizes), train_bytes, digest.hexdigest())
    os.replace(file.name, joined_path)
    # The record is written last: if it exists, the text is complete.
    partial = Path(f"{file.name}.json")
    record = {name: value for name, value in vars(text).items() if name != "path"}
    partial.write_text(json.dumps(record), encoding="utf-8")
    os.replace(partial, record_path)
    return text


def _check_length(text: Text, config: DataConfig) -> None:
    window = config.seq_len + 1
    for part, num_bytes in (("training", text.train_bytes), ("validation", text.num_bytes - text.train_bytes)):
        if num_bytes < window:
            raise ValueError(
                f"the {part} text has {num_bytes} bytes, one window needs {window} (data.seq_len + 1): "
                f"give more text in data.path or a smaller data.seq_len"
            )


def permutation(size: int, seed: int, epoch: int) -> np.ndarray:
    """The order of `size` windows in one epoch, int64 [size]; equal on every platform and NumPy release."""
    # RandomState, not Generator: NumPy guarantees that its streams never change, which resumed runs rely on.
    return np.random.RandomState([seed & 0xFFFFFFFF, seed >> 32, epoch]).permutation(size)


class Windows:
    """A text as numbered windows; window i reads bytes [i * L, i * L + L + 1), the last one only as a target."""

    def __init__(self, text_bytes: np.ndarray, seq_len: int) -> None:
        self.text_bytes = text_bytes
        self.seq_len = seq_len
        self.num_windows = (len(text_bytes) - 1) // seq_len

    def read(self, window_ids_B: np.ndarray) -> Batch:
        """The batch of these windows."""
        L = self.seq_len
        bytes_BL = np.stack([self.text_bytes[i * L : i * L + L + 1] for i in window_ids_B.tolist()])
        ids_BL = torch.from_numpy(bytes_BL.astype(np.int64))
        return Batch(ids_BL[:, :-1], ids_BL[:, 1:])


@dataclass(frozen=True)
class BatchShape:
    """The division of a global batch of `batch_size` windows: into micro-batches, and each of these over the ranks."""

    batch_size: int
    micro_batches: int
    rank: int
    world_size: int

    @property
    def windows_per_rank(self) -> int:
        """Windows of one micro-batch on one rank."""
        return self.batch_size // (self.micro_batches * self.world_size)

    def indices(self, micro_batch: int) -> range:
        """This rank's window indices in the global batch, for one micro-batch."""
        first = (micro_batch * self.world_size + self.rank) * self.windows_per_rank
        return range(first, first + self.windows_per_rank)


class TrainingData:
    """Batches of the training text by position, the number of windows that all ranks have consumed.

    Each epoch visits every window once, in an order of its own; a batch may span two epochs.
    """

    def __init__(self, windows: Windows, shape: BatchShape, *, seed: int, position: int = 0) -> None:
        self.windows = windows
        self.shape = shape
        self.seed = seed
        self.position = position
        self._epoch = -1
        self._order = np.empty(0, dtype=np.int64)

    def next_step(self) -> Iterator[Batch]:
        """This rank's micro-batches of the next global batch; the position advances after the last one."""
        for micro_batch in range(self.shape.micro_batches):
            yield self.windows.read(self.window_ids(self.shape.indices(micro_batch)))
        self.position += self.shape.batch_size

    def window_ids(self, indices: range) -> np.ndarray:
        """Numbers of the windows at these indices of the global batch that starts at the current position."""
        size = self.windows.num_windows
        return np.array([self._order_of(at // size)[at % size] for at in (self.position + index for index in indices)])

    def _order_of(self, epoch: int) -> np.ndarray:
        if epoch != self._epoch:
            self._epoch, self._order = epoch, permutation(self.windows.num_windows, self.seed, epoch)
        return self._order


def validation_batches(windows: Windows, shape: BatchShape, num_batches: int) -> list[Batch]:
    """This rank's share of `num_batches` fixed global micro-batches, whose windows are spread evenly over the text.

    A short validation text repeats windows, so that all ranks have equal work.
    """
    num_windows = shape.windows_per_rank * shape.world_size
    spread = np.linspace(0, windows.num_windows, num_batches * num_windows, endpoint=False).astype(np.int64)
    per_rank = spread.reshape(num_batches, shape.world_size, shape.windows_per_rank)
    return [windows.read(per_rank[batch, shape.rank]) for batch in range(num_batches)]
