"""Recordings of other systems: which array of a file is meant, what it holds, and in which order its dims are.

Known names (S steps, L layers, R ranks, E experts, K top-k, T tokens):
    topk_ids, routed_experts (vLLM, SGLang)   ids of experts [T, L, K]; topk_ids_of_layer (SGLang) [L, T, K]
    routing_map (Megatron)                    bool [T, L, E]
    counts, loads, tokens_per_expert, logical_count (SGLang), weight (EPLB)   loads [L, E] or [S, L, E], others by their axes
    shares, share                             loads [..., L, E] that are taken as shares
Other names, and files without names, are recognized by their dims: a last dim of --top-k is tokens, one of --experts loads.
`axes` gives the order of dims where it is another: a letter for each, S for all that steps are counted along.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Any

import numpy as np

from ..content import check_positive_int
from . import counts, tokens
from .format import TraceMeta
from .npz import WHOLE_ARRAY_BYTES, ArrayFile, MemoryFile

_DEFAULT_TOKENS = 4096
_MAX_META_BYTES = 1 << 20
# More layers than any model has: tokens in the place of layers.
_MAX_LAYERS = 256


@dataclass(frozen=True)
class _Kind:
    """What an array holds. order: its dims as they are read, the first one for all leading ones."""

    order: str
    is_shares: bool = False


_TOKENS, _MAP, _LOADS, _RANK_LOADS = _Kind("TLK"), _Kind("TLE"), _Kind("SLE"), _Kind("SLRE")
_SHARES = _Kind("SLE", is_shares=True)
# Name: kind, and the order of dims where it is always the same other one.
_KNOWN = MappingProxyType(
    {
        "topk_ids": (_TOKENS, None),
        "routed_experts": (_TOKENS, None),
        "topk_ids_of_layer": (_TOKENS, "LTK"),
        "routing_map": (_MAP, None),
        "counts": (_LOADS, None),
        "logical_count": (_LOADS, None),
        "tokens_per_expert": (_LOADS, None),
        "weight": (_LOADS, None),
        "weights": (_LOADS, None),
        "loads": (_LOADS, None),
        "shares": (_SHARES, None),
        "share": (_SHARES, None),
    }
)


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """Sizes of the model as the user gives them; they go before those of a file. None where not given."""

    num_experts: int | None = None
    top_k: int | None = None
    dim: int | None = None
    ffn_dim: int | None = None
    num_matrices: int | None = None

    def apply(self, meta: TraceMeta) -> TraceMeta:
        """Return `meta` with the sizes that price a placement replaced."""
        changes = {name: getattr(self, name) for name in ("dim", "ffn_dim", "num_matrices") if getattr(self, name) is not None}
        return replace(meta, **changes)


@dataclass(frozen=True, kw_only=True)
class Reading:
    """How the user wants a foreign recording to be read.

    array: which of a file's arrays. axes: the order of its dims, a letter for each. none_ids: ids that stand for no expert.
    as_shares: loads are shares, also where they are whole numbers. tokens_per_step: of recorded tokens and of shares.
    """

    array: str | None = None
    axes: str | None = None
    none_ids: tuple[int, ...] = ()
    as_shares: bool = False
    tokens_per_step: int | None = None
    shuffle_seed: int | None = None


class Arranged:
    """An array of a file, its dims in the order of its kind: read as a stream where it lies in that order, else held whole."""

    def __init__(self, file: ArrayFile, name: str, order: str, axes: str) -> None:
        self.file, self.name = file, name
        member = file.members[name]
        self.dtype = member.dtype
        lead, tail = order[0], order[1:]
        leading = [dim for dim, letter in enumerate(axes) if letter in ("S", lead)]
        dims = [*leading, *(axes.index(letter) for letter in tail if letter in axes)]
        tail_shape = tuple(member.shape[axes.index(letter)] if letter in axes else 1 for letter in tail)
        num_lead = int(np.prod([member.shape[dim] for dim in leading], dtype=np.int64))
        self.shape = (num_lead, *tail_shape)
        self._dims = dims
        self._is_stream = bool(leading) and dims == list(range(len(axes))) and (len(leading) == 1 or lead == "S")

    def error(self, problem: str) -> ValueError:
        """The one line for an array that cannot be used."""
        return self.file.error(problem)

    def whole(self) -> np.ndarray:
        """Return all of it, in the order of its kind."""
        return self.file.array(self.name, WHOLE_ARRAY_BYTES).transpose(self._dims).reshape(self.shape)

    def rows(self, count: int) -> Iterator[np.ndarray]:
        """Yield blocks of `count` of its first dim, the last one shorter."""
        if self._is_stream:
            for block in self.file.rows(self.name, count):
                yield block.reshape(-1, *self.shape[1:])
            return
        whole = self.whole()
        yield from (whole[start : start + count] for start in range(0, len(whole), count))


def read_foreign_meta(file: ArrayFile) -> dict[str, Any]:
    """Return what the file's `meta` says as JSON; nothing where it has none that can be read."""
    member = file.members.get("meta")
    if member is None or member.dtype.kind != "U" or member.shape:
        return {}
    try:
        said = json.loads(str(file.array("meta", _MAX_META_BYTES)))
    except (RecursionError, json.JSONDecodeError):
        return {}
    return said if isinstance(said, dict) else {}


def _choose(file: ArrayFile, name: str | None) -> str:
    """Return the name of the array that is meant; ValueError where none is, or more than one may be."""
    found = ", ".join(sorted(file.members)[:8])
    if name is not None:
        if name not in file.members:
            raise file.error(f"it has no {name} (its arrays: {found}); name one with --array")
        return name
    known = [known for known in _KNOWN if known in file.members]
    if len(known) > 1:
        raise file.error(f"it has {' and '.join(known)}; name one with --array")
    # A file of one array without a name: what numpy.savez calls arr_0, a .npy, a tensor alone.
    unnamed = [only for only in file.members if only != "meta"] if len(file.members) <= 2 else []
    if not known and (unnamed == ["arr_0"] or (len(unnamed) == 1 and unnamed[0] == file.path.stem)):
        return unnamed[0]
    if not known:
        raise file.error(f"it has no topk_ids, counts or shares (its arrays: {found}); name one with --array")
    return known[0]


def _kind_by_dims(file: ArrayFile, name: str, sizes: Sizes) -> _Kind:
    """Distinguish tokens from loads by the last dim."""
    member = file.members[name]
    last = member.shape[-1] if member.shape else 0
    if member.dtype.kind == "b":
        return _MAP
    if len(member.shape) != 3 or (sizes.num_experts is None and sizes.top_k is None) or last == sizes.num_experts:
        return _LOADS
    if last == sizes.top_k or sizes.top_k is None:
        return _TOKENS
    if sizes.num_experts is None:
        return _LOADS
    raise file.error(f"{name} is {member.shape}: its last dim is neither --experts {sizes.num_experts} nor --top-k {sizes.top_k}")


def _kind_of_axes(axes: str) -> _Kind:
    letters = set(axes)
    if letters - set("STLRKE") or any(axes.count(letter) > 1 for letter in "TLRKE"):
        raise ValueError(
            f"--axes {axes}: give a letter for each dim, of S steps, T tokens, L layers, R ranks, K top-k, E experts"
        )
    for kind, needed in ((_TOKENS, "TK"), (_MAP, "TE"), (_RANK_LOADS, "RE"), (_LOADS, "E")):
        if set(needed) <= letters and letters <= {*kind.order, "S"}:
            return kind
    raise ValueError(
        f"--axes {axes} is no recording: tokens are T, L, K; maps T, L, E; loads S, L, E or S, L, R, E, in any order"
    )


def _axes_of(file: ArrayFile, name: str, kind: _Kind) -> tuple[_Kind, str]:
    """Return an array's kind and the order of its dims; ValueError where they are ambiguous."""
    shape, order = file.members[name].shape, kind.order
    if kind in (_TOKENS, _MAP):
        if len(shape) != len(order):
            raise file.error(f"{name} has dims {shape}, not [{', '.join(order)}]; say what they are, such as --axes T{order[-1]}")
        return kind, order
    if len(shape) < 2:
        raise file.error(f"{name} has dims {shape}, not [L, E] or [S, L, E]: loads are by layer and expert")
    if len(shape) == 4 and not kind.is_shares:
        raise file.error(
            f"{name} is {shape}, which may be [steps, layers, ranks, experts] or [steps, steps, layers, experts]; "
            "say which, --axes SLRE or --axes SSLE"
        )
    return kind, "S" * (len(shape) - 2) + "LE"


@dataclass(frozen=True)
class _Chosen:
    """The array that is read, what it holds, and a line for what was not plain."""

    array: Arranged
    kind: _Kind
    notes: tuple[str, ...]


def _arrange(file: ArrayFile, reading: Reading, sizes: Sizes) -> _Chosen:
    """Choose an array, and bring its dims into order."""
    name = _choose(file, reading.array)
    member = file.members[name]
    file.check_plain(name)
    if member.dtype.kind not in "biuf":
        raise file.error(f"{name} is {str(member.dtype)[:80]}; tokens and loads are whole numbers, bools or floats")
    if 0 in member.shape or not member.shape:
        raise file.error(f"{name} is empty: {member.shape}" if member.shape else f"{name} is a single number")
    kind, axes = _KNOWN.get(name, (None, None))
    is_guessed = kind is None
    if reading.axes is not None:
        kind, axes, is_guessed = _kind_of_axes(reading.axes), reading.axes, False
    elif kind is None:
        kind = _kind_by_dims(file, name, sizes)
    if axes is None:
        kind, axes = _axes_of(file, name, kind)
    if len(axes) != len(member.shape):
        raise file.error(f"{name} has dims {member.shape}, not [{', '.join(axes)}]; say what they are with --axes")
    if member.dtype.kind == "b" and kind != _MAP:
        raise file.error(f"{name} is bool, which only routing maps [T, L, E] are; convert it to numbers, or give --axes")
    arranged = Arranged(file, name, kind.order, axes)
    notes = list(file.notes) if isinstance(file, MemoryFile) else []
    if is_guessed:
        notes.append(f"{name} is read as [{', '.join(axes)}], by its dims; if it is another, give --axes")
    if kind in (_TOKENS, _MAP) and arranged.shape[0] < arranged.shape[1] and arranged.shape[1] > _MAX_LAYERS:
        num_tokens, num_layers, _ = arranged.shape
        raise file.error(
            f"{name} would be {num_tokens} tokens of {num_layers} layers, more than any model has: its order seems to be "
            f"[L, T, {kind.order[-1]}], not [T, L, {kind.order[-1]}]; give --axes LT{kind.order[-1]}"
        )
    return _Chosen(arranged, kind, tuple(notes))


def open_foreign(file: ArrayFile, num_ranks: int | None, reading: Reading, sizes: Sizes) -> tokens.TokenFile | counts.CountFile:
    """Open a recording at `num_ranks` ranks, or at its own where it has some; it is read and checked as a whole."""
    said = read_foreign_meta(file)
    chosen = _arrange(file, reading, sizes)
    array, kind = chosen.array, chosen.kind
    if num_ranks is None and kind != _RANK_LOADS:
        raise ValueError(f"{file.path} does not say how many ranks there are; give --ranks or --topology")
    top_k = _said("top_k", sizes.top_k, said.get("top_k"))
    num_experts = _said("num_experts", sizes.num_experts, said.get("n_experts", said.get("num_experts")))
    if kind.order[-1] == "E":
        if sizes.num_experts not in (None, array.shape[-1]):
            raise file.error(f"{array.name} is by {array.shape[-1]} experts, --experts says {sizes.num_experts}; leave it out")
        num_experts = array.shape[-1]
    if num_experts is None or (top_k is None and kind not in (_TOKENS, _MAP)):
        raise ValueError(f"{file.path} does not say its experts and top-k; give --experts and --top-k")
    meta = TraceMeta(
        num_layers=array.shape[1],
        num_experts=num_experts,
        top_k=1 if top_k is None else top_k,
        num_ranks=array.shape[2] if kind == _RANK_LOADS else check_positive_int("ranks", num_ranks),
        source=str(said.get("source", said.get("model", "")))[:200] or file.path.name,
    )
    return (_open_tokens if kind in (_TOKENS, _MAP) else _open_counts)(chosen, meta, top_k, reading)


def _said(name: str, by_user: int | None, by_file: object) -> int | None:
    found = by_file if by_user is None else by_user
    return None if found is None else check_positive_int(name, found)


def _open_tokens(chosen: _Chosen, meta: TraceMeta, top_k: int | None, reading: Reading) -> tokens.TokenFile:
    array, is_map, path = chosen.array, chosen.kind == _MAP, chosen.array.file.path
    if not is_map and top_k is not None and top_k > array.shape[2]:
        raise array.error(f"{array.name} names {array.shape[2]} experts a token, top-k is {top_k}; correct --top-k")
    if reading.as_shares:
        raise array.error(f"{array.name} names the experts of tokens; leave out --shares")
    wrong = [none for none in reading.none_ids if 0 <= none < meta.num_experts]
    if wrong:
        raise ValueError(f"--none {wrong[0]} is one of the experts 0 to {meta.num_experts - 1}; give an id that is not")
    notes, per_step = [*chosen.notes], reading.tokens_per_step or _DEFAULT_TOKENS
    if reading.tokens_per_step is None and array.shape[0] < _DEFAULT_TOKENS:
        per_step = array.shape[0]
        notes.append(f"its {per_step:,} tokens are taken as one step; cut them with --tokens-per-step")
    cells = tokens.Cells(num_experts=meta.num_experts, is_map=is_map, top_k=top_k, none_ids=reading.none_ids)
    # Too few tokens are refused before all of them are read.
    tokens.TokenFile(path, array, cells, meta, per_step)
    found = tokens.survey(array, cells)
    notes += found.notes
    if array.shape[0] % per_step:
        notes.append(f"the last {array.shape[0] % per_step:,} of {array.shape[0]:,} tokens make no whole step: left out")
    meta = replace(
        meta,
        num_layers=len(found.layers) or meta.num_layers,
        top_k=found.top_k,
        dropped=found.is_dropped,
        layers=found.layers,
    )
    return tokens.TokenFile(path, array, found.cells, meta, per_step, reading.shuffle_seed, tuple(notes))


def _open_counts(chosen: _Chosen, meta: TraceMeta, top_k: int | None, reading: Reading) -> counts.CountFile:
    array = chosen.array
    if reading.shuffle_seed is not None:
        raise array.error(f"{array.name} counts no single tokens, which --shuffle could mix; leave it out")
    if reading.none_ids:
        raise array.error(f"{array.name} holds loads, no ids of experts; leave out --none")
    assert top_k is not None
    per_step = reading.tokens_per_step or _DEFAULT_TOKENS
    found = counts.survey(array, top_k, per_step, as_shares=chosen.kind.is_shares or reading.as_shares)
    notes = [*chosen.notes, *found.notes]
    if reading.tokens_per_step is not None and not found.are_shares:
        raise array.error(
            f"{array.name} holds counts, which are kept as they are; leave out --tokens-per-step, or rescale them with --shares"
        )
    meta = replace(meta, num_layers=len(found.layers) or meta.num_layers, dropped=found.is_dropped, layers=found.layers)
    return counts.CountFile(array.file.path, array, found, meta, tuple(notes))
