"""Adapters: MoE layers of other models.

conversions.py        The names of a model's weights in checkpoints, by transformers' own conversion mapping.
meta.py               Models built on the meta device: shapes without memory, allocated once they are sharded.
safetensors_files.py  A checkpoint as a folder of safetensors files with an index, as transformers reads and writes it.
save_pretrained.py    `save_pretrained` of a sharded model: files of the whole model, or a refusal; never of one rank's experts.
experts_modules.py    Experts modules of Hugging Face transformers: only they are replaced, inside their block, which stays
                      transformers' own.
weights.py            A model's weights under the names that it has unwrapped: state dict and safetensors, out and in.
lora_experts.py       LoRA on experts of transformers' models, as peft makes it with `target_parameters`: pairs go into the banks
                      with their experts.
registry.py           Finding the MoE layers of a model: moesaic's own, those that registered adapters match, and experts modules
                      of transformers.
"""

from .registry import Adapter, FoundLayer, find_layers, register_adapter, replace_modules

__all__ = ["Adapter", "FoundLayer", "find_layers", "register_adapter", "replace_modules"]
