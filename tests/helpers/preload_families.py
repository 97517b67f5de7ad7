"""The models of Hugging Face transformers that tests wrap, imported in the process that all ranks are forked from."""

import transformers

from tests.helpers.families import FAMILIES

for _prefix, _ in FAMILIES.values():
    getattr(transformers, f"{_prefix}ForCausalLM")
