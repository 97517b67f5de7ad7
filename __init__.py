"""moesaic: load-adaptive Mixture-of-Experts training: fully sharded, sparsely materialized experts."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from . import jit as jit  # first of all: it notes when the package was imported

__path__.append(str(Path(__file__).parent / "integrations"))  # moesaic.transformers

__version__ = "0.1.0"

if TYPE_CHECKING:
    from .runtime import (
        Adapter,
        CollectiveError,
        DebugConfig,
        DriftError,
        ExpertNames,
        ExpertShape,
        Handle,
        MigrationConfig,
        MoELayer,
        Router,
        RouterConfig,
        Routing,
        RuntimeConfig,
        ShardedExperts,
        WeightNaming,
        register_adapter,
        shard_experts,
    )

__all__ = [
    "Adapter",
    "CollectiveError",
    "DebugConfig",
    "DriftError",
    "ExpertNames",
    "ExpertShape",
    "Handle",
    "MigrationConfig",
    "MoELayer",
    "Router",
    "RouterConfig",
    "Routing",
    "RuntimeConfig",
    "ShardedExperts",
    "WeightNaming",
    "register_adapter",
    "shard_experts",
]


def __getattr__(name: str) -> Any:
    """Import the runtime, and torch with it, when one of its names is asked for: offline placement needs neither."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from . import runtime

    return getattr(runtime, name)


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
