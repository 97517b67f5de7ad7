"""An Accelerator that trains a model whose experts are shared: it wraps nothing, clips by the one norm, saves every rank's part."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.optimizer import AcceleratedOptimizer
from accelerate.utils import DistributedType
from torch import Tensor, nn

from moesaic.runtime import Handle

from .checkpoint import Folder, load_optimizer, save_optimizer, save_weights


class SteppingOptimizer(AcceleratedOptimizer):
    """Closes the handle's step after each of its own; of several optimizers the last that was prepared does."""

    def __init__(self, optimizer: torch.optim.Optimizer, accelerator: ShardedAccelerator, device_placement: bool):
        super().__init__(optimizer, device_placement=device_placement)
        self._accelerator = accelerator
        self._is_accelerate_prepared = True

    def step(self, closure: Any = None) -> None:
        """See torch; a step of the handle follows, but not before the last micro-batch."""
        super().step(closure)
        if self.gradient_state.sync_gradients and self._accelerator._optimizers[-1] is self:
            self._accelerator.handle.step(self.optimizer)


class ShardedAccelerator(Accelerator):
    """What an Accelerator becomes with a handle attached. Ranks call its methods together, those that save included."""

    handle: Handle

    def attach(self, handle: Handle) -> None:
        """Take the model of `handle` for the one that is trained; see `moesaic.transformers.attach`."""
        self.handle = handle
        # Of the parts of a checkpoint, Accelerate's own calls write and read what is left.
        self.register_save_state_pre_hook(lambda models, weights, folder: self._save(folder))
        self.register_load_state_pre_hook(lambda models, folder: self._load(folder))

    def _is_sharded(self, model: nn.Module) -> bool:
        return self.unwrap_model(model) is self.handle.model

    def prepare_model(self, model: nn.Module, device_placement: bool | None = None, evaluation_mode: bool = False) -> nn.Module:
        """See Accelerate. The sharded model is left as it is, but for DistributedDataParallel if its dense part is not sharded."""
        if self._is_sharded(model) and self.handle._config.shard_dense:
            model._is_accelerate_prepared = True  # type: ignore[assignment]
        return super().prepare_model(model, device_placement, evaluation_mode)

    def prepare_optimizer(self, optimizer: torch.optim.Optimizer, device_placement: bool | None = None) -> AcceleratedOptimizer:
        """See Accelerate. Steps of the optimizer are steps of the handle."""
        if not isinstance(optimizer, AcceleratedOptimizer):
            place = self.device_placement if device_placement is None else device_placement
            optimizer = SteppingOptimizer(optimizer, self, place)
        return super().prepare_optimizer(optimizer)

    def clip_grad_norm_(self, parameters: Iterable[nn.Parameter], max_norm: float, norm_type: float = 2) -> Tensor:
        """See Accelerate. For all parameters of the model this is `Handle.clip_grad_norm_`, the same norm on every rank."""
        parameters = list(parameters)
        with_grad = {id(parameter) for parameter in self.handle.parameters() if parameter.grad is not None}
        if norm_type == 2 and with_grad == {id(parameter) for parameter in parameters if parameter.grad is not None}:
            return self.handle.clip_grad_norm_(max_norm)
        return super().clip_grad_norm_(parameters, max_norm, norm_type)

    def get_state_dict(self, model: nn.Module, unwrap: bool = True) -> dict[str, Any]:
        """The state dict of the unwrapped model, whole, on the main process; empty elsewhere. Collective."""
        return self.handle.weights.state_dict() if self._is_sharded(model) else super().get_state_dict(model, unwrap)

    def save_model(self, model: nn.Module, save_directory: Folder, *args: Any, **options: Any) -> None:
        """Write the model's weights and configuration as `from_pretrained` reads them. Collective."""
        if self._is_sharded(model):
            save_weights(self.handle, save_directory)
        else:
            super().save_model(model, save_directory, *args, **options)

    def save_state(self, output_dir: str | None = None, *args: Any, **options: Any) -> str:
        """See Accelerate; any world size loads the folder. Collective."""
        with self._others_only():
            return super().save_state(output_dir, *args, **options)

    def load_state(self, input_dir: str | None = None, *args: Any, **options: Any) -> None:
        """Load what `save_state` wrote, at any world size. Collective.

        Raises:
            ValueError: no such folder, or it holds no state of the optimizers.
        """
        with self._others_only():
            super().load_state(input_dir, *args, **options)
        self.step = 0  # micro-batches since the last step; another world size has others

    @contextmanager
    def _others_only(self) -> Iterator[None]:
        """Let Accelerate's own calls see neither the sharded model nor its optimizers."""
        models, optimizers = self._models, self._optimizers
        self._models = [model for model in models if not self._is_sharded(model)]
        self._optimizers = [optimizer for optimizer in optimizers if not isinstance(optimizer, SteppingOptimizer)]
        self._stepping = [optimizer for optimizer in optimizers if isinstance(optimizer, SteppingOptimizer)]
        try:
            yield
        finally:
            self._models, self._optimizers = models, optimizers

    def _save(self, folder: Folder) -> None:
        save_weights(self.handle, folder)
        for index, optimizer in enumerate(self._stepping):
            save_optimizer(self.handle, optimizer, Path(folder) / f"optimizer_{index}")

    def _load(self, folder: Folder) -> None:
        self.handle.weights.load_safetensors(folder)
        for index, optimizer in enumerate(self._stepping):
            load_optimizer(self.handle, optimizer, Path(folder) / f"optimizer_{index}")


def check_accelerator(accelerator: Accelerator, handle: Handle) -> None:
    """Refuse what cannot be together with experts that are shared.

    Raises:
        ValueError: what, and what to do instead.
    """
    kind = accelerator.distributed_type
    if kind in (DistributedType.FSDP, DistributedType.DEEPSPEED, DistributedType.MEGATRON_LM):
        raise ValueError(f"Accelerate is to shard the model with {kind.value}, but shard_experts has; leave that out")
    parallel = accelerator.parallelism_config
    if parallel is not None and parallel.total_size > 1:
        raise ValueError(
            f"parallelism_config has a size of {parallel.total_size}, but each rank trains on its own batch; leave it out"
        )
    computes = handle._config.compute_dtype
    wanted = accelerator.mixed_precision
    if wanted not in ("no", computes):
        cure = "set RuntimeConfig(compute_dtype='bf16')" if wanted == "bf16" else "use bf16"
        raise ValueError(f"mixed precision is {wanted}, but shard_experts was told compute_dtype={computes!r}; {cure}")
    if accelerator.state.dynamo_plugin.backend.value != "NO":
        raise ValueError(
            "torch.compile of the whole model is not done with experts that are shared; compile its blocks: block.compile()"
        )
    if not accelerator.even_batches:
        raise ValueError("even_batches is False, but ranks run every forward together; leave it True")
