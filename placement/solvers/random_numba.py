"""Random integers for compiled searches, identical on every machine. Import this module lazily: it imports numba."""
# mypy: disable-error-code=no-untyped-def
# Numba infers the types of compiled functions.

from __future__ import annotations

import numpy as np

from ...jit.decorators import njit


@njit(cache=True)
def draw(state_1, limit):
    """Return the next random integer below `limit`: 64-bit xorshift (Marsaglia 2003), its upper bits."""
    x = state_1[0]
    x ^= x << np.uint64(13)
    x ^= x >> np.uint64(7)
    x ^= x << np.uint64(17)
    state_1[0] = x
    return np.int64((x >> np.uint64(33)) % np.uint64(limit))
