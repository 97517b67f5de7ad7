"""A Trainer of a sharded model: its checkpoints hold every rank's part, and any world size resumes from them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import Trainer
from transformers.trainer import OPTIMIZER_NAME, SCHEDULER_NAME, TRAINING_ARGS_NAME

from .accelerator import ShardedAccelerator
from .checkpoint import load_optimizer, load_weights, save_optimizer, save_weights

_OPTIMIZER = Path(OPTIMIZER_NAME).stem


class ShardedTrainer(Trainer):
    """What a Trainer, or a subclass of it, becomes with a handle attached."""

    accelerator: ShardedAccelerator
    optimizer: Any
    lr_scheduler: Any

    def _has_mixed_mesh_grads(self, model: nn.Module) -> bool:
        """No: the accelerator clips gradients of every kind together."""
        return False

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None) -> None:
        """What is written of the model. Collective, as the Trainer's call is."""
        folder = Path(output_dir or self.args.output_dir or ".")
        save_weights(self.accelerator.handle, folder)
        if self.args.should_save:
            processing = self.processing_class or getattr(self.data_collator, "tokenizer", None)
            if processing is not None:
                processing.save_pretrained(folder)
            torch.save(self.args, folder / TRAINING_ARGS_NAME)

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        save_optimizer(self.accelerator.handle, self.optimizer, Path(output_dir) / _OPTIMIZER)
        if self.args.should_save:
            torch.save(self.lr_scheduler.state_dict(), Path(output_dir) / SCHEDULER_NAME)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        load_weights(self.accelerator.handle, resume_from_checkpoint)

    def _load_best_model(self) -> None:
        load_weights(self.accelerator.handle, self.state.best_model_checkpoint or "")

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if checkpoint is not None:
            load_optimizer(self.accelerator.handle, self.optimizer, Path(checkpoint) / _OPTIMIZER)
            self.lr_scheduler.load_state_dict(torch.load(Path(checkpoint) / SCHEDULER_NAME, weights_only=True))
