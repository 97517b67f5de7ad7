"""Modules for use with other packages, named after them: `integrations/transformers` is imported as `moesaic.transformers`.

A folder `transformers` beside the others would hide the package of that name from every program that runs in a clone.

transformers/  The training loops of Hugging Face with a model whose experts are shared: Trainer, Accelerate, and the trainers of
               TRL.
"""
