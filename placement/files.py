"""Atomic file replacement, one-line errors of the file system, and file digests."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

_BLOCK_BYTES = 1 << 20


@contextmanager
def replacing(path: str | os.PathLike[str]) -> Iterator[IO[bytes]]:
    """Open a binary file that replaces `path` when the block ends without an exception; after one the old file is unchanged."""
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def replace_text(path: str | os.PathLike[str], text: str) -> None:
    """Write `text` as UTF-8 to `path`, atomically."""
    with replacing(path) as file:
        file.write(text.encode("utf-8"))


def writable(path: str | None) -> str | None:
    """Return `path` if a file can be created there; - stands for standard output. Called before long work whose results go there.

    Raises:
        ValueError: no file can be created there.
    """
    if path is not None and path != "-":
        folder = Path(path).parent
        if not folder.is_dir() or not os.access(folder, os.W_OK) or Path(path).is_dir():
            raise ValueError(f"cannot write {path}: give a file in a folder that is there and that you may write to")
    return path


@contextmanager
def clear_errors() -> Iterator[None]:
    """Turn an `OSError` of the block into a `ValueError` of one line."""
    try:
        yield
    except OSError as error:
        where = f" {error.filename}" if error.filename else ""
        raise ValueError(f"cannot write or read{where}: {error.strerror or error}") from None


def digest_of(path: str | os.PathLike[str]) -> str:
    """Return the SHA-256 of a file, as "sha256:" and hex digits; read in blocks."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(_BLOCK_BYTES):
            digest.update(block)
    return f"sha256:{digest.hexdigest()}"
