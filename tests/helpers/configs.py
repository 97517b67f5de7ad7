"""Runtime configurations for tests that vary options wherever they stand."""

from collections.abc import Mapping
from dataclasses import fields
from typing import Any

from moesaic import DebugConfig, MigrationConfig, RuntimeConfig
from moesaic.runtime.moved_options import MOVED


def runtime_config(**options: Any) -> RuntimeConfig:
    """Options of `RuntimeConfig` and of its `debug` side by side."""
    debug = {field.name: options.pop(field.name) for field in fields(DebugConfig) if field.name in options}
    return RuntimeConfig(**options, debug=DebugConfig(**debug))


# The old name of every option of `RuntimeConfig` that has a new one, with a value that is not its default.
MOVED_VALUES: Mapping[str, Any] = {
    "split": "local_even",
    "predictor": "last",
    "overlap_s": 0.5,
    "overlap": False,
    "calibrate": "never",
    "schedule": "direct",
    "token_route": "by_node",
    "reduce_wire": "bf16",
    "rehome_effort": 0.5,
    "rehome_every": 4,
}


def moved_config(name: str, value: Any, **options: Any) -> RuntimeConfig:
    """The configuration that this value of an option by its old name means."""
    _, section, new = MOVED[f"runtime.{name}"].split(".")
    kind: Any = {"debug": DebugConfig, "migration": MigrationConfig}[section]
    return RuntimeConfig(**options, **{section: kind(**{new: value})})
