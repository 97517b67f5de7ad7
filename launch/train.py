"""Train the demo language model: the program of `moesaic train` and of `python -m moesaic.launch.train`.

`train(config)` reads from top to bottom: process, inputs, model, run folder, then the loop.
"""

import json
import math
import os
import signal
import sys
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

import click
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from ..jit import compile_seconds, run_seconds
from ..runtime import Handle, shard_experts
from ..runtime.layer import moe_layers
from ..runtime.moved_options import MovedOptionWarning
from ..runtime.optim import Muon, muon_groups
from ..runtime.wrap.recorder import Recorder
from .config import Config, OptimConfig, load_config
from .entry import run_command, warnings_as_lines
from .run.checkpoint import load_checkpoint, progress_of, save_checkpoint
from .run.data import Batch, BatchShape, TrainingData, Windows, validation_batches
from .run.failure_report import Peers, failure_report
from .run.inputs import RunInputs, read_inputs
from .run.model import VOCAB_SIZE, build_model
from .run.process import (
    Process,
    StopSignal,
    agreed,
    find_process,
    from_first,
    process_group,
    reuse_memory,
    set_threads,
    stop_with_launcher,
)
from .run.records import Records, StepRecord, create_run_folder, show
from .run.replay import Replay
from .run.warm import warm_run


def train(config: Config) -> int:
    """Train on this rank, together with all others; return the exit status: 0, or 128 + the signal that stopped the run.

    Raises `ValueError`, the same on every rank, for errors that the user can correct.
    """
    process = find_process(config.launch, os.environ)
    stop_with_launcher(process, os.environ)
    config.check_world_size(process.world_size)
    set_threads(process, config.launch, os.environ)
    reuse_memory(process, config.launch)
    with process_group(process, config.launch, timeout_s=config.runtime.timeout_s) as mesh:
        inputs = read_inputs(config, process)
        trainer = Trainer(config, process, mesh, inputs)
        if inputs.resume:
            load_checkpoint(process, inputs.resume, trainer.handle, trainer.optimizer)
        warm_run(config.runtime, process.device)
        made = agreed(process, lambda: create_run_folder(config.run).absolute() if process.is_first else Path())
        folder = from_first(process, made)
        if process.is_first:
            show(_describe(config, process, trainer, folder))
        with trainer.record(folder) as recorder, agreed(process, lambda: Records(recorder, config, process)) as records:
            signum = trainer.run(records)
        summary = recorder.summary()
        if summary is not None:
            stopped = f"stopped by {signal.Signals(signum).name} after step {trainer.step}\n" if signum else ""
            show(f"{stopped}{summary}")
    return 128 + signum if signum else 0


def _describe(config: Config, process: Process, trainer: "Trainer", folder: Path) -> str:
    text, degree = trainer.text, config.launch.data_parallel_replicate_degree
    replicas = f" in {degree} replicas" if degree > 1 else ""
    return (
        f"moesaic: {process.world_size} rank(s){replicas} on {process.device.type}, {torch.get_num_threads()} thread(s) each; "
        f"{trainer.num_parameters / 1e6:.1f} M parameters, {config.model.num_layers} layers, {config.model.num_experts} experts, "
        f"top-{config.model.top_k}; text: {text.num_documents} file(s), {text.num_bytes / 1e6:.1f} MB; "
        f"{f'plan {config.placement.file}' if config.placement.file else f'policy {config.runtime.policy}'}; files in {folder}"
    )


class DivergenceError(ValueError):
    """The training diverged. The same on every rank."""


@dataclass(frozen=True)
class StepTotals:
    """Means and sums over all ranks at the end of a step."""

    loss: float
    aux_loss: float
    bytes_sent: float
    signum: int


class Trainer:
    """Model, optimizer and data of one rank, and the loop over them."""

    def __init__(self, config: Config, process: Process, mesh: DeviceMesh, inputs: RunInputs) -> None:
        self.config = config
        self.process = process
        self.peers = Peers(process)
        self.text = inputs.text
        model = build_model(config.model, config.router, seq_len=config.data.seq_len, seed=config.run.seed)
        self.num_parameters = sum(parameter.numel() for parameter in model.parameters())
        self.model = model.to(process.device)
        placements = inputs.plan.layers if inputs.plan else None
        self.handle = shard_experts(self.model, mesh=mesh, config=config.runtime, placements=placements, machine=inputs.machine)
        self.optimizer = build_optimizer(self.handle, config.optim)

        self.tokens_per_step = config.train.batch_size * config.data.seq_len
        shape = BatchShape(config.train.batch_size, config.train.micro_batches, process.rank, process.world_size)
        self.step = inputs.progress.step if inputs.progress else 0
        layers = list(moe_layers(self.model).values())
        rank = process.rank % config.ranks_per_replica(process.world_size)
        self._replay = Replay(inputs.trace, layers, rank, first_step=self.step) if inputs.trace else None
        self._compile_s = 0.0  # seconds of compilation recorded so far
        position = inputs.progress.position if inputs.progress else 0
        train, validation = (Windows(part, config.data.seq_len) for part in (self.text.train(), self.text.validation()))
        self.data = TrainingData(train, shape, seed=config.run.seed, position=position)
        self.val_batches = validation_batches(validation, shape, config.train.eval_batches)

    def record(self, folder: Path) -> Recorder:
        """The records of the run, which go on from its first step. Collective."""
        run = self.config.run
        return self.handle.record(
            folder,
            first_step=self.step,
            layers=run.metrics == "detailed",
            trace_every=run.trace_every,
            tensorboard=run.tensorboard,
        )

    def run(self, records: Records) -> int:
        """Train until the configured step or a stop signal; return the signal's number, or 0."""
        config = self.config
        profile_from = max(self.step, config.train.steps - config.run.profile_steps)
        with StopSignal() as stop, ExitStack() as profile:
            with self._reported():
                records.recorder.add_validation(self.evaluate())
            while self.step < config.train.steps:
                if self.step == profile_from:
                    records.recorder.folder.mkdir(parents=True, exist_ok=True)  # also on machines without rank 0
                    profile.enter_context(
                        self.handle.telemetry.profile(records.recorder.folder / f"profile-rank-{self.process.rank}.json")
                    )
                with self._reported():
                    signum = self._train_step(records, stop)
                if signum:
                    return signum
        return 0

    @contextmanager
    def _reported(self) -> Iterator[None]:
        """Raise errors of the body again, with a failure report."""
        try:
            yield
        except DivergenceError:
            raise
        except (ValueError, RuntimeError, OSError) as error:
            # A ValueError is for what the user can correct; in a step it is a bug. Errors of torch name neither rank nor step.
            where = self.process.rank, self.step, self.handle.telemetry.last_stage()
            raise RuntimeError(failure_report(error, *where, self.peers)) from error

    def _train_step(self, records: Records, stop: StopSignal) -> int:
        """One optimizer step, and the records, evaluation and checkpoint due after it; return the signal to stop for, or 0."""
        config = self.config
        start_s = run_seconds()

        # Phase 1: gradients of one global batch
        if self._replay is not None:
            self._replay.begin_step()
        lr = self._set_learning_rate()
        losses = self._forward_backward()
        grad_norm = float(self.handle.clip_grad_norm_(config.optim.clip_norm or math.inf))
        self._check_finite("the gradient norm", grad_norm, "not taken")

        # Phase 2: update
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.handle.step(self.optimizer)
        self.step += 1

        # Phase 3: totals over all ranks, and whether to stop
        metrics = self.handle.metrics()
        totals = self._agree(losses, metrics, stop.signum)
        seconds = run_seconds() - start_s

        # Phase 4: evaluate, record, save
        is_last = self.step == config.train.steps or totals.signum != 0
        val_loss = self.evaluate() if is_last or _is_due(self.step, config.train.eval_every) else None
        record = StepRecord(
            loss=totals.loss,
            aux_loss=totals.aux_loss,
            grad_norm=grad_norm,
            lr=lr,
            seconds=seconds,
            compile_s=compile_seconds() - self._compile_s,
            tokens_per_s=self.tokens_per_step / seconds,
            bytes_sent=totals.bytes_sent,
        )
        self._compile_s += record.compile_s
        records.add(record, metrics, val_loss=val_loss)
        if config.checkpoint.every and (is_last or _is_due(self.step, config.checkpoint.every)):
            self.save(records)
        return totals.signum

    def _forward_backward(self) -> Tensor:
        """Gradients of one global batch; return this rank's mean cross-entropy and router loss, fp32 [2]."""
        num_micro_batches = self.config.train.micro_batches
        losses = torch.zeros(2, device=self.process.device)
        for index, batch in enumerate(self.data.next_step()):
            self.handle.set_requires_all_reduce(index == num_micro_batches - 1)
            loss = self._cross_entropy(batch)
            aux_loss = self.handle.aux_loss()
            ((loss + aux_loss) / num_micro_batches).backward()
            losses += torch.stack((loss.detach(), aux_loss.detach())) / num_micro_batches
        return losses

    def _cross_entropy(self, batch: Batch) -> Tensor:
        """Mean cross-entropy of the batch, nats per byte."""
        device = self.process.device
        logits_BLV = self.model(batch.ids_BL.to(device))
        return F.cross_entropy(logits_BLV.view(-1, VOCAB_SIZE).float(), batch.targets_BL.to(device).reshape(-1))

    def _set_learning_rate(self) -> float:
        lr = learning_rate(self.config.optim, self.step, self.config.train.steps)
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        return lr

    def _agree(self, losses: Tensor, metrics: Mapping[str, float], signum: int) -> StepTotals:
        """The step's one extra collective: mean losses, total bytes, and whether any rank received a stop signal."""
        bytes_sent = sum(value for key, value in metrics.items() if key.startswith("bytes_"))
        stops = [float(signum == number) for number in StopSignal.signals]
        local = torch.tensor([*losses.tolist(), bytes_sent, *stops], dtype=torch.float64, device=self.process.device)
        dist.all_reduce(local)
        loss, aux_loss, bytes_sent, *stops = local.tolist()
        stopped_by = [int(number) for number, count in zip(StopSignal.signals, stops, strict=True) if count]
        world_size = self.process.world_size
        return StepTotals(loss / world_size, aux_loss / world_size, bytes_sent, stopped_by[0] if stopped_by else 0)

    @torch.no_grad()
    def evaluate(self) -> float:
        """Mean cross-entropy of the fixed validation windows over all ranks, nats per byte. Collective."""
        self.model.eval()
        total = torch.stack([self._cross_entropy(batch) for batch in self.val_batches]).double().sum()
        dist.all_reduce(total)
        self.model.train()
        val_loss = float(total) / (len(self.val_batches) * self.process.world_size)
        self._check_finite("the validation loss", val_loss, "not saved")
        return val_loss

    def _check_finite(self, what: str, value: float, step_was: str) -> None:
        """Raise `DivergenceError` unless a value, the same on all ranks, is finite: no later step would make it finite."""
        if not math.isfinite(value):
            raise DivergenceError(
                f"{what} is {value} after {self.step} steps: the run diverged, and this state is {step_was}; "
                "resume from an earlier checkpoint (checkpoint.resume) with a lower optim.lr or optim.clip_norm"
            )

    def save(self, records: Records) -> None:
        """Write a checkpoint into the run folder. Collective."""
        progress = progress_of(self.config, self.text, step=self.step, position=self.data.position)
        folder = save_checkpoint(self.process, records.recorder.folder / "checkpoints", self.handle, self.optimizer, progress)
        records.print_line(f"checkpoint {folder}")


def _is_due(step: int, every: int) -> bool:
    """Whether `step` is a multiple of `every`; 0 means never."""
    return every > 0 and step % every == 0


def build_optimizer(handle: Handle, config: OptimConfig) -> torch.optim.AdamW:
    """The optimizer of all parameters: matrices decay, vectors do not."""
    if config.name == "muon":
        groups = muon_groups(handle, adamw=["head.*"])
        betas = (config.beta1, config.beta2)
        return Muon(groups, lr=config.lr, weight_decay=config.weight_decay, betas=betas, eps=config.eps)
    groups = []
    for group in handle.parameter_groups():
        for weight_decay, is_matrix in ((config.weight_decay, True), (0.0, False)):
            parameters = [parameter for parameter in group["params"] if (parameter.ndim >= 2) == is_matrix]
            if parameters:
                groups.append({"params": parameters, "weight_decay": weight_decay})
    return torch.optim.AdamW(groups, lr=config.lr, betas=(config.beta1, config.beta2), eps=config.eps, fused=True)


def learning_rate(config: OptimConfig, step: int, num_steps: int) -> float:
    """Learning rate after `step` steps: linear warm-up to `lr`, then a half cosine down to `min_lr_share` of it."""
    if step < config.warmup_steps:
        return config.lr * (step + 1) / config.warmup_steps
    done = (step - config.warmup_steps) / max(1, num_steps - 1 - config.warmup_steps)
    cosine = 0.5 * (1 + math.cos(math.pi * min(1.0, done)))
    return config.lr * (config.min_lr_share + (1 - config.min_lr_share) * cosine)


@click.command("train")
@click.option("--config", "path", type=click.Path(dir_okay=False), help="Configuration file (TOML).")
@click.option("--set", "assignments", multiple=True, metavar="KEY=VALUE", help="Override one value, as in --set train.steps=50.")
@click.option("--machine", metavar="FILE", help="Price with the rates that `moesaic calibrate` wrote; is placement.machine.")
def command(path: str | None, assignments: tuple[str, ...], machine: str | None) -> int:
    """Train the demo language model, in one process or under torchrun; the defaults are the demo."""
    try:
        with warnings_as_lines(MovedOptionWarning):
            config = load_config(path, [*assignments, *([f"placement.machine={json.dumps(machine)}"] if machine else [])])
    except OSError as error:
        raise ValueError(f"--config {path}: {error.strerror}") from None
    return train(config)


if __name__ == "__main__":
    sys.exit(run_command(command))
