"""Members of public classes that have new names: their old names work for one release, with a warning.

With the release after, this file goes, and with it the decorators that use it.
"""

import operator
import warnings
from collections.abc import Callable
from typing import Any, TypeVar

_Class = TypeVar("_Class", bound=type)


class RenamedMemberWarning(DeprecationWarning):
    """A member was used by its old name."""


def renamed_members(**new_names: str) -> Callable[[_Class], _Class]:
    """Class decorator: every old name reads and sets the member of the new name, which may be a path.

    Example: with `renamed_members(loads="telemetry.loads")`, `handle.loads()` is `handle.telemetry.loads()`.
    """

    def decorate(kind: _Class) -> _Class:
        for old, new in new_names.items():
            setattr(kind, old, _alias(f"{kind.__name__}.{old}", kind.__name__, new))
        return kind

    return decorate


def _alias(old: str, kind: str, new: str) -> property:
    path, _, name = new.rpartition(".")

    def holder_of(instance: Any) -> Any:
        warnings.warn(f"{old} is now {kind}.{new}; old names work for one more release", RenamedMemberWarning, stacklevel=3)
        return operator.attrgetter(path)(instance) if path else instance

    def read(instance: Any) -> Any:
        return getattr(holder_of(instance), name)

    def write(instance: Any, value: Any) -> None:
        setattr(holder_of(instance), name, value)

    return property(read, write)
