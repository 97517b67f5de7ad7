"""The private names of torch that the runtime stands on, all of them here."""

import inspect
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from datetime import timedelta
from typing import Any
from weakref import finalize, ref

import torch
import torch.distributed as dist
import torch.utils._foreach_utils
from torch import Tensor, nn
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

outside_graphs = torch._disable_dynamo
"""Decorates what `torch.compile` leaves as it is. Unlike `torch.compiler.disable` it imports the compiler when called."""


def current_backward_node() -> torch.autograd.graph.Node | None:
    """The autograd node whose backward runs on this thread now, or None outside a backward pass."""
    return torch._C._current_autograd_node()


def current_backward_id() -> int:
    """The number of the backward pass that runs on this thread now; -1 outside of any."""
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
    """The identity of a recomputation among those of the checkpoint; None in its forward."""


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
    """The tensors of a module's output: of tuples, lists, dictionaries, and other classes registered with torch's pytree."""
    return [leaf for leaf in pytree.tree_leaves(output) if isinstance(leaf, torch.Tensor)]


def time_limit_s(group: dist.ProcessGroup, device_type: str) -> float:
    """The seconds that a collective of the group may take on this kind of device."""
    limit: timedelta = group._get_backend(torch.device(device_type)).options._timeout
    return limit.total_seconds()


def default_store() -> dist.Store:
    """The key-value store of the default process group's rendezvous."""
    store: dist.Store = dist.distributed_c10d._get_default_store()
    return store


def leave_out_of_ddp(model: nn.Module, names: Iterable[str]) -> None:
    """Have `DistributedDataParallel(model)` neither broadcast the parameters of these names nor average their gradients."""
    before = getattr(model, "_ddp_params_and_buffers_to_ignore", ())
    nn.parallel.DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(model, [*before, *names])


def when_a_module_is_added(callback: Callable[[nn.Module, nn.Module, nn.Module], None], *, lives_with: nn.Module) -> None:
    """Have `callback(lives_with, holder, child)` called whenever a module gets a child, as long as `lives_with` exists."""
    alive = ref(lives_with)

    def called(holder: nn.Module, name: str, child: nn.Module | None) -> None:
        model = alive()
        if model is not None and child is not None:
            callback(model, holder, child)

    handle = nn.modules.module.register_module_module_registration_hook(called)
    finalize(lives_with, handle.remove)


def sharded_modules(module: nn.Module) -> list[nn.Module]:
    """The modules whose parameters `fully_shard` on `module` has taken."""
    state = module._get_fsdp_state()  # type: ignore[operator]
    groups = getattr(state, "_fsdp_param_groups", None) or [getattr(state, "_fsdp_param_group", None)]
    return [param._module_info.module for group in groups if group is not None for param in group.fsdp_params]


def gradient_divide_factor(module: nn.Module) -> float | None:
    """What `FSDPModule.set_gradient_divide_factor` has set, or None; also of a module that manages no parameter."""
    state = module._get_fsdp_state()  # type: ignore[operator]
    groups = getattr(state, "_fsdp_param_groups", None) or [getattr(state, "_fsdp_param_group", None)]
    return next((group.gradient_divide_factor for group in groups if group is not None), None)


def allow_in_foreach(kind: type[Tensor]) -> None:
    """Have `torch.nn.utils.clip_grad_norm_` and its like take gradients of this class as it takes plain ones, in one call for
    all."""
    kinds: list[type[Tensor]] = torch.utils._foreach_utils._foreach_supported_types
    if kind not in kinds:
        kinds.append(kind)


def hooks_on(parameter: nn.Parameter) -> bool:
    """Whether the parameter has hooks on its gradient (`register_hook`)."""
    return bool(parameter._backward_hooks)


def post_accumulate_hooks(parameter: nn.Parameter) -> tuple[Callable[[Tensor], None], ...]:
    """The parameter's hooks that are called once its gradient was accumulated (`register_post_accumulate_grad_hook`)."""
    hooks = parameter._post_accumulate_grad_hooks
    return tuple(hooks.values()) if hooks else ()


@dataclass(frozen=True)
class FullStateDict:
    """What is asked for: every tensor whole."""

    on_rank_zero_only: bool
    """In memory of the CPU of rank 0; else on all ranks."""


def full_state_dict_requested() -> FullStateDict | None:
    """What `torch.distributed.checkpoint.state_dict` wants whole, where it is what calls `Module.state_dict` or an optimizer's.

    It gathers DTensors afterwards and takes plain tensors for whole; neither a module nor an optimizer is notified. Its options
    are in its frame.
    """
    frame = inspect.currentframe()
    while frame is not None:
        if frame.f_code.co_name in ("_get_model_state_dict", "_get_optim_state_dict") and "info" in frame.f_locals:
            info = frame.f_locals["info"]
            return FullStateDict(on_rank_zero_only=info.cpu_offload) if info.full_state_dict else None
        frame = frame.f_back
    return None


def plain_parts(tensor: Tensor) -> list[Tensor]:
    """The plain tensors that a tensor consists of, in place: itself, or what a subclass (quantized optimizer state) wraps."""
    if type(tensor) is Tensor or not is_traceable_wrapper_subclass(tensor):
        return [tensor.detach()]
    names, _ = tensor.__tensor_flatten__()
    return [part for name in names for part in plain_parts(getattr(tensor, name))]


def reshaped(tensor: Tensor, shape: torch.Size) -> Tensor:
    """A tensor without another user, in another shape; to autograd it is no view, which FSDP2 warns of at a module's output."""
    return torch.ops.aten._unsafe_view(tensor, shape)
