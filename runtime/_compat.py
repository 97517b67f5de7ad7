"""The private names of torch that the runtime stands on, all of them here."""

import inspect
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.utils import _pytree as pytree

outside_graphs = torch._disable_dynamo
"""Decorates what `torch.compile` leaves as it is. Unlike `torch.compiler.disable` it imports the compiler when called."""


def current_backward_node() -> torch.autograd.graph.Node | None:
    """The autograd node whose backward runs on this thread now, or None outside a backward pass."""
    return torch._C._current_autograd_node()


def current_backward_id() -> int:
    """A number that tells the backward pass that runs on this thread now from others; -1 outside of any."""
    return torch._C._current_graph_task_id()


def will_run(node: torch.autograd.graph.Node) -> bool:
    """Whether the backward pass that runs on this thread now reaches `node`, and is to run it."""
    return torch._C._will_engine_execute_node(node)


def keeps_graph() -> bool:
    """Whether the backward pass that runs on this thread now leaves its graph to another one."""
    return torch._C._autograd._get_current_graph_task_keep_graph()


def version_of(tensor: torch.Tensor) -> int:
    """How often the tensor was written to in place, but for writes through `.data` and by fused optimizers."""
    return tensor._version


def call_after_backward(callback: Callable[[], None]) -> None:
    """Have `callback` called when the backward pass that runs on this thread now is complete."""
    torch.autograd.Variable._execution_engine.queue_callback(callback)


@dataclass(frozen=True)
class RunningCheckpoint:
    """An activation checkpoint (of the kind that is not reentrant) whose function runs on this thread now."""

    frame: Any
    """One object from the checkpoint's forward to its last recomputation; it lives as long as the graph may ask for one."""
    recomputation: Any
    """What tells a recomputation from others of the checkpoint; None in its forward."""


def running_checkpoints() -> list[RunningCheckpoint]:
    """The activation checkpoints that this code runs under, innermost first.

    Each has hooks on the stack of hooks for saved tensors while its function runs, among those of others. They hold its frame.
    """
    hooks = []
    while (pair := torch._C._autograd._top_saved_tensors_default_hooks(True)) is not None:
        torch._C._autograd._pop_saved_tensors_default_hooks()
        hooks.append(pair)
    for pair in reversed(hooks):
        torch._C._autograd._push_saved_tensors_default_hooks(*pair)
    running = []
    for pack, _ in hooks:
        owner = getattr(pack, "__qualname__", "").partition(".")[0]
        if owner in ("_checkpoint_hook", "_recomputation_hook"):
            pack = inspect.unwrap(pack)
            held = dict(zip(pack.__code__.co_freevars, (cell.cell_contents for cell in pack.__closure__), strict=True))
            frame = held["frame"] if owner == "_checkpoint_hook" else held["target_frame_ref"]()
            running.append(RunningCheckpoint(frame, held.get("gid")))
    return running


def tensors_in(output: Any) -> list[torch.Tensor]:
    """The tensors of a module's output: of tuples, lists, dictionaries, and other classes that torch knows how to take apart."""
    return [leaf for leaf in pytree.tree_leaves(output) if isinstance(leaf, torch.Tensor)]


def time_limit_s(group: dist.ProcessGroup, device_type: str) -> float:
    """The seconds that a collective of the group may take on this kind of device."""
    limit: timedelta = group._get_backend(torch.device(device_type)).options._timeout
    return limit.total_seconds()


def default_store() -> dist.Store:
    """The key-value store over which the default process group met."""
    store: dist.Store = dist.distributed_c10d._get_default_store()
    return store


def leave_out_of_ddp(model: nn.Module, parameters: Iterable[nn.Parameter]) -> None:
    """Have `DistributedDataParallel(model)` neither broadcast these parameters of the model nor average their gradients."""
    ids = {id(parameter) for parameter in parameters}
    names = [name for name, parameter in model.named_parameters() if id(parameter) in ids]
    before = getattr(model, "_ddp_params_and_buffers_to_ignore", ())
    nn.parallel.DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(model, [*before, *names])
