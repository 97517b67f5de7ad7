"""Options that have new names, or are gone: their old names work for one release, with a warning.

With the release after, this file goes, and with it its uses: the decorators in config.py, `_renamed` in launch/config.py and
`warnings_as_lines` in launch/train.py.
"""

import functools
import operator
import warnings
from collections.abc import Callable, Iterable, Mapping
from dataclasses import fields, replace
from typing import Any, TypeVar

_Config = TypeVar("_Config")

_MOVED_TO_DEBUG = (
    "split",
    "predictor",
    "overlap_s",
    "overlap",
    "calibrate",
    "schedule",
    "token_route",
    "reduce_wire",
)
MOVED: Mapping[str, str] = {
    **{f"runtime.{name}": f"runtime.debug.{name}" for name in _MOVED_TO_DEBUG},
    "runtime.rehome_effort": "runtime.debug.migration_effort",
    "runtime.debug.rehome_effort": "runtime.debug.migration_effort",
    "runtime.rehome_every": "runtime.migration.every",
}
"""Old key to new key, as a TOML file has them."""

GONE = ("runtime.reuse_copies", "runtime.row_parts", "runtime.debug.row_parts")
"""Keys of options that have no effect any more."""


class MovedOptionWarning(DeprecationWarning):
    """An option was given or read by its old name."""


def warn_of_moved(names: Iterable[str], stacklevel: int) -> None:
    """One warning that gives the new key for every old one; `stacklevel` counts from the caller of this function."""
    pairs = ", ".join(f"{name} is now {MOVED[name]}" for name in names)
    warnings.warn(f"{pairs}; old names work for one more release", MovedOptionWarning, stacklevel=stacklevel + 1)


def warn_of_gone(names: Iterable[str], stacklevel: int) -> None:
    """One warning for options that have no effect."""
    message = f"{', '.join(names)}: no effect any more, leave it out; old names work for one more release"
    warnings.warn(message, MovedOptionWarning, stacklevel=stacklevel + 1)


def takes_moved_options(section: str) -> Callable[[type[_Config]], type[_Config]]:
    """Class decorator of a section's dataclass: old names are taken as arguments and can be read as attributes.

    A new name is a field of the class itself, or of a dataclass that a field of it holds.
    """
    prefix = f"{section}."
    moved = {
        old.removeprefix(prefix): new.removeprefix(prefix) for old, new in MOVED.items() if old.rpartition(".")[0] == section
    }
    gone = [key.removeprefix(prefix) for key in GONE if key.rpartition(".")[0] == section]

    def decorate(kind: type[_Config]) -> type[_Config]:
        init, defaults = kind.__init__, {field.name: field.default for field in fields(kind)}  # type: ignore[arg-type]

        @functools.wraps(init)
        def init_with_old_names(self: _Config, *args: Any, **values: Any) -> None:
            ignored = [prefix + name for name in gone if name in values]
            if ignored:
                warn_of_gone(ignored, stacklevel=2)
            values = {name: value for name, value in values.items() if name not in gone}
            given = {name: values.pop(name) for name in moved if name in values}
            if given:
                # Every field is given by dataclasses.replace alone, whose values are those that it starts from.
                is_replace = values.keys() >= defaults.keys()
                for old in () if is_replace else given:
                    field, _, inner = moved[old].partition(".")
                    if field in values:
                        cure = f"{type(defaults[field]).__name__}({inner}=...)" if inner else field
                        raise ValueError(f"{prefix}{old} and {prefix}{field} are both given; give {cure} alone")
                warn_of_moved((prefix + old for old in given), stacklevel=3 if is_replace else 2)
                for old, value in given.items():
                    field, _, inner = moved[old].partition(".")
                    values[field] = replace(values.get(field, defaults[field]), **{inner: value}) if inner else value
            init(self, *args, **values)

        kind.__init__ = init_with_old_names  # type: ignore[method-assign, assignment]
        for old, new in moved.items():
            setattr(kind, old, property(functools.partial(_read, prefix + old, new)))
        return kind

    return decorate


def _read(old: str, new: str, config: Any) -> Any:
    warn_of_moved([old], stacklevel=2)
    return operator.attrgetter(new)(config)
