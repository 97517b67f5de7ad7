"""Adapters: MoE blocks of other models, one file a family.

registry.py       what an adapter is; finding blocks in a model; register_adapter
fused.py          what the families of transformers share
mixtral.py, qwen2_moe.py, qwen3_moe.py, olmoe.py, deepseek_v2.py, deepseek_v3.py, gpt_oss.py
meta.py            models built without memory
weights.py        a model's weights under its family's names: state dict and checkpoint, out and in
safetensors_files.py  a checkpoint as files
"""

from .registry import Adapter, adopt_moe_layers, register_adapter

__all__ = ["Adapter", "adopt_moe_layers", "register_adapter"]
