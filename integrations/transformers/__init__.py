"""The training loops of Hugging Face with a model whose experts are shared: Trainer, Accelerate, and the trainers of TRL.

checkpoint.py   Checkpoints of these loops: weights as transformers has them, optimizer state by the experts' names; any world
                size loads them.
refusals.py     What a Trainer or an Accelerator is refused for when a handle is attached, rather than in its hundredth step.
accelerator.py  An Accelerator that trains a sharded model: it wraps nothing, clips by one norm, saves every rank's part.
trainer.py      A Trainer of a sharded model: its checkpoints hold every rank's part, and any world size resumes from them.
attach.py       Have a Trainer or an Accelerator train a sharded model.
"""

from .attach import attach

__all__ = ["attach"]
