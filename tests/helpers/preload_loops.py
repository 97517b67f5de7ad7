"""The training loops that tests run, imported in the process that all ranks are forked from."""

import moesaic.transformers  # noqa: F401
