"""Where compiled routines are kept: a folder for each source file and digest.

Folders lie in $NUMBA_CACHE_DIR/moesaic where that is set, else in $XDG_CACHE_HOME/moesaic or ~/.cache/moesaic, and where nothing
can be written there, in a folder of this user's own beside the temporary files. One that is filled already may be read-only.
A folder's digest covers the sources, the CPU and the compiler, so what is in it never changes its meaning: versions, checkouts
and machines with other CPUs may share a home directory. Folders that nothing used for two months are deleted.
"""

from __future__ import annotations

import os
import shutil
import stat
import tempfile
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

from .lock import try_lock
from .sources import PACKAGE

_KEPT_S = 60 * 24 * 3600.0
_DAY_S = 24 * 3600.0


def folder_for(source: Path, digest: str) -> Path | None:
    """The folder of what is compiled from `source`, made if need be; None if there is no place for one."""
    module = ".".join(source.relative_to(PACKAGE).with_suffix("").parts)
    for root in _roots():
        folder = root / f"{module}-{digest[:20]}"
        if _is_filled(folder) or _can_write(folder):
            _clean(folder, module)
            return folder
    return None


def _roots() -> Iterator[Path]:
    """The places to try, in turn."""
    if os.environ.get("NUMBA_CACHE_DIR"):
        yield Path(os.environ["NUMBA_CACHE_DIR"]).absolute() / "moesaic"
    else:
        chosen = Path(os.environ.get("XDG_CACHE_HOME", ""))
        with suppress(RuntimeError):  # no home
            yield (chosen if chosen.is_absolute() else Path.home() / ".cache") / "moesaic"
    with suppress(OSError):
        own = Path(tempfile.gettempdir()) / f"moesaic-{os.getuid()}"
        own.mkdir(mode=0o700, exist_ok=True)
        # What lies there is run: no other user may be able to write there.
        status = own.lstat()
        if stat.S_ISDIR(status.st_mode) and status.st_uid == os.getuid() and not status.st_mode & 0o022:
            yield own


def _is_filled(folder: Path) -> bool:
    try:
        return any(file.suffix == ".nbi" for file in folder.iterdir()) and os.access(folder, os.R_OK | os.X_OK)
    except OSError:
        return False


def _can_write(folder: Path) -> bool:
    """Whether processes can fill the folder together, now that it was made if it was not there."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        file = os.open(folder / "lock", os.O_RDWR | os.O_CREAT, 0o600)
        try:
            try_lock(file)
        finally:
            os.close(file)
        return os.access(folder, os.W_OK | os.X_OK)
    except OSError:
        return False


def _clean(folder: Path, module: str) -> None:
    """Note that the folder is in use; delete those of the same module that nothing has used for long."""
    with suppress(OSError):
        now_s = time.time()
        if now_s - folder.stat().st_mtime > _DAY_S:
            os.utime(folder)
        for other in folder.parent.glob(f"{module}-*"):
            if now_s - other.stat().st_mtime > _KEPT_S:
                shutil.rmtree(other, ignore_errors=True)
