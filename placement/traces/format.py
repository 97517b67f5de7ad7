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
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from types import TracebackType
from typing import IO

import numpy as np

from ..content import check_positive_int
from .npz import NpzReader, array_writer, write_npz

SCHEMA = "moesaic-trace/1"
# Larger headers and dims belong to no real model; a damaged file must not make the reader allocate.
_MAX_META_BYTES = 1 << 20
_MAX_DIM = 1 << 24
_MAX_STEP_BYTES = 1 << 26
_MAX_MATRICES = 16
_MAX_LOAD = int(np.iinfo(np.int32).max)
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
        for name in ("num_layers", "num_experts", "top_k", "num_ranks", "num_matrices", "dim", "ffn_dim"):
            most = _MAX_MATRICES if name == "num_matrices" else _MAX_DIM
            # Sizes may be unknown, numbers of things not.
            if check_positive_int(name, getattr(self, name), minimum=0 if name in ("dim", "ffn_dim") else 1) > most:
                raise ValueError(f"{name} is above the supported {most}")
        if self.top_k > self.num_experts:
            raise ValueError(f"top_k {self.top_k} is above num_experts {self.num_experts}")
        if 4 * math.prod(self.step_shape) > _MAX_STEP_BYTES:
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
    if loads_LRE.max(initial=0) > _MAX_LOAD:
        raise ValueError(f"step {step} holds a load of {int(loads_LRE.max())}, above int32")
    sums_LR = loads_LRE.sum(axis=2, dtype=np.int64)
    if (sums_LR != sums_LR[0]).any() or (sums_LR % meta.top_k).any():
        layer, rank = np.argwhere((sums_LR != sums_LR[0]) | (sums_LR % meta.top_k != 0))[0]
        raise ValueError(
            f"step {step}, layer {layer}, rank {rank}: {sums_LR[layer, rank]} assignments are not tokens x top-k "
            f"(layer 0 has {sums_LR[0, rank]}, top-k is {meta.top_k}); loads must count every token once per layer"
        )


class TraceWriter:
    """Records a run: `append` per step, `close` at the end. Loads wait on disk, not in memory, in `PATH.partial`.

    As a context manager it closes on the way out, also after an error, so that an interrupted run keeps its steps. The file at
    `path` appears only on close, whole; a trace without steps is not written.
    """

    def __init__(self, path: str | os.PathLike[str], meta: TraceMeta, *, pair_counts_LEE: np.ndarray | None = None) -> None:
        self.path = Path(path)
        self.meta = meta
        self._pairs_LEE = None if pair_counts_LEE is None else _checked_pairs(np.asarray(pair_counts_LEE), meta)
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
        self._partial.write(np.ascontiguousarray(loads_LRE, dtype="<i4").tobytes())
        self.num_steps += 1

    def close(self) -> None:
        """Write the trace and remove the partial file; a second call does nothing."""
        if self._partial is None:
            return
        partial, self._partial = self._partial, None
        try:
            if self.num_steps:
                members = {
                    "meta": array_writer(np.array(self.meta.to_json(self.num_steps))),
                    "loads": lambda member: self._copy_loads(partial, member),
                }
                if self._pairs_LEE is not None:
                    members["pair_counts"] = array_writer(self._pairs_LEE.astype("<i4"))
                write_npz(self.path, members)
        finally:
            partial.close()
        self._partial_path.unlink()

    def discard(self) -> None:
        """Give up: remove the partial file, leave `path` as it was."""
        if self._partial is not None:
            self._partial.close()
            self._partial = None
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
    write_npz(path, {name: array_writer(array) for name, array in arrays.items()})


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
    if pairs.size and (pairs.min() < 0 or pairs.max() > _MAX_LOAD):
        wrong = f"a negative count, {int(pairs.min())}" if pairs.min() < 0 else f"a count of {int(pairs.max())}, above int32"
        raise ValueError(f"pair_counts holds {wrong}")
    return pairs


class Trace:
    """A trace on disk. Opening reads only headers and `meta`; `steps` streams the loads and checks each step."""

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        self._file = NpzReader(path, "trace")
        self.meta, steps = self._read_meta()
        shape = self._file.require("loads", "i", 4)
        if shape != (steps, *self.meta.step_shape):
            raise self._file.error(f"loads are {shape}, its meta says {(steps, *self.meta.step_shape)}")
        self.num_steps = steps

    def _read_meta(self) -> tuple[TraceMeta, int]:
        self._file.require("meta", "U", 0)
        text = self._file.array("meta", _MAX_META_BYTES)
        try:
            values = json.loads(str(text))
        except (ValueError, RecursionError) as error:
            raise self._file.error(f"meta cannot be read ({error})") from None
        if not isinstance(values, dict) or values.get("schema") != SCHEMA:
            found = values.get("schema") if isinstance(values, dict) else type(values).__name__
            raise self._file.error(f"its schema is {str(found)[:80]!r}, not {SCHEMA!r}; convert it with `moesaic trace convert`")
        steps = values.get("steps")
        known = {field.name for field in fields(TraceMeta)}
        try:
            meta = TraceMeta(**{name: value for name, value in values.items() if name in known})
            return meta, check_positive_int("steps", steps)
        except (ValueError, TypeError) as error:
            raise self._file.error(f"meta: {error}") from None

    def steps(self) -> Iterator[np.ndarray]:
        """Yield every step's loads, int64 [L, R, E]; ValueError at the first step that cannot come from routing."""
        for step, block in enumerate(self._file.rows("loads", 1)):
            loads_LRE = block[0].astype(np.int64)
            try:
                _check_step(loads_LRE, self.meta, step)
            except ValueError as error:
                raise self._file.error(str(error)) from None
            yield loads_LRE

    @property
    def has_topk_ids(self) -> bool:
        """Whether single tokens were recorded."""
        return "topk_ids" in self._file.members

    @property
    def has_pair_counts(self) -> bool:
        """Whether layer-to-layer counts were recorded."""
        return "pair_counts" in self._file.members

    @property
    def num_tokens(self) -> int:
        """Single tokens recorded in `topk_ids`; 0 without them."""
        return self._file.require("topk_ids", "i", 3)[0] if self.has_topk_ids else 0

    def topk_blocks(self, num_tokens: int) -> Iterator[np.ndarray]:
        """Yield the experts of single tokens, integers [<= num_tokens, L, K], as a stream; ValueError if there are none."""
        self._file.require("topk_ids", "i", 3)
        for block in self._file.rows("topk_ids", num_tokens):
            yield self._checked(_checked_topk, block)

    def topk_ids(self) -> np.ndarray:
        """Return the experts of single tokens, integers [T, L, K]; ValueError if there are none or more than fit in memory."""
        self._file.require("topk_ids", "i", 3)
        return self._checked(_checked_topk, self._file.array("topk_ids"))

    def pair_counts(self) -> np.ndarray:
        """Return the layer-to-layer counts, integers [L - 1, E, E]; ValueError if there are none."""
        self._file.require("pair_counts", "i", 3)
        return self._checked(_checked_pairs, self._file.array("pair_counts"))

    def _checked(self, check: Callable[[np.ndarray, TraceMeta], np.ndarray], array: np.ndarray) -> np.ndarray:
        try:
            return check(array, self.meta)
        except ValueError as error:
            raise self._file.error(str(error)) from None
