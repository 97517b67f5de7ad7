"""One training step, a file a stage, plus the wrapping of models and the state that lasts.

layer.py          the forward: the pipeline, one line a stage
router.py         which experts, with which weights; balancing and z-loss
capacity.py       how much experts take, and what is dropped
planning.py       predicted load -> placement, exact load -> split
bank.py           every expert once: weights and gradients of the experts this rank owns
materialize.py    copies in, their gradients home
dispatch.py       where rows go: to their experts and back
dispatch_handle.py  how rows travel, in one part or in two
dispatch_by_node.py  the same over nodes of several ranks: each row crosses to a node once
token_rows.py     dispatch and combine as autograd sees them, and the work under which rows travel
experts.py        the local experts' SwiGLU
carried.py        copies that micro-batches share
layer_pass.py     one forward and its backward; replay under activation checkpointing
layer_runtime.py  what one layer has of all this
overlap.py        when gathers are launched
group.py          the ranks, their transports, their machine
family.py         how a family of models names what a layer holds
sharded_experts.py  the experts of one layer as a module; an expert is a child with ordinary parameters
expert.py         one expert: shape, tensors, module
expert_grad.py    gradients of experts, and norms of them over all ranks
slots.py          expert-sized buffers that layers share
dense.py          FSDP2 on the dense rest
adapters/         MoE blocks of other models, and their checkpoints
shard.py          shard_experts
handle.py         what the user's loop calls
optimizer_numbers.py  an optimizer's numbers, parameter by parameter
agreement.py      what ranks are doing, compared with every gather
forwards.py       where forwards and backwards begin, ranks meet
drift.py          what ranks must hold alike, compared every so many steps
fingerprint.py    64 bits that stand for a tensor
state.py          state under logical names
metrics.py        balance, copies, bytes
stages.py         profiler ranges and stage clocks
config.py         what a user chooses
moved_options.py  old names of options, for one release
"""

from .adapters import Adapter, register_adapter
from .config import DebugConfig, RouterConfig, RuntimeConfig
from .handle import Handle
from .layer import MoELayer
from .router import Router, Routing
from .shard import shard_experts
from .sharded_experts import ShardedExperts

__all__ = [
    "Adapter",
    "DebugConfig",
    "Handle",
    "MoELayer",
    "Router",
    "RouterConfig",
    "Routing",
    "RuntimeConfig",
    "ShardedExperts",
    "register_adapter",
    "shard_experts",
]
