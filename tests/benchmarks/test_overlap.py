"""The overlap benchmark end to end at a tiny size: all modes train alike, and the profiles are where they were asked for."""

from pathlib import Path

from moesaic.benchmarks.overlap import MODES, OverlapCase, run


def test_modes_side_by_side(tmp_path: Path) -> None:
    case = OverlapCase(
        nodes=1,
        ranks_per_node=2,
        link_mbit=200.0,
        layers=2,
        hidden=8,
        ffn=8,
        shared_ffn=8,
        heads=2,
        experts=4,
        top_k=1,
        tokens=16,
        slots=1,
        rounds=1,
    )
    rows = run(case, tmp_path)
    assert [row["mode"] for row in rows] == list(MODES)
    for row in rows:
        assert row["exposed_s"] <= row["exposed_gather_s"] + row["exposed_reduce_s"] + 1e-9
        assert row["exposed_tokens_s_min"] <= row["exposed_tokens_s"] <= row["exposed_tokens_s_max"]
        assert row["step_s_min"] <= row["step_s"] <= row["step_s_max"]
    assert rows[-1]["ratio_to_no_overlap"] == rows[-1]["ratio_tokens"] == 1.0
    names = {f"{mode}-rank-{rank}.json" for mode in ("overlap", "no-overlap") for rank in range(2)}
    assert {path.name for path in tmp_path.iterdir()} == names
