"""The training loops that tests run, imported in the process that all ranks are forked from."""

from trl import SFTTrainer  # noqa: F401

import moesaic.transformers  # noqa: F401
