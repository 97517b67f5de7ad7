"""The loops of Hugging Face with a sharded model: the scripts of `examples/`, at several world sizes, against stock ones."""

import os
import runpy
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from accelerate.state import AcceleratorState, GradientState
from transformers import MixtralForCausalLM

import moesaic
import moesaic.transformers
from tests.helpers.ranks import run_ranks

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"
IDS = torch.arange(3, 51).view(4, 12)


@dataclass(frozen=True)
class Run:
    """What a script did, as rank 0 has it."""

    losses: list[float]
    eval_loss: float
    """In the end, without the router losses: Trainer counts those of an evaluation once for every rank."""
    logits: torch.Tensor


def run_example(rank: int, world_size: int, script: str, folder: Path, *arguments: str, stock: bool = False) -> Run:
    """Run a script in `folder` as torchrun would; `stock`: without moesaic, which is the dumbest code that means the same."""
    folder.mkdir(exist_ok=True, parents=True)
    environment = dict(
        RANK=rank, LOCAL_RANK=rank, WORLD_SIZE=world_size, LOCAL_WORLD_SIZE=world_size, MASTER_ADDR="localhost", MASTER_PORT=1
    )
    replaced = [mock.patch.dict(os.environ, {name: str(value) for name, value in environment.items()})]
    replaced += [mock.patch.object(dist, name, lambda *_: None) for name in ("init_process_group", "destroy_process_group")]
    replaced += [mock.patch("sys.argv", [script, *arguments])]
    if stock:
        replaced += [mock.patch.object(moesaic, "shard_experts", lambda model, mesh: None, create=True)]
        replaced += [mock.patch.object(moesaic.transformers, "attach", lambda loop, handle: loop)]
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()
    before = Path.cwd()
    os.chdir(folder)
    for each in replaced:
        each.start()
    try:
        made: dict[str, Any] = runpy.run_path(str(EXAMPLES / script))
        model = made["model"].eval()
        model.config.output_router_logits = False
        trainer = made["trainer"]
        losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
        eval_loss = trainer.evaluate()["eval_loss"]
        with torch.no_grad():
            return Run(losses, eval_loss, model(input_ids=IDS).logits)
    finally:
        mock.patch.stopall()
        os.chdir(before)


@pytest.mark.parametrize("script", ["hf_trainer.py"])
def test_a_loop_trains_saves_and_resumes_as_one_process_does(script: str, tmp_path: Path) -> None:
    """Twenty steps of a global batch of 8 (clipping, schedule, accumulation, checkpointing, padding, router losses) on 2 ranks
    equal those of the stock loop on one; the saved model is that one; 1, 2 and 4 ranks go on from step 10."""
    (stock,) = run_ranks(1, run_stock, script, tmp_path / "stock")
    two, _ = run_ranks(2, run_example, 2, script, tmp_path / "two")
    assert len(two.losses) == 20 and two.losses[-1] < two.losses[0] - 1
    assert two.losses == pytest.approx(stock.losses, abs=1e-4) and two.eval_loss == pytest.approx(stock.eval_loss, abs=1e-4)
    (saved,) = tmp_path.glob("two/runs/*/model")
    logits = MixtralForCausalLM.from_pretrained(saved).eval()(input_ids=IDS).logits
    torch.testing.assert_close(logits, two.logits, rtol=0, atol=1e-5)
    (checkpoint,) = tmp_path.glob("two/runs/*/checkpoint-10")
    for world_size in (1, 2, 4):
        resumed, *_ = run_ranks(world_size, run_example, world_size, script, tmp_path / f"on_{world_size}", str(checkpoint))
        assert resumed.losses[-10:] == pytest.approx(two.losses[10:], abs=1e-4), world_size
        assert resumed.eval_loss == pytest.approx(two.eval_loss, abs=1e-4), world_size


def run_stock(rank: int, script: str, folder: Path) -> Run:
    return run_example(rank, 1, script, folder, stock=True)
