"""Dumps of serving systems opened as named arrays: `.npz`, `.npy`, and the `.pt` files of SGLang's expert distribution recorder.

What SGLang writes, by its recorder mode (S passes, L layers, T tokens, P physical experts, E logical experts):
    stat, stat_approx  {"logical_count": int32 [S, L, E]}; unused slots of its ring buffer and dense layers stay zero
    per_pass           {"records": [{"global_physical_count": [L, P]}, ...], "last_physical_to_logical_map": [L, P]}
    per_token          the same with "topk_ids_of_layer": int32 [L, T, 8] of physical experts, -1 where a slot was not used
Nothing in a file is run: tensors are read with `weights_only`.
"""

from __future__ import annotations

import math
import os
import pickle
import warnings
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

import numpy as np

from .npz import ArrayFile, MemoryFile, NpyReader, NpzReader

if TYPE_CHECKING:
    from torch import Tensor

_MAX_DUMP_BYTES = 1 << 31
# What a record of a pass holds, and its number of dims.
_RECORDED = MappingProxyType({"topk_ids_of_layer": 3, "global_physical_count": 2})


def open_arrays(path: str | os.PathLike[str], what: str) -> ArrayFile:
    """Open a file of arrays, recognized by its first bytes; what cannot be read is one clear ValueError."""
    try:
        with open(path, "rb") as file:
            start = file.read(8)
    except OSError:
        start = b""
    if start.startswith(b"\x93NUMPY"):
        return NpyReader(path, what)
    is_pickle = start.startswith(b"\x80") and Path(path).suffix in (".pt", ".pth", ".bin")
    return _read_torch(path, what) if is_pickle or _is_torch_archive(path) else NpzReader(path, what)


def _is_torch_archive(path: str | os.PathLike[str]) -> bool:
    try:
        with zipfile.ZipFile(path) as archive:
            return any(info.filename.endswith("/data.pkl") for info in archive.infolist())
    except (zipfile.BadZipFile, OSError, ValueError, NotImplementedError):
        return False


def _read_torch(path: str | os.PathLike[str], what: str) -> MemoryFile:
    """Read the tensors of a `torch.save` file into memory, as arrays."""
    file = ArrayFile(path, what)
    size = os.path.getsize(path)
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            size = max(size, sum(info.file_size for info in archive.infolist()))
    if size > _MAX_DUMP_BYTES:
        raise file.error(f"it takes {size} bytes, above the limit of {_MAX_DUMP_BYTES}; save its array alone as .npy")
    import torch

    try:
        with warnings.catch_warnings():
            # Of an uncommon pickle protocol, which is read as well.
            warnings.simplefilter("ignore")
            data = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError:
        raise file.error(
            "it holds more than tensors, numbers, lists and dicts, or is damaged, and nothing in a file is run; "
            "save the tensor alone, or as .npz"
        ) from None
    except Exception as error:  # A damaged pickle may fail in any way.
        raise file.error(f"it is damaged ({type(error).__name__})") from None
    if isinstance(data, Mapping) and "records" in data:
        arrays, notes = _from_records(file, data)
        return MemoryFile(path, what, arrays, *notes)
    found = data if isinstance(data, Mapping) else {Path(path).stem: data}
    tensors = {str(name): value for name, value in found.items() if isinstance(value, torch.Tensor)}
    if not tensors:
        raise file.error(f"it holds no tensor, but {_listed(found)}; save the tensor that counts or names experts")
    return MemoryFile(path, what, {name: _plain(file, name, tensor) for name, tensor in tensors.items()})


def _listed(found: Mapping[Any, Any]) -> str:
    return ", ".join(f"{name} ({type(value).__name__})" for name, value in list(found.items())[:8]) or "nothing"


def _plain(file: ArrayFile, name: str, tensor: Tensor) -> np.ndarray:
    """Return a dense tensor as an array in C order."""
    import torch

    if tensor.layout != torch.strided or tensor.is_quantized or tensor.device.type != "cpu":
        raise file.error(f"{name} is no plain dense tensor; save its dense values")
    # A view may claim far more elements than its file holds.
    if math.prod(tensor.shape) * tensor.element_size() > _MAX_DUMP_BYTES:
        raise file.error(f"{name} is {tuple(tensor.shape)}, above the limit of {_MAX_DUMP_BYTES} bytes; save a part of it")
    if tensor.dtype.is_floating_point and tensor.dtype not in (torch.float16, torch.float32, torch.float64):
        tensor = tensor.to(torch.float32)
    return tensor.detach().contiguous().numpy()


def _from_records(file: ArrayFile, data: Mapping[str, Any]) -> tuple[dict[str, np.ndarray], tuple[str, ...]]:
    """Turn SGLang's records of single passes into `topk_ids` [T, L, K] or `logical_count` [S, L, E], by logical experts."""
    records, mapped = data["records"], data.get("last_physical_to_logical_map")
    if not isinstance(records, Sequence) or not records or not all(isinstance(record, Mapping) for record in records):
        raise file.error("its records are empty or no list of dicts; record some passes before the dump")
    logical_LP = None if mapped is None else _tensor(file, "last_physical_to_logical_map", mapped, 2)
    name = next((known for known in _RECORDED if known in records[0]), None)
    if name is None:
        raise file.error(f"its records hold neither {' nor '.join(_RECORDED)}, but {_listed(records[0])}")
    arrays = [_tensor(file, name, record.get(name), _RECORDED[name]) for record in records]
    is_tokens = name == "topk_ids_of_layer"
    # Passes may differ in their number of tokens, the second dim of topk_ids_of_layer, and in nothing else.
    if len({(array.shape[0], array.shape[-1]) for array in arrays}) > 1:
        raise file.error(f"{name} changes its layers or experts from record to record; dump again without changing them")
    if logical_LP is not None and len(logical_LP) != len(arrays[0]):
        raise file.error(f"{name} has {len(arrays[0])} layers, last_physical_to_logical_map {len(logical_LP)}")
    ranks = sorted({record["rank"] for record in records if isinstance(record.get("rank"), int)})
    notes = (f"{len(records)} recorded passes of rank{'s' * (len(ranks) > 1)} {', '.join(map(str, ranks)) or 'unknown'} alone",)
    if is_tokens:
        ids_LTK = _logical_ids(file, np.concatenate(arrays, axis=1), logical_LP)
        return {"topk_ids": np.ascontiguousarray(ids_LTK.transpose(1, 0, 2))}, notes
    return {"logical_count": _logical_counts(file, np.stack(arrays), logical_LP)}, notes


def _tensor(file: ArrayFile, name: str, value: Any, ndim: int) -> np.ndarray:
    import torch

    if not isinstance(value, torch.Tensor) or value.ndim != ndim or value.is_floating_point() or value.is_complex():
        found = f"{value.dtype} {tuple(value.shape)}" if isinstance(value, torch.Tensor) else type(value).__name__
        raise file.error(f"{name} must be an integer tensor of {ndim} dims, got {found}")
    return _plain(file, name, value)


def _logical_ids(file: ArrayFile, ids_LTK: np.ndarray, logical_LP: np.ndarray | None) -> np.ndarray:
    if logical_LP is None:
        return ids_LTK
    if ids_LTK.max(initial=-1) >= logical_LP.shape[1]:
        raise file.error(f"topk_ids_of_layer holds {ids_LTK.max()}, its map has {logical_LP.shape[1]} physical experts")
    layer_L11 = np.arange(len(ids_LTK))[:, None, None]
    return np.where(ids_LTK < 0, ids_LTK, logical_LP[layer_L11, np.maximum(ids_LTK, 0)])


def _logical_counts(file: ArrayFile, counts_SLP: np.ndarray, logical_LP: np.ndarray | None) -> np.ndarray:
    if logical_LP is None:
        return counts_SLP
    if logical_LP.shape != counts_SLP.shape[1:] or logical_LP.min(initial=0) < 0:
        raise file.error(f"global_physical_count is {counts_SLP.shape}, last_physical_to_logical_map {logical_LP.shape}")
    num_experts = int(logical_LP.max()) + 1
    if num_experts > logical_LP.shape[1]:
        raise file.error(f"last_physical_to_logical_map names expert {num_experts - 1} of {logical_LP.shape[1]} physical ones")
    counts_SLE = np.zeros((*counts_SLP.shape[:2], num_experts), dtype=np.int64)
    for layer, logical_P in enumerate(logical_LP):
        for physical, logical in enumerate(logical_P.tolist()):
            counts_SLE[:, layer, logical] += counts_SLP[:, layer, physical]
    return counts_SLE
