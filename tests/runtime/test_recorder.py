"""`Handle.record`: what any loop has of `moesaic train`'s records."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh

from moesaic import RuntimeConfig, shard_experts
from moesaic.launch.offline.report import run_page
from moesaic.placement import Trace
from tests.helpers.ranks import run_ranks
from tests.helpers.small_net import DIM, EXPERTS, Net

STEPS, TOKENS = 3, 6


def record(rank: int, folder: Path) -> dict[str, Any]:
    torch.manual_seed(0)
    model = Net()
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    handle = shard_experts(model, mesh=mesh, config=RuntimeConfig(timeout_s=60))
    optimizer = torch.optim.AdamW(handle.parameter_groups(), lr=1e-2)
    losses, metrics = [], []
    with handle.record(folder, first_step=5, layers=True) as records:
        records.add_validation(2.0)
        for step in range(STEPS):
            loss = model(torch.randn(TOKENS, DIM)).square().mean()
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            handle.step()
            records.add(loss, lr=1e-2, **({"val_loss": 1.0} if step == 1 else {}))
            losses.append(loss.item())
            metrics.append(handle.metrics())
    with pytest.raises(ValueError, match="holds the records of another run; give a new folder"):
        handle.record(folder)
    summary = records.summary()
    return {"losses": losses, "metrics": metrics, "summary": summary and str(summary)}


def test_a_loop_of_ones_own_has_the_records_of_a_run(tmp_path: Path) -> None:
    """Numbers are means over ranks, bytes their sum; the report draws them; a second run does not overwrite them."""
    folder = tmp_path / "runs" / "x"
    zero, one = run_ranks(2, record, folder)
    first, *lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert first == {"step": 5, "val_loss": 2.0}
    assert [line["step"] for line in lines] == [6, 7, 8]
    assert [line.get("val_loss") for line in lines] == [None, 1.0, None]
    for line, *losses, mine, theirs in zip(lines, zero["losses"], one["losses"], zero["metrics"], one["metrics"], strict=True):
        assert line["loss"] == pytest.approx(sum(losses) / 2)
        assert line["lr"] == pytest.approx(1e-2)
        sent = [value for metrics in (mine, theirs) for key, value in metrics.items() if key.startswith("bytes_")]
        assert line["bytes_sent"] == sum(sent) > 0
        assert line["tokens_per_s"] == pytest.approx(2 * TOKENS / line["seconds"])
        assert mine.items() <= line.items()
        assert [layer["layer"] for layer in line["layers"]] == ["layers.0.moe", "layers.1.moe"]
    trace = Trace(folder / "trace.npz")
    assert (trace.num_steps, trace.meta.num_layers, trace.meta.num_experts, trace.meta.num_ranks) == (STEPS, 2, EXPERTS, 2)
    assert all((loads_LRE.sum(axis=2) == 2 * TOKENS).all() for loads_LRE in trace.steps())
    assert "validation loss        2.000 -> 1.000\n" in zero["summary"]
    assert json.loads((folder / "summary.json").read_text())["steps"] == STEPS
    assert one["summary"] is None
    page = run_page(folder)
    assert "run x" in page and "Routing by layer" in page
