"""Which files of the package compiled code depends on, and their digest.

Machine code holds what its function called and which constants it read when it was compiled. All of that comes from the file the
function is written in and from what that file imports, all the way down. An import inside a function has no part in it.

Example: quota_numba.py has `from ..cost import seconds_of`, cost.py has `from .values import Problem`, and split_numba.py imports
neither. A change of values.py changes the digests of all but split_numba.py's.
"""

from __future__ import annotations

import ast
import hashlib
from collections.abc import Iterator
from functools import cache
from pathlib import Path

from .clock import IMPORTED_S

PACKAGE = Path(__file__).parent.parent
_NAME = __name__.partition(".")[0]
# File systems may date a change so much too early.
_TICK_S = 0.01


def digest_of(source: Path) -> str | None:
    """A digest of all the sources that code compiled from `source` depends on; None where it is not known what was imported.

    That is so if a file cannot be read, or changed after the package was imported, which may have brought it as it was before.
    """
    digest = hashlib.sha256()
    try:
        for path in sources_of(source):
            content = _content(path)
            if content is None:
                return None
            digest.update(f"{path.relative_to(PACKAGE)} {len(content)}\n".encode() + content)
    except OSError:
        return None
    return digest.hexdigest()


def sources_of(source: Path) -> tuple[Path, ...]:
    """The file itself and all files of the package that it imports when it is imported, sorted."""
    found, waiting = {source}, [source]
    while waiting:
        more = _imported_by(waiting.pop()) - found
        found |= more
        waiting += more
    return tuple(sorted(found))


@cache
def _content(path: Path) -> bytes | None:
    """The bytes of a file; None if it changed after the package was imported."""
    changed = path.stat()
    return None if max(changed.st_mtime, changed.st_ctime) > IMPORTED_S - _TICK_S else path.read_bytes()


@cache
def _imported_by(path: Path) -> frozenset[Path]:
    """The files of the package that a file names in imports."""
    found = set()
    package = path.relative_to(PACKAGE).parts[:-1]
    for node in _at_import(ast.parse(path.read_bytes()).body):
        if isinstance(node, ast.Import):
            names = [alias.name.split(".") for alias in node.names]
            found |= {_file_of(name[1:]) for name in names if name[0] == _NAME}
        elif isinstance(node, ast.ImportFrom):
            module = node.module.split(".") if node.module else []
            if node.level:
                base = [*package[: len(package) - node.level + 1], *module]
            elif module[0] == _NAME:
                base = module[1:]
            else:
                continue
            # A name is a module of that package, or something in it.
            found |= {_file_of([*base, alias.name]) or _file_of(base) for alias in node.names}
    return frozenset(path for path in found if path is not None)


def _at_import(body: list[ast.stmt]) -> Iterator[ast.stmt]:
    """The statements that an import of the module runs."""
    for node in body:
        yield node
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            yield from _at_import(node.orelse)
        elif not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            for name in ("body", "orelse", "finalbody"):
                yield from _at_import(getattr(node, name, []))
            for handler in getattr(node, "handlers", []):
                yield from _at_import(handler.body)


def _file_of(module: list[str]) -> Path | None:
    """The file of a module of the package, by its name in parts; None if there is none."""
    path = PACKAGE.joinpath(*module)
    for file in (path / "__init__.py", path.with_name(f"{path.name}.py")):
        if file.is_file():
            return file
    return None
