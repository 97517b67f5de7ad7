"""What a Trainer or an Accelerator is refused for when a handle is attached, rather than in its hundredth step."""

from __future__ import annotations

from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType
from transformers import Trainer, TrainingArguments
from transformers.training_args import OptimizerNames

from moesaic.runtime import Handle

_OTHER_SHARDING = (DistributedType.FSDP, DistributedType.DEEPSPEED, DistributedType.MEGATRON_LM)
_CHANGES_MODEL = ("use_liger_kernel", "fp16_full_eval", "bf16_full_eval")


def check_accelerator(accelerator: Accelerator, handle: Handle) -> None:
    """Raises ValueError: what cannot be together with the sharded model, and what to do instead."""
    if accelerator._models:
        raise ValueError("accelerator.prepare was called before attach; call attach(accelerator, handle) first")
    if accelerator.distributed_type in _OTHER_SHARDING:
        raise ValueError(
            f"Accelerate is set to {accelerator.distributed_type.value}, but shard_experts has sharded the model; unset it"
        )
    parallel = accelerator.parallelism_config
    if parallel is not None and parallel.total_size > 1:
        raise ValueError(f"parallelism_config is of {parallel.total_size} ranks, but shard_experts has a mesh; leave it out")
    computes = handle._banks[0].compute_dtype
    if accelerator.mixed_precision not in ("no", "bf16"):
        raise ValueError(f"mixed precision {accelerator.mixed_precision} does not go with sharded experts; use bf16")
    if accelerator.mixed_precision == "bf16" and computes != torch.bfloat16:
        raise ValueError(f"bf16 is on, but experts compute in {computes}; give shard_experts RuntimeConfig(compute_dtype='bf16')")
    if accelerator.state.dynamo_plugin.backend.value != "NO":
        raise ValueError("torch.compile is on, which Accelerate applies to the whole model; compile its blocks: block.compile()")
    if not accelerator.even_batches:
        raise ValueError("even_batches is False, but all ranks run as many forwards; leave it True")


def check_trainer(trainer: Trainer, handle: Handle) -> None:
    """Raises ValueError: what the Trainer cannot do with the sharded model, and what to do instead."""
    if trainer.model_init is not None:
        raise ValueError("model_init would build a model that is not sharded; give the Trainer the sharded one as model=")
    if trainer.model is not handle.model:
        raise ValueError(
            f"the Trainer trains a {type(trainer.model).__name__} that is not the handle's {type(handle.model).__name__}; give "
            "shard_experts the model that the Trainer gets, and leave out peft_config"
        )
    _check_arguments(trainer.args)
    optimizer: Any = trainer.optimizer
    held = [] if optimizer is None else [id(parameter) for group in optimizer.param_groups for parameter in group["params"]]
    if not set(held) <= {id(parameter) for parameter in handle.parameters()}:
        raise ValueError(
            f"{type(optimizer).__name__} has parameters that the sharded model has not; build it after shard_experts, from "
            "handle.parameter_groups()"
        )
    owned_R = sum(owners.num_rows_R for owners in handle.owner_maps)
    if optimizer is None and not all(owned_R):
        raise ValueError(
            f"{sum(owned_R == 0)} of {len(owned_R)} ranks own no expert, and would get other parameter groups from the Trainer; "
            "give it optimizers=(optimizer, None), built from handle.parameter_groups(), or share experts among fewer ranks"
        )


def _check_arguments(args: TrainingArguments) -> None:
    """See `check_trainer`."""
    for option in _CHANGES_MODEL:
        if getattr(args, option):
            raise ValueError(f"{option}=True would change the model after shard_experts; leave it out")
    if args.auto_find_batch_size:
        raise ValueError("auto_find_batch_size=True would have one rank start anew; set per_device_train_batch_size")
    if args.n_gpu > 1:
        raise ValueError(f"DataParallel would run on {args.n_gpu} GPUs of one process; start a process for each, with torchrun")
    optimizer = OptimizerNames(args.optim).value
    if "lomo" in optimizer:
        raise ValueError(f"optim={optimizer!r} steps within backward; choose another, such as adamw_torch")
    options = [getattr(args, f"{kind}_checkpointing_kwargs", None) or {} for kind in ("activation", "gradient")]
    if any(each.get("use_reentrant") for each in options):
        raise ValueError("activation checkpointing with use_reentrant=True does not go with sharded experts; set it to False")
