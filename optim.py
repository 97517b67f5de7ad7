"""Optimizers that know what a sharded model's parameters are: `Muon`, and `muon_groups` of a handle for it."""

from .runtime.optim import Muon, muon_groups

__all__ = ["Muon", "muon_groups"]
