from __future__ import annotations

from dataclasses import replace
from functools import partial

import pytest
import torch

from moesaic.benchmarks import kernels
from moesaic.benchmarks.kernel_cases import Case, Shape, ffn_case, layer_case, product_cases, zipf_sizes
from moesaic.benchmarks.kernel_memory_cases import in_turn, memory_cases, router_cases
from moesaic.benchmarks.kernels import measure, verdict
from moesaic.launch.entry import run_command

KEYS = {"op", "shape", "dtype", "device", "achieved", "ceiling", "unit", "ratio_to_ceiling", "target", "ratio_to_torch"}
SHAPE = Shape("tiny", D=16, F=24, group_sizes=(5, 0, 11), experts=4, top_k=2)


def test_every_case_passes_its_gate_and_fills_a_row() -> None:
    cases = [ffn_case(SHAPE, torch.float32, "cpu"), layer_case(SHAPE, torch.float32, "cpu"), *router_cases("cpu")]
    for make in (product_cases, memory_cases):
        cases += make(SHAPE, torch.float32, "cpu")
    for case in cases:
        row = measure(case, "cpu", rounds=1)
        assert row.keys() >= KEYS, case.op
        assert row["achieved"] > 0, case.op
        assert row["ratio_to_ceiling"] > 0, case.op


def test_a_wrong_result_is_not_timed_and_costs_no_other_row(monkeypatch: pytest.MonkeyPatch) -> None:
    right, wrong, *_ = product_cases(SHAPE, torch.float32, "cpu")
    cases = [replace(wrong, check=lambda: 0.5, ours=lambda: pytest.fail("timed")), right]
    monkeypatch.setattr(kernels, "all_cases", lambda device, dtype, only: iter(cases))
    rows, failures = kernels.run("cpu", torch.float32, rounds=1)
    assert [row["op"] for row in rows] == ["grouped_gemm"]
    assert failures == ["grouped_gemm_dgrad at tiny: ValueError: differs from torch by 5.00e-01, allowed is 1e-04"]
    assert kernels.run("cpu", torch.float32, rounds=1, only="wgrad") == ([], [])
    assert run_command(kernels.command, ["--device", "cpu", "--rounds", "1"]) == 1


def test_the_verdict_names_what_misses_its_target() -> None:
    rows = [
        {
            "op": op,
            "shape": "demo",
            "ratio_to_ceiling": ratio,
            "target": target,
            "ratio_to_grouped_mm": high,
            "ratio_to_grouped_mm_low": low,
            "ratio_to_grouped_mm_high": high,
        }
        for op, ratio, target, low, high in (
            ("a", 0.9, 0.92, 0.98, 1.0),
            ("b", 0.92, 0.92, 0.98, 0.99),
            ("c", 0.1, None, None, None),
        )
    ]
    targets, beside = verdict(rows).split("\n")
    assert targets == "1 of 2 records with a target reach it; a at demo 0.900 < 0.92"
    assert beside == "1 of 2 records with a ratio to torch's grouped_mm are not slower; b at demo 0.980 to 0.990"


def test_operands_are_taken_in_turn() -> None:
    """Torch's way begins half a turn later, so that it does not find what ours has just read."""
    calls: list[str] = []

    def case(number: int) -> Case:
        log = lambda what: partial(calls.append, f"{what} {number}")  # noqa: E731
        return Case("op", "tiny", "float32", "GB/s", 1.0, log("ours"), log("copy"), {"way": log("torch")}, lambda: 0.0, 0.0)

    turning = in_turn([case(number) for number in range(3)])
    assert callable(turning.ceiling)
    for _ in range(4):
        turning.ours(), turning.ceiling(), turning.torch["way"]()
    assert [calls[i::3] for i in range(3)] == [
        ["ours 0", "ours 1", "ours 2", "ours 0"],
        ["copy 0", "copy 1", "copy 2", "copy 0"],
        ["torch 1", "torch 2", "torch 0", "torch 1"],
    ]


def test_only_the_shapes_asked_for_are_made(monkeypatch: pytest.MonkeyPatch) -> None:
    """A shape's tensors take seconds to fill."""
    monkeypatch.setattr(kernels, "shapes", lambda device: [SHAPE, replace(SHAPE, name="other")])
    assert {case.shape for case in kernels.all_cases("cpu", torch.float32, "swiglu at ti")} >= {"tiny"}
    assert "other" not in {case.shape for case in kernels.all_cases("cpu", torch.float32, "swiglu at ti")}
    assert "other" in {case.shape for case in kernels.all_cases("cpu", torch.float32, "swiglu")}


def test_zipf_sizes_add_up() -> None:
    assert zipf_sizes(10, 4, 0.0) == (2, 3, 3, 2)
    assert sum(zipf_sizes(8192, 8, 1.2)) == 8192
    assert zipf_sizes(8192, 8, 1.2) == tuple(sorted(zipf_sizes(8192, 8, 1.2), reverse=True))
