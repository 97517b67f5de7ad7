"""What a user chooses about routing and about the runtime. Frozen values that check themselves."""

import math
import typing
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from .moved_options import takes_moved_options

# The longest wait, eleven days: below every library's limit, some of which count milliseconds in 32 bits.
MAX_SECONDS = 1e6


def check_choices(config: Any, section: str) -> None:
    """Raise `ValueError` if a field of a dataclass whose annotation is a `Literal` holds anything else.

    Example: `runtime.debug.split is 'x'; choose 'exact' or 'local_even'`.
    """
    for name, hint in typing.get_type_hints(type(config)).items():
        value, choices = getattr(config, name), typing.get_args(hint)
        if typing.get_origin(hint) is Literal and value not in choices:
            *others, last = map(repr, choices)
            raise ValueError(f"{section}.{name} is {value!r}; choose {', '.join(others)} or {last}")


@dataclass(frozen=True, kw_only=True)
class RouterConfig:
    """How tokens choose experts."""

    score: Literal["softmax", "sigmoid"] = "softmax"
    """What a logit becomes: a softmax over all experts, or each expert's own sigmoid (DeepSeek-V3)."""
    normalize_weights: bool = True
    """Gate weights of a token's K experts sum to one (Mixtral); else they are the scores as they are (Switch)."""
    weight_scale: float = 1.0
    """Factor on the gate weights, after normalization (DeepSeek-V2's routed scaling factor)."""
    num_groups: int = 1
    """Groups of neighbouring experts, of which a token chooses some first (arXiv 2405.04434, section 2.2.2); 1 turns it off."""
    groups_per_token: int = 1
    """Groups that a token may choose experts from."""
    group_score: Literal["max", "top2"] = "max"
    """What a group is chosen by: its best score (DeepSeek-V2), or the sum of its two best (DeepSeek-V3)."""
    aux_loss_coef: float = 0.01
    """Weight of the load-balancing loss (Switch Transformer, arXiv 2101.03961, equation 4); 0 turns it off."""
    aux_loss_scope: Literal["micro_batch", "global_batch"] = "global_batch"
    """Whose expert frequencies the balancing loss uses: this rank's micro-batch, or the micro-batches of all ranks."""
    z_loss_coef: float = 0.0
    """Weight of the router z-loss (ST-MoE, arXiv 2202.08906, equation 5); 0 turns it off."""
    force_balance: bool = False
    """Ignore the scores and spread assignments evenly: the upper bound of a benchmark, never for training."""

    def __post_init__(self) -> None:
        check_choices(self, "router")
        for name in ("aux_loss_coef", "z_loss_coef"):
            if not 0 <= getattr(self, name) < math.inf:
                raise ValueError(f"router.{name} is {getattr(self, name)}; it must be 0 or more, and finite")
        if not 1 <= self.groups_per_token <= self.num_groups:
            raise ValueError(
                f"router.groups_per_token is {self.groups_per_token} of {self.num_groups} groups; it must be from 1 to num_groups"
            )
        if not 0 < self.weight_scale < math.inf:
            raise ValueError(f"router.weight_scale is {self.weight_scale}; it must be more than 0, and finite")


@dataclass(frozen=True, kw_only=True)
class MigrationConfig:
    """When experts migrate: change their owner while training runs."""

    every: int = 0
    """Steps between proposals of new owners, solved in the background from the loads observed; experts migrate with their
    optimizer state if that pays until the next one. 0: owners stay. Give `handle.step` the optimizer."""
    solver: Literal["auto", "milp", "joint"] = "auto"
    """What proposes: "joint", an annealing of each layer's owners; "milp", after it the exact planner, a mixed-integer program,
    layer by layer, which also bounds what any owners could reach; "auto": as "milp", but without the layers that are within 1 %
    of their bound already. The best of all that they find is proposed; if the exact planner fails, what there is without it."""
    time_limit_s: float = 0.0
    """Seconds for a proposal, in one thread at low priority. Joint ends by itself, the exact planner has what is left. 0: 0.4 of
    the seconds that the steps between proposals take, so that the answer is there when it is first looked for."""

    def __post_init__(self) -> None:
        check_choices(self, "runtime.migration")
        if self.every < 0:
            raise ValueError(f"runtime.migration.every is {self.every}; it must be 0 (never) or a number of steps")
        if not 0 <= self.time_limit_s < math.inf:
            raise ValueError(
                f"runtime.migration.time_limit_s is {self.time_limit_s}; it must be 0 (by the interval) or more, and finite"
            )


@takes_moved_options("runtime.debug")
@dataclass(frozen=True, kw_only=True)
class DebugConfig:
    """What only comparisons, benchmarks and bug hunts set: the defaults are right for training."""

    split: Literal["exact", "local_even"] = "exact"
    """How tokens are split over copies: the exact min-max split, or Hecate's rule (local first, then even)."""
    predictor: Literal["best", "last", "window", "ema"] = "best"
    """How the next load is predicted from the past; 'best' uses whichever had the smallest recent error."""
    overlap_s: float | Literal["auto"] = "auto"
    """Seconds of other work ahead of each MoE layer, under which its gather hides: copies that hide cost nothing to the planner,
    and "hecate" copies only as many experts as hide. "auto": measured in the first forwards, and 0 until then, or where
    nothing travels beside work, as in shared memory. Runs whose clocks differ may then place other copies; a number repeats."""
    overlap: bool = True
    """Copies and their gradients travel under other work, and routed tokens under shared experts; False waits for all of them
    right after their launch, to compare or debug."""
    calibrate: Literal["auto", "always", "never"] = "auto"
    """Whether copies are added when the exact load is known, if they save more than their gather costs on the critical path;
    "auto": in the first forwards, and while predictions are off by more than a tenth of the assignments on average."""
    schedule: Literal["auto", "direct", "relay", "hierarchical", "element_sharded"] = "auto"
    """How copies travel: the schedule that is predicted to be fastest, or always this one."""
    token_route: Literal["auto", "direct", "by_node"] = "auto"
    """How routed tokens travel: straight to every rank that computes them, or once to each node and on inside it; "auto" goes by
    node where the topology has several nodes of several ranks."""
    reduce_wire: Literal["as_is", "bf16"] = "as_is"
    """How gradients of copies travel: in their own dtype, or rounded to bf16 and straight to the owner; summed in fp32 anyway."""
    migration_effort: float = 1.0
    """How long joint searches for owners to migrate experts to, relative to its default."""

    def __post_init__(self) -> None:
        check_choices(self, "runtime.debug")
        if not 0 < self.migration_effort < math.inf:
            raise ValueError(f"runtime.debug.migration_effort is {self.migration_effort}; it must be more than 0, and finite")
        if self.overlap_s != "auto" and not (isinstance(self.overlap_s, int | float) and 0 <= self.overlap_s < math.inf):
            raise ValueError(f"runtime.debug.overlap_s is {self.overlap_s}; it must be 0 or more seconds, and finite, or 'auto'")
        if self.reduce_wire == "bf16" and self.schedule not in ("auto", "direct"):
            raise ValueError(
                f"runtime.debug.schedule {self.schedule!r} forwards sums, which bf16 would round at every rank; "
                "set runtime.debug.reduce_wire='as_is', or runtime.debug.schedule='auto' or 'direct'"
            )


@takes_moved_options("runtime")
@dataclass(frozen=True, kw_only=True)
class RuntimeConfig:
    """How experts are placed and migrate."""

    policy: str = "quota"
    """Solver that places the copies: 'static' (none), 'hecate', 'quota' (fewest seconds), 'balance' (fewest routed tokens on
    the busiest rank, also where the forecast is wrong), 'auto' (of these two, for each layer, the one whose steps take fewer
    predicted seconds, planning included), or another name of `placement.SOLVERS`."""
    slots: int | Literal["auto"] = 2
    """Copies of other ranks' experts that a rank may hold per MoE layer; "auto": as many as fit into `slot_bytes`, up to 4."""
    materialize: Literal["keep", "rematerialize", "auto"] = "keep"
    """Copies stay until backward, or are released after forward and gathered again, so that layers share slots; the last layer's
    stay in any case, as its backward comes at once. "auto" keeps those of as many last layers as fit into `slot_bytes`."""
    slot_bytes: int = 0
    """The most bytes that copies, their gradients and staging may take on a rank, for one forward in flight; 0: no limit."""
    shard_dense: bool = True
    """Shard everything but the experts with FSDP2 `fully_shard`; False leaves the rest of the model to you."""
    compute_dtype: Literal["as_is", "bf16"] = "as_is"
    """What experts and the dense rest compute in, and what copies, routed tokens and FSDP2's gathers travel in: the parameters'
    own dtype, or bf16 cast from them. Master weights, gradients, their reductions and optimizer state keep the parameters' dtype;
    of FSDP2 it is MixedPrecisionPolicy(param_dtype=bfloat16, reduce_dtype=float32). Router logits are fp32."""
    check_replicas_every: int = 100
    """Steps between checks that ranks hold the same dense weights, buffers, experts of replicas and optimizer's numbers; one
    after the first step besides. A difference of one bit ends the step with an error on every rank. 0: none."""
    check_replicas_except: Sequence[str] = ()
    """Parameters and buffers that differ by rank on purpose and are not checked: names, or patterns such as "*.running_mean"."""
    transport: Literal["auto", "c10d", "shm", "mpi", "hierarchical"] = "auto"
    """How bytes travel between ranks; `moesaic doctor` says what "auto" chooses here, and why."""
    timeout_s: float = 300.0
    """Seconds after which a wait for other ranks fails."""
    migration: MigrationConfig = MigrationConfig()
    """When experts migrate."""
    debug: DebugConfig = DebugConfig()
    """What only comparisons, benchmarks and bug hunts set."""

    def __post_init__(self) -> None:
        check_choices(self, "runtime")
        for name, kind in (("migration", MigrationConfig), ("debug", DebugConfig)):
            if not isinstance(getattr(self, name), kind):
                raise ValueError(f"runtime.{name} is {getattr(self, name)!r}; give a {kind.__name__}")
        if self.slots != "auto" and not (isinstance(self.slots, int) and self.slots >= 0):
            raise ValueError(f"runtime.slots is {self.slots!r}; it must be 0 (no copies) or more, or 'auto'")
        if self.slot_bytes < 0:
            raise ValueError(f"runtime.slot_bytes is {self.slot_bytes}; it must be 0 (no limit) or a number of bytes")
        for name in ("slots", "materialize"):
            if getattr(self, name) == "auto" and not self.slot_bytes:
                raise ValueError(f"runtime.{name} is 'auto', but runtime.slot_bytes is 0; state the bytes that slots may take")
        if self.check_replicas_every < 0:
            raise ValueError(
                f"runtime.check_replicas_every is {self.check_replicas_every}; it must be 0 (never) or a number of steps"
            )
        if isinstance(self.check_replicas_except, str):
            raise ValueError(
                f"runtime.check_replicas_except is {self.check_replicas_except!r}; give a list: [{self.check_replicas_except!r}]"
            )
        object.__setattr__(self, "check_replicas_except", tuple(self.check_replicas_except))
        if not 0 < self.timeout_s <= MAX_SECONDS:
            raise ValueError(f"runtime.timeout_s is {self.timeout_s}; it must be more than 0, at most {MAX_SECONDS:.0f} seconds")
