"""Runtime configurations for tests that vary options wherever they stand."""

from collections.abc import Mapping
from dataclasses import fields
from typing import Any

from moesaic import DebugConfig, RuntimeConfig


def runtime_config(**options: Any) -> RuntimeConfig:
    """Options of `RuntimeConfig` and of its `debug` side by side."""
    debug = {field.name: options.pop(field.name) for field in fields(DebugConfig) if field.name in options}
    return RuntimeConfig(**options, debug=DebugConfig(**debug))


# Every option that moved to `RuntimeConfig.debug`, with a value that is not its default.
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
}
