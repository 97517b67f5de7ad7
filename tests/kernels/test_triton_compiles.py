from __future__ import annotations

import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from moesaic.kernels import (
    grouped_gemm_tiles,
    grouped_gemm_triton,
    histogram_triton,
    permute_triton,
    split_tokens_triton,
    swiglu_triton,
    topk_gate_triton,
)

H100 = GPUTarget("cuda", 90, 32)
SHARED_BYTES_H100 = 232_448  # what one block may use


@dataclass(frozen=True)
class Case:
    """One kernel as its launcher calls it: pointer and float types by name (all else int32), constants, options.

    Arguments named in `aligned` are divisible by 16, as the launcher's are for ordinary model shapes.
    """

    kernel: Any
    types: dict[str, str]
    constants: dict[str, Any]
    aligned: str = ""
    num_warps: int = 8
    num_stages: int = 3
    instructions: dict[str, int] = field(default_factory=dict)  # instruction -> fewest occurrences in the PTX


def product_cases() -> dict[str, Case]:
    """Every tile in each of the three products by TMA, the largest and the smallest also through pointers, as all of fp32.

    bf16 tiles from 64 rows on must reach the tensor cores.
    """
    cases = {}
    half, tiny = grouped_gemm_tiles.HALF_TILES, grouped_gemm_tiles.TINY_HALF_TILES
    float_tiles = grouped_gemm_tiles.FLOAT_TILES + grouped_gemm_tiles.TINY_FLOAT_TILES
    for dtype, use_tma, tiles in (("bf16", True, half + tiny), ("bf16", False, half[:1] + tiny), ("fp32", False, float_tiles)):
        for tile in tiles:
            instructions = {"wgmma.mma_async": 1} if tile in half else {}
            if dtype == "bf16":
                instructions |= {"cp.async.bulk.tensor" if use_tma else "cp.async.cg.shared.global": 1}
            options = {"num_warps": tile.num_warps, "num_stages": tile.num_stages, "instructions": instructions}
            constants = {
                "BLOCK_M": tile.block_m,
                "BLOCK_N": tile.block_n,
                "BLOCK_K": tile.block_k,
                "GROUP_M": 8,
                "ALIGNMENT": 16,
                "PRECISION": "ieee",
                "USE_TMA": use_tma,
            }
            name = f"{dtype} {tile.block_m}x{tile.block_n} {'tma' if use_tma else 'pointers'}"
            pointers = {"a_ptr": f"*{dtype}", "tiles_ptr": "*i64", "addresses_ptr": "*i64", "out_ptr": f"*{dtype}"}
            aligned = "a_ptr out_ptr width_n width_k stride_a stride_out "
            for op, is_k_contiguous in (("forward", True), ("dgrad", False)):
                one, other = ("stride_b_k", "stride_b_n") if is_k_contiguous else ("stride_b_n", "stride_b_k")
                cases[f"{op} {name}"] = Case(
                    grouped_gemm_triton._grouped_gemm_kernel,
                    pointers,
                    constants | {one: 1, "IS_K_CONTIGUOUS": is_k_contiguous},
                    aligned + other,
                    **options,
                )
            cases[f"wgrad {name}"] = Case(
                grouped_gemm_triton._grouped_wgrad_kernel,
                {"dy_ptr": f"*{dtype}", "x_ptr": f"*{dtype}", "groups_ptr": "*i64", "addresses_ptr": "*i64", "alpha": "fp32"},
                constants | {"stride_grad_i": 1},
                "dy_ptr x_ptr width_o width_i stride_dy stride_x stride_grad_o",
                **options,
            )
    return cases


def row_cases() -> dict[str, Case]:
    """The memory-bound kernels, in bf16."""
    wide_load = {"ld.global.v4": 1}
    swiglu_types = {"gate_up_ptr": "*bf16", "weights_ptr": "*fp32", "h_ptr": "*bf16"}
    swiglu_constants = {"HAS_WEIGHTS": True, "COMPUTE": triton.language.float32}
    gate_types = {"logits_ptr": "*fp32", "ids_ptr": "*i64"}
    gate_constants = {"TOP_K": 8, "IS_SOFTMAX": True, "NORMALIZE": True, "BLOCK_T": 4, "BLOCK_E": 256}
    return {
        "gather": Case(
            permute_triton._gather_rows_kernel,
            {"x_ptr": "*bf16", "beside_ptr": "*bf16", "ids_ptr": "*i64", "out_ptr": "*bf16"},
            {"BLOCK_N": 1, "BLOCK_D": 4096},
            "x_ptr beside_ptr out_ptr width stride_x stride_beside stride_out",
            instructions=wide_load,
        ),
        "sum": Case(
            permute_triton._sum_rows_kernel,
            {"rows_ptr": "*bf16", "beside_ptr": "*bf16", "indices_ptr": "*i32", "offsets_ptr": "*i32", "out_ptr": "*bf16"},
            {"ACCUMULATE": triton.language.float32, "BLOCK_D": 4096},
            "rows_ptr beside_ptr out_ptr width stride_rows stride_beside stride_out",
            instructions=wide_load,
        ),
        "swiglu": Case(
            swiglu_triton._swiglu_kernel,
            swiglu_types,
            swiglu_constants | {"BLOCK_N": 1, "BLOCK_F": 4096},
            "gate_up_ptr h_ptr width stride_gate_up stride_h",
            instructions=wide_load,
        ),
        "swiglu backward": Case(
            swiglu_triton._swiglu_backward_kernel,
            swiglu_types | {"dh_ptr": "*bf16", "dgate_up_ptr": "*bf16", "dweights_ptr": "*fp32"},
            swiglu_constants | {"BLOCK_N": 1, "BLOCK_F": 2048},
            "dh_ptr gate_up_ptr dgate_up_ptr h_ptr width stride_dh stride_gate_up stride_dgate_up stride_h",
            instructions=wide_load,
        ),
        "gate": Case(
            topk_gate_triton._topk_gate_kernel,
            gate_types | {"bias_ptr": "*fp32", "weights_ptr": "*fp32", "lse_ptr": "*fp32", "load_ptr": "*i64"},
            gate_constants | {"HAS_BIAS": True, "HAS_IDS": False, "HAS_LSE": True, "BLOCK_K": 8},
            num_warps=4,
        ),
        "gate backward": Case(
            topk_gate_triton._topk_gate_backward_kernel,
            gate_types | {"dweights_ptr": "*fp32", "dlse_ptr": "*fp32", "dlogits_ptr": "*fp32"},
            gate_constants | {"HAS_DLSE": True},
            num_warps=4,
        ),
        "histogram": Case(
            histogram_triton._count_kernel,
            {"ids_ptr": "*i64", "counts_ptr": "*i32"},
            {"BLOCK_N": 128, "BLOCK_B": 64},
            num_warps=4,
        ),
        "split place": Case(
            split_tokens_triton._place_kernel,
            {"ids_ptr": "*i64", "before_ptr": "*i32", "piece_end_ptr": "*i32", "shift_ptr": "*i32", "order_ptr": "*i64"},
            {"BLOCK_N": 128, "LOG_RANKS": 7},
            num_warps=4,
        ),
    }


CASES = product_cases() | row_cases()


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_compiles_for_an_h100(case: Case, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The whole way to machine code, which needs no GPU: fits shared memory, loads wide, uses the tensor cores."""
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    names = case.kernel.arg_names
    signature = {name: "constexpr" if name in case.constants else case.types.get(name, "i32") for name in names}
    aligned = {(names.index(name),): [["tt.divisibility", 16]] for name in case.aligned.split()}
    options = {"num_warps": case.num_warps, "num_stages": case.num_stages}
    compiled = triton.compile(ASTSource(case.kernel, signature, case.constants, aligned), target=H100, options=options)
    assert compiled.metadata.shared <= SHARED_BYTES_H100
    for instruction, fewest in case.instructions.items():
        assert len(re.findall(re.escape(instruction), compiled.asm["ptx"])) >= fewest, instruction
    assert compiled.asm["cubin"]
