"""`njit` and `cfunc` of numba, whose `cache=True` keeps what was compiled where it cannot be stale. It imports numba.

Numba's own cache drops a function when the file changes that it is written in. Its machine code also holds what it calls in other
files: ranks that ran different versions of that would plan differently, and wait for each other in vain. Here a file's compiled
code lies in a folder that is named after a digest of all the sources it depends on.

What is not there yet is compiled by one process of the machine; the others load it when it is there.

This file depends on more of numba than its manual says: that a function's cache is its `_cache` and how one is put together, and
that a function compiles itself by its own `compile`. tests/jit would notice if that changed.
"""

from __future__ import annotations

import functools
import hashlib
import inspect
import os
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import llvmlite
import llvmlite.binding
import numba
import numpy as np
from numba.core import config
from numba.core.caching import CompileResultCacheImpl, FunctionCache, NullCache
from numba.core.ccallback import CFunc
from numba.core.sigutils import normalize_signature

from .clock import CLOCK
from .folders import folder_for
from .lock import lock_of
from .sources import digest_of

# Variables of launchers: 0 in the first process of a machine, or of the run where only the last is set.
LOCAL_RANKS = ("LOCAL_RANK", "OMPI_COMM_WORLD_LOCAL_RANK", "MPI_LOCALRANKID", "SLURM_LOCALID", "RANK")


def njit(signature: Any = None, *, cache: bool = False, **options: Any) -> Callable[[Callable[..., Any]], Any]:
    """`numba.njit`: compiled now for `signature`, or without one for the types of each first call."""

    def decorate(function: Callable[..., Any]) -> Any:
        dispatcher = numba.njit(**options)(function)
        if not hasattr(dispatcher, "compile"):  # NUMBA_DISABLE_JIT
            return dispatcher
        if cache:
            dispatcher._cache = _cache_of(function)
        dispatcher.compile = _counted(dispatcher.compile)
        if signature is not None:
            dispatcher.compile(signature)
            dispatcher.disable_compile()
        return dispatcher

    return decorate


def cfunc(signature: Any, *, cache: bool = False, **options: Any) -> Callable[[Callable[..., Any]], Any]:
    """`numba.cfunc`."""

    def decorate(function: Callable[..., Any]) -> Any:
        callback: Any = CFunc(function, normalize_signature(signature), locals={}, options=options)
        if cache:
            callback._cache = _cache_of(function)
        _counted(callback.compile)()
        return callback

    return decorate


class _Frames(threading.local):
    """What this thread is compiling, callers before what they call: what each holds until it is compiled and saved."""

    def __init__(self) -> None:
        self.stack: list[ExitStack] = []


_FRAMES = _Frames()


def _counted(compile_: Callable[..., Any]) -> Callable[..., Any]:
    """The same, whose time counts, and after which the lock is given back that loading took, whatever became of it."""

    @functools.wraps(compile_)
    def count_and_unlock(*args: Any) -> Any:
        with CLOCK.running(), ExitStack() as frame:
            _FRAMES.stack.append(frame)
            frame.callback(_FRAMES.stack.pop)
            return compile_(*args)

    return count_and_unlock


def _cache_of(function: Callable[..., Any]) -> FunctionCache | NullCache:
    return _NoCache() if folder_of(inspect.getfile(function)) is None else _SharedCache(function)


@functools.cache
def folder_of(file: str) -> Path | None:
    """Where to keep what is compiled from a source file; None if it cannot be kept."""
    digest = digest_of(Path(file))
    if digest is None:
        return None
    # Numba separates its versions and CPUs inside a folder, but the files there are replaced by the others'.
    compiler = numba.__version__, llvmlite.__version__, np.__version__
    cpu = llvmlite.binding.get_host_cpu_name(), llvmlite.binding.get_host_cpu_features().flatten()
    return folder_for(Path(file), hashlib.sha256(repr((digest, compiler, cpu)).encode()).hexdigest())


class _Locator:
    """The place of a function's files, for numba. What is in the folder is never stale, so it has no stamp."""

    def __init__(self, function: Callable[..., Any], file: str, folder: Path) -> None:
        self._py_file = file
        self._line = function.__code__.co_firstlineno
        self._folder = folder

    @classmethod
    def from_function(cls, function: Callable[..., Any], file: str) -> _Locator | None:
        folder = folder_of(file)
        return None if folder is None else cls(function, file, folder)

    def get_cache_path(self) -> str:
        return str(self._folder)

    def ensure_cache_path(self) -> None:
        self._folder.mkdir(parents=True, exist_ok=True)

    def get_source_stamp(self) -> str:
        return self._folder.name

    def get_disambiguator(self) -> str:
        return str(self._line)


class _SharedCacheImpl(CompileResultCacheImpl):
    def __init__(self, function: Callable[..., Any]) -> None:
        locators: list[Any] = [_Locator]
        self._locator_classes = locators
        with _no_other_locators():
            super().__init__(function)


@contextmanager
def _no_other_locators() -> Iterator[None]:
    """The body does not see NUMBA_CACHE_LOCATOR_CLASSES, whose folders may hold stale code."""
    settings, name = vars(config), "CACHE_LOCATOR_CLASSES"
    chosen = settings.get(name)  # older versions have none
    if chosen:
        settings[name] = ""
    try:
        yield
    finally:
        if chosen:
            settings[name] = chosen


class _SharedCache(FunctionCache):
    """The cache of one function; what is not in it is locked, for this process to compile and save it."""

    _impl_class = _SharedCacheImpl

    def load_overload(self, sig: Any, target_context: Any) -> Any:
        """What was compiled for a signature; None, and a lock until this thread's frame ends, if it is not there."""
        found = self._load(sig, target_context)
        if found is None:
            _announce(f"{Path(self.cache_path).parent} keeps them")
            _FRAMES.stack[-1].enter_context(lock_of(Path(self.cache_path)))
            found = self._load(sig, target_context)
        return found

    def _load(self, sig: Any, target_context: Any) -> Any:
        try:
            return super().load_overload(sig, target_context)
        except Exception:  # whatever pickle raises of a file that a full disk or a crash cut short
            self._try(self.flush)
            return None

    def save_overload(self, sig: Any, data: Any) -> None:
        """Keep what was compiled, where that works: a full disk stops no run."""
        self._try(super().save_overload, sig, data)

    def _try(self, action: Callable[..., None], *args: Any) -> None:
        try:
            action(*args)
        except OSError as error:
            folder = Path(self.cache_path).parent
            _say_once("keep", f"cannot keep compiled routines in {folder} ({error.strerror}): the next run compiles them anew")


class _NoCache(NullCache):
    """No cache: no folder can be written, or a source file has changed since it was imported."""

    def load_overload(self, sig: Any, target_context: Any) -> None:
        _announce("nothing keeps them, as no folder can be written (see NUMBA_CACHE_DIR), or sources changed after their import")


def _announce(keeping: str) -> None:
    """Say, once on a machine, what takes so long."""
    local_rank = next((os.environ[name] for name in LOCAL_RANKS if os.environ.get(name)), "0")
    if local_rank == "0":
        _say_once("compile", f"compiling routines, a minute or two; {keeping}, `moesaic doctor --warm` does it ahead of a run")


_SAID: set[str] = set()


def _say_once(what: str, line: str) -> None:
    if what not in _SAID:
        _SAID.add(what)
        print(f"moesaic: {line}", file=sys.stderr, flush=True)
