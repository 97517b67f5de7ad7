"""Optimizers of a bank's experts: their steps change the weights, and what they cannot do with experts is refused.

Fused optimizers write without raising a tensor's version, so steps are noted by hooks on all optimizers.
"""

from __future__ import annotations

import threading
from collections.abc import Iterable, Iterator
from functools import cache
from typing import Any, Protocol
from weakref import WeakSet, ref

from torch import nn
from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

from .._compat import full_state_dict_requested


class OptimizedExperts(Protocol):
    """What is watched: a bank."""

    def parameters(self) -> Iterator[nn.Parameter]:
        """The parameters of the experts."""

    def weights_changed(self) -> None:
        """Called after a step."""


class OptimizerWatch:
    """Notes the steps of the optimizers that hold a bank's parameters, for as long as the bank keeps the watch.

    Args:
        bank: whose `weights_changed` is called after each step.
        is_shared: whether ranks share the experts, so that the state of an optimizer has parts on other ranks.
    """

    def __init__(self, bank: OptimizedExperts, *, is_shared: bool):
        self._bank = ref(bank)
        self._is_shared = is_shared
        self._hooked: WeakSet[Optimizer] = WeakSet()  # optimizers whose state dicts are checked
        self._retired: dict[int, ref[nn.Parameter]] = {}  # by id: parameters that these experts had before
        _hook_all_optimizers()
        with _LOCK:
            _WATCHES.add(self)

    def retire(self, parameters: Iterable[nn.Parameter]) -> None:
        """Note parameters that the experts had before: an optimizer that still holds one would train nothing, and is refused."""
        self._retired |= {id(parameter): ref(parameter) for parameter in parameters}

    def _holds(self, optimizer: Optimizer) -> bool:
        """Whether it steps the experts' weights. Where none is owned, their parameter group is empty."""
        bank = self._bank()
        mine = set() if bank is None else {id(parameter) for parameter in bank.parameters()}
        if not mine:
            return any(not group["params"] for group in optimizer.param_groups)
        return any(id(p) in mine for group in optimizer.param_groups for p in group["params"])

    def _note(self, optimizer: Optimizer) -> None:
        """After a step. An optimizer of other weights may step on this rank alone, and at any time."""
        bank = self._bank()
        if bank is not None and self._holds(optimizer):
            bank.weights_changed()

    def _check(self, optimizer: Optimizer) -> None:
        """Before a step: refuse an optimizer of parameters that the experts do not have any more."""
        if self._is_shared and optimizer not in self._hooked and self._holds(optimizer):
            self._hooked.add(optimizer)
            optimizer.register_state_dict_pre_hook(_refuse_full_state)
            optimizer.register_load_state_dict_pre_hook(_refuse_groups_of_one_rank)
        self._retired = {key: of for key, of in self._retired.items() if of() is not None}
        if self._retired and any(id(p) in self._retired for group in optimizer.param_groups for p in group["params"]):
            raise RuntimeError(
                f"{type(optimizer).__name__} was built before shard_experts and holds parameters that experts do not "
                "have any more; build it afterwards, from handle.parameter_groups()"
            )


_WATCHES: WeakSet[OptimizerWatch] = WeakSet()
_LOCK = threading.Lock()


def _watches() -> list[OptimizerWatch]:
    with _LOCK:
        return list(_WATCHES)


@cache
def _hook_all_optimizers() -> None:
    """Register the hooks, once and for good: torch goes through its hooks without a lock, and a bank may end during a step."""

    def before(optimizer: Optimizer, *_: Any) -> None:
        for watch in _watches():
            watch._check(optimizer)

    def after(optimizer: Optimizer, *_: Any) -> None:
        for watch in _watches():
            watch._note(optimizer)

    register_optimizer_step_pre_hook(before)
    register_optimizer_step_post_hook(after)


def _refuse_full_state(optimizer: Optimizer) -> None:
    """Refuse the whole state on one rank: torch gathers that of DTensors only, and experts' would be one rank's for all."""
    if full_state_dict_requested() is not None:
        raise RuntimeError(
            f"the state of {type(optimizer).__name__} is asked for with full_state_dict=True, but torch would leave out that of "
            "other ranks' experts; leave full_state_dict out, and save the sharded state with torch.distributed.checkpoint"
        )


def _refuse_groups_of_one_rank(optimizer: Optimizer, state: dict[str, Any]) -> None:
    """Refuse parameter groups without settings: torch's checkpoints keep one rank's groups, with the names of its experts."""
    for group, saved in zip(optimizer.param_groups, state["param_groups"], strict=False):
        lacking = sorted(set(group) - {"params", "param_names"})
        # One that lacks some is of an optimizer with fewer settings, as another version of torch has; torch keeps the defaults.
        if lacking and not set(saved) - {"params", "param_names"}:
            raise RuntimeError(
                f"the state has no {lacking[0]!r} for a parameter group of {type(optimizer).__name__} that holds experts: torch "
                "saves the groups of one rank; get and set the state with StateDictOptions(flatten_optimizer_state_dict=True)"
            )
