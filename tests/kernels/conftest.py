from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from tests.helpers.nan import poisoned_empty


@pytest.fixture(autouse=True)
def _seeded_and_poisoned() -> Iterator[None]:
    """Every kernel test draws the same numbers and finds NaN where an op forgot to write."""
    torch.manual_seed(42)
    with poisoned_empty():
        yield
