"""Confidence intervals of medians, which benchmarks print."""

import numpy as np
import pytest

from moesaic.benchmarks.records import median_interval


@pytest.mark.parametrize("num_values,first,last", [(1, 0, 0), (5, 0, 4), (6, 0, 5), (9, 1, 7), (15, 3, 11), (30, 9, 20)])
def test_median_interval_is_the_published_one(num_values: int, first: int, last: int) -> None:
    """The ranks of tables of binomial intervals, in whatever order the values come."""
    values = np.random.default_rng(0).permutation(num_values).tolist()
    assert median_interval(values) == (first, last)


def test_median_interval_covers_the_median() -> None:
    """At least 95 of 100 intervals of a skewed law hold its median, and hardly more than the law's steps allow."""
    draws = np.random.default_rng(1).exponential(size=(2000, 15))
    hits = [low <= np.log(2) <= high for low, high in map(median_interval, draws.tolist())]
    assert 0.95 <= np.mean(hits) <= 0.975
