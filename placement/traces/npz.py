"""Archives of plain arrays (`.npz`): written atomically, read without pickle, in blocks, and only what their headers account for.

A damaged or hostile file (truncated, bit flips, headers that promise terabytes, compressed bombs) is a ValueError of one line,
raised before anything of its claimed size is allocated.
"""

from __future__ import annotations

import io
import math
import os
import struct
import zipfile
import zlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np

from ..files import replacing

_BLOCK_BYTES = 1 << 20
_MAX_MEMBERS = 64
# The longest header of a plain array is far below this; numpy would read whatever length a header claims.
_MAX_HEADER_BYTES = 1 << 14
# A damaged number may have thousands of digits.
_MAX_PROBLEM = 300
_SMALL_ARRAY_BYTES = 1 << 26
_DAMAGE = (
    zipfile.BadZipFile,
    zlib.error,
    struct.error,
    RuntimeError,
    EOFError,
    OSError,
    OverflowError,
    ValueError,
)


def write_npz(path: str | os.PathLike[str], members: Mapping[str, Callable[[IO[bytes]], None]]) -> None:
    """Write a compressed archive, a function per member; the file appears whole or not at all."""
    with replacing(path) as file, zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED, compresslevel=1) as archive:
        for name, write in members.items():
            with archive.open(f"{name}.npy", "w", force_zip64=True) as member:
                write(member)


def array_writer(array: np.ndarray) -> Callable[[IO[bytes]], None]:
    """Return what writes `array` as one member."""
    return lambda member: np.lib.format.write_array(member, array, allow_pickle=False)


@dataclass(frozen=True)
class Member:
    """One array of the file by its header."""

    shape: tuple[int, ...]
    dtype: np.dtype[Any]
    header_bytes: int
    total_bytes: int


class NpzReader:
    """An archive on disk. Opening reads headers only; `what` names the file's kind in errors."""

    def __init__(self, path: str | os.PathLike[str], what: str) -> None:
        self.path = Path(path)
        self.what = what
        self.members = self._read_headers()

    def error(self, problem: str) -> ValueError:
        """The one line for a file that cannot be used."""
        return ValueError(f"{self.path} is not a usable {self.what}: {problem[:_MAX_PROBLEM]}")

    def _read_headers(self) -> dict[str, Member]:
        try:
            with zipfile.ZipFile(self.path) as archive:
                infos = archive.infolist()
                if len(infos) > _MAX_MEMBERS:
                    raise self.error(f"it holds {len(infos)} arrays, above the limit of {_MAX_MEMBERS}")
                headers = {info.filename: self._open_header(archive, info) for info in infos}
        except FileNotFoundError:
            raise ValueError(f"there is no {self.what} at {self.path}") from None
        except IsADirectoryError:
            raise self.error("it is a folder; give a file in it") from None
        except _DAMAGE as error:
            raise self._damage(error, "it is damaged, unreadable or no .npz file") from None
        return {name.removesuffix(".npy"): member for name, member in headers.items()}

    def _damage(self, error: BaseException, problem: str) -> ValueError:
        if isinstance(error, ValueError) and str(error).startswith(f"{self.path} is not"):
            return error
        return self.error(f"{problem} ({type(error).__name__})")

    def _open_header(self, archive: zipfile.ZipFile, info: zipfile.ZipInfo) -> Member:
        if info.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
            raise self.error(f"{info.filename} is compressed in a way no .npz uses")
        with archive.open(info) as member:
            prefix = member.read(12)
            major = prefix[6] if len(prefix) == 12 else 0
            length = int.from_bytes(prefix[8:10] if major == 1 else prefix[8:12], "little")
            if length > _MAX_HEADER_BYTES:
                raise self.error(f"{info.filename} has no valid .npy header")
            header = io.BytesIO(prefix + member.read(length))
        try:
            version = np.lib.format.read_magic(header)
            read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
            shape, fortran_order, dtype = read(header)
            expected = header.tell() + math.prod(shape) * dtype.itemsize
        except (ValueError, SyntaxError, TypeError, KeyError, RecursionError, MemoryError, OverflowError):
            raise self.error(f"{info.filename} has no valid .npy header") from None
        if fortran_order or dtype.hasobject or min(shape, default=0) < 0 or expected != info.file_size:
            raise self.error(f"{info.filename} holds {info.file_size} bytes, its header accounts for {str(expected)[:30]}")
        return Member(shape, dtype, header.tell(), info.file_size)

    def require(self, name: str, kinds: str, ndim: int) -> tuple[int, ...]:
        """Return an array's shape; ValueError unless it is there, of one of the dtype `kinds`, and has `ndim` dims."""
        member = self.members.get(name)
        if member is None:
            raise self.error(f"it has no {name}")
        if member.dtype.kind not in kinds or len(member.shape) != ndim:
            raise self.error(f"{name} is {member.dtype} {member.shape}")
        return member.shape

    def _blocks(self, name: str, block_bytes: int) -> Iterator[bytes]:
        info = self.members[name]
        left = info.total_bytes - info.header_bytes
        try:
            with zipfile.ZipFile(self.path) as archive, archive.open(f"{name}.npy") as member:
                member.read(info.header_bytes)
                while left:
                    block = member.read(min(block_bytes, left))
                    if len(block) != min(block_bytes, left):
                        raise EOFError
                    left -= len(block)
                    # Reading to the very end is what makes zipfile compare the checksum.
                    if not left and member.read(1):
                        raise EOFError
                    yield block
        except (*_DAMAGE, KeyError) as error:
            raise self._damage(error, f"{name} is damaged") from None

    def rows(self, name: str, count: int) -> Iterator[np.ndarray]:
        """Yield an array in blocks of `count` rows of its first dim, the last block shorter; read as a stream."""
        member = self.members[name]
        row_bytes = math.prod(member.shape[1:]) * member.dtype.itemsize
        if not row_bytes:
            raise self.error(f"{name} is empty: {member.shape}")
        if count * row_bytes > _SMALL_ARRAY_BYTES:
            raise self.error(f"{count} rows of {name} take {count * row_bytes} bytes, above the limit of {_SMALL_ARRAY_BYTES}")
        for block in self._blocks(name, count * row_bytes):
            yield np.frombuffer(block, dtype=member.dtype).reshape(-1, *member.shape[1:])

    def array(self, name: str, limit_bytes: int = _SMALL_ARRAY_BYTES) -> np.ndarray:
        """Return a whole array; ValueError if it takes more than `limit_bytes`."""
        member = self.members[name]
        if member.total_bytes > limit_bytes:
            raise self.error(f"{name} takes {member.total_bytes} bytes, above the limit of {limit_bytes}")
        if not member.dtype.itemsize or not math.prod(member.shape):
            return np.zeros(member.shape, dtype=member.dtype)
        data = bytearray()
        for block in self._blocks(name, _BLOCK_BYTES):
            data += block
        return np.frombuffer(data, dtype=member.dtype).reshape(member.shape)
