"""Shared parts of the value types: read-only arrays, equality by content, argument checks with one-line errors."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np

# Loads and their sums are int64. A total near this limit indicates a damaged file, not a batch of tokens.
MAX_TOTAL = 1 << 53


class ByContent:
    """Mixin for frozen dataclasses that hold arrays: equal and hashed by the bytes of their fields."""

    def content(self) -> tuple[Any, ...]:
        """Return the fields as a hashable tuple, an array as (shape, dtype, bytes)."""
        values = (getattr(self, field.name) for field in dataclasses.fields(self))  # type: ignore[arg-type]
        return tuple((v.shape, v.dtype.str, v.tobytes()) if isinstance(v, np.ndarray) else v for v in values)

    def __eq__(self, other: object) -> bool:
        if type(other) is not type(self):
            return NotImplemented
        return self is other or self.content() == other.content()

    def __hash__(self) -> int:
        return hash(self.content())


def freeze(instance: object, name: str, array: np.ndarray) -> None:
    """Store `array` under `name` in a frozen dataclass and make it read-only."""
    object.__setattr__(instance, name, read_only(array))


def read_only(array: np.ndarray) -> np.ndarray:
    """Make an array read-only, and return it."""
    array.setflags(write=False)
    return array


def as_counts(name: str, values: object, ndim: int) -> np.ndarray:
    """Return a C-contiguous int64 copy of an integer array of `ndim` dims, or raise ValueError.

    Floats are rejected: a load that is not a whole number was averaged, and the caller must choose how to round it.
    """
    array = np.asarray(values)
    if array.dtype.kind not in "iu":
        raise ValueError(f"{name} must hold integers, got {array.dtype}; round it first")
    if array.ndim != ndim or 0 in array.shape:
        raise ValueError(f"{name} must have {ndim} non-empty dims, got shape {array.shape}")
    return np.array(array, dtype=np.int64, order="C")


def check_ids(name: str, ids: np.ndarray, limit: int, of_what: str) -> None:
    """Raise ValueError unless every entry of `ids` lies in [0, limit)."""
    low, high = int(ids.min()), int(ids.max())
    if low < 0 or high >= limit:
        raise ValueError(f"{name} holds {low if low < 0 else high}, but there are {limit} {of_what}: use 0 to {limit - 1}")


def check_positive_int(name: str, value: object, minimum: int = 1) -> int:
    """Return `value` as an int of at least `minimum`, or raise ValueError."""
    if isinstance(value, bool) or not isinstance(value, int | np.integer) or value < minimum:
        raise ValueError(f"{name} must be an integer of at least {minimum}, got {value!r}")
    return int(value)


def check_seconds(name: str, value: float, *, positive: bool = False) -> float:
    """Return a rate or a time as a finite float that is >= 0 (> 0 if `positive`), or raise ValueError."""
    number = float(value)
    if not np.isfinite(number) or number < 0 or (positive and number == 0):
        raise ValueError(f"{name} must be finite and {'above 0' if positive else 'at least 0'}, got {value!r}")
    return number
