"""A trace forced through the routers: the run's loads are the trace's, and what cannot be replayed is one line."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.checkpoint import checkpoint

from moesaic import MoELayer
from moesaic.launch.run.replay import Replay, ids_of, open_replay
from moesaic.placement import Trace, TraceMeta
from moesaic.placement.traces.format import write_trace
from moesaic.placement.traces.synth import SynthSpec, synthesize
from tests.launch.ranks import metrics_of, train_tiny

KEYS = {*("solver", "moved", "objective", "bound", "gap", "seconds", "saved_s_predicted", "move_s", "reason")}
META = TraceMeta(num_layers=2, num_experts=8, top_k=2, num_ranks=2, dim=16, ffn_dim=16)


def drifting(path: Path, steps: int, tokens: int, meta: TraceMeta = META) -> np.ndarray:
    spec = SynthSpec(meta=meta, kind="drifting", num_steps=steps, tokens_per_rank=tokens, skew=1.0, drift=0.2)
    loads_SLRE = np.stack(list(synthesize(spec)))
    write_trace(path, meta, loads_SLRE)
    return loads_SLRE


@settings(deadline=None)
@given(data=st.data(), num_experts=st.integers(1, 9), num_tokens=st.integers(0, 12), seed=st.integers(0, 99))
def test_ids_have_the_load_and_no_token_chooses_twice(data: st.DataObject, num_experts: int, num_tokens: int, seed: int) -> None:
    """Loads that come from some routing, the empty one included."""
    top_k = data.draw(st.integers(1, num_experts))
    rng = np.random.default_rng(seed)
    routing = [rng.permutation(num_experts)[:top_k] if rng.random() < 0.5 else np.arange(top_k) for _ in range(num_tokens)]
    counts_E = np.bincount(np.array(routing, dtype=np.int64).ravel(), minlength=num_experts)
    ids_TK = ids_of(counts_E, top_k, seed=seed)
    assert ids_TK.shape == (num_tokens, top_k)
    assert np.array_equal(np.bincount(ids_TK.flatten().numpy(), minlength=num_experts), counts_E)
    assert all(len(set(row)) == top_k for row in ids_TK.tolist())
    assert torch.equal(ids_TK, ids_of(counts_E, top_k, seed=seed))


def test_micro_batches_evaluation_and_recomputation(tmp_path: Path) -> None:
    """Two micro-batches make up a step; evaluation chooses for itself; a recomputed layer repeats its choice."""
    loads_SLRE = drifting(tmp_path / "t.npz", 3, 10)
    torch.manual_seed(0)
    layers = [MoELayer(16, 16, 8, 2) for _ in range(2)]
    replay = Replay(Trace(tmp_path / "t.npz"), layers, 1, first_step=1)
    x = torch.randn(10, 16, requires_grad=True)
    for step in (1, 2):
        replay.begin_step()
        counts = np.zeros((2, 8), dtype=np.int64)
        for part in x.split([4, 6]):
            for layer in layers:
                checkpoint(layer, part, use_reentrant=False).sum().backward()
                layer.eval()
                own_E = layer.router(part).counts_E(8)
                layer.train()
                assert torch.equal(own_E, torch.bincount(layer.router.logits(part).topk(2).indices.flatten(), minlength=8))
        for index, layer in enumerate(layers):
            load_RE = layer.runtime.counters.load_RE
            assert load_RE is not None
            counts[index] = load_RE[0]
            layer.runtime.counters.reset()
        assert np.array_equal(counts, loads_SLRE[step, :, 1])


def test_what_cannot_be_replayed_is_one_line(tmp_path: Path) -> None:
    path = tmp_path / "t.npz"
    loads_SLRE = drifting(path, 3, 10)

    def refusal(meta: TraceMeta = META, num_tokens: int = 10, num_steps: int = 3) -> str:
        with pytest.raises(ValueError) as refused:
            open_replay(path, meta, num_tokens=num_tokens, num_steps=num_steps)
        assert "\n" not in str(refused.value)
        return str(refused.value)

    assert open_replay(path, META, num_tokens=10, num_steps=2).num_steps == 3
    three = TraceMeta(num_layers=3, num_experts=8, top_k=2, num_ranks=2)
    assert f"{path} has num_layers 2, this run 3; set model.num_layers to 2" in refusal(three)
    four = TraceMeta(num_layers=2, num_experts=8, top_k=2, num_ranks=4)
    assert "num_ranks 2, this run 4; set the number of ranks to 2" in refusal(four)
    assert "10 tokens on rank 0 in step 0, this run 12; set train.batch_size and data.seq_len" in refusal(num_tokens=12)
    assert "has 3 steps, this run 4; set train.steps" in refusal(num_steps=4)
    loads_SLRE[1, :, 1] *= 2
    write_trace(path, META, loads_SLRE)
    assert "20 tokens on rank 1 in step 1, this run 10" in refusal()
    loads_SLRE[1, :, 1] = np.array([20, 0, 0, 0, 0, 0, 0, 0])
    write_trace(path, META, loads_SLRE)
    assert "an expert that 20 of 10 tokens of a rank chose in step 1" in refusal()
    write_trace(path, replace(META, dropped=True), loads_SLRE, tokens_SR=np.full((3, 2), 10))
    assert f"{path} lacks assignments that were dropped; every token chooses top-k experts" in refusal()
    path.write_bytes(b"no trace")
    refusal()
    path.unlink()
    refusal()


def test_a_drifting_run_stays_balanced_and_says_why_experts_move(tmp_path: Path) -> None:
    """Two processes: the recorded loads are the replayed ones, drops and all; every decision about owners is in the log with both
    of its numbers."""
    (tmp_path / "text.txt").write_text("router expert slot bank owner\n" * 500)
    loads_SLRE = drifting(tmp_path / "t.npz", 13, 96)
    values = ["model.num_experts=8", f"train.replay={tmp_path}/t.npz", "train.steps=13", "train.eval_every=0"]
    values += ["train.micro_batches=2", "model.capacity_factor=1.2", "run.metrics=detailed"]
    values += ["migration.every=4", "migration.solver=milp", "migration.time_limit_s=0.2", "runtime.debug.migration_effort=0.05"]
    first, _ = train_tiny(2, values, tmp_path)
    run = tmp_path / "runs" / "demo"
    assert np.array_equal(np.stack(list(Trace(run / "trace.npz").steps())), loads_SLRE)
    rows = metrics_of(run)[1:]
    decisions = [(row["step"], decision) for row in rows for decision in row.get("migrations", ())]  # type: ignore[attr-defined]
    for step, decision in decisions:
        assert step >= 6  # asked after step 4 at the earliest
        assert set(decision) == KEYS
        assert decision["solver"] in ("milp", "joint") and 0 <= decision["bound"] <= decision["objective"]
        assert decision["reason"] in first.stdout
        assert " s over 4 steps and take " in decision["reason"] and "would save" in decision["reason"]
        assert rows[int(step) - 1]["moved_experts"] == decision["moved"]
    assert (run / "plan.json").exists() == any(decision["moved"] for _, decision in decisions)
    layers = [row["layers"] for row in rows]
    assert [[layer["layer"] for layer in each] for each in layers] == [["blocks.0.moe", "blocks.1.moe"]] * 13  # type: ignore[attr-defined]
    assert 0 < rows[5]["prediction_error"] < 1
    assert all(0 < row["dropped_share"] < 0.5 for row in rows)
    assert 0 <= rows[5]["solve_s"] <= rows[5]["plan_s"]
