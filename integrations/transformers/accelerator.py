"""An Accelerator that trains a sharded model: it wraps nothing, clips by one norm, saves every rank's part."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.optimizer import AcceleratedOptimizer
from torch import Tensor, nn

from moesaic.runtime import Handle

from .checkpoint import Folder, load_optimizer, load_weights, save_optimizer, save_weights


class SteppingOptimizer(AcceleratedOptimizer):
    """Closes the handle's step after each of its own; of several optimizers the last that was prepared does."""

    def __init__(self, optimizer: torch.optim.Optimizer, accelerator: ShardedAccelerator, device_placement: bool):
        super().__init__(optimizer, device_placement=device_placement)
        self._accelerator = accelerator
        self._is_accelerate_prepared = True

    def step(self, closure: Any = None) -> None:
        """See Accelerate: nothing before the last micro-batch."""
        super().step(closure)
        if self.gradient_state.sync_gradients and self._accelerator._optimizers[-1] is self:
            self._accelerator.handle.step(self.optimizer)


class ShardedAccelerator(Accelerator):
    """What an Accelerator becomes with a handle attached. All ranks call together what saves or loads."""

    handle: Handle
    _models: list[nn.Module]
    _optimizers: list[AcceleratedOptimizer]
    _stepping: list[SteppingOptimizer]

    def attach(self, handle: Handle) -> None:
        """Train the model of this handle; see `moesaic.transformers.attach`."""
        self.handle = handle
        self.register_save_state_pre_hook(lambda models, weights, folder: self._save(Path(folder)))
        self.register_load_state_pre_hook(lambda models, folder: self._load(Path(folder)))

    def _is_sharded(self, model: nn.Module) -> bool:
        return self.unwrap_model(model) is self.handle.model

    def prepare_model(self, model: nn.Module, device_placement: bool | None = None, evaluation_mode: bool = False) -> nn.Module:
        """See Accelerate. It leaves the sharded model as it is; if `shard_dense` is off, DistributedDataParallel wraps it."""
        if self._is_sharded(model) and self.handle._config.shard_dense:
            model._is_accelerate_prepared = True  # type: ignore[assignment]
        return super().prepare_model(model, device_placement, evaluation_mode)

    def prepare_optimizer(self, optimizer: torch.optim.Optimizer, device_placement: bool | None = None) -> AcceleratedOptimizer:
        """See Accelerate. The optimizer's steps become the handle's."""
        if not isinstance(optimizer, AcceleratedOptimizer):
            place = self.device_placement if device_placement is None else device_placement
            optimizer = SteppingOptimizer(optimizer, self, place)
        return super().prepare_optimizer(optimizer)

    def clip_grad_norm_(self, parameters: Iterable[nn.Parameter], max_norm: float, norm_type: float = 2) -> Tensor:
        """See Accelerate. For all parameters of the model this is `Handle.clip_grad_norm_`: one norm, on every rank."""
        parameters = list(parameters)
        with_grad = {id(parameter) for parameter in self.handle.parameters() if parameter.grad is not None}
        if norm_type == 2 and with_grad == {id(parameter) for parameter in parameters if parameter.grad is not None}:
            return self.handle.clip_grad_norm_(max_norm)
        return super().clip_grad_norm_(parameters, max_norm, norm_type)

    def get_state_dict(self, model: nn.Module, unwrap: bool = True) -> dict[str, Any]:
        """The state dict of the model as it was before `shard_experts`, whole, on the main process; empty elsewhere."""
        return self.handle.weights.state_dict() if self._is_sharded(model) else super().get_state_dict(model, unwrap)

    def save_model(self, model: nn.Module, save_directory: Folder, *args: Any, **options: Any) -> None:
        """Write the model's weights and configuration as `from_pretrained` reads them."""
        if self._is_sharded(model):
            save_weights(self.handle, save_directory)
        else:
            super().save_model(model, save_directory, *args, **options)

    def save_state(self, output_dir: str | None = None, *args: Any, **options: Any) -> str:
        """See Accelerate. Any world size loads the folder."""
        with self._others_only():
            return super().save_state(output_dir, *args, **options)

    def load_state(self, input_dir: str | None = None, *args: Any, **options: Any) -> None:
        """See Accelerate. The folder may be of any world size.

        Raises:
            ValueError: no such folder, or no state of these optimizers in it.
        """
        with self._others_only():
            super().load_state(input_dir, *args, **options)
        self.step = 0  # counts micro-batches, of which another world size has others in a step

    @contextmanager
    def _others_only(self) -> Iterator[None]:
        """Have Accelerate save and load what is not sharded; the hooks do the rest, in the folder that it has chosen."""
        models, optimizers = self._models, self._optimizers
        self._models = [model for model in models if not self._is_sharded(model)]
        self._optimizers = [each for each in optimizers if not isinstance(each, SteppingOptimizer)]
        self._stepping = [each for each in optimizers if isinstance(each, SteppingOptimizer)]
        try:
            yield
        finally:
            self._models, self._optimizers = models, optimizers

    def _save(self, folder: Path) -> None:
        save_weights(self.handle, folder)
        for index, optimizer in enumerate(self._stepping):
            save_optimizer(self.handle, optimizer, folder / f"optimizer_{index}")

    def _load(self, folder: Path) -> None:
        load_weights(self.handle, folder)
        for index, optimizer in enumerate(self._stepping):
            load_optimizer(self.handle, optimizer, folder / f"optimizer_{index}")
