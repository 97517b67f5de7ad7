"""The weights of a sharded model under the names that it has unwrapped: a state dict, and folders of safetensors."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch.distributed as dist
from torch import Tensor

from ..adapters.safetensors_files import SafetensorsFolder, write_folder
from ..adapters.weights import checkpoint_tensors, load_weights, state_on_rank_zero
from .sharded_model import ShardedModel


class ModelWeights:
    """The model's weights as the unwrapped model has them; those of transformers' models under transformers' own names."""

    def __init__(self, sharded: ShardedModel):
        self._sharded = sharded

    def state_dict(self) -> dict[str, Tensor]:
        """The weights as the unwrapped model's `state_dict()` has them, whole, in CPU memory of rank 0; empty elsewhere.

        Collective.
        """
        sharded = self._sharded
        sharded.reshard()
        sharded.claim()
        is_first = sharded.group.replicas.rank == 0
        return state_on_rank_zero(sharded.model, sharded.layers, sharded.group.tokens) if is_first else {}

    def load_state_dict(self, state: Mapping[str, Any]) -> tuple[str, ...]:
        """Copy this rank's part of the weights out of the unwrapped model's whole state dict, or of a checkpoint's tensors.

        One of the base model alone leaves adapters as they are. Returns names that the model has no place for; see
        `adapters.weights.load_weights`.
        """
        return self._load(state)

    def _load(self, state: Mapping[str, Any], *, of_adapters: bool = False) -> tuple[str, ...]:
        sharded = self._sharded
        sharded.drop_prefetched()
        sharded.reshard()
        sharded.claim()
        sharded.weights_changed()
        return load_weights(state, sharded.model, sharded.layers, of_adapters=of_adapters)

    def save_safetensors(self, folder: str | Path, *, max_file_bytes: int = 4 << 30) -> None:
        """Write the weights as transformers' `save_pretrained` lays them out, with the model's config, if it has one.

        Collective; every rank, of the first replica, writes the experts it owns into the same folder, which must hold no
        safetensors yet.
        """
        sharded = self._sharded
        group, replica = sharded.group, sharded.group.replicas.rank
        sharded.reshard()
        sharded.claim()
        tensors = () if replica else checkpoint_tensors(sharded.model, sharded.layers, group.tokens)
        write_folder(Path(folder), tensors, rank=replica * group.world_size + group.rank, max_file_bytes=max_file_bytes)
        save_config = getattr(getattr(sharded.model, "config", None), "save_pretrained", None)
        if group.is_first and save_config is not None:
            save_config(folder)

    def save_adapter(self, folder: str | Path) -> None:
        """Write the adapters of a model of peft as its `save_pretrained` does, for `PeftModel.from_pretrained(base, folder)`.

        Collective. Rank 0 holds the adapters whole, and no other weights.

        Raises:
            ValueError: the model has none.
        """
        sharded = self._sharded
        self._check_adapters()
        sharded.reshard()
        sharded.claim()
        if sharded.group.replicas.rank == 0:
            state = state_on_rank_zero(sharded.model, sharded.layers, sharded.group.tokens, of_adapters=True)
            if sharded.group.is_first:
                sharded.model.save_pretrained(str(folder), state_dict=state)  # type: ignore[operator]
        dist.barrier()

    def load_adapter(self, folder: str | Path) -> tuple[str, ...]:
        """Load LoRA adapters from a folder that `save_adapter`, or `save_pretrained` of peft, wrote.

        Returns names that the model has no place for.

        Raises:
            ValueError: the model has no adapters, or the folder lacks some.
        """
        self._check_adapters()
        return self._load(SafetensorsFolder(Path(folder)), of_adapters=True)

    def _check_adapters(self) -> None:
        model = self._sharded.model
        if not hasattr(model, "peft_config"):
            raise ValueError(f"{type(model).__name__} has no adapters; give shard_experts what get_peft_model returned")

    def load_safetensors(self, folder: str | Path) -> tuple[str, ...]:
        """Load weights from such a folder, transformers' own included; each rank reads its part only.

        Returns names that the model has no place for.
        """
        return self.load_state_dict(SafetensorsFolder(Path(folder)))
