"""Compiled Python: numba's decorators with a cache that cannot be stale and that the processes of a machine fill together.

clock.py       Seconds spent on compiling and loading, a clock that stands still meanwhile, and when the package was imported.
lock.py        One process of a machine at a time compiles what is written in a source file.
sources.py     Which files of the package compiled code depends on, and their digest.
folders.py     Where compiled routines are kept: a folder for each source file and digest.
decorators.py  `njit` and `cfunc` of numba, whose `cache=True` keeps what was compiled where it cannot be stale.
"""

from .clock import compile_seconds, run_seconds

__all__ = ["compile_seconds", "run_seconds"]
