"""The layers' parity over every transport: the bodies of test_shard.py, with the transport chosen by configuration."""

from collections.abc import Callable, Iterator
from contextlib import nullcontext
from functools import partial
from typing import Any
from unittest.mock import patch

import pytest

from moesaic import RuntimeConfig
from tests.helpers.cluster import Cluster
from tests.helpers.compare import assert_all_close
from tests.helpers.mpi import run_mpi_ranks
from tests.helpers.ranks import run_ranks
from tests.runtime import test_shard

WORLD_SIZE = 4
Run = Callable[..., list[Any]]


def over(rank: int, transport: str, body: str, *args: Any) -> Any:
    """A body of test_shard.py on one rank, over a transport."""
    with patch.object(test_shard, "RuntimeConfig", partial(RuntimeConfig, transport=transport)):
        return getattr(test_shard, body)(rank, *args) if body else test_shard.wrapped()[1]._group.experts.name


@pytest.fixture(scope="module", params=["c10d", "shm", "mpi", "hierarchical"])
def run(request: pytest.FixtureRequest) -> Iterator[Run]:
    """Run a body on four ranks: processes, an MPI job, or two nodes of two ranks."""
    ranks: Run = partial(run_mpi_ranks if request.param == "mpi" else run_ranks, WORLD_SIZE)
    with Cluster(2, WORLD_SIZE // 2, bits_per_s=1e9) if request.param == "hierarchical" else nullcontext() as cluster:
        ranks = cluster.run if cluster else ranks
        assert ranks(over, request.param, "") == [request.param] * WORLD_SIZE
        yield partial(ranks, over, request.param)


@pytest.mark.parametrize("solver", ["static", "everywhere", "random"])
def test_gradients_and_norm_equal_one_process(run: Run, solver: str) -> None:
    """Three accumulated micro-batches under activation checkpointing: every gradient by name, and the global norm."""
    expected = test_shard.backward_on_one(3)
    for grads, norm, clipped in run("backward_on_ranks", solver, 3, True):
        assert_all_close(grads, expected[0])
        assert norm.item() == pytest.approx(expected[1].item(), rel=1e-5)
        assert_all_close(clipped, expected[2])


def test_loss_curve_is_that_of_one_process_and_repeats(run: Run) -> None:
    """Ten steps of SGD; a second run, of half as many, gives the same bits."""
    first, second = (run("train_on_ranks", "random", "sgd", steps)[0] for steps in (10, 5))
    assert first == pytest.approx(test_shard.train_on_one("sgd", 10), rel=1e-5)
    assert first[:5] == second
