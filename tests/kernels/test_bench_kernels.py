from __future__ import annotations

from dataclasses import asdict, replace

import pytest
import torch

from moesaic.benchmarks.kernel_cases import (
    Shape,
    bank_cases,
    ffn_case,
    layer_case,
    product_cases,
    router_cases,
    row_cases,
    zipf_sizes,
)
from moesaic.benchmarks.kernels import measure

KEYS = {"op", "shape", "dtype", "device", "achieved", "ceiling", "unit", "ratio_to_ceiling", "ratio_to_torch"}
SHAPE = Shape("tiny", D=16, F=24, group_sizes=(5, 0, 11), experts=4, top_k=2)


def test_every_case_passes_its_gate_and_fills_a_row() -> None:
    cases = [ffn_case(SHAPE, torch.float32, "cpu"), layer_case(SHAPE, torch.float32, "cpu"), *router_cases("cpu")]
    for make in (product_cases, row_cases, bank_cases):
        cases += make(SHAPE, torch.float32, "cpu")
    for case in cases:
        row = asdict(measure(case, "cpu", rounds=1))
        assert row.keys() >= KEYS, case.op
        assert row["achieved"] > 0, case.op
        assert row["ratio_to_ceiling"] > 0, case.op


def test_a_wrong_result_is_not_timed() -> None:
    case = next(product_cases(SHAPE, torch.float32, "cpu"))
    with pytest.raises(ValueError, match=r"grouped_gemm at tiny: differs from torch by 5\.00e-01"):
        measure(replace(case, check=lambda: 0.5), "cpu", rounds=1)


def test_zipf_sizes_add_up() -> None:
    assert zipf_sizes(10, 4, 0.0) == (2, 3, 3, 2)
    assert sum(zipf_sizes(8192, 8, 1.2)) == 8192
    assert zipf_sizes(8192, 8, 1.2) == tuple(sorted(zipf_sizes(8192, 8, 1.2), reverse=True))
