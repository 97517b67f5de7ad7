"""The loops of Hugging Face with a sharded model: the scripts of `examples/`, at several world sizes, against stock ones."""

import os
import re
import runpy
from collections.abc import Callable, Iterator
from contextlib import ExitStack, chdir, contextmanager, redirect_stdout
from dataclasses import dataclass
from io import StringIO
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState
from peft import PeftModel
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from transformers import MixtralForCausalLM, Trainer, TrainingArguments

import moesaic
import moesaic.transformers
from moesaic import MigrationConfig, RuntimeConfig, shard_experts
from moesaic.transformers import attach
from tests.helpers.families import batch_ids, make_family_model
from tests.helpers.ranks import run_ranks
from tests.runtime.test_lora import adapted

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"
IDS = torch.arange(3, 51).view(4, 12)


@dataclass(frozen=True)
class Run:
    """What a script did, as rank 0 has it."""

    losses: list[float]
    eval_loss: float | None
    """In the end, without the router losses: those of an evaluation count once for every rank, in any Trainer."""
    logits: torch.Tensor


@contextmanager
def as_torchrun(rank: int, world_size: int) -> Iterator[None]:
    """Have Accelerate take this process for one that torchrun started; printed lines go nowhere."""
    names = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE")
    environment = dict(zip(names, map(str, (rank, rank, world_size, world_size)), strict=True))
    forget_worlds()
    with mock.patch.dict(os.environ, environment, MASTER_ADDR="localhost", MASTER_PORT="1"), redirect_stdout(StringIO()):
        yield


def forget_worlds() -> None:
    """Accelerate keeps the world of the first script that a process runs."""
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()


def run_example(rank: int, world_size: int, script: str, folder: Path, *arguments: str, stock: bool = False) -> Run:
    """Run a script in `folder` as torchrun would; `stock`: without moesaic, which is the dumbest code that means the same."""
    folder.mkdir(exist_ok=True)
    with ExitStack() as stack:
        stack.enter_context(as_torchrun(rank, world_size))
        stack.enter_context(chdir(folder))
        printed = stack.enter_context(redirect_stdout(StringIO()))
        stack.enter_context(mock.patch("sys.argv", [script, *arguments]))
        for name in ("init_process_group", "destroy_process_group"):  # this rank's group outlives the script
            stack.enter_context(mock.patch.object(dist, name))
        if stock:
            stack.enter_context(mock.patch.object(moesaic, "shard_experts", leave_whole, create=True))
            stack.enter_context(mock.patch.object(moesaic.transformers, "attach", lambda loop, handle: loop))
        made: dict[str, Any] = runpy.run_path(str(EXAMPLES / script))
        trainer = made.get("trainer")
        model = getattr(made["model"], "module", made["model"]).eval()
        losses = [float(loss) for loss in re.findall(r"^loss (.*)", printed.getvalue(), re.MULTILINE)]
        if trainer is not None:
            losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
            model.config.output_router_logits = False
            trainer.aux_loss_enabled = False  # TRL's own flag
        eval_loss = trainer.evaluate()["eval_loss"] if trainer is not None else None
        with torch.no_grad():
            return Run(losses, eval_loss, model(input_ids=IDS).logits)


def leave_whole(model: nn.Module, mesh: DeviceMesh) -> SimpleNamespace:
    return SimpleNamespace(parameter_groups=model.parameters)


@pytest.mark.parametrize("script", ["hf_trainer.py", "hf_accelerate.py", "hf_sft.py"])
def test_a_loop_trains_saves_and_resumes_as_one_process_does(script: str, tmp_path: Path) -> None:
    """Twenty steps of a global batch of 8 (clipping, schedule, accumulation, checkpointing, padding, router losses) on 2 ranks
    equal those of the stock loop on one; the saved model is that one; 1, 2 and 4 ranks go on from step 10."""
    (stock,) = run_ranks(1, run_stock, script, tmp_path / "stock")
    two, _ = run_ranks(2, run_example, 2, script, tmp_path / "two")
    half = len(two.losses) // 2
    assert half in (10, 20) and two.losses[-1] < two.losses[0] - 1  # one loss for each step, or micro-batch
    assert two.losses == pytest.approx(stock.losses, abs=1e-4) and two.eval_loss == pytest.approx(stock.eval_loss, abs=1e-4)
    (saved,) = tmp_path.glob("two/runs/*/model")
    logits = MixtralForCausalLM.from_pretrained(saved).eval()(input_ids=IDS).logits
    torch.testing.assert_close(logits, two.logits, rtol=0, atol=1e-5)
    (checkpoint,) = tmp_path.glob("two/runs/*/checkpoint-10")
    for world_size in (1, 2, 4):
        resumed, *_ = run_ranks(world_size, run_example, world_size, script, tmp_path / f"on_{world_size}", str(checkpoint))
        assert resumed.losses[-half:] == pytest.approx(two.losses[half:], abs=1e-4), world_size
        assert resumed.eval_loss == pytest.approx(two.eval_loss, abs=1e-4), world_size


def run_stock(rank: int, script: str, folder: Path) -> Run:
    return run_example(rank, 1, script, folder, stock=True)


def test_options_of_a_trainer(tmp_path: Path) -> None:
    """bf16, migration, the best checkpoint at the end; DDP of the dense part; one's own optimizer, where a rank owns nothing."""
    (stock,) = run_ranks(1, train, 1, tmp_path / "stock", "stock")
    for case, world_size, tolerance in (("bf16", 2, 0.05), ("ddp", 2, 1e-4), ("own optimizer", 4, 1e-4)):
        losses, *_ = run_ranks(world_size, train, world_size, tmp_path / case, case)
        assert losses == pytest.approx(stock, abs=tolerance), case


def train(rank: int, world_size: int, folder: Path, case: str) -> list[float]:
    """The losses of four steps of a Mixtral of one layer with 3 experts."""
    model = make_family_model("mixtral", num_local_experts=3, num_hidden_layers=1)
    rows = [{"input_ids": ids, "labels": ids} for ids in batch_ids(0).repeat(4, 1)]
    with as_torchrun(rank, world_size):
        args = TrainingArguments(
            str(folder), max_steps=4, per_device_train_batch_size=8 // world_size, learning_rate=1e-2, logging_steps=1,
            eval_strategy="steps", eval_steps=2, per_device_eval_batch_size=8 // world_size, save_steps=2,
            load_best_model_at_end=True, metric_for_best_model="loss", greater_is_better=True, bf16=case == "bf16",
            report_to=[], disable_tqdm=True, use_cpu=True,
        )  # fmt: skip
        data = dict(train_dataset=rows, eval_dataset=rows[:8])
        trainer = Trainer(model, args, **data)
        if case != "stock":
            config = RuntimeConfig(
                compute_dtype="bf16" if case == "bf16" else "as_is",
                migration=MigrationConfig(every=2 if case == "bf16" else 0),
                shard_dense=case != "ddp",
            )
            handle = shard_experts(model, mesh=dist.init_device_mesh("cpu", (world_size,)), config=config)
            if case == "own optimizer":
                with pytest.raises(ValueError, match=r"^1 of 4 ranks own no expert, and would get other parameter groups"):
                    attach(trainer, handle)
                optimizer = torch.optim.AdamW(handle.parameter_groups(), lr=1e-2, weight_decay=0.0)
                trainer = Trainer(model, args, optimizers=(optimizer, None), **data)
            attach(trainer, handle)
        trainer.train()
        log = trainer.state.log_history
        evaluated = [entry["eval_loss"] for entry in log if "eval_loss" in entry]
        assert evaluated[0] > evaluated[1] + 0.1  # the greater counts as the better here, so that the last is not the best
        if case != "stock":  # which leaves experts as they are: it takes no weights by the names of its own files
            assert trainer.evaluate()["eval_loss"] == pytest.approx(evaluated[0], abs=1e-5)
        return [entry["loss"] for entry in log if "loss" in entry]


def test_a_trainer_of_adapters(tmp_path: Path) -> None:
    """LoRA on attention and experts: on 2 ranks as the stock loop on one; its checkpoints are adapters, which peft loads, and
    from which 1 and 4 ranks go on."""
    (stock,) = run_ranks(1, train_adapters, 1, tmp_path / "stock", "", True)
    two, _ = run_ranks(2, train_adapters, 2, tmp_path / "two")
    assert two.losses == pytest.approx(stock.losses, abs=1e-4) and two.losses[-1] < two.losses[0] - 0.1
    checkpoint = tmp_path / "two" / "checkpoint-3"
    assert not list(checkpoint.glob("model*.safetensors"))
    for world_size in (1, 4):
        resumed, *_ = run_ranks(world_size, train_adapters, world_size, tmp_path / f"on_{world_size}", str(checkpoint))
        assert resumed.losses[-3:] == pytest.approx(two.losses[3:], abs=1e-4), world_size
    saved = PeftModel.from_pretrained(make_family_model("mixtral"), tmp_path / "two" / "checkpoint-6").eval()
    torch.testing.assert_close(saved(input_ids=batch_ids(1)).logits, two.logits, rtol=0, atol=1e-5)


def train_adapters(rank: int, world_size: int, folder: Path, checkpoint: str = "", stock: bool = False) -> Run:
    rows = [{"input_ids": ids, "labels": ids} for ids in batch_ids(0).repeat(4, 1)]
    with as_torchrun(rank, world_size):
        args = TrainingArguments(
            str(folder), max_steps=6, per_device_train_batch_size=8 // world_size, learning_rate=1e-2, logging_steps=1,
            save_steps=3, report_to=[], disable_tqdm=True, use_cpu=True,
        )  # fmt: skip
        model = adapted("mixtral")
        if stock:
            trainer = Trainer(model, args, train_dataset=rows)
        else:
            handle = shard_experts(model, mesh=dist.init_device_mesh("cpu", (world_size,)))
            trainer = attach(Trainer(model, args, train_dataset=rows), handle)
        trainer.train(resume_from_checkpoint=checkpoint or None)
        with torch.no_grad():
            logits = model.eval()(input_ids=batch_ids(1)).logits
        return Run([entry["loss"] for entry in trainer.state.log_history if "loss" in entry], None, logits)


def test_what_accelerate_gives_and_takes(tmp_path: Path) -> None:
    """On 2 ranks: the whole state dict for `save_pretrained`; two optimizers, whose steps are one of the handle."""
    first, _ = run_ranks(2, save_by_hand, tmp_path)
    saved = MixtralForCausalLM.from_pretrained(tmp_path).eval()(input_ids=batch_ids(1)).logits
    torch.testing.assert_close(saved, first, rtol=0, atol=1e-5)


def save_by_hand(rank: int, folder: Path) -> torch.Tensor:
    with as_torchrun(rank, 2):
        model = make_family_model("mixtral")
        handle = shard_experts(model, mesh=dist.init_device_mesh("cpu", (2,)))
        accelerator = attach(Accelerator(cpu=True), handle)
        optimizers = [torch.optim.SGD(group["params"], lr=0.1) for group in handle.parameter_groups()]
        model, *optimizers = accelerator.prepare(model, *optimizers)
        accelerator.backward(model(input_ids=batch_ids(0), labels=batch_ids(0)).loss)
        for optimizer in optimizers:
            optimizer.step()
        assert handle._step == 1
        state = accelerator.get_state_dict(model)
        accelerator.unwrap_model(model).save_pretrained(folder, is_main_process=accelerator.is_main_process, state_dict=state)
        with torch.no_grad():
            return model.eval()(input_ids=batch_ids(1)).logits


def test_what_a_loop_cannot_do_is_refused_when_the_handle_is_attached() -> None:
    """In one line, with the cure; loops and their classes stay as they were."""
    (messages,) = run_ranks(1, refuse)
    wanted = {
        "model": "attach got a FSDPMixtralForCausalLM; give it a Trainer or an Accelerator",
        "twice": "attach was called for this ShardedTrainer before; call it once",
        "other model": "the Trainer trains a MixtralForCausalLM that is not the handle's FSDPMixtralForCausalLM; give",
        "model_init": "model_init would build a model that is not sharded; give the Trainer the sharded one as model=",
        "bf16": "bf16 is on, but experts compute in torch.float32; give shard_experts RuntimeConfig(compute_dtype='bf16')",
        "bf16_full_eval": "bf16_full_eval=True would change the model after shard_experts; leave it out",
        "auto_find_batch_size": "auto_find_batch_size=True would have one rank start anew; set per_device_train_batch_size",
        "reentrant": "activation checkpointing with use_reentrant=True does not go with sharded experts; set it to False",
        "lomo": "optim='lomo' steps within backward; choose another, such as adamw_torch",
        "uneven": "even_batches is False, but all ranks run as many forwards; leave it True",
        "old optimizer": "SGD has parameters that the sharded model has not; build it after shard_experts, from",
        "prepared": "accelerator.prepare was called before attach; call attach(accelerator, handle) first",
        "compile": "torch.compile is on, which Accelerate applies to the whole model; compile its blocks: block.compile()",
    }
    assert messages.keys() == wanted.keys()
    for case, message in messages.items():
        assert message.startswith(wanted[case]) and "\n" not in message, (case, message)


def refuse(rank: int) -> dict[str, str]:
    """By case: the message."""
    model, other = make_family_model("mixtral"), make_family_model("mixtral")
    old = torch.optim.SGD(other.parameters())
    handle = shard_experts(model, mesh=dist.init_device_mesh("cpu", (1,)))
    forget_worlds()

    def trainer(model: Any = model, optimizers: Any = (None, None), init: Any = None, **options: Any) -> Trainer:
        forget_worlds()
        options = dict(output_dir="never", report_to=[], use_cpu=True) | options
        return Trainer(model, TrainingArguments(**options), optimizers=optimizers, model_init=init)

    def prepared() -> Accelerator:
        forget_worlds()
        accelerator = Accelerator(cpu=True)
        accelerator.prepare(nn.Linear(2, 2))
        return accelerator

    makers: dict[str, Callable[[], Any]] = {
        "model": lambda: model,
        "twice": lambda: attach(trainer(), handle),
        "other model": lambda: trainer(other),
        "model_init": lambda: trainer(None, init=lambda: other),
        "bf16": lambda: trainer(bf16=True),
        "bf16_full_eval": lambda: trainer(bf16_full_eval=True),
        "auto_find_batch_size": lambda: trainer(auto_find_batch_size=True),
        "reentrant": lambda: trainer(activation_checkpointing=True, activation_checkpointing_kwargs={"use_reentrant": True}),
        "lomo": lambda: trainer(optim="lomo"),
        "uneven": lambda: trainer(accelerator_config={"even_batches": False}),
        "old optimizer": lambda: trainer(optimizers=(old, None)),
        "prepared": prepared,
        "compile": lambda: trainer(torch_compile=True, torch_compile_backend="eager"),
    }
    messages = {}
    for case, make in makers.items():
        loop = make()
        kind = type(loop)
        with pytest.raises(ValueError) as caught:
            attach(loop, handle)
        assert type(loop) is kind
        messages[case] = str(caught.value)
    forget_worlds()
    return messages
