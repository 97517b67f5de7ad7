"""The training loops of Hugging Face with a model whose experts are shared: Trainer, Accelerate, and the trainers of TRL."""

from .attach import attach

__all__ = ["attach"]
