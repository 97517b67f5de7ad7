"""Options that moved to `RuntimeConfig.debug`, or are gone: their old names work for one release, with a warning.

With the release after, this file goes, and with it its three uses: the decorator in config.py, `_renamed` in launch/config.py and
`warnings_as_lines` in launch/train.py.
"""

import functools
import warnings
from collections.abc import Iterable
from dataclasses import fields, replace
from typing import Any, TypeVar, cast

_Config = TypeVar("_Config")

MOVED = (
    "split",
    "predictor",
    "overlap_s",
    "overlap",
    "calibrate",
    "schedule",
    "token_route",
    "reduce_wire",
    "rehome_effort",
)


GONE = ("reuse_copies", "row_parts")
"""Options that have no effect any more: what they saved was below 0.3 % of a step, see docs/benchmarks.md."""


class MovedOptionWarning(DeprecationWarning):
    """An option was given or read by its old name."""


def warn_of_moved(names: Iterable[str], stacklevel: int) -> None:
    """One warning that gives the new name of every option; `stacklevel` counts from the caller of this function."""
    pairs = ", ".join(f"runtime.{name} is now runtime.debug.{name}" for name in names)
    warnings.warn(f"{pairs}; old names work for one more release", MovedOptionWarning, stacklevel=stacklevel + 1)


def warn_of_gone(names: Iterable[str], stacklevel: int) -> None:
    """One warning for options that have no effect."""
    gone = ", ".join(f"runtime.{name}" for name in names)
    message = f"{gone}: no effect any more, leave it out; old names work for one more release"
    warnings.warn(message, MovedOptionWarning, stacklevel=stacklevel + 1)


def takes_moved_options(kind: type[_Config]) -> type[_Config]:
    """Class decorator of `RuntimeConfig`: old names are taken as arguments and can be read as attributes."""
    defaults = {field.name: field.default for field in fields(kind)}  # type: ignore[arg-type]
    init, default = kind.__init__, cast(Any, defaults["debug"])

    @functools.wraps(init)
    def init_with_old_names(self: _Config, *args: Any, **values: Any) -> None:
        gone = [name for name in GONE if values.pop(name, None) is not None]
        if gone:
            warn_of_gone(gone, stacklevel=2)
        moved = {name: values.pop(name) for name in MOVED if name in values}
        if moved:
            # Every field is given by dataclasses.replace alone, whose `debug` is that of the value it starts from.
            is_replace = values.keys() >= defaults.keys()
            if "debug" in values and not is_replace:
                name = next(iter(moved))
                raise ValueError(f"runtime.{name} and runtime.debug are both given; give DebugConfig({name}=...) alone")
            warn_of_moved(moved, stacklevel=3 if is_replace else 2)
            values["debug"] = replace(values.get("debug", default), **moved)
        init(self, *args, **values)

    kind.__init__ = init_with_old_names  # type: ignore[method-assign, assignment]
    for name in MOVED:
        setattr(kind, name, property(functools.partial(_read, name)))
    return kind


def _read(name: str, config: Any) -> Any:
    warn_of_moved([name], stacklevel=2)
    return getattr(config.debug, name)
