"""Adapters: MoE layers of other models.

registry.py          what an adapter is; finding layers in a model; register_adapter
experts_modules.py   experts modules of transformers, replaced inside their block
families.py          the families of transformers, as data
meta.py              models built without memory
weights.py           a model's weights under its family's names: state dict and checkpoint, out and in
safetensors_files.py  a checkpoint as files
save_pretrained.py   transformers' own saving, of a sharded model
"""

from .registry import Adapter, FoundLayer, find_layers, register_adapter, replace_modules

__all__ = ["Adapter", "FoundLayer", "find_layers", "register_adapter", "replace_modules"]
