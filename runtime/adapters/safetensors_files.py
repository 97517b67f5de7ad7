"""A checkpoint as a folder of safetensors files with an index, as transformers reads and writes it."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch.distributed as dist
from torch import Tensor

INDEX = "model.safetensors.index.json"


def require_safetensors() -> None:
    """Raise ValueError if the package is missing."""
    if find_spec("safetensors") is None:
        raise ValueError("safetensors is not installed; install moesaic[hf]")


class SafetensorsFolder(Mapping[str, Any]):
    """The tensors of a folder by name, each a slice that is read from its file when it is indexed."""

    def __init__(self, folder: Path):
        require_safetensors()
        index = folder / INDEX
        if index.exists():
            files = {folder / name for name in json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()}
        else:
            files = set(folder.glob("*.safetensors"))
        missing = sorted(file.name for file in files if not file.exists())
        if missing or not files:
            what = f"lacks {missing[0]!r}, which its index names" if missing else "holds no safetensors file"
            raise ValueError(f"{folder} {what}; give a folder that save_safetensors or save_pretrained wrote")
        safe_open = import_module("safetensors").safe_open
        self._files = [safe_open(file, framework="pt") for file in sorted(files)]
        self._file_of = {name: file for file in self._files for name in file.keys()}  # noqa: SIM118 - not a mapping

    def __getitem__(self, name: str) -> Any:
        return self._file_of[name].get_slice(name)

    def __iter__(self) -> Iterator[str]:
        return iter(self._file_of)

    def __len__(self) -> int:
        return len(self._file_of)


def write_folder(folder: Path, tensors: Iterable[tuple[str, Tensor]], *, rank: int, max_file_bytes: int) -> None:
    """Write every rank's tensors into one folder on a disk that all ranks share. Collective.

    A rank holds at most `max_file_bytes`, or one larger tensor, at a time. The index comes last and under its name only
    when it is complete.
    """
    require_safetensors()
    folder.mkdir(parents=True, exist_ok=True)
    of_ranks: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(of_ranks, any(folder.glob("*.safetensors")))
    if any(of_ranks):
        raise ValueError(f"{folder} holds safetensors files already; give an empty folder")
    writer = _Writer(folder, rank, max_file_bytes)
    for name, tensor in tensors:
        writer.add(name, tensor)
    writer.flush()
    dist.all_gather_object(of_ranks, (writer.file_of, writer.total_bytes))
    if rank == 0:
        weight_map = {name: file for part, _ in of_ranks for name, file in part.items()}
        index = {"metadata": {"total_size": sum(size for _, size in of_ranks)}, "weight_map": dict(sorted(weight_map.items()))}
        draft = folder / (INDEX + ".part")
        draft.write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
        draft.replace(folder / INDEX)
    dist.barrier()


class _Writer:
    """Collects tensors until a file is full."""

    def __init__(self, folder: Path, rank: int, max_file_bytes: int):
        self._folder, self._rank, self._max_file_bytes = folder, rank, max_file_bytes
        self._pending: dict[str, Tensor] = {}
        self._pending_bytes = 0
        self._num_files = 0
        self.file_of: dict[str, str] = {}
        self.total_bytes = 0

    def add(self, name: str, tensor: Tensor) -> None:
        if self._pending and self._pending_bytes + tensor.nbytes > self._max_file_bytes:
            self.flush()
        # A copy: tensors may be views of weights, and safetensors takes no two that share memory.
        self._pending[name] = tensor.detach().to("cpu", copy=True).contiguous()
        self._pending_bytes += tensor.nbytes

    def flush(self) -> None:
        if not self._pending:
            return
        file = f"model-rank{self._rank:04d}-{self._num_files:05d}.safetensors"
        draft = self._folder / (file + ".part")
        import_module("safetensors.torch").save_file(self._pending, draft, metadata={"format": "pt"})
        draft.replace(self._folder / file)
        self.file_of |= dict.fromkeys(self._pending, file)
        self.total_bytes += self._pending_bytes
        self._num_files += 1
        self._pending, self._pending_bytes = {}, 0
