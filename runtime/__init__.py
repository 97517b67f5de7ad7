"""One training step, a file a stage, plus the wrapping of models and the state that lasts.

_compat.py          The private names of torch that the runtime stands on, all of them here.
naming.py           How other models name and lay out the weights of a MoE layer: in their modules, and in their checkpoints.
moved_options.py    Options that have new names, or are gone: their old names work for one release, with a warning.
dispatch/           Dispatch: the routes of tokens to the ranks that compute them, and the round trip along them.
renamed_members.py  Members of public classes that have new names: their old names work for one release, with a warning.
stages.py           The stages of a step: profiler ranges, and optional clocks for the break-down that benchmarks print.
group.py            The ranks that share experts: their transports, and the topology that the planner prices with.
config.py           What a user chooses about routing and about the runtime.
family.py           The module's old name: what it had works for one release, with a warning; see `naming`.
agreement.py        What the ranks are doing must be the same on all of them: whatever they gather says so, and every rank
                    compares.
experts/            Experts: the bank of those that this rank owns, copies of others, gradients, and migration between owners.
routing/            Routing: which experts each token goes to, with which weights, and how many tokens an expert takes.
step/               One forward of one layer and its backward.
sharded_experts.py  The experts of one MoE layer as a module: tokens and their routing in, weighted sums of expert outputs out, no
                    router.
layer.py            The Mixture-of-Experts layer.
state.py            State under logical names: an expert is named by its layer and number, not by rank and row.
adapters/           Adapters: MoE layers of other models.
wrap/               Wrapping a model: `shard_experts`, and the handle that it returns.
optim.py            Muon of sharded models: the momentum of a matrix made orthogonal; AdamW for what is no matrix of a hidden
                    layer.
"""

from ..collectives import CollectiveError
from .adapters import Adapter, register_adapter
from .config import DebugConfig, MigrationConfig, RouterConfig, RuntimeConfig
from .experts.expert import ExpertShape
from .layer import MoELayer
from .naming import ExpertNames, WeightNaming
from .routing.router import Router, Routing
from .sharded_experts import ShardedExperts
from .wrap.drift import DriftError
from .wrap.handle import Handle
from .wrap.shard import shard_experts

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
