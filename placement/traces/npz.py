"""Files of plain arrays (`.npz`, `.npy`): written atomically, read without pickle, in blocks, and only what headers account for.

A damaged or hostile file (truncated, bit flips, headers that promise terabytes, compressed bombs) is a ValueError of one line,
raised before anything of its claimed size is allocated. Arrays of Python objects are listed and never read.
"""

from __future__ import annotations

import io
import math
import os
import struct
import tokenize
import warnings
import zipfile
import zlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
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
_MAX_PROBLEM = 400
_SMALL_ARRAY_BYTES = 1 << 26
# What may be held whole where an array cannot be read as a stream: Fortran order, other orders of dims.
WHOLE_ARRAY_BYTES = 1 << 28
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
# What numpy raises at a header, whose text it parses as Python.
_BAD_HEADER = (ValueError, SyntaxError, TypeError, KeyError, RecursionError, MemoryError, OverflowError, tokenize.TokenError)


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
    header_bytes: int = 0
    total_bytes: int = 0
    is_fortran: bool = False


class ArrayFile:
    """A file of named arrays, `members`; `what` names the file's kind in errors."""

    members: dict[str, Member]

    def __init__(self, path: str | os.PathLike[str], what: str) -> None:
        self.path = Path(path)
        self.what = what

    def error(self, problem: str) -> ValueError:
        """The one line for a file that cannot be used."""
        return ValueError(f"{self.path} is not a usable {self.what}: {problem[:_MAX_PROBLEM]}")

    def require(self, name: str, kinds: str, ndim: int) -> tuple[int, ...]:
        """Return an array's shape; ValueError unless it is there, of one of the dtype `kinds`, and has `ndim` dims."""
        member = self.members.get(name)
        if member is None:
            raise self.error(f"it has no {name}")
        self.check_plain(name)
        if member.dtype.kind not in kinds or len(member.shape) != ndim:
            raise self.error(f"{name} is {member.dtype} {member.shape}")
        return member.shape

    def check_plain(self, name: str) -> None:
        """Raise ValueError if an array holds Python objects: reading them would run code."""
        if self.members[name].dtype.hasobject:
            raise self.error(f"{name} holds Python objects, which are never read from a file; save it as numbers")

    def rows(self, name: str, count: int) -> Iterator[np.ndarray]:
        """Yield an array in blocks of `count` rows of its first dim, the last block shorter."""
        raise NotImplementedError

    def array(self, name: str, limit_bytes: int = _SMALL_ARRAY_BYTES) -> np.ndarray:
        """Return a whole array; ValueError if it takes more than `limit_bytes`."""
        raise NotImplementedError


class MemoryFile(ArrayFile):
    """Arrays that were read from `path` already. `notes`: lines on what had to be done to get them."""

    def __init__(self, path: str | os.PathLike[str], what: str, arrays: Mapping[str, np.ndarray], *notes: str) -> None:
        super().__init__(path, what)
        self.notes = notes
        self._arrays = dict(arrays)
        self.members = {name: Member(array.shape, array.dtype, 0, array.nbytes) for name, array in arrays.items()}

    def rows(self, name: str, count: int) -> Iterator[np.ndarray]:
        """Yield an array in blocks of `count` rows of its first dim, the last block shorter."""
        for start in range(0, len(self._arrays[name]), count):
            yield self._arrays[name][start : start + count]

    def array(self, name: str, limit_bytes: int = _SMALL_ARRAY_BYTES) -> np.ndarray:
        """Return a whole array, which is in memory whatever the limit."""
        return self._arrays[name]


class StreamFile(ArrayFile):
    """Arrays on disk. Opening reads headers only."""

    def __init__(self, path: str | os.PathLike[str], what: str) -> None:
        super().__init__(path, what)
        try:
            self.members = self._read_headers()
        except FileNotFoundError:
            raise ValueError(f"there is no {what} at {path}") from None
        except IsADirectoryError:
            raise self.error("it is a folder; give a file in it") from None
        except _DAMAGE as error:
            raise self._damage(error, "it is damaged, unreadable or no .npz, .npy or .pt file") from None

    def _read_headers(self) -> dict[str, Member]:
        raise NotImplementedError

    def _open(self, name: str) -> AbstractContextManager[IO[bytes]]:
        """Open an array at the start of its header."""
        raise NotImplementedError

    def _damage(self, error: BaseException, problem: str) -> ValueError:
        if isinstance(error, ValueError) and str(error).startswith(f"{self.path} is not"):
            return error
        return self.error(f"{problem} ({type(error).__name__})")

    def _read_header(self, name: str, member: IO[bytes], size: int) -> Member:
        """Read one array's header; ValueError unless it accounts for the `size` bytes that are there."""
        prefix = member.read(12)
        major = prefix[6] if len(prefix) == 12 else 0
        length = int.from_bytes(prefix[8:10] if major == 1 else prefix[8:12], "little")
        if length > _MAX_HEADER_BYTES:
            raise self.error(f"{name} has no valid .npy header")
        header = io.BytesIO(prefix + member.read(length))
        try:
            version = np.lib.format.read_magic(header)
            read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
            with warnings.catch_warnings():
                # Headers of Python 2 are read as well; numpy would say that this took longer.
                warnings.simplefilter("ignore")
                shape, is_fortran, dtype = read(header)
            expected = header.tell() + math.prod(shape) * dtype.itemsize
        except _BAD_HEADER:
            raise self.error(f"{name} has no valid .npy header") from None
        # How long pickled objects are, no header says; they are never read.
        if min(shape, default=0) < 0 or (expected != size and not dtype.hasobject):
            raise self.error(f"{name} holds {size} bytes, its header accounts for {str(expected)[:30]}")
        return Member(shape, dtype, header.tell(), size, is_fortran)

    def _blocks(self, name: str, block_bytes: int) -> Iterator[bytes]:
        self.check_plain(name)
        info = self.members[name]
        left = info.total_bytes - info.header_bytes
        try:
            with self._open(name) as member:
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
        """Yield an array in blocks of `count` rows of its first dim, the last block shorter; read as a stream.

        In Fortran order a row lies all over the array, which is held whole then.
        """
        member = self.members[name]
        row_bytes = math.prod(member.shape[1:]) * member.dtype.itemsize
        if not row_bytes:
            raise self.error(f"{name} is empty: {member.shape}")
        if count * row_bytes > _SMALL_ARRAY_BYTES:
            raise self.error(f"{count} rows of {name} take {count * row_bytes} bytes, above the limit of {_SMALL_ARRAY_BYTES}")
        if member.is_fortran:
            whole = self.array(name, WHOLE_ARRAY_BYTES)
            yield from (whole[start : start + count] for start in range(0, len(whole), count))
            return
        for block in self._blocks(name, count * row_bytes):
            yield np.frombuffer(block, dtype=member.dtype).reshape(-1, *member.shape[1:])

    def array(self, name: str, limit_bytes: int = _SMALL_ARRAY_BYTES) -> np.ndarray:
        """Return a whole array; ValueError if it takes more than `limit_bytes`."""
        self.check_plain(name)
        member = self.members[name]
        if member.total_bytes > limit_bytes:
            cure = "; save it in C order, which is read as a stream" if member.is_fortran else ""
            raise self.error(f"{name} takes {member.total_bytes} bytes, above the limit of {limit_bytes}{cure}")
        if not member.dtype.itemsize or not math.prod(member.shape):
            return np.zeros(member.shape, dtype=member.dtype)
        data = bytearray()
        for block in self._blocks(name, _BLOCK_BYTES):
            data += block
        flat = np.frombuffer(data, dtype=member.dtype)
        return flat.reshape(member.shape[::-1]).T if member.is_fortran else flat.reshape(member.shape)


class NpzReader(StreamFile):
    """An archive of arrays (`.npz`)."""

    def _read_headers(self) -> dict[str, Member]:
        with zipfile.ZipFile(self.path) as archive:
            infos = archive.infolist()
            if len(infos) > _MAX_MEMBERS:
                raise self.error(f"it holds {len(infos)} arrays, above the limit of {_MAX_MEMBERS}")
            headers = {}
            for info in infos:
                if info.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
                    raise self.error(f"{info.filename} is compressed in a way no .npz uses")
                with archive.open(info) as member:
                    headers[info.filename.removesuffix(".npy")] = self._read_header(info.filename, member, info.file_size)
        return headers

    @contextmanager
    def _open(self, name: str) -> Iterator[IO[bytes]]:
        with zipfile.ZipFile(self.path) as archive, archive.open(f"{name}.npy") as member:
            yield member


class NpyReader(StreamFile):
    """One array without a name (`.npy`), which is called by the stem of its file."""

    def _read_headers(self) -> dict[str, Member]:
        with open(self.path, "rb") as file:
            return {self.path.stem: self._read_header(self.path.name, file, os.fstat(file.fileno()).st_size)}

    def _open(self, name: str) -> AbstractContextManager[IO[bytes]]:
        return open(self.path, "rb")
