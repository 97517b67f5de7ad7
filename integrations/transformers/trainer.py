"""A Trainer whose model has shared experts: its checkpoints hold every rank's part, and any world size resumes from them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import Trainer
from transformers.trainer import OPTIMIZER_NAME, SCHEDULER_NAME, TRAINING_ARGS_NAME

from moesaic.runtime import Handle

from .accelerator import ShardedAccelerator
from .checkpoint import load_optimizer, save_optimizer, save_weights

_OPTIMIZER_FOLDER = OPTIMIZER_NAME.partition(".")[0]


class ShardedTrainer(Trainer):
    """What a Trainer, or a subclass of it, becomes with a handle attached."""

    accelerator: ShardedAccelerator

    def _has_mixed_mesh_grads(self, model: nn.Module) -> bool:
        """No: the accelerator clips all gradients by one norm, on ranks without experts too."""
        return False

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None) -> None:
        """What `save_model` and checkpoints write of the model. Collective."""
        folder = Path(output_dir or self.args.output_dir)
        save_weights(self.accelerator.handle, folder)
        if self.args.should_save:
            processing = self.processing_class or getattr(self.data_collator, "tokenizer", None)
            if processing is not None:
                processing.save_pretrained(folder)
            torch.save(self.args, folder / TRAINING_ARGS_NAME)

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        save_optimizer(self.accelerator.handle, self.optimizer, Path(output_dir) / _OPTIMIZER_FOLDER)
        if self.args.should_save:
            torch.save(self.lr_scheduler.state_dict(), Path(output_dir) / SCHEDULER_NAME)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        self.accelerator.handle.weights.load_safetensors(resume_from_checkpoint)

    def _load_best_model(self) -> None:
        self.accelerator.handle.weights.load_safetensors(self.state.best_model_checkpoint)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if checkpoint is not None:
            load_optimizer(self.accelerator.handle, self.optimizer, Path(checkpoint) / _OPTIMIZER_FOLDER)
            self.lr_scheduler.load_state_dict(torch.load(Path(checkpoint) / SCHEDULER_NAME, weights_only=True))


def check_trainer(trainer: Trainer, handle: Handle) -> None:
    """Refuse what a Trainer cannot do with experts that are shared.

    Raises:
        ValueError: what, and what to do instead.
    """
    args = trainer.args
    if trainer.model_init is not None:
        raise ValueError("model_init builds a model that is not shared; give the Trainer model=, after shard_experts")
    if trainer.model is not handle.model:
        raise ValueError(
            f"the Trainer trains {type(trainer.model).__name__}, the handle is of another {type(handle.model).__name__}; give both "
            "the same model, with its adapters (peft_config) added before shard_experts"
        )
    if args.n_gpu > 1:
        raise ValueError(
            f"one process has {args.n_gpu} GPUs, which DataParallel would share; start one process for each, with torchrun"
        )
    for option in ("auto_find_batch_size", "use_liger_kernel", "fp16_full_eval", "bf16_full_eval", "torch_compile"):
        if getattr(args, option):
            raise ValueError(f"TrainingArguments({option}=True) changes a model that is shared already; leave it out")
    for option in ("activation_checkpointing_kwargs", "gradient_checkpointing_kwargs"):
        if (getattr(args, option, None) or {}).get("use_reentrant"):
            raise ValueError(f"{option} has use_reentrant=True, which experts that are shared refuse; set it to False")
    if "lomo" in str(args.optim):
        raise ValueError(f"the optimizer {args.optim} steps inside of the backward; choose another, such as adamw_torch")
    held = (
        {id(parameter) for group in trainer.optimizer.param_groups for parameter in group["params"]}
        if trainer.optimizer
        else set()
    )
    if held - {id(parameter) for parameter in handle.parameters()}:
        raise ValueError(
            f"{type(trainer.optimizer).__name__} holds parameters that the shared model does not have; build it after "
            "shard_experts, from handle.parameter_groups()"
        )
    counts_R = sum(owners.num_rows_R for owners in handle.owner_maps)
    if trainer.optimizer is None and not counts_R.all():
        raise ValueError(
            f"{(counts_R == 0).sum()} of {len(counts_R)} ranks own no expert, for which the Trainer would make other parameter groups; "
            "give it optimizers=(optimizer, None) with an optimizer of handle.parameter_groups(), or share experts among fewer ranks, "
            "with a mesh (replicate, shard)"
        )
