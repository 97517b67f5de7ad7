"""moesaic: load-adaptive Mixture-of-Experts training: fully sharded, sparsely materialized experts."""

from .runtime import (
    Adapter,
    Handle,
    MoELayer,
    Router,
    RouterConfig,
    Routing,
    RuntimeConfig,
    register_adapter,
    shard_experts,
)

__all__ = [
    "Adapter",
    "Handle",
    "MoELayer",
    "Router",
    "RouterConfig",
    "Routing",
    "RuntimeConfig",
    "register_adapter",
    "shard_experts",
]
