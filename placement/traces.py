"""Routing traces: recorded expert loads in one `.npz` file, without pickle, written atomically and read as a stream.

Arrays of the file (S steps, L layers, R source ranks, E experts, K top-k, T tokens):
    meta         a JSON string: schema, model shape, ranks, steps, source (`TraceMeta`)
    loads        int32 [S, L, R, E], assignments counted per source rank and expert
    topk_ids     int16 [T, L, K], optional: the experts of single tokens
    pair_counts  int32 [L - 1, E, E], optional: tokens that follow expert i in layer l by expert j in layer l + 1
Every token chooses K experts in every layer, so a step's loads of one source rank sum to the same multiple of K in every layer;
reading checks it.
"""

from __future__ import annotations

import json
import math
import os
import zipfile
import zlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from types import TracebackType
from typing import IO, Any

import numpy as np

from .content import check_positive_int

SCHEMA = "moesaic-trace/1"
# Larger headers and dims belong to no real model; a damaged file must not make the reader allocate.
_MAX_META_BYTES = 1 << 20
_MAX_DIM = 1 << 24
_MAX_STEP_BYTES = 1 << 28
_CHUNK_BYTES = 1 << 20


@dataclass(frozen=True)
class TraceMeta:
    """What a trace is about. `dim`, `ffn_dim` and `num_matrices` price a placement; 0 where the source did not say."""

    num_layers: int
    num_experts: int
    top_k: int
    num_ranks: int
    dim: int = 0
    ffn_dim: int = 0
    num_matrices: int = 3
    source: str = ""

    def __post_init__(self) -> None:
        for name in ("num_layers", "num_experts", "top_k", "num_ranks", "num_matrices"):
            check_positive_int(name, getattr(self, name))
        for name in ("dim", "ffn_dim"):
            check_positive_int(name, getattr(self, name), minimum=0)
        if self.top_k > self.num_experts:
            raise ValueError(f"top_k {self.top_k} is above num_experts {self.num_experts}")
        if max(self.step_shape) > _MAX_DIM or 4 * math.prod(self.step_shape) > _MAX_STEP_BYTES:
            raise ValueError(f"a step of {self.step_shape} loads is above the supported {_MAX_STEP_BYTES} bytes")
        if not isinstance(self.source, str):
            raise ValueError(f"source must be text, got {type(self.source).__name__}")

    @property
    def step_shape(self) -> tuple[int, int, int]:
        """Shape of one step's loads: (layers, ranks, experts)."""
        return self.num_layers, self.num_ranks, self.num_experts

    def to_json(self, num_steps: int) -> str:
        """Return the text of the file's `meta`."""
        return json.dumps({"schema": SCHEMA, "steps": num_steps, **asdict(self)}, sort_keys=True)


def _check_step(loads_LRE: np.ndarray, meta: TraceMeta, step: int) -> None:
    """Raise ValueError unless one step's loads can come from routing: the reader's and the writer's check."""
    if loads_LRE.shape != meta.step_shape:
        raise ValueError(f"step {step} has loads of shape {loads_LRE.shape}, the trace [L, R, E] = {meta.step_shape}")
    if loads_LRE.size and loads_LRE.min() < 0:
        raise ValueError(f"step {step} holds a negative load, {int(loads_LRE.min())}")
    sums_LR = loads_LRE.sum(axis=2, dtype=np.int64)
    if (sums_LR != sums_LR[0]).any() or (sums_LR % meta.top_k).any():
        layer, rank = np.argwhere((sums_LR != sums_LR[0]) | (sums_LR % meta.top_k != 0))[0]
        raise ValueError(
            f"step {step}, layer {layer}, rank {rank}: {sums_LR[layer, rank]} assignments are not tokens x top-k "
            f"(layer 0 has {sums_LR[0, rank]}, top-k is {meta.top_k}); loads must count every token once per layer"
        )


def _write_npz(path: Path, members: Mapping[str, Callable[[IO[bytes]], None]]) -> None:
    """Write a compressed .npz beside `path` and rename it into place, so that a reader sees the old file or the whole new one."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "wb") as file:
            with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED, compresslevel=1) as archive:
                for name, write in members.items():
                    with archive.open(f"{name}.npy", "w", force_zip64=True) as member:
                        write(member)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def _array_writer(array: np.ndarray) -> Callable[[IO[bytes]], None]:
    return lambda member: np.lib.format.write_array(member, array, allow_pickle=False)


class TraceWriter:
    """Records a run: `append` per step, `close` at the end. Loads wait on disk, not in memory, in `PATH.partial`.

    As a context manager it closes on the way out, also after an error, so that an interrupted run keeps its steps. The file at
    `path` appears only on close, whole; a trace without steps is not written.
    """

    def __init__(self, path: str | os.PathLike[str], meta: TraceMeta) -> None:
        self.path = Path(path)
        self.meta = meta
        self.num_steps = 0
        self._partial_path = self.path.with_name(self.path.name + ".partial")
        self._partial: IO[bytes] | None = open(self._partial_path, "w+b")  # noqa: SIM115 (closed by close)

    def append(self, loads_LRE: np.ndarray) -> None:
        """Add one step's loads, integers [L, R, E]; ValueError if they do not fit the trace."""
        if self._partial is None:
            raise ValueError(f"trace {self.path} is closed; open a new TraceWriter")
        loads_LRE = np.asarray(loads_LRE)
        if loads_LRE.dtype.kind not in "iu":
            raise ValueError(f"loads must be integers, got {loads_LRE.dtype}")
        _check_step(loads_LRE, self.meta, self.num_steps)
        if loads_LRE.max() > np.iinfo(np.int32).max:
            raise ValueError(f"step {self.num_steps} holds a load of {int(loads_LRE.max())}, above int32")
        self._partial.write(np.ascontiguousarray(loads_LRE, dtype="<i4").tobytes())
        self.num_steps += 1

    def close(self) -> None:
        """Write the trace and remove the partial file; a second call does nothing."""
        if self._partial is None:
            return
        partial, self._partial = self._partial, None
        try:
            if self.num_steps:
                _write_npz(
                    self.path,
                    {
                        "meta": _array_writer(np.array(self.meta.to_json(self.num_steps))),
                        "loads": lambda member: self._copy_loads(partial, member),
                    },
                )
        finally:
            partial.close()
        self._partial_path.unlink()

    def _copy_loads(self, partial: IO[bytes], member: IO[bytes]) -> None:
        header = {"descr": "<i4", "fortran_order": False, "shape": (self.num_steps, *self.meta.step_shape)}
        np.lib.format.write_array_header_1_0(member, header)
        partial.seek(0)
        while chunk := partial.read(_CHUNK_BYTES):
            member.write(chunk)

    def __enter__(self) -> TraceWriter:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()


def write_trace(
    path: str | os.PathLike[str],
    meta: TraceMeta,
    loads_SLRE: np.ndarray,
    *,
    topk_ids_TLK: np.ndarray | None = None,
    pair_counts_LEE: np.ndarray | None = None,
) -> None:
    """Write a whole trace at once, atomically; the optional arrays are the module docstring's."""
    loads_SLRE = np.asarray(loads_SLRE)
    if loads_SLRE.ndim != 4 or not loads_SLRE.shape[0] or loads_SLRE.dtype.kind not in "iu":
        raise ValueError(f"loads must be integers [S, L, R, E] with at least one step, got {loads_SLRE.dtype} {loads_SLRE.shape}")
    for step, loads_LRE in enumerate(loads_SLRE):
        _check_step(loads_LRE, meta, step)
    arrays = {"meta": np.array(meta.to_json(loads_SLRE.shape[0])), "loads": loads_SLRE.astype("<i4")}
    if topk_ids_TLK is not None:
        arrays["topk_ids"] = _checked_topk(np.asarray(topk_ids_TLK), meta).astype("<i2")
    if pair_counts_LEE is not None:
        arrays["pair_counts"] = _checked_pairs(np.asarray(pair_counts_LEE), meta).astype("<i4")
    _write_npz(Path(path), {name: _array_writer(array) for name, array in arrays.items()})


def _checked_topk(ids: np.ndarray, meta: TraceMeta) -> np.ndarray:
    if ids.ndim != 3 or ids.shape[1:] != (meta.num_layers, meta.top_k):
        raise ValueError(f"topk_ids must be [T, {meta.num_layers}, {meta.top_k}], got {ids.shape}")
    if ids.size and (ids.min() < 0 or ids.max() >= meta.num_experts):
        raise ValueError(f"topk_ids holds an expert outside 0 to {meta.num_experts - 1}")
    return ids


def _checked_pairs(pairs: np.ndarray, meta: TraceMeta) -> np.ndarray:
    if pairs.shape != (meta.num_layers - 1, meta.num_experts, meta.num_experts):
        raise ValueError(
            f"pair_counts must be [{meta.num_layers - 1}, {meta.num_experts}, {meta.num_experts}], got {pairs.shape}"
        )
    if pairs.size and pairs.min() < 0:
        raise ValueError(f"pair_counts holds a negative count, {int(pairs.min())}")
    return pairs


@dataclass(frozen=True)
class _Member:
    """One array of the file by its header: nothing is read that the header does not account for."""

    shape: tuple[int, ...]
    dtype: np.dtype[Any]
    header_bytes: int
    total_bytes: int


class Trace:
    """A trace on disk. Opening reads only headers and `meta`; `steps` streams the loads and checks each step."""

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        self._members = self._read_headers()
        self.meta, steps = self._read_meta()
        shape = self._require("loads", "i", 4)
        if shape != (steps, *self.meta.step_shape) or not steps:
            raise self._error(f"loads are {shape}, its meta says {(steps, *self.meta.step_shape)}")
        self.num_steps = steps

    def _error(self, what: str) -> ValueError:
        return ValueError(f"{self.path} is not a usable trace: {what}")

    def _read_headers(self) -> dict[str, _Member]:
        try:
            with zipfile.ZipFile(self.path) as archive:
                return {i.filename.removesuffix(".npy"): self._header(archive, i) for i in archive.infolist()}
        except FileNotFoundError:
            raise ValueError(f"there is no trace at {self.path}") from None
        except (zipfile.BadZipFile, zlib.error, NotImplementedError, RuntimeError, EOFError, OSError, UnicodeError) as error:
            raise self._error(f"it is damaged, unreadable or no .npz file ({type(error).__name__})") from None

    def _header(self, archive: zipfile.ZipFile, info: zipfile.ZipInfo) -> _Member:
        with archive.open(info) as member:
            try:
                version = np.lib.format.read_magic(member)
                read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
                shape, fortran_order, dtype = read(member)
            except (ValueError, SyntaxError, TypeError, KeyError, RecursionError, MemoryError):
                raise self._error(f"{info.filename} has no valid .npy header") from None
            result = _Member(shape, dtype, member.tell(), info.file_size)
        expected = result.header_bytes + math.prod(shape) * dtype.itemsize
        if fortran_order or dtype.hasobject or min(shape, default=0) < 0 or expected != info.file_size:
            raise self._error(f"{info.filename} holds {info.file_size} bytes, its header accounts for {expected}")
        return result

    def _require(self, name: str, kind: str, ndim: int) -> tuple[int, ...]:
        member = self._members.get(name)
        if member is None:
            raise self._error(f"it has no {name}")
        if member.dtype.kind not in kind or len(member.shape) != ndim:
            raise self._error(f"{name} is {member.dtype} {member.shape}")
        return member.shape

    def _blocks(self, name: str, block_bytes: int) -> Iterator[bytes]:
        """Yield an array's bytes in blocks; a damaged file raises ValueError."""
        member_info = self._members[name]
        left = member_info.total_bytes - member_info.header_bytes
        try:
            with zipfile.ZipFile(self.path) as archive, archive.open(f"{name}.npy") as member:
                member.read(member_info.header_bytes)
                while left:
                    block = member.read(min(block_bytes, left))
                    if not block:
                        raise EOFError
                    left -= len(block)
                    # Reading to the very end is what makes zipfile compare the checksum.
                    if not left and member.read(1):
                        raise EOFError
                    yield block
        except (zipfile.BadZipFile, zlib.error, NotImplementedError, RuntimeError, EOFError, OSError, UnicodeError) as error:
            raise self._error(f"{name} is damaged ({type(error).__name__})") from None

    def _array(self, name: str, limit_bytes: int) -> np.ndarray:
        member = self._members[name]
        if member.total_bytes > limit_bytes:
            raise self._error(f"{name} takes {member.total_bytes} bytes, above the limit of {limit_bytes}")
        if not member.dtype.itemsize or not math.prod(member.shape):
            return np.zeros(member.shape, dtype=member.dtype)
        data = b"".join(self._blocks(name, _CHUNK_BYTES))
        return np.frombuffer(data, dtype=member.dtype).reshape(member.shape)

    def _read_meta(self) -> tuple[TraceMeta, int]:
        self._require("meta", "U", 0)
        text = self._array("meta", _MAX_META_BYTES)
        try:
            values = json.loads(str(text))
        except (ValueError, RecursionError) as error:
            raise self._error(f"meta cannot be read ({error})") from None
        if not isinstance(values, dict) or values.get("schema") != SCHEMA:
            found = values.get("schema") if isinstance(values, dict) else type(values).__name__
            raise self._error(f"its schema is {str(found)[:80]!r}, not {SCHEMA!r}; convert it with `moesaic trace convert`")
        steps = values.get("steps")
        known = {field.name for field in fields(TraceMeta)}
        try:
            meta = TraceMeta(**{name: value for name, value in values.items() if name in known})
            return meta, check_positive_int("steps", steps)
        except (ValueError, TypeError) as error:
            raise self._error(f"meta: {error}") from None

    def steps(self) -> Iterator[np.ndarray]:
        """Yield every step's loads, int64 [L, R, E]; ValueError at the first step that cannot come from routing."""
        member = self._members["loads"]
        step_bytes = math.prod(self.meta.step_shape) * member.dtype.itemsize
        for step, block in enumerate(self._blocks("loads", step_bytes)):
            loads_LRE = np.frombuffer(block, dtype=member.dtype).astype(np.int64).reshape(self.meta.step_shape)
            try:
                _check_step(loads_LRE, self.meta, step)
            except ValueError as error:
                raise self._error(str(error)) from None
            yield loads_LRE

    @property
    def has_topk_ids(self) -> bool:
        """Whether single tokens were recorded."""
        return "topk_ids" in self._members

    @property
    def has_pair_counts(self) -> bool:
        """Whether layer-to-layer counts were recorded."""
        return "pair_counts" in self._members

    def topk_ids(self, limit_bytes: int = 1 << 29) -> np.ndarray:
        """Return the experts of single tokens, integers [T, L, K]; ValueError if there are none."""
        self._require("topk_ids", "i", 3)
        array = self._array("topk_ids", limit_bytes)
        try:
            return _checked_topk(array, self.meta)
        except ValueError as error:
            raise self._error(str(error)) from None

    def pair_counts(self, limit_bytes: int = 1 << 29) -> np.ndarray:
        """Return the layer-to-layer counts, integers [L - 1, E, E]; ValueError if there are none."""
        self._require("pair_counts", "i", 3)
        array = self._array("pair_counts", limit_bytes)
        try:
            return _checked_pairs(array, self.meta)
        except ValueError as error:
            raise self._error(str(error)) from None
