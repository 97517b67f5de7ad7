"""A rank that fails during training: the others stop within the limit, say why, and leave nothing behind."""

from pathlib import Path

import pytest

from tests.helpers.cluster import skip_without_network
from tests.launch.failures import Case, fail

CASES = (
    Case("kill", "shm", seed=1),
    Case("stop", "c10d", seed=3, ranks_per_node=2),
    Case("cut", "hierarchical", seed=4, ranks_per_node=2),
)


@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case.how} {case.transport}")
def test_the_others_stop(case: Case, tmp_path: Path) -> None:
    if case.how == "cut":
        skip_without_network()
    fail(case, tmp_path).check()
