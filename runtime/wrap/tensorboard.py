"""Metrics for TensorBoard, where its package is installed."""

from __future__ import annotations

from collections.abc import Mapping
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any


def require_tensorboard() -> None:
    """Raise ValueError if the package is missing."""
    if find_spec("tensorboard") is None:
        raise ValueError(
            "TensorBoard is not installed: pip install 'moesaic[report]', or set run.tensorboard=false (tensorboard=False)"
        )


class TensorBoard:
    """A run's event file in `folder`; a context manager that closes it."""

    def __init__(self, folder: Path):
        require_tensorboard()
        self._writer: Any = import_module("torch.utils.tensorboard").SummaryWriter(str(folder))

    def add(self, step: int, record: Mapping[str, Any]) -> None:
        """Write every number of a metrics record: a step's as step/KEY, a layer's as KEY/LAYER, and the reasons of decisions."""
        for key, value in record.items():
            if isinstance(value, int | float) and key != "step":
                self._writer.add_scalar(f"step/{key}", value, step)
        for layer in record.get("layers", ()):
            for key, value in layer.items():
                if key != "layer":
                    self._writer.add_scalar(f"{key}/{layer['layer']}", value, step)
        for decision in record.get("migrations", ()):
            self._writer.add_text("migration", decision["reason"], step)

    def __enter__(self) -> TensorBoard:
        return self

    def __exit__(self, *exc: object) -> None:
        self._writer.close()
