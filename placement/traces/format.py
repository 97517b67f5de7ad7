"""Routing traces: recorded expert loads in one `.npz` file, without pickle, written atomically and read as a stream.

Arrays of the file (S steps, L layers, R source ranks, E experts, K top-k, T tokens):
    meta         a JSON string: schema, model shape, ranks, steps, source (`TraceMeta`)
    loads        int32 [S, L, R, E], assignments counted per source rank and expert; int64 where int32 does not hold them
    topk_ids     int16 [T, L, K], optional: the experts of single tokens
    pair_counts  int32 [L - 1, E, E], optional: tokens that follow expert i in layer l by expert j in layer l + 1
    tokens       int64 [S, R], where assignments were dropped: the tokens of each source rank
Every token chooses K experts in every layer, so a step's loads of one source rank sum to the same multiple of K in every layer;
reading checks it. Where the meta says `dropped`, some assignments are missing, and sums are at most tokens x K instead.
A trace with dropped assignments or with int64 loads has the second schema, any other the first.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass, fields
from functools import cached_property
from itertools import repeat
from pathlib import Path
from types import TracebackType
from typing import IO, Any

import numpy as np

from ..content import MAX_TOTAL, check_positive_int
from .npz import NpzReader, array_writer, write_npz

SCHEMA = "moesaic-trace/1"
EXTENDED_SCHEMA = "moesaic-trace/2"
# Larger headers and dims belong to no real model; a damaged file must not make the reader allocate.
_MAX_META_BYTES = 1 << 20
_MAX_DIM = 1 << 24
_MAX_STEP_BYTES = 1 << 26
_MAX_MATRICES = 16
_MAX_INT32 = int(np.iinfo(np.int32).max)
_CHUNK_BYTES = 1 << 20


@dataclass(frozen=True)
class TraceMeta:
    """What a trace is about. `dim`, `ffn_dim` and `num_matrices` price a placement; 0 where the source did not say.

    dropped: some assignments of its tokens were dropped, or not recorded. layers: the recording's numbers of the trace's layers,
    where some of its layers hold no experts and are left out; empty where none is.
    """

    num_layers: int
    num_experts: int
    top_k: int
    num_ranks: int
    dim: int = 0
    ffn_dim: int = 0
    num_matrices: int = 3
    source: str = ""
    dropped: bool = False
    layers: tuple[int, ...] = ()

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
        if not isinstance(self.dropped, bool):
            raise ValueError(f"dropped must be true or false, got {self.dropped!r}")
        self._check_layers()

    def _check_layers(self) -> None:
        if not isinstance(self.layers, list | tuple):
            raise ValueError(f"layers must be a list of numbers, got {type(self.layers).__name__}")
        numbers = tuple(check_positive_int("a number in layers", number, minimum=0) for number in self.layers)
        if numbers and (len(numbers) != self.num_layers or list(numbers) != sorted(set(numbers))):
            raise ValueError(f"layers must be {self.num_layers} rising numbers, one for each layer, got {len(numbers)}")
        object.__setattr__(self, "layers", numbers)

    @property
    def step_shape(self) -> tuple[int, int, int]:
        """Shape of one step's loads: (layers, ranks, experts)."""
        return self.num_layers, self.num_ranks, self.num_experts

    def to_json(self, num_steps: int, *, is_wide: bool = False) -> str:
        """Return the text of the file's `meta`; is_wide: its loads are int64."""
        values = {"schema": EXTENDED_SCHEMA if self.dropped or is_wide else SCHEMA, "steps": num_steps, **asdict(self)}
        # Said only where they say something: a plain trace is written as ever.
        for name in ("dropped", "layers"):
            if not values[name]:
                del values[name]
        return json.dumps(values, sort_keys=True)


def _check_step(loads_LRE: np.ndarray, meta: TraceMeta, step: int, tokens_R: np.ndarray | None) -> None:
    """Raise ValueError unless one step's loads can come from routing: the reader's and the writer's check.

    tokens_R: of a trace with dropped assignments, the tokens that its sums must not exceed.
    """
    if loads_LRE.shape != meta.step_shape:
        raise ValueError(f"step {step} has loads of shape {loads_LRE.shape}, the trace [L, R, E] = {meta.step_shape}")
    if loads_LRE.size and loads_LRE.min() < 0:
        raise ValueError(f"step {step} holds a negative load, {int(loads_LRE.min())}")
    if loads_LRE.sum(axis=(1, 2), dtype=np.float64).max(initial=0) > MAX_TOTAL:
        raise ValueError(
            f"step {step} holds a load of {int(loads_LRE.max())}; a layer's loads above {MAX_TOTAL} are not supported"
        )
    if loads_LRE.max(initial=0) > _MAX_INT32 and 8 * loads_LRE.size > _MAX_STEP_BYTES:
        raise ValueError(f"step {step} holds a load of {int(loads_LRE.max())}, above int32, and is too large for int64 loads")
    sums_LR = loads_LRE.sum(axis=2, dtype=np.int64)
    if tokens_R is not None:
        _check_sums(sums_LR, tokens_R, meta.top_k, step)
        return
    if (sums_LR != sums_LR[0]).any() or (sums_LR % meta.top_k).any():
        layer, rank = np.argwhere((sums_LR != sums_LR[0]) | (sums_LR % meta.top_k != 0))[0]
        raise ValueError(
            f"step {step}, layer {layer}, rank {rank}: {sums_LR[layer, rank]} assignments are not tokens x top-k "
            f"(layer 0 has {sums_LR[0, rank]}, top-k is {meta.top_k}); loads must count every token once per layer"
        )


def _check_sums(sums_LR: np.ndarray, tokens_R: np.ndarray, top_k: int, step: int) -> None:
    """Raise ValueError if a rank counts more assignments than its tokens can have."""
    if tokens_R.shape != sums_LR.shape[1:] or tokens_R.min(initial=0) < 0 or tokens_R.max(initial=0) > MAX_TOTAL // top_k:
        raise ValueError(f"step {step} has tokens {tokens_R.tolist()[:8]} on {sums_LR.shape[1]} ranks; count each rank's tokens")
    if (sums_LR > tokens_R * top_k).any():
        layer, rank = np.argwhere(sums_LR > tokens_R * top_k)[0]
        raise ValueError(
            f"step {step}, layer {layer}, rank {rank}: {sums_LR[layer, rank]} assignments are more than "
            f"{tokens_R[rank]} tokens x top-{top_k}"
        )


class TraceWriter:
    """Records a run: `append` per step, `close` at the end. Loads wait on disk, not in memory, in `PATH.partial`.

    As a context manager it closes on the way out, also after an error, so that an interrupted run keeps its steps. The file at
    `path` appears only on close, whole; a trace without steps is not written.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        meta: TraceMeta,
        *,
        topk_ids_TLK: np.ndarray | None = None,
        pair_counts_LEE: np.ndarray | None = None,
    ) -> None:
        self.path = Path(path)
        self.meta = meta
        self._dtype: np.dtype[Any] = np.dtype("<i4")
        self._tokens: list[np.ndarray] = []
        self._optional: dict[str, np.ndarray] = {}
        if topk_ids_TLK is not None:
            self._optional["topk_ids"] = _checked_topk(np.asarray(topk_ids_TLK), meta).astype("<i2")
        if pair_counts_LEE is not None:
            self._optional["pair_counts"] = _checked_pairs(np.asarray(pair_counts_LEE), meta).astype("<i4")
        self.num_steps = 0
        self._partial_path = self.path.with_name(self.path.name + ".partial")
        self._partial: IO[bytes] | None = open(self._partial_path, "w+b")  # noqa: SIM115 (closed by close)

    def append(self, loads_LRE: np.ndarray, tokens_R: np.ndarray | None = None) -> None:
        """Add one step's loads, integers [L, R, E]; ValueError if they do not fit the trace.

        tokens_R: each rank's tokens, integers [R], where the trace's meta says `dropped`.
        """
        if self._partial is None:
            raise ValueError(f"trace {self.path} is closed; open a new TraceWriter")
        loads_LRE = np.asarray(loads_LRE)
        if loads_LRE.dtype.kind not in "iu":
            raise ValueError(f"loads must be integers, got {loads_LRE.dtype}")
        if self.meta.dropped != (tokens_R is not None):
            raise ValueError("a trace with dropped assignments takes the tokens of each step and rank, any other takes none")
        _check_step(loads_LRE, self.meta, self.num_steps, tokens_R)
        if tokens_R is not None:
            self._tokens.append(np.array(tokens_R, dtype="<i8"))
        if loads_LRE.max(initial=0) > _MAX_INT32 and self._dtype.itemsize == 4:
            self._widen()
        self._partial.write(np.ascontiguousarray(loads_LRE, dtype=self._dtype).tobytes())
        self.num_steps += 1

    def _widen(self) -> None:
        """Write the partial file's loads anew in place, as int64: from the end, so that nothing unread is overwritten."""
        assert self._partial is not None
        for step in reversed(range(self.num_steps)):
            count = math.prod(self.meta.step_shape)
            self._partial.seek(step * count * 4)
            loads = np.frombuffer(self._partial.read(count * 4), dtype="<i4")
            self._partial.seek(step * count * 8)
            self._partial.write(loads.astype("<i8").tobytes())
        self._partial.seek(0, os.SEEK_END)
        self._dtype = np.dtype("<i8")

    def close(self) -> None:
        """Write the trace and remove the partial file; a second call does nothing."""
        if self._partial is None:
            return
        partial, self._partial = self._partial, None
        try:
            if self.num_steps:
                members = {
                    "meta": array_writer(np.array(self.meta.to_json(self.num_steps, is_wide=self._dtype.itemsize == 8))),
                    "loads": lambda member: self._copy_loads(partial, member),
                }
                if self._tokens:
                    self._optional["tokens"] = np.stack(self._tokens)
                write_npz(self.path, members | {name: array_writer(array) for name, array in self._optional.items()})
        finally:
            partial.close()
        self._partial_path.unlink()

    def discard(self) -> None:
        """Give up: remove the partial file, leave `path` as it was."""
        if self._partial is not None:
            self._partial.close()
            self._partial = None
        self._partial_path.unlink(missing_ok=True)

    def _copy_loads(self, partial: IO[bytes], member: IO[bytes]) -> None:
        header = {"descr": self._dtype.str, "fortran_order": False, "shape": (self.num_steps, *self.meta.step_shape)}
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
    steps: Iterable[np.ndarray],
    *,
    topk_ids_TLK: np.ndarray | None = None,
    pair_counts_LEE: np.ndarray | None = None,
    tokens_SR: np.ndarray | None = None,
    on_step: Callable[[], None] = lambda: None,
) -> None:
    """Write a whole trace, atomically: after an error the file is as it was. `steps`: every step's loads, integers [L, R, E].

    The optional arrays are the module docstring's. `on_step` is called after every step.
    """
    writer = TraceWriter(path, meta, topk_ids_TLK=topk_ids_TLK, pair_counts_LEE=pair_counts_LEE)
    try:
        tokens: Iterable[np.ndarray | None] = repeat(None) if tokens_SR is None else tokens_SR
        for loads_LRE, tokens_R in zip(steps, tokens, strict=tokens_SR is not None):
            writer.append(loads_LRE, tokens_R)
            on_step()
        if not writer.num_steps:
            raise ValueError(f"{path} would hold no step; give at least one")
        writer.close()
    except BaseException:
        writer.discard()
        raise


def _checked_topk(ids: np.ndarray, meta: TraceMeta) -> np.ndarray:
    if ids.ndim != 3 or ids.shape[1:] != (meta.num_layers, meta.top_k):
        raise ValueError(f"topk_ids must be [T, {meta.num_layers}, {meta.top_k}], got {ids.shape}")
    # In a trace with dropped assignments -1 stands for one of them.
    if ids.size and (ids.min() < -int(meta.dropped) or ids.max() >= meta.num_experts):
        raise ValueError(f"topk_ids holds an expert outside 0 to {meta.num_experts - 1}")
    return ids


def _checked_pairs(pairs: np.ndarray, meta: TraceMeta) -> np.ndarray:
    if pairs.shape != (meta.num_layers - 1, meta.num_experts, meta.num_experts):
        raise ValueError(
            f"pair_counts must be [{meta.num_layers - 1}, {meta.num_experts}, {meta.num_experts}], got {pairs.shape}"
        )
    if pairs.size and (pairs.min() < 0 or pairs.max() > _MAX_INT32):
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
        if self.meta.dropped and self._file.require("tokens", "i", 2) != (steps, self.meta.num_ranks):
            raise self._file.error(f"tokens are {self._file.members['tokens'].shape}, not {(steps, self.meta.num_ranks)}")

    def _read_meta(self) -> tuple[TraceMeta, int]:
        self._file.require("meta", "U", 0)
        text = self._file.array("meta", _MAX_META_BYTES)
        try:
            values = json.loads(str(text))
        except (ValueError, RecursionError) as error:
            raise self._file.error(f"meta cannot be read ({error})") from None
        schema = values.get("schema") if isinstance(values, dict) else None
        if schema not in (SCHEMA, EXTENDED_SCHEMA):
            found = schema if isinstance(values, dict) else type(values).__name__
            raise self._file.error(f"its schema is {str(found)[:80]!r}, not {SCHEMA!r}; convert it with `moesaic trace convert`")
        steps = values.get("steps")
        known = {field.name for field in fields(TraceMeta)}
        try:
            meta = TraceMeta(**{name: value for name, value in values.items() if name in known})
            if meta.dropped and schema == SCHEMA:
                raise ValueError(f"dropped assignments need the schema {EXTENDED_SCHEMA!r}, it says {SCHEMA!r}")
            return meta, check_positive_int("steps", steps)
        except (ValueError, TypeError) as error:
            raise self._file.error(f"meta: {error}") from None

    def steps(self) -> Iterator[np.ndarray]:
        """Yield every step's loads, int64 [L, R, E]; ValueError at the first step that cannot come from routing."""
        tokens_SR = self.tokens_SR
        for step, block in enumerate(self._file.rows("loads", 1)):
            loads_LRE = block[0].astype(np.int64)
            try:
                _check_step(loads_LRE, self.meta, step, None if tokens_SR is None else tokens_SR[step])
            except ValueError as error:
                raise self._file.error(str(error)) from None
            yield loads_LRE

    @property
    def notes(self) -> tuple[str, ...]:
        """Nothing: a trace is played as it was recorded."""
        return ()

    @cached_property
    def tokens_SR(self) -> np.ndarray | None:
        """Tokens of every step and source rank, int64 [S, R], where assignments were dropped; None where none was."""
        return self._file.array("tokens").astype(np.int64) if self.meta.dropped else None

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
